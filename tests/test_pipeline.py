"""CorelPipeline against the schedulers' own results, and its life as a folder."""

import json
import sys

import diffusers
import numpy as np
import pytest
import torch
from conftest import UNET_CONFIG, VAE_CONFIG, launch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DModel, UniPCMultistepScheduler

from corel_diffusers.generate import build_sampler, possible_steps
from pipeline import CorelPipeline

NAMES = {"0": "sunset at sea", "1": "snowy mountain"}
SWAPPED = [
    f"{name}Scheduler"
    for name in ("DDIM", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "EulerDiscrete", "EulerAncestralDiscrete",
                 "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete", "PNDM", "DEISMultistep")
]  # fmt: skip


def build(prediction_type: str = "epsilon", classes: dict | None = NAMES, size: int | list = 8) -> CorelPipeline:
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    vae = AutoencoderKL.from_config(VAE_CONFIG | blocks | {"scaling_factor": 1.0})
    vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 0.5, 1.5])
    embeds = len(classes) + 1 if classes else None
    unet = UNet2DModel.from_config(UNET_CONFIG | {"in_channels": 4, "out_channels": 4, "sample_size": size, "num_class_embeds": embeds})
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing")
    pipe = CorelPipeline(vae.eval(), unet.eval(), scheduler, classes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class ExactPredictor(torch.nn.Module):
    """Knows x_0 and so predicts the noise (or v) in any x_t without error."""

    def __init__(self, clean: torch.Tensor, pipe: CorelPipeline) -> None:
        super().__init__()
        self.clean, self.config, self.dtype, self.device = clean, pipe.unet.config, torch.float32, torch.device("cpu")
        self.prediction_type, self.alphas_cumprod = pipe.scheduler.config.prediction_type, pipe.scheduler.alphas_cumprod

    def forward(self, noisy, timestep, labels=None):
        a = self.alphas_cumprod[timestep.long()].view(-1, 1, 1, 1)
        clean = self.clean.repeat(len(noisy) // len(self.clean), 1, 1, 1)
        noise = (noisy - a.sqrt() * clean) / (1 - a).sqrt()
        value = {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * clean, "sample": clean}[self.prediction_type]
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=value)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_an_exact_predictor_gives_the_schedulers_own_result_and_the_clean_latents(name, prediction_type):
    pipe = build(prediction_type)
    clean = torch.randn(2, 4, 8, 8) * 3  # far beyond 1: a clipped sample could not reach it
    pipe.unet = exact = ExactPredictor(clean, pipe)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)

    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(5)
    expected = torch.randn(2, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    takes_generator = name in ("DDPMScheduler", "DPMSolverMultistepScheduler")
    for timestep in scheduler.timesteps:
        noise_pred = exact(scheduler.scale_model_input(expected, timestep), timestep).sample
        expected = scheduler.step(noise_pred, timestep, expected, **({"generator": generator} if takes_generator else {})).prev_sample

    for guidance_scale in (1.0, 2.0):
        result = pipe(
            2, 1, guidance_scale=guidance_scale, num_inference_steps=20, generator=torch.Generator().manual_seed(5), output_type="latent"
        )
        assert torch.allclose(result.images, expected, atol=1e-3), f"guidance {guidance_scale}"
    assert torch.allclose(expected, clean, atol=0.05)


def test_guidance_in_one_pass_is_that_of_two():
    pipe = build()
    latents, timestep = torch.randn(2, 4, 8, 8), torch.tensor(999)
    with torch.no_grad():
        null = pipe.unet(latents, timestep, torch.tensor([2, 2])).sample
        of_class = pipe.unet(latents, timestep, torch.tensor([0, 1])).sample
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(1)
    expected = scheduler.step(null + 3.0 * (of_class - null), timestep, latents).prev_sample
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    result = pipe(2, [0, "snowy mountain"], guidance_scale=3.0, num_inference_steps=1, latents=latents, output_type="latent").images
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("classes", [NAMES, None])
def test_a_guide_leads_away_from_what_it_predicts_for_the_same_label(classes):
    """And so guides pictures without a class as well."""
    pipe, early = build(classes=classes), build(classes=classes).unet
    with torch.no_grad():
        early.conv_out.weight.mul_(0.5)
    guided = CorelPipeline(pipe.vae, pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config), classes, early)
    latents, timestep, labels = torch.randn(2, 4, 8, 8), torch.tensor(999), torch.tensor([0, 2]) if classes else None
    with torch.no_grad():
        weak, full = early(latents, timestep, labels).sample, pipe.unet(latents, timestep, labels).sample
    for scale in (1.0, 3.0):
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(1)
        expected = scheduler.step(weak + scale * (full - weak), timestep, latents).prev_sample
        wanted = [0, None] if classes else None
        options = {"guidance_interval": (0, 1), "num_inference_steps": 1, "latents": latents, "output_type": "latent"}
        result = guided(2, wanted, guidance_scale=scale, **options).images
        assert torch.allclose(result, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["ddim", "dpm-solver++"])
def test_a_model_of_zero_terminal_snr_begins_at_pure_noise(name):
    pipe = build("v_prediction")
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=True)
    clean, asked = torch.randn(2, 4, 8, 8), []
    pipe.unet = ExactPredictor(clean, pipe)
    pipe.unet.register_forward_pre_hook(lambda _, inputs: asked.append(int(inputs[1])))
    pipe.scheduler = build_sampler(name, pipe.scheduler)
    result = pipe(2, num_inference_steps=20, guidance_scale=1.0, output_type="latent").images
    assert asked[0] == 999
    assert torch.allclose(result, clean, atol=1e-2)


def test_within_an_interval_only_its_noise_levels_are_guided():
    pipe, asked = build("v_prediction"), []
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    handle = pipe.unet.register_forward_pre_hook(lambda _, inputs: asked.append((int(inputs[1]), len(inputs[0]))))
    seeds = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    inside = pipe(3, 1, num_inference_steps=10, guidance_scale=3.0, guidance_interval=(0.25, 0.65), **seeds).images
    handle.remove()
    assert asked == [(t, 6 if 250 <= t <= 650 else 3) for t in range(999, 0, -100)]

    scheduler, x = DDIMScheduler.from_config(pipe.scheduler.config), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(10)
    label, none = torch.full((3,), 1), torch.full((3,), 2)
    for t in scheduler.timesteps:
        with torch.no_grad():
            with_class, without = pipe.unet(x, t, label).sample, pipe.unet(x, t, none).sample
        guided = without + 3.0 * (with_class - without) if 250 <= t <= 650 else with_class
        x = scheduler.step(guided, t, x).prev_sample
    assert torch.allclose(inside, x, atol=1e-4)


def test_a_guide_leaves_the_layout_alone():
    """By default it is asked at low noise only; without it, the class guides throughout."""
    pipe, guided, by_class = build("v_prediction"), [], []
    pipe.register_modules(guide=build().unet, scheduler=DDIMScheduler.from_config(pipe.scheduler.config))
    pipe.guide.register_forward_pre_hook(lambda _, inputs: guided.append(int(inputs[1])))
    pipe(2, 1, num_inference_steps=10, output_type="latent")
    assert guided == [599, 499, 399, 299, 199, 99]
    pipe.guide = None
    pipe.unet.register_forward_pre_hook(lambda _, inputs: by_class.append(len(inputs[0])))
    pipe(2, 1, num_inference_steps=10, output_type="latent")
    assert by_class == [4] * 10


@pytest.mark.parametrize("name", SWAPPED)
def test_any_fitting_scheduler_swaps_in(name):
    pipe = build("v_prediction" if name not in ("KDPM2DiscreteScheduler", "LMSDiscreteScheduler") else "epsilon")
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    images = pipe(1, 0, num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    assert images.std() > 0


def test_a_generators_seed_fixes_the_pictures_and_a_list_of_them_each_picture():
    pipe = build()

    def pictures(count, generator):
        return pipe(count, 0, num_inference_steps=4, generator=generator, output_type="pt").images

    assert torch.equal(pictures(2, torch.Generator().manual_seed(1)), pictures(2, torch.Generator().manual_seed(1)))
    assert not torch.equal(pictures(2, torch.Generator().manual_seed(1)), pictures(2, torch.Generator().manual_seed(2)))
    three = pictures(3, [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)])
    assert torch.allclose(pictures(1, [torch.Generator().manual_seed(8)])[0], three[1], atol=1e-4)


def test_calls_that_cannot_be_are_refused_with_the_classes():
    pipe = build()
    with pytest.raises(ValueError, match="the classes are 0 sunset at sea, 1 snowy mountain"):
        pipe(1, "moon")
    with pytest.raises(ValueError, match="class 5 is unknown"):
        pipe(1, 5)
    with pytest.raises(ValueError, match="3 class_labels for num_images=2"):
        pipe(2, [0, 1, 0])
    with pytest.raises(ValueError, match="3 generators for num_images=2"):
        pipe(2, 0, generator=[torch.Generator()] * 3)
    with pytest.raises(ValueError, match="expected \\(1, 4, 8, 8\\)"):
        pipe(1, 0, latents=torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="no classes"):
        build(classes=None)(1, 0)


def test_labels_may_be_an_array_or_a_tensor():
    pipe = build()
    expected = pipe.label_ids(3, [0, 1, 0]).tolist()
    for labels in (np.array([0, 1, 0]), torch.tensor([0, 1, 0]), list(np.array([0, 1, 0]))):
        assert pipe.label_ids(3, labels).tolist() == expected
    assert pipe.label_ids(2, np.int64(1)).tolist() == [1, 1]


def test_unconditional_rectangular_callback_and_output_types():
    pipe = build(classes=None, size=[8, 12])
    seen = []
    pictures = pipe(2, num_inference_steps=3, callback_on_step_end=lambda p, step, t, values: seen.append(step) or values).images
    assert seen == [0, 1, 2]
    assert pictures[0].size == (48, 32)
    black = pipe(
        1, num_inference_steps=2, output_type="latent", callback_on_step_end=lambda p, s, t, v: {"latents": v["latents"] * 0}
    ).images
    assert (black == 0).all()
    assert isinstance(pipe(1, num_inference_steps=2, return_dict=False), tuple)


@pytest.mark.filterwarnings("error")
def test_pictures_that_are_no_numbers_are_not_passed_over_in_silence():
    pipe, lost = build(), {"latents": torch.full((1, 4, 8, 8), float("nan"))}
    pipe(1, num_inference_steps=1)
    with pytest.raises(UserWarning, match="the pictures are no numbers any more"):
        pipe(1, num_inference_steps=1, callback_on_step_end=lambda *step: lost)


@pytest.mark.parametrize("guided", [False, True])
def test_it_loads_where_the_package_is_not_and_saves_and_loads_again(guided, tmp_path):
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
folder, again, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.save_pretrained(again)
pipe = DiffusionPipeline.from_pretrained(again, trust_remote_code=True)
torch.save(pipe(2, ["sunset at sea", 1], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images, out)
"""
    launch(sys.executable, "-c", code, tmp_path / "first", tmp_path / "second", tmp_path / "out.pt", env={"PYTHONPATH": ""})
    expected = pipe(2, [0, 1], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)
    with pytest.raises(ValueError, match="custom code"):
        DiffusionPipeline.from_pretrained(tmp_path / "second")
    pipe.guide = None
    pipe.save_pretrained(tmp_path / "third")
    without = DiffusionPipeline.from_pretrained(tmp_path / "third", trust_remote_code=True)
    pictures = without(2, [0, 1], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert torch.equal(pictures, expected) is not guided, "without a guide, guided by the UNet without the class"


def test_decoding_in_parts_changes_nothing():
    pipe = build()
    latents = torch.randn(18, 4, 8, 8)
    with torch.no_grad():
        whole = pipe.decode(latents, "pt")
        assert torch.allclose(whole[17], pipe.decode(latents[17:], "pt")[0], atol=1e-5)


@pytest.mark.parametrize("name", ["DDPMScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_under_autocast_only_the_networks_run_in_half_precision(name, prediction_type):
    pipe, types = build(prediction_type), []
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    pipe.unet.conv_in.register_forward_hook(lambda module, inputs, output: types.append((inputs[0].dtype, output.dtype)))
    options = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 2.0}
    plain = pipe(2, "snowy mountain", generator=torch.Generator().manual_seed(0), **options).images
    types.clear()
    with torch.autocast("cpu", torch.bfloat16):
        half = pipe(2, "snowy mountain", generator=torch.Generator().manual_seed(0), **options).images
    assert set(types) == {(torch.float32, torch.bfloat16)}, "latents stay float32 from step to step"
    assert half.dtype == torch.float32
    assert torch.allclose(half, plain, atol=0.1)


@pytest.mark.parametrize("upcast", [False, True])
def test_a_vae_that_must_not_be_halved_is_not(upcast):
    pipe, types = build(), []
    pipe.vae.register_to_config(force_upcast=upcast)
    pipe.vae.decoder.conv_in.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        pictures = pipe.decode(torch.randn(2, 4, 8, 8), "pt")
    assert types == [torch.float32 if upcast else torch.bfloat16]
    assert pictures.dtype == torch.float32
    pipe.vae.to(torch.float16)  # as loaded with torch_dtype=torch.float16
    pipe.decode(torch.randn(2, 4, 8, 8), "pt")
    assert types[1:] == [torch.float32 if upcast else torch.float16]


def sampled_deviation(sampler: DDIMScheduler, deviation: float, steps: int, error: float = 0.0) -> float:
    """The spread of samples of an analytic model of data N(0, deviation^2), whose predictions of the noise are off by `error`."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 100, 100, generator=random)
    sampler.set_timesteps(steps)
    for timestep in sampler.timesteps:
        kept = sampler.alphas_cumprod[timestep]
        noise = (1 - kept).sqrt() / (kept * deviation**2 + 1 - kept) * x
        noise = noise + error * torch.randn(x.shape, generator=random)
        clean = (x - (1 - kept).sqrt() * noise) / kept.sqrt()
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean
        x = sampler.step({"epsilon": noise, "v_prediction": velocity}[sampler.config.prediction_type], timestep, x).prev_sample
    return float(x.std())


@pytest.mark.parametrize(("name", "steps"), [("ddpm", 1000), ("ddpm", 15), ("ddim", 27), ("ddim", 50), ("unipc", 15), ("dpm-solver++", 15)])
def test_samplers_begin_where_a_predicted_noise_still_tells_the_photo(name, steps):
    """The cosine schedule ends at a = 1e-9, by whose root an error of the predicted noise is divided: DDIM gave 4.5 in place of 1."""
    trained_with = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing="trailing")
    sampler = build_sampler(name, trained_with)
    steps = possible_steps(sampler, steps)
    exact = sampled_deviation(sampler, 1.0, steps)  # 0.87 in 15 steps of DDPM, whose fresh noise is coarse by itself
    assert sampled_deviation(sampler, 1.0, steps, error=0.02) == pytest.approx(exact, abs=0.05)
    assert exact == pytest.approx(1, abs=0.15 if name == "ddpm" else 0.05)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", [150, 400, 600, 999])
def test_ddim_leaves_no_noise_at_any_number_of_steps(steps, schedule, prediction_type):
    trained_with = DDPMScheduler(beta_schedule=schedule, prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing")
    assert sampled_deviation(build_sampler("ddim", trained_with), 0.3, steps) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "unipc", "dpm-solver++"])
@pytest.mark.parametrize(("schedule", "prediction_type"), [("linear", "v_prediction"), ("squaredcos_cap_v2", "epsilon")])
def test_no_timestep_lies_below_0_at_any_number_of_steps(name, schedule, prediction_type):
    """At 62 numbers of steps diffusers' spacing of 1000 timesteps places one at -1, the noisiest: the last step brought the noise back."""
    trained_with = DDPMScheduler(beta_schedule=schedule, prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing")
    sampler = build_sampler(name, trained_with)
    for steps in (*range(1, 131), 201, 300, 397, 996, 1000):
        possible = possible_steps(sampler, steps)
        sampler.set_timesteps(possible)
        assert sampler.timesteps.min() >= 0
        assert len(sampler.timesteps.unique()) == len(sampler.timesteps) == possible or name == "dpm-solver++"
        assert possible >= min(steps, sampler.config.num_train_timesteps) - 2 or name == "dpm-solver++"


def test_the_pipeline_warns_of_a_timestep_below_0():
    pipe = build("v_prediction")
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with pytest.warns(UserWarning, match="below 0 at 61 steps"):
        pipe(1, 0, num_inference_steps=61, output_type="latent")


@pytest.mark.parametrize("error", [0.0, 0.02])
def test_ddim_at_61_steps_is_as_at_62(error):
    """It was 0 without an error, and 3.1 with: the library places a timestep at -1."""
    sampler = build_sampler("ddim", DDPMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"))
    assert sampled_deviation(sampler, 0.3, 61, error) == pytest.approx(sampled_deviation(sampler, 0.3, 62, error), abs=0.01)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_is_the_librarys_where_the_steps_divide_the_timesteps(prediction_type, eta):
    trained_with = DDPMScheduler(prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing")
    ours, theirs = build_sampler("ddim", trained_with), DDIMScheduler.from_config(trained_with.config)
    x, prediction = torch.randn(2, 1, 4, 8, 8)
    for sampler in (ours, theirs):
        sampler.set_timesteps(50)
    for timestep in (999, 499, 19):
        found, expected = (s.step(prediction, timestep, x, eta=eta, generator=torch.Generator().manual_seed(0)) for s in (ours, theirs))
        assert torch.allclose(found.prev_sample, expected.prev_sample, atol=1e-5)


def test_the_librarys_ddim_at_other_steps_is_warned_of():
    pipe = build("v_prediction")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.warns(UserWarning, match="does not divide 1000: take 8"):
        pipe(1, 0, num_inference_steps=7, output_type="latent")
