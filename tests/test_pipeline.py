"""CorelPipeline: its results equal those of the schedulers, and it can be saved and loaded. Also: the samplers."""

import inspect
import json
import sys

import diffusers
import numpy as np
import pytest
import torch
from conftest import UNET_CONFIG, VAE_CONFIG, launch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from packaging.version import Version

from corel_diffusers.sampling.samplers import build_sampler, possible_steps
from pipeline import CorelPipeline

NAMES = {"0": "sunset at sea", "1": "snowy mountain"}
OTHER_SCHEDULERS = [
    f"{name}Scheduler"
    for name in ("DDIM", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "EulerDiscrete",
                 "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete", "PNDM", "DEISMultistep")
]  # fmt: skip


def build(prediction_type: str = "epsilon", classes: dict | None = NAMES, size: int | list = 8) -> CorelPipeline:
    """Return a small pipeline with random weights. `size` is the side, or [height, width], of the latents."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    vae = AutoencoderKL.from_config(VAE_CONFIG | blocks | {"scaling_factor": 1.0})
    vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 0.5, 1.5])
    embeds = len(classes) + 1 if classes else None
    unet = UNet2DModel.from_config(
        UNET_CONFIG | {"in_channels": 4, "out_channels": 4, "sample_size": size, "num_class_embeds": embeds}
    )
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing")
    pipe = CorelPipeline(vae.eval(), unet.eval(), scheduler, classes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class ExactPredictor(torch.nn.Module):
    """Stands in for the UNet. It knows x_0, so it predicts the noise, v or x_0 without error for any x_t."""

    def __init__(self, clean: torch.Tensor, pipe: CorelPipeline) -> None:
        super().__init__()
        self.clean, self.config, self.dtype, self.device = clean, pipe.unet.config, torch.float32, torch.device("cpu")
        self.prediction_type, self.alphas_cumprod = pipe.scheduler.config.prediction_type, pipe.scheduler.alphas_cumprod

    def forward(self, noisy, timestep, labels=None):
        a = self.alphas_cumprod[timestep.long()].view(-1, 1, 1, 1)
        clean = self.clean.repeat(len(noisy) // len(self.clean), 1, 1, 1)
        noise = (noisy - a.sqrt() * clean) / (1 - a).sqrt()
        value = {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * clean, "sample": clean}[
            self.prediction_type
        ]
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=value)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_an_exact_predictor_gives_the_result_of_the_scheduler_and_the_clean_latents(name, prediction_type):
    pipe = build(prediction_type)
    clean = torch.randn(2, 4, 8, 8) * 3  # far beyond 1: if samples were clipped to 1, the result would differ
    pipe.unet = exact = ExactPredictor(clean, pipe)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)

    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(5)
    expected = torch.randn(2, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    takes_generator = name in ("DDPMScheduler", "DPMSolverMultistepScheduler")
    for timestep in scheduler.timesteps:
        model_pred = exact(scheduler.scale_model_input(expected, timestep), timestep).sample
        expected = scheduler.step(
            model_pred, timestep, expected, **({"generator": generator} if takes_generator else {})
        ).prev_sample

    for guidance_scale in (1.0, 2.0):
        result = pipe(
            2,
            1,
            guidance_scale=guidance_scale,
            num_inference_steps=20,
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
        )
        assert torch.allclose(result.images, expected, atol=1e-3), f"guidance {guidance_scale}"
    assert torch.allclose(expected, clean, atol=0.05)


def test_guidance_in_one_forward_pass_equals_guidance_in_two():
    pipe = build()
    latents, timestep = torch.randn(2, 4, 8, 8), torch.tensor(999)
    with torch.no_grad():
        null = pipe.unet(latents, timestep, torch.tensor([2, 2])).sample
        with_class = pipe.unet(latents, timestep, torch.tensor([0, 1])).sample
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(1)
    expected = scheduler.step(null + 3.0 * (with_class - null), timestep, latents).prev_sample
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    result = pipe(
        2, [0, "snowy mountain"], guidance_scale=3.0, num_inference_steps=1, latents=latents, output_type="latent"
    ).images
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("classes", [NAMES, None])
def test_guidance_leads_away_from_the_prediction_of_the_guide_model(classes):
    """The guide model gets the same label as the UNet, so it also guides samples without a class."""
    pipe, guide = build(classes=classes), build(classes=classes).unet
    with torch.no_grad():
        guide.conv_out.weight.mul_(0.5)
    guided = CorelPipeline(pipe.vae, pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config), classes, guide)
    latents, timestep, labels = torch.randn(2, 4, 8, 8), torch.tensor(999), torch.tensor([0, 2]) if classes else None
    with torch.no_grad():
        weak, full = guide(latents, timestep, labels).sample, pipe.unet(latents, timestep, labels).sample
    for scale in (1.0, 3.0):
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(1)
        expected = scheduler.step(weak + scale * (full - weak), timestep, latents).prev_sample
        class_labels = [0, None] if classes else None
        options = {"guidance_interval": (0, 1), "num_inference_steps": 1, "latents": latents, "output_type": "latent"}
        result = guided(2, class_labels, guidance_scale=scale, **options).images
        assert torch.allclose(result, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["ddim", "dpm-solver++"])
def test_sampling_begins_at_pure_noise_with_zero_terminal_snr(name):
    pipe = build("v_prediction")
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=True)
    clean, timesteps = torch.randn(2, 4, 8, 8), []
    pipe.unet = ExactPredictor(clean, pipe)
    pipe.unet.register_forward_pre_hook(lambda _, inputs: timesteps.append(int(inputs[1])))
    pipe.scheduler = build_sampler(name, pipe.scheduler)
    result = pipe(2, num_inference_steps=20, guidance_scale=1.0, output_type="latent").images
    assert timesteps[0] == 999
    assert torch.allclose(result, clean, atol=1e-2)


def test_guidance_acts_only_at_the_noise_levels_of_the_interval():
    pipe, calls = build("v_prediction"), []
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    handle = pipe.unet.register_forward_pre_hook(lambda _, inputs: calls.append((int(inputs[1]), len(inputs[0]))))
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    result = pipe(3, 1, num_inference_steps=10, guidance_scale=3.0, guidance_interval=(0.25, 0.65), **options).images
    handle.remove()
    assert calls == [(t, 6 if 250 <= t <= 650 else 3) for t in range(999, 0, -100)]

    scheduler, x = (
        DDIMScheduler.from_config(pipe.scheduler.config),
        torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    scheduler.set_timesteps(10)
    label, null_label = torch.full((3,), 1), torch.full((3,), 2)
    for t in scheduler.timesteps:
        with torch.no_grad():
            with_class, without = pipe.unet(x, t, label).sample, pipe.unet(x, t, null_label).sample
        model_pred = without + 3.0 * (with_class - without) if 250 <= t <= 650 else with_class
        x = scheduler.step(model_pred, t, x).prev_sample
    assert torch.allclose(result, x, atol=1e-4)


def test_a_guide_model_acts_only_at_low_noise_by_default():
    """So it does not change the layout of a sample. Without a guide model, guidance by the class acts at all levels."""
    pipe, guide_timesteps, batch_sizes = build("v_prediction"), [], []
    pipe.register_modules(guide=build().unet, scheduler=DDIMScheduler.from_config(pipe.scheduler.config))
    pipe.guide.register_forward_pre_hook(lambda _, inputs: guide_timesteps.append(int(inputs[1])))
    pipe(2, 1, num_inference_steps=10, output_type="latent")
    assert guide_timesteps == [599, 499, 399, 299, 199, 99]
    pipe.guide = None
    pipe.unet.register_forward_pre_hook(lambda _, inputs: batch_sizes.append(len(inputs[0])))
    pipe(2, 1, num_inference_steps=10, output_type="latent")
    assert batch_sizes == [4] * 10


@pytest.mark.parametrize("name", OTHER_SCHEDULERS)
def test_other_schedulers_of_diffusers_work(name):
    pipe = build("v_prediction" if name not in ("KDPM2DiscreteScheduler", "LMSDiscreteScheduler") else "epsilon")
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    images = pipe(1, 0, num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    assert images.std() > 0


def test_one_generator_fixes_all_samples_and_a_list_of_generators_fixes_each_sample():
    pipe = build()

    def sample(count, generator):
        return pipe(count, 0, num_inference_steps=4, generator=generator, output_type="pt").images

    assert torch.equal(sample(2, torch.Generator().manual_seed(1)), sample(2, torch.Generator().manual_seed(1)))
    assert not torch.equal(sample(2, torch.Generator().manual_seed(1)), sample(2, torch.Generator().manual_seed(2)))
    three = sample(3, [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)])
    assert torch.allclose(sample(1, [torch.Generator().manual_seed(8)])[0], three[1], atol=1e-4)


def test_invalid_arguments_raise_errors_with_the_expected_values():
    pipe = build()
    with pytest.raises(ValueError, match="the classes are 0 sunset at sea, 1 snowy mountain"):
        pipe(1, "moon")
    with pytest.raises(ValueError, match="class 5 is unknown"):
        pipe(1, 5)
    for not_a_class in (2, -1, True):  # 2 is the null label: only None means no class
        with pytest.raises(ValueError, match=f"class {not_a_class} is unknown.*, and None for no class"):
            pipe(1, not_a_class)
    for steps in (0, -3, 1001):
        with pytest.raises(ValueError, match=f"num_inference_steps={steps}: give a number from 1 to 1000"):
            pipe(1, 0, num_inference_steps=steps)
    with pytest.raises(ValueError, match="output_type='tensor': give 'pil', 'np', 'pt' or 'latent'"):
        pipe(1, 0, output_type="tensor")
    with pytest.raises(ValueError, match="3 class_labels for num_images=2"):
        pipe(2, [0, 1, 0])
    with pytest.raises(ValueError, match="3 generators for num_images=2"):
        pipe(2, 0, generator=[torch.Generator()] * 3)
    with pytest.raises(ValueError, match="expected \\(1, 4, 8, 8\\)"):
        pipe(1, 0, latents=torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="no classes"):
        build(classes=None)(1, 0)


def test_labels_can_be_an_array_or_a_tensor():
    pipe = build()
    expected = pipe.label_ids(3, [0, 1, 0]).tolist()
    for labels in (np.array([0, 1, 0]), torch.tensor([0, 1, 0]), list(np.array([0, 1, 0]))):
        assert pipe.label_ids(3, labels).tolist() == expected
    assert pipe.label_ids(2, np.int64(1)).tolist() == [1, 1]
    assert len(pipe(class_labels=torch.tensor([0, 1, 0]), num_inference_steps=1).images) == 3
    assert len(pipe(class_labels=torch.tensor(1), num_inference_steps=1).images) == 1


def test_unconditional_rectangular_callback_and_output_types():
    pipe = build(classes=None, size=[8, 12])
    steps = []
    images = pipe(
        2, num_inference_steps=3, callback_on_step_end=lambda p, step, t, values: steps.append(step) or values
    ).images
    assert steps == [0, 1, 2]
    assert images[0].size == (48, 32)
    zeros = pipe(
        1,
        num_inference_steps=2,
        output_type="latent",
        callback_on_step_end=lambda p, s, t, v: {"latents": v["latents"] * 0},
        callback_on_step_end_tensor_inputs=["latents"],  # as examples of other pipelines give it
    ).images
    assert (zeros == 0).all()
    assert isinstance(pipe(1, num_inference_steps=2, return_dict=False), tuple)


@pytest.mark.filterwarnings("error")
def test_nan_images_give_a_warning():
    pipe, nan_latents = build(), {"latents": torch.full((1, 4, 8, 8), float("nan"))}
    pipe(1, num_inference_steps=1)
    with pytest.raises(UserWarning, match="the images contain NaN or infinite values"):
        pipe(1, num_inference_steps=1, callback_on_step_end=lambda *step: nan_latents)


@pytest.mark.parametrize("guided", [False, True])
def test_the_pipeline_loads_and_saves_without_the_package(guided, tmp_path):
    pipe = build()
    if guided:
        pipe.register_modules(guide=build().unet)
        with torch.no_grad():
            pipe.guide.conv_out.weight.mul_(0.5)
    pipe.save_pretrained(tmp_path / "first")
    index = json.loads((tmp_path / "first" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "CorelPipeline"]
    code = """
import sys
sys.modules["corel_diffusers"] = None  # importing it fails
import torch
from diffusers import DiffusionPipeline
folder, copy, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.save_pretrained(copy)
pipe = DiffusionPipeline.from_pretrained(copy, trust_remote_code=True)
generator = torch.Generator().manual_seed(0)
images = pipe(2, ["sunset at sea", 1], num_inference_steps=3, generator=generator, output_type="pt").images
torch.save(images, out)
"""
    launch(
        sys.executable, "-c", code, tmp_path / "first", tmp_path / "second", tmp_path / "out.pt", env={"PYTHONPATH": ""}
    )
    expected = pipe(
        2, [0, 1], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)
    if Version(diffusers.__version__) >= Version("0.37"):  # before, diffusers runs the code of a local folder
        with pytest.raises(ValueError, match="custom code"):
            DiffusionPipeline.from_pretrained(tmp_path / "second")
    pipe.guide = None
    pipe.save_pretrained(tmp_path / "third")
    without = DiffusionPipeline.from_pretrained(tmp_path / "third", trust_remote_code=True)
    images = without(
        2, [0, 1], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    assert torch.equal(images, expected) is not guided, "without a guide model, guidance is by the class"


def images_of(pipe: CorelPipeline) -> torch.Tensor:
    """Return two images (2, 3, H, W) that begin with the same noise on every device and in every precision."""
    generator = torch.Generator().manual_seed(0)
    return pipe(2, [0, 1], num_inference_steps=3, generator=generator, output_type="pt").images.float().cpu()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pipeline_that_is_loaded_in_half_precision_draws_almost_the_same_images(dtype, tmp_path):
    pipe = build()
    pipe.save_pretrained(tmp_path)
    half = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=dtype, trust_remote_code=True)
    assert {half.unet.dtype, half.vae.dtype} == {dtype}
    # the mean over the pixels: single ones differ by up to 0.08 with the half-precision kernels of torch 2.6 on CPUs
    assert (images_of(half) - images_of(pipe)).abs().mean() < 0.015


def test_a_variant_is_saved_and_loaded(tmp_path):
    pipe = build().to(torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    options = {"variant": "fp16", "torch_dtype": torch.float16, "trust_remote_code": True}
    assert torch.equal(images_of(DiffusionPipeline.from_pretrained(tmp_path, **options)), images_of(pipe))


def test_parts_load_by_themselves_and_onto_a_device(tmp_path):
    pipe = build()
    pipe.save_pretrained(tmp_path)
    vae = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    assert all(map(torch.equal, vae.parameters(), pipe.vae.parameters()))
    placed = DiffusionPipeline.from_pretrained(tmp_path, device_map="cpu", trust_remote_code=True)
    assert torch.equal(images_of(placed), images_of(pipe))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "device_map"])
def test_offloaded_parts_draw_the_images_of_parts_on_the_gpu(method, tmp_path):
    pipe = build()
    pipe.save_pretrained(tmp_path)
    options = {"device_map": "balanced"} if method == "device_map" else {}
    offloaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True, **options)
    if not options:
        getattr(offloaded, method)()
    assert torch.allclose(images_of(offloaded), images_of(pipe.to("cuda")), atol=0.02)


def test_decoding_in_parts_gives_the_same_images():
    pipe = build()
    latents = torch.randn(18, 4, 8, 8)
    with torch.no_grad():
        images = pipe.decode(latents, "pt")
        assert torch.allclose(images[17], pipe.decode(latents[17:], "pt")[0], atol=1e-5)


@pytest.mark.parametrize("name", ["DDPMScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_under_autocast_only_the_networks_run_in_half_precision(name, prediction_type):
    pipe, dtypes = build(prediction_type), []
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    pipe.unet.conv_in.register_forward_hook(
        lambda module, inputs, output: dtypes.append((inputs[0].dtype, output.dtype))
    )
    options = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 2.0}
    full_precision = pipe(2, "snowy mountain", generator=torch.Generator().manual_seed(0), **options).images
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        half_precision = pipe(2, "snowy mountain", generator=torch.Generator().manual_seed(0), **options).images
    assert set(dtypes) == {(torch.float32, torch.bfloat16)}, "latents are float32 between steps"
    assert half_precision.dtype == torch.float32
    assert torch.allclose(half_precision, full_precision, atol=0.1)


@pytest.mark.parametrize("upcast", [False, True])
def test_a_vae_with_force_upcast_decodes_in_float32(upcast):
    pipe, dtypes = build(), []
    pipe.vae.register_to_config(force_upcast=upcast)
    pipe.vae.decoder.conv_in.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        images = pipe.decode(torch.randn(2, 4, 8, 8), "pt")
    assert dtypes == [torch.float32 if upcast else torch.bfloat16]
    assert images.dtype == torch.float32
    pipe.vae.to(torch.float16)  # as loaded with torch_dtype=torch.float16
    pipe.decode(torch.randn(2, 4, 8, 8), "pt")
    assert dtypes[1:] == [torch.float32 if upcast else torch.float16]


def std_of_samples(sampler: DDIMScheduler, data_std: float, steps: int, error: float = 0.0) -> float:
    """Return the standard deviation of samples from the exact model of data N(0, data_std^2).

    Args:
        error: standard deviation of a random error that is added to each prediction of the noise.
    """
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 100, 100, generator=rng)
    sampler.set_timesteps(steps)
    for timestep in sampler.timesteps:
        a = sampler.alphas_cumprod[timestep]
        noise_pred = (1 - a).sqrt() / (a * data_std**2 + 1 - a) * x
        noise_pred = noise_pred + error * torch.randn(x.shape, generator=rng)
        x_0 = (x - (1 - a).sqrt() * noise_pred) / a.sqrt()
        velocity = a.sqrt() * noise_pred - (1 - a).sqrt() * x_0
        x = sampler.step(
            {"epsilon": noise_pred, "v_prediction": velocity}[sampler.config.prediction_type], timestep, x
        ).prev_sample
    return float(x.std())


@pytest.mark.parametrize(
    ("name", "steps"),
    [("ddpm", 1000), ("ddpm", 15), ("ddim", 27), ("ddim", 50), ("unipc", 15), ("dpm-solver++", 15)],
)
def test_samplers_give_the_correct_std_on_the_cosine_schedule(name, steps):
    """The cosine schedule ends at a = 1e-9, and an error of the predicted noise is divided by the square root of a.

    Before the samplers left out the last timesteps, DDIM gave a standard deviation of 4.5 instead of 1.
    """
    trained_with = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing="trailing")
    sampler = build_sampler(name, trained_with)
    steps = possible_steps(sampler, steps)
    exact = std_of_samples(sampler, 1.0, steps)  # 0.87 in 15 steps of DDPM, because it adds fresh noise in each step
    assert std_of_samples(sampler, 1.0, steps, error=0.02) == pytest.approx(exact, abs=0.05)
    assert exact == pytest.approx(1, abs=0.15 if name == "ddpm" else 0.05)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", [150, 400, 600, 999])
def test_ddim_leaves_no_noise_for_any_number_of_steps(steps, schedule, prediction_type):
    trained_with = DDPMScheduler(
        beta_schedule=schedule, prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing"
    )
    assert std_of_samples(build_sampler("ddim", trained_with), 0.3, steps) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "unipc", "dpm-solver++"])
@pytest.mark.parametrize(
    ("schedule", "prediction_type"), [("linear", "v_prediction"), ("squaredcos_cap_v2", "epsilon")]
)
def test_no_timestep_lies_below_0_at_any_number_of_steps(name, schedule, prediction_type):
    """At 62 numbers of steps diffusers adds the timestep -1. The last step then brings the noise back."""
    trained_with = DDPMScheduler(
        beta_schedule=schedule, prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing"
    )
    sampler = build_sampler(name, trained_with)
    for steps in (*range(1, 131), 201, 300, 397, 996, 1000):
        possible = possible_steps(sampler, steps)
        sampler.set_timesteps(possible)
        assert sampler.timesteps.min() >= 0
        if name != "dpm-solver++":  # with clipping, it has fewer timesteps than steps
            assert len(sampler.timesteps.unique()) == len(sampler.timesteps) == possible
            assert possible >= min(steps, sampler.config.num_train_timesteps) - 2


def test_the_pipeline_warns_of_a_timestep_below_0():
    pipe = build("v_prediction")
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with pytest.warns(UserWarning, match="below 0 at 61 steps"):
        pipe(1, 0, num_inference_steps=61, output_type="latent")


@pytest.mark.parametrize("error", [0.0, 0.02])
def test_ddim_gives_the_same_std_at_61_and_62_steps(error):
    """With diffusers' timestep -1 the standard deviation was 0 without an error and 3.1 with one."""
    trained_with = DDPMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    sampler = build_sampler("ddim", trained_with)
    assert std_of_samples(sampler, 0.3, 61, error) == pytest.approx(std_of_samples(sampler, 0.3, 62, error), abs=0.01)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_equals_that_of_diffusers_if_the_steps_divide_the_timesteps(prediction_type, eta):
    trained_with = DDPMScheduler(prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing")
    ours, reference = build_sampler("ddim", trained_with), DDIMScheduler.from_config(trained_with.config)
    x, model_pred = torch.randn(2, 1, 4, 8, 8)
    for sampler in (ours, reference):
        sampler.set_timesteps(50)
    for timestep in (999, 499, 19):
        result, expected = (
            s.step(model_pred, timestep, x, eta=eta, generator=torch.Generator().manual_seed(0))
            for s in (ours, reference)
        )
        assert torch.allclose(result.prev_sample, expected.prev_sample, atol=1e-5)


def test_the_ddim_of_diffusers_gives_a_warning_at_other_numbers_of_steps():
    pipe = build("v_prediction")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.warns(UserWarning, match="does not divide 1000: use 8"):
        pipe(1, 0, num_inference_steps=7, output_type="latent")


def test_ddim_refuses_a_prediction_type_that_it_does_not_know():
    scheduler = build_sampler("ddim", DDPMScheduler())
    scheduler.register_to_config(prediction_type="flow_prediction")
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="flow_prediction"):
        scheduler.step(torch.zeros(1, 1, 2, 2), 500, torch.zeros(1, 1, 2, 2))


def test_classes_that_are_numbers_are_found_by_their_number_and_keep_their_order(tmp_path):
    pipe = build(classes={str(label): str(3 * label) for label in range(12)})
    assert pipe.label_ids(3, [3, "33", None]).tolist() == [1, 11, 12]
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert list(loaded.config.class_names.values()) == [str(3 * label) for label in range(12)]


@pytest.mark.parametrize("name", ["ddpm", "ddim", "unipc", "dpm-solver++"])
@pytest.mark.parametrize(
    "options",
    [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}, {"prediction_type": "epsilon"}],
)
def test_samplers_made_from_the_saved_sampler_equal_those_made_from_the_scheduler_of_training(name, options, tmp_path):
    """The reference is the scheduler of training. The folder holds DPM-Solver++, which was made from it."""
    given = {"prediction_type": "v_prediction", "clip_sample": False, "timestep_spacing": "trailing"}
    trained = DDPMScheduler(**given | options)
    build_sampler("dpm-solver++", trained).save_pretrained(tmp_path)
    results = []
    for source in (trained, diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path)):
        sampler, generator = build_sampler(name, source), torch.Generator().manual_seed(0)
        sampler.set_timesteps(10)
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        more = {"generator": generator} if "generator" in inspect.signature(sampler.step).parameters else {}
        for timestep in sampler.timesteps:
            latents = sampler.step(torch.sin(latents), timestep, latents, **more).prev_sample
        results.append(latents)
    assert torch.equal(*results)
