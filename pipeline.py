"""CorelPipeline: class labels -> pictures. One self-contained file; it travels with the weights.

pipe = DiffusionPipeline.from_pretrained("diffusion_models", trust_remote_code=True)
pipe(num_images=4, class_labels="sunset", num_inference_steps=50).images[0].save("sunset.png")
"""

import inspect
import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class CorelPipeline(DiffusionPipeline):
    """Latent diffusion with class labels: a UNet2DModel denoises latents, an AutoencoderKL decodes them.

    class_names: {"0": name, ...} of the UNet's labels; None for an unconditional model. (A dict with string keys, because a
    list of strings in model_index.json breaks loading from the Hub.) The label after the last class is the null label.
    class_numbers: {"0": number, ...}, the numbers that these classes have in the data, which `corel-diffusers generate --class` takes.
    guide: the same UNet after a small part of its training. Guidance then leads away from what it predicts (Karras et al. 2024,
    arXiv:2406.02507); without one, as after `pipe.guide = None`, away from what the UNet predicts without the class.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components: ClassVar = ["guide"]
    _exclude_from_cpu_offload: ClassVar = ["guide"]  # it takes turns with the UNet in each step

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        class_names: dict[str, str] | None = None,
        guide: UNet2DModel | None = None,
        class_numbers: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler, guide=guide)
        self.register_to_config(class_names=class_names, class_numbers=class_numbers)
        self.image_processor = VaeImageProcessor(vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1))

    @torch.no_grad()
    def __call__(
        self,
        num_images: int = 1,
        class_labels: str | int | list[str | int] | None = None,
        guidance_scale: float = 2.5,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["CorelPipeline", int, torch.Tensor, dict], dict] | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generates pictures.

        num_images: how many. class_labels: one class for all or one a picture, by name or id; None leaves the class open (the
        null label). guidance_scale: w of e = e_weak + w (e_unet - e_weak), where e_weak is the guide's; without a guide, the UNet's
        for the null label (Ho & Salimans 2022, arXiv:2207.12598); 1 is none.
        guidance_interval: the share of the noise levels, 0 clean to 1 pure noise, within which guidance acts (Kynkäänniemi et al.
        2024, arXiv:2404.07724); outside it the UNet acts alone, at half the cost. None: `default_guidance_interval`.
        eta: DDIM's share of fresh noise. generator: fixes the pictures. latents: start from these, (num_images, C, h, w) of
        unit variance. output_type: "pil", "np" (N, H, W, 3) or "pt" (N, 3, H, W) in [0, 1], or "latent" (scaled).
        callback_on_step_end(pipe, step, timestep, {"latents": ...}) may return a dict with new latents.
        """
        labels = self.label_ids(num_images, class_labels)
        if isinstance(generator, list) and len(generator) not in (1, num_images):
            raise ValueError(f"{len(generator)} generators for num_images={num_images}: give one, or one a picture")
        has_class = labels is not None and bool((labels != self.null_label).any())
        guided = guidance_scale != 1 and (self.guide is not None or has_class)
        device, dtype = self._execution_device, self.unet.dtype
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (num_images, self.unet.config.in_channels, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {shape}")
        latents = latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

        low, high = guidance_interval or self.default_guidance_interval
        always = low <= 0 and high >= 1
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        trained_steps = self.scheduler.config.num_train_timesteps
        if type(self.scheduler) is DDIMScheduler and trained_steps % num_inference_steps:
            divisors = [steps for steps in range(1, trained_steps + 1) if trained_steps % steps == 0]
            nearest = min(divisors, key=lambda steps: abs(steps - num_inference_steps))
            warnings.warn(
                f"DDIMScheduler leaves noise in the pictures where num_inference_steps does not divide {trained_steps}: take {nearest}",
                stacklevel=2,
            )
        if (self.scheduler.timesteps < 0).any():
            warnings.warn(
                f"{type(self.scheduler).__name__} places a timestep below 0 at {num_inference_steps} steps, which brings the noise back: "
                "take another number",
                stacklevel=2,
            )
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {name: value for name, value in {"eta": eta, "generator": generator}.items() if name in accepted}
        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                inputs = self.scheduler.scale_model_input(latents, timestep)
                if guided and (always or low <= float(timestep) / self.scheduler.config.num_train_timesteps <= high):
                    weak, noise_pred = (prediction.to(latents.dtype) for prediction in self.weak_and_full(inputs, timestep, labels))
                    noise_pred = weak + guidance_scale * (noise_pred - weak)
                else:
                    noise_pred = self.unet(inputs, timestep, labels).sample.to(latents.dtype)
                with torch.autocast(device.type, enabled=False):  # only the networks run in the precision of autocast
                    latents = self.scheduler.step(noise_pred, timestep, latents, **extra).prev_sample
                if callback_on_step_end is not None:
                    latents = (callback_on_step_end(self, step, timestep, {"latents": latents}) or {}).get("latents", latents)
                progress.update()

        if not latents.isfinite().all():
            warnings.warn("the pictures are no numbers any more: half precision was too coarse, draw them in another", stacklevel=2)
        images = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def weak_and_full(self, inputs: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What guidance leads away from, and the UNet's prediction: (N, C, h, w) each."""
        if self.guide is not None:
            return self.guide(inputs, timestep, labels).sample, self.unet(inputs, timestep, labels).sample
        both = torch.cat([torch.full_like(labels, self.null_label), labels])
        return self.unet(torch.cat([inputs, inputs]), timestep, both).sample.chunk(2)  # in one pass

    def decode(self, latents: torch.Tensor, output_type: str) -> list | torch.Tensor:
        """Scaled latents (N, C, h, w) -> pictures. The scale is the VAE's config: latents_mean and latents_std where it has them."""
        config = self.vae.config
        latents = latents / config.scaling_factor
        if config.latents_mean is None:
            latents = latents + (config.shift_factor or 0.0)
        else:
            mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(latents) for v in (config.latents_mean, config.latents_std))
            latents = latents * std + mean
        if config.force_upcast and self.vae.dtype == torch.float16:  # it overflows
            self.vae.to(torch.float32)
        with torch.autocast(latents.device.type, enabled=False) if config.force_upcast else nullcontext():
            pictures = torch.cat([self.vae.decode(part.to(self.vae.dtype)).sample.float() for part in latents.split(16)])
        return self.image_processor.postprocess(pictures, output_type=output_type)

    @property
    def default_guidance_interval(self) -> tuple[float, float]:
        """Without a guide, all noise levels. A guide leads away from what many photos share towards the layout of one of them, at high
        noise, where the layout is laid down: below it there are fewer copies."""
        return (0.0, 0.6) if self.guide is not None else (0.0, 1.0)

    @property
    def null_label(self) -> int:
        """The label that stands for no class."""
        return len(self.config.class_names)

    def label_ids(self, num_images: int, class_labels: str | int | list[str | int] | None) -> torch.Tensor | None:
        """Names or ids -> (num_images,) int64, None for an unconditional model. Raises ValueError naming the classes there are."""
        if not self.config.class_names:
            if class_labels is not None:
                raise ValueError("this model has no classes: leave class_labels out")
            return None
        ids = {name: int(number) for number, name in self.config.class_names.items()}
        if hasattr(class_labels, "tolist"):  # an array, a tensor
            class_labels = class_labels.tolist()
        labels = class_labels if isinstance(class_labels, (list, tuple)) else [class_labels] * num_images
        labels = [label.item() if hasattr(label, "item") else label for label in labels]
        if len(labels) != num_images:
            raise ValueError(f"{len(labels)} class_labels for num_images={num_images}: give one, or one a picture")
        found = [self.null_label if label is None else ids.get(label, label) for label in labels]
        for label in found:
            if not isinstance(label, int) or not 0 <= label <= self.null_label:
                raise ValueError(f"class {label!r} is unknown: the classes are {', '.join(f'{i} {name}' for name, i in ids.items())}")
        return torch.tensor(found, device=self._execution_device)

    def save_config(self, save_directory: str, *args, **kwargs) -> None:
        """Also saves this file and names it in model_index.json: without both, the folder would not load again."""
        super().save_config(save_directory, *args, **kwargs)
        index = Path(save_directory) / "model_index.json"
        values = json.loads(index.read_text(encoding="utf-8"))
        values["_class_name"] = ["pipeline", type(self).__name__]
        values.pop("_name_or_path", None)
        index.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        source, target = Path(inspect.getsourcefile(type(self))), Path(save_directory) / "pipeline.py"
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)
