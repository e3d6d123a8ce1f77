"""CorelPipeline: generate images from class labels. This file is self-contained and is saved beside the weights.

pipe = DiffusionPipeline.from_pretrained("diffusion_models", trust_remote_code=True)
pipe(num_images=4, class_labels="sunset").images[0].save("sunset.png")
"""

import inspect
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar, Optional

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class CorelPipeline(DiffusionPipeline):
    """Latent diffusion with class labels: a UNet2DModel denoises latents, and an AutoencoderKL decodes them.

    Args:
        class_names: {"0": name, ...}, the class of each label of the UNet. None for an unconditional model. The label
            after the last class is the null label. This is a dict with string keys, because a list of strings in
            model_index.json breaks loading from the Hub.
        class_numbers: {"0": number, ...}, the number that each class has in the data. `corel-diffusers generate
            --class` accepts these numbers.
        image_sizes: {"<height>x<width>": number of training photos, ...} in pixels, if the model was trained on several
            image sizes. Otherwise None.
        guide: the guide model for autoguidance (Karras et al. 2024, arXiv:2406.02507). It is the same UNet after a
            small part of its training, and guidance leads away from its prediction. Without a guide model (set
            `pipe.guide = None` to remove it), guidance leads away from the UNet's prediction for the null label.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components: ClassVar = ["guide"]
    _exclude_from_cpu_offload: ClassVar = ["guide"]  # moving it to the CPU and back in each step would be slow

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        # Optional, because diffusers 0.36 reads the types of these parameters and does not know "X | None"
        class_names: Optional[dict[str, str]] = None,  # noqa: UP045
        guide: Optional[UNet2DModel] = None,  # noqa: UP045
        class_numbers: Optional[dict[str, int]] = None,  # noqa: UP045
        image_sizes: Optional[dict[str, int]] = None,  # noqa: UP045
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler, guide=guide)
        if not all(isinstance(name, str) for name in (class_names or {}).values()):
            raise ValueError("class_names must give each label a name, as in {'0': 'beach', '1': 'sunset'}")
        class_names, class_numbers = (  # in the order of the labels: a config file sorts its keys as text
            values and dict(sorted(values.items(), key=lambda item: int(item[0])))
            for values in (class_names, class_numbers)
        )
        # as in training, the most frequent size first: see above
        image_sizes = image_sizes and dict(sorted(image_sizes.items(), key=lambda item: (-item[1], item[0])))
        self.register_to_config(class_names=class_names, class_numbers=class_numbers, image_sizes=image_sizes)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        first: int | str | list[str] | None = None,
        class_labels: str | int | list[str | int] | None = None,
        guidance_scale: float = 2.5,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["CorelPipeline", int, torch.Tensor, dict], dict] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images: int | None = None,
        batch_size: int | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            first: what is given without a name: the number of images, as in pipe(4), or the classes, as in
                pipe("sunset") and pipe("sunset", num_images=4).
            class_labels: one class for all images or one class per image, each a name or a label (its position in
                class_names, from 0). A number that is the name of a class means this class. None means no class:
                the null label.
            guidance_scale: w in e = e_weak + w (e_unet - e_weak). e_weak is the prediction of the guide model. Without
                a guide model, it is the UNet's prediction for the null label (Ho & Salimans 2022, arXiv:2207.12598).
                1 turns guidance off.
            num_inference_steps: number of denoising steps. None means `default_steps`.
            eta: amount of fresh noise in each step of DDIM, from 0 (none) to 1 (as much as DDPM).
            generator: random generator for the noise. The same seed gives the same images.
            latents: initial noise with unit variance, (num_images, C, h, w).
            output_type: "pil"; "np", (N, H, W, 3) in [0, 1]; "pt", (N, 3, H, W) in [0, 1]; or "latent", scaled latents.
                A model of grey photos gives grey images, with one channel instead of three.
            return_dict: return an ImagePipelineOutput instead of a tuple.
            callback_on_step_end: called as callback(pipe, step, timestep, {"latents": ...}). It may return a dict with
                new latents.
            guidance_interval: the noise levels at which guidance acts, as fractions from 0 (clean) to 1 (pure noise)
                (Kynkäänniemi et al. 2024, arXiv:2404.07724). At other levels only the UNet's prediction is used, which
                takes half the time. None means `default_guidance_interval`.
            height, width: size of the images in pixels. None means the size of `default_size`. The model draws well in
                the sizes that it was trained on: see `image_sizes`.
            num_images: number of images. None means one image, or one per class of a list `class_labels`.
            batch_size: the name that num_images has in the pipelines of diffusers.
            callback_on_step_end_tensor_inputs: the tensors that callback_on_step_end gets, as in other pipelines. Here
                there is only "latents".

        Raises:
            ValueError: an unknown class, output_type or tensor for the callback, a number of steps or a size that the
                model cannot take, or class_labels, generator or latents that do not fit num_images.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}: give 'pil', 'np', 'pt' or 'latent'")
        if not set(callback_on_step_end_tensor_inputs) <= {"latents"}:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={callback_on_step_end_tensor_inputs!r}: give ['latents']"
            )
        num_images, class_labels = self.count_images(
            first, class_labels, batch_size if num_images is None else num_images
        )
        labels = self.label_ids(num_images, class_labels)
        num_inference_steps = self.default_steps if num_inference_steps is None else num_inference_steps
        most = self.scheduler.config.num_train_timesteps
        if not 1 <= num_inference_steps <= most:
            raise ValueError(f"num_inference_steps={num_inference_steps}: give a number from 1 to {most}")
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        latents = self.initial_latents(num_images, generator, latents, self.checked_size(height, width))
        self.warn_about_timesteps(num_inference_steps)
        interval = guidance_interval or self.default_guidance_interval
        options = {"eta": eta, "generator": generator}
        latents = self.denoise(latents, labels, guidance_scale, interval, options, callback_on_step_end)
        images = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def count_images(
        self, first: object, class_labels: object, num_images: object
    ) -> tuple[int, str | int | list[str | int] | None]:
        """Return the number of images and their classes, from the ways in which people give them.

        Raises:
            ValueError: the number is not a whole number above 0, or something is given twice.
        """
        if isinstance(first, (str, list, tuple)):
            if num_images is None and isinstance(class_labels, int):  # pipe("sunset", 4)
                class_labels, num_images = None, class_labels
            if class_labels is not None:
                raise ValueError(f"{first!r} and class_labels={class_labels!r}: give the classes once")
            class_labels = first
        elif first is not None:
            if num_images is not None:
                raise ValueError(f"{first!r} and num_images={num_images!r}: give the number of images once")
            num_images = first
        if num_images is None:
            is_list = isinstance(class_labels, (list, tuple)) or getattr(class_labels, "ndim", 0)  # array or tensor
            num_images = len(class_labels) if is_list else 1
        if not isinstance(num_images, int) or num_images < 1:
            raise ValueError(
                f"num_images={num_images!r}: give the number of images, 1 or more, and the class as class_labels"
            )
        return num_images, class_labels

    def initial_latents(
        self,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        size_px: tuple[int, int],
    ) -> torch.Tensor:
        """Return the noise that denoising begins with, multiplied by the scheduler's init_noise_sigma: (N, C, h, w).

        Raises:
            ValueError: the generators or the given latents do not fit num_images.
        """
        if isinstance(generator, list) and len(generator) not in (1, num_images):
            raise ValueError(f"{len(generator)} generators for num_images={num_images}: give one, or one per image")
        device, dtype, factor = self._execution_device, self.unet.dtype, self.vae_scale_factor
        shape = (num_images, self.unet.config.in_channels, size_px[0] // factor, size_px[1] // factor)
        if latents is None:
            # in float32: some versions of torch draw other numbers in half precision
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {shape}")
        return latents.to(device=device, dtype=dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    @property
    def vae_scale_factor(self) -> int:
        """The number of pixels per latent position in each direction."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def default_size(self) -> tuple[int, int]:
        """The (height, width) in pixels of the images that the model draws by default."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def checked_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the size of the images in pixels. Warn if the model was not trained on it.

        Raises:
            ValueError: the stages of the VAE and of the UNet cannot halve this size.
        """
        default_height, default_width = self.default_size
        size_px = height or default_height, width or default_width
        multiple = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if any(side < multiple or side % multiple for side in size_px):
            raise ValueError(f"height={size_px[0]}, width={size_px[1]}: give multiples of {multiple}")
        trained = list(self.config.image_sizes or [f"{default_height}x{default_width}"])
        if size_px != self.default_size and f"{size_px[0]}x{size_px[1]}" not in trained:
            warnings.warn(
                f"the model was trained on images of {', '.join(trained)} pixels (height x width): images of "
                f"{size_px[0]}x{size_px[1]} will be worse",
                stacklevel=3,
            )
        return size_px

    def warn_about_timesteps(self, num_inference_steps: int) -> None:
        """Warn if the scheduler of diffusers leaves noise in the images with this number of steps."""
        trained_steps = self.scheduler.config.num_train_timesteps
        if type(self.scheduler) is DDIMScheduler and trained_steps % num_inference_steps:
            divisors = [steps for steps in range(1, trained_steps + 1) if trained_steps % steps == 0]
            nearest = min(divisors, key=lambda steps: abs(steps - num_inference_steps))
            warnings.warn(
                f"DDIMScheduler leaves noise in the images if num_inference_steps does not divide {trained_steps}: "
                f"use {nearest}",
                stacklevel=3,
            )
        if (self.scheduler.timesteps < 0).any():
            warnings.warn(
                f"{type(self.scheduler).__name__} uses a timestep below 0 at {num_inference_steps} steps, which brings "
                "the noise back: use another number of steps",
                stacklevel=3,
            )

    def denoise(
        self,
        latents: torch.Tensor,
        labels: torch.Tensor | None,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        options: dict[str, object],
        callback_on_step_end: Callable[["CorelPipeline", int, torch.Tensor, dict], dict] | None,
    ) -> torch.Tensor:
        """Denoise latents (N, C, h, w) in the timesteps of the scheduler.

        Args:
            options: arguments for the steps of the scheduler. A scheduler gets only those that it accepts.
        """
        has_class = labels is not None and bool((labels != self.null_label).any())
        guided = guidance_scale != 1 and (self.guide is not None or has_class)
        low, high = guidance_interval
        guide_at_all_levels = low <= 0 and high >= 1
        # schedulers of flow matching have no such method: their inputs are not scaled
        scale_model_input = getattr(self.scheduler, "scale_model_input", lambda latents, timestep: latents)
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {name: value for name, value in options.items() if name in accepted}
        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                inputs = scale_model_input(latents, timestep)
                if guided and (
                    guide_at_all_levels or low <= float(timestep) / self.scheduler.config.num_train_timesteps <= high
                ):
                    model_pred = self.guided_prediction(inputs, timestep, labels, guidance_scale)
                else:
                    model_pred = self.unet(inputs, timestep, labels).sample.to(latents.dtype)
                with torch.autocast(latents.device.type, enabled=False):  # only the networks run in half precision
                    latents = self.scheduler.step(model_pred, timestep, latents, **options).prev_sample
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, step, timestep, {"latents": latents}) or {}
                    latents = changed.get("latents", latents)
                progress.update()
        if not latents.isfinite().all():
            warnings.warn(
                "the images contain NaN or infinite values: half precision is not accurate enough: "
                "use another precision",
                stacklevel=3,
            )
        return latents

    def guided_prediction(
        self, inputs: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None, guidance_scale: float
    ) -> torch.Tensor:
        """Return the UNet's prediction, led away from the weak prediction: (N, C, h, w), see `guidance_scale` above."""
        if self.guide is not None:
            weak_pred, model_pred = (model(inputs, timestep, labels).sample for model in (self.guide, self.unet))
        else:  # both in one forward pass
            both_labels = torch.cat([torch.full_like(labels, self.null_label), labels])
            weak_pred, model_pred = self.unet(torch.cat([inputs, inputs]), timestep, both_labels).sample.chunk(2)
        weak_pred, model_pred = weak_pred.to(inputs.dtype), model_pred.to(inputs.dtype)
        return weak_pred + guidance_scale * (model_pred - weak_pred)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str) -> list | torch.Tensor:
        """Decode scaled latents (N, C, h, w) to images of `output_type`.

        The scale is in the VAE's config: scaling_factor, and either latents_mean and latents_std or shift_factor.
        """
        config = self.vae.config
        latents = latents / config.scaling_factor
        if config.latents_mean is None:
            latents = latents + (config.shift_factor or 0.0)
        else:
            mean, std = (
                torch.tensor(v).view(1, -1, 1, 1).to(latents) for v in (config.latents_mean, config.latents_std)
            )
            latents = latents * std + mean
        if config.force_upcast and self.vae.dtype == torch.float16:  # this VAE overflows in float16
            self.vae.to(torch.float32)
        with torch.autocast(latents.device.type, enabled=False) if config.force_upcast else nullcontext():
            images = torch.cat([self.vae.decode(part.to(self.vae.dtype)).sample.float() for part in latents.split(16)])
        return self.image_processor.postprocess(images, output_type=output_type)

    @property
    def default_steps(self) -> int:
        """The number of denoising steps by default: 15 for DPM-Solver++ and UniPC, 50 for other schedulers."""
        return 15 if isinstance(self.scheduler, (DPMSolverMultistepScheduler, UniPCMultistepScheduler)) else 50

    @property
    def default_guidance_interval(self) -> tuple[float, float]:
        """The noise levels at which guidance acts by default: up to 0.6 with a guide model, all levels without one.

        At high noise, the layout of an image forms. Guidance with a guide model would there push the samples towards
        the layout of one photo.
        """
        return (0.0, 0.6) if self.guide is not None else (0.0, 1.0)

    @property
    def null_label(self) -> int:
        """The label that means "no class"."""
        return len(self.config.class_names)

    def label_ids(self, num_images: int, class_labels: str | int | list[str | int] | None) -> torch.Tensor | None:
        """Convert class names or ids to labels: int64 (num_images,), or None for an unconditional model.

        Raises:
            ValueError: an unknown class (the message lists the classes), the wrong number of classes, or a class for an
                unconditional model.
        """
        if not self.config.class_names:
            if class_labels is not None:
                raise ValueError("this model has no classes: omit class_labels")
            return None
        ids = {name: int(number) for number, name in self.config.class_names.items()}
        if hasattr(class_labels, "tolist"):  # an array or a tensor
            class_labels = class_labels.tolist()
        labels = class_labels if isinstance(class_labels, (list, tuple)) else [class_labels] * num_images
        labels = [label.item() if hasattr(label, "item") else label for label in labels]
        if len(labels) != num_images:
            raise ValueError(f"{len(labels)} class_labels for num_images={num_images}: give one, or one per image")
        # a number can be a name: with the folders 1, 2, 3, the number 2 means folder 2, whose label is 1
        found = [None if label is None else ids.get(str(label), label) for label in labels]
        for label in found:
            if label is not None and (type(label) is not int or not 0 <= label < self.null_label):
                raise ValueError(
                    f"class {label!r} is unknown: the classes are {', '.join(f'{i} {name}' for name, i in ids.items())}"
                    ", and None for no class"
                )
        found = [self.null_label if label is None else label for label in found]
        return torch.tensor(found, device=self._execution_device)

    def save_config(self, save_directory: str, *args, **kwargs) -> None:
        """Save the config, and save this file beside it under the name that model_index.json refers to.

        Without this file and its name, the pipeline could not be loaded from the folder.
        """
        super().save_config(save_directory, *args, **kwargs)
        (Path(save_directory) / "manifest.json").unlink(missing_ok=True)  # the checksums of an earlier pipeline
        index = Path(save_directory) / "model_index.json"
        values = json.loads(index.read_text(encoding="utf-8"))
        values["_class_name"] = ["pipeline", type(self).__name__]
        values.pop("_name_or_path", None)
        index.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        source, target = Path(inspect.getsourcefile(type(self))), Path(save_directory) / "pipeline.py"
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)
