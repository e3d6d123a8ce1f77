"""Aspect buckets: the image sizes, their batches, and runs, samples and evaluations with several sizes."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_photos, run_here, tool_here
from datasets import Dataset
from datasets import Image as ImageFeature
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from corel_diffusers.config.commands import Evaluate
from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.data.aspect import choose_sizes, kept_area, nearest_size, photo_shapes
from corel_diffusers.data.augmented_crops import AugmentedCrops
from corel_diffusers.data.batches import BLOCK_STEPS, BatchPlan, sizes_of_steps, training_batches
from corel_diffusers.data.decoding import fit_photo, open_photo
from corel_diffusers.data.latents import cache_moments, measure_latents
from corel_diffusers.data.mixed_sizes import MixedArray, join, parts_of
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import cache_large_pixels, cache_pixels
from corel_diffusers.evaluation.evaluate import make_samples
from corel_diffusers.evaluation.inputs import ComparedPhotos
from corel_diffusers.evaluation.judge import stratified_rows
from corel_diffusers.files import UserError
from corel_diffusers.losses.diffusion import Diffusion
from corel_diffusers.models.unet import build_unet
from corel_diffusers.models.vae import build_vae
from corel_diffusers.training import gauge
from pipeline import CorelPipeline

CPU = torch.device("cpu")
WIDE, TALL = (32, 48), (48, 32)


@pytest.fixture(scope="module")
def mixed_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders in which two thirds of the photos are wide and one third is tall."""
    folder = tmp_path_factory.mktemp("mixed")
    make_photos(folder / "wide", each=8, size_px=(64, 96))
    make_photos(folder / "tall", each=4, size_px=(96, 64))
    for shape in ("wide", "tall"):
        (folder / shape / "classes.txt").unlink()
        for file in (folder / shape).glob("*.png"):
            target = folder / "photos" / f"class {file.name[3]}"
            target.mkdir(parents=True, exist_ok=True)
            file.rename(target / f"{shape}_{file.name}")
        (folder / shape).rmdir()
    return folder / "photos"


@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [
        ([(64, 96)] * 5 + [(96, 64)] * 3, [(64, 96), (96, 64)]),
        ([(64, 96)] * 3 + [(96, 64)] * 5, [(96, 64), (64, 96)]),
        ([(400, 400)] * 4, [(80, 80)]),
        ([(64, 96)] * 100 + [(96, 64)], [(64, 96)]),  # one photo does not justify a size
        ([(100, 400), (400, 100)] * 4, [(128, 48), (48, 128)]),  # the most extreme sizes
    ],
)
def test_the_sizes_are_those_in_which_the_photos_keep_the_most_of_their_area(shapes, sizes):
    assert choose_sizes(np.array(shapes), (64, 96), multiple=16) == sizes


def test_chosen_sizes_are_few_and_have_about_the_same_area():
    rng = np.random.default_rng(0)
    shapes = np.stack([rng.integers(100, 400, 500), rng.integers(100, 400, 500)], 1)
    sizes = choose_sizes(shapes, (64, 64), multiple=8)
    assert 2 < len(sizes) <= 5
    assert all(abs(height * width / 64**2 - 1) <= 0.1 for height, width in sizes)
    assert all(side % 8 == 0 for size in sizes for side in size)
    counts = np.bincount(nearest_size(shapes, sizes), minlength=len(sizes))
    assert (counts > 0).all()
    assert (np.diff(counts) <= 0).all(), "the most frequent size comes first"
    assert kept_area(shapes, sizes).max(1).mean() > kept_area(shapes, [(64, 64)]).mean() + 0.1


def test_sizes_are_multiples_and_no_photo_gives_the_given_size():
    squares_and_portraits = np.array([(100, 80)] * 6 + [(90, 90)] * 4)
    assert all(side % 16 == 0 for size in choose_sizes(squares_and_portraits, (72, 72), 16) for side in size)
    assert choose_sizes(np.empty((0, 2), int), (64, 96), 16) == [(64, 96)]
    with pytest.raises(UserError, match="--image-size 40"):
        choose_sizes(squares_and_portraits, (40, 40), 64)


def test_shapes_are_those_of_the_upright_photos():
    def row(width: int, height: int, orientation: int = 1, kind: str = "JPEG") -> dict:
        buffer, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (width, height)).save(buffer, kind, exif=exif)
        return {"bytes": buffer.getvalue(), "path": None}

    rows = [row(60, 40, *values) for values in ((), (6,), (3,), (6, "TIFF"), (1, "TIFF"), (8, "PNG"), (1, "PNG"))]
    photos = Dataset.from_dict({"image": [*rows, {"bytes": b"no photo", "path": None}]})
    shapes = photo_shapes(photos.cast_column("image", ImageFeature())).tolist()
    assert shapes == [[40, 60], [60, 40], [40, 60], [60, 40], [40, 60], [60, 40], [40, 60], [1, 1]]
    for values, shape in zip(rows, shapes, strict=False):
        assert list(open_photo(values["bytes"]).size) == shape[::-1]


def test_mixed_pixels_equal_the_photos_resized_one_by_one(mixed_photos, tmp_path, capsys):
    photos = load_photos(mixed_photos)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no photo")
    rows = photos["train"].cast_column("image", ImageFeature(decode=False)).to_list()
    rows[3]["image"] = {"bytes": None, "path": str(broken)}
    photos["train"] = Dataset.from_list(rows, features=photos["train"].features)
    kept, pixels = cache_pixels(photos, WIDE, more_sizes_px=[TALL])
    assert f"1 photos cannot be read and are left out: {rows[3]['file_name']}" in capsys.readouterr().out
    assert len(kept["train"]) == len(pixels["train"]) == len(rows) - 1
    for split, part in kept.items():
        for index, image in enumerate(part["image"]):
            size = TALL if image.height > image.width else WIDE
            assert np.array_equal(pixels[split].values[index], np.asarray(fit_photo(image.convert("RGB"), size)))
    large = cache_large_pixels(kept, WIDE, more_sizes_px=[TALL])
    assert [image.shape[:2] for image in large.values] == [
        (64, 96) if image.shape[:2] == WIDE else (96, 64) for image in pixels["train"].values
    ]
    assert pixels["train"].sizes_px() == [image.shape[:2] for image in pixels["train"].values]
    few = pixels["train"].evenly_spaced(5)
    assert len(few) == 5
    assert sum(len(part) for _, part in few.by_size()) == 5
    batches = list(pixels["train"].batches(4))
    assert sorted(row for rows, _ in batches for row in rows) == list(range(len(pixels["train"])))


def test_a_mixed_array_is_indexed_like_one_array():
    values = [np.full((2, 3 + index % 2), index) for index in range(7)]
    parts = [(np.arange(0, 7, 2), np.stack(values[::2])), (np.arange(1, 7, 2), np.stack(values[1::2]))]
    mixed = join(parts)
    assert len(mixed) == 7
    assert all(np.array_equal(a, b) for a, b in zip(mixed, values, strict=True))
    assert np.array_equal(mixed[[4, 0]], np.stack([values[4], values[0]]))
    assert np.array_equal(mixed[[4, 0], [1, 0]], np.stack([values[4][1], values[0][0]]))
    for got, expected in zip(mixed[2:5], values[2:5], strict=True):
        assert np.array_equal(got, expected)
    for got, expected in zip(mixed[[3, 6], [0, 1]], (values[3][0], values[6][1]), strict=True):
        assert np.array_equal(got, expected)
    chosen = mixed.select(np.array([5, 1, 2]))
    assert [int(value[0, 0]) for value in chosen] == [5, 1, 2]
    assert join(parts[:1]) is parts[0][1], "photos of one size are a plain array"
    with pytest.raises(IndexError):
        mixed[7]


def test_each_batch_has_one_size_and_each_size_its_fraction_of_the_steps():
    sizes = [np.arange(0, 40, 4), np.setdiff1d(np.arange(40), np.arange(0, 40, 4))]
    plan = BatchPlan(40, 5, 1, 1, 0, seed=3, photos_by_size=sizes)
    batches = [plan.indices(step, 0) for step in range(160)]
    size_of = [0 if batch[0] % 4 == 0 else 1 for batch in batches]
    assert all(set(batch % 4 == 0) in ({True}, {False}) for batch in batches)
    for steps in (20, 40, 160):
        assert abs(size_of[:steps].count(0) - steps / 4) <= 2
    uses = np.bincount(np.concatenate(batches), minlength=40)
    for photos in sizes:
        assert uses[photos].max() - uses[photos].min() <= 1, "photos of one size are used equally often"


def test_the_sizes_of_steps_do_not_depend_on_the_block():
    """The second block continues the first one: this is what a resumed run reads."""
    counts = (30, 12, 5)
    sizes, earlier = zip(*(sizes_of_steps(counts, block) for block in (0, 1)), strict=True)
    sizes, earlier = np.concatenate(sizes), np.concatenate(earlier)
    for step in (0, 7, BLOCK_STEPS - 1, BLOCK_STEPS, BLOCK_STEPS + 100):
        assert earlier[step] == (sizes[:step] == sizes[step]).sum()


def test_a_batch_of_several_ranks_has_one_size():
    sizes = [np.arange(20), np.arange(20, 33)]
    single = BatchPlan(33, 8, 1, 1, 0, seed=1, photos_by_size=sizes)
    for step in range(6):
        parts = [
            BatchPlan(33, 2, 2, 2, rank, seed=1, photos_by_size=sizes).indices(step, micro_step)
            for micro_step in range(2)
            for rank in range(2)
        ]
        assert np.array_equal(np.concatenate(parts), single.indices(step, 0))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_batches_of_mixed_arrays_equal_indexing(num_workers):
    rows = [np.arange(0, 12, 3), np.setdiff1d(np.arange(12), np.arange(0, 12, 3))]
    arrays = [np.random.default_rng(size).random((len(photos), 2, 3 + size)) for size, photos in enumerate(rows)]
    mixed, labels = MixedArray.of(list(zip(rows, arrays, strict=True))), np.arange(24).reshape(12, 2)
    plan = BatchPlan(12, 4, 1, 1, 0, seed=0, photos_by_size=rows)
    versions = [np.random.default_rng(step).integers(2, size=4) for step in range(8)]
    batches = training_batches(plan, 2, 8, num_workers, mixed, labels, versions=versions.__getitem__)
    for step, (values, batch_labels) in enumerate(batches, 2):
        photos = plan.indices(step, 0)
        assert np.array_equal(values, mixed[photos, versions[step]])
        assert np.array_equal(batch_labels, labels[photos, versions[step]])


def test_moments_of_mixed_photos_equal_those_of_each_photo(mixed_photos):
    torch.manual_seed(0)
    vae = build_vae("tiny", WIDE).eval()
    photos, pixels = cache_pixels(load_photos(mixed_photos), WIDE, more_sizes_px=[TALL])
    large = cache_large_pixels(photos, WIDE, more_sizes_px=[TALL])
    crops = AugmentedCrops.of(large, 2, pixels["train"])
    moments = cache_moments(vae, pixels["train"], CPU, crops)
    assert [part.shape[1:] for part in parts_of(moments)] == [(6, 8, 8, 12), (6, 8, 12, 8)]
    for index in (0, 5, len(moments) - 1):
        image = torch.from_numpy(pixels["train"].values[index][None]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(image).latent_dist
        assert np.allclose(moments[index][0, :4], posterior.mean[0], atol=1e-5)
    mean, std, _ = measure_latents(moments)
    parts = [np.asarray(part)[:, :, :4].transpose(2, 0, 1, 3, 4).reshape(4, -1) for part in parts_of(moments)]
    means = np.concatenate(parts, axis=1)
    assert np.allclose(mean, means.mean(1), atol=1e-5)
    assert (np.array(std) > means.std(1)).all()


def test_a_saved_pipeline_keeps_the_order_of_its_sizes(tmp_path):
    vae = build_vae("tiny", (32, 48))
    sizes = {"48x32": 9, "32x48": 4, "16x96": 4}
    pipe = CorelPipeline(vae, build_unet("tiny", (48, 32), vae, None), DDPMScheduler(), image_sizes=sizes)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert list(loaded.config.image_sizes) == ["48x32", "16x96", "32x48"]
    assert loaded.default_size == (48, 32)


def test_the_gauge_compares_photos_of_the_same_size_and_class():
    """In the smaller size, one class has no training photo: photos of other classes take its place."""
    shapes = {"wide": (4, 6), "tall": (6, 4)}
    labels = {"train": np.array([0, 0, 0, 1, 1, 1, 0, 0]), "validation": np.array([0, 1, 0, 1, 1])}
    kinds = {"train": "wide wide wide wide wide wide tall tall", "validation": "wide wide tall tall tall"}
    moments = {}
    for split, names in kinds.items():
        parts = []
        for kind, shape in shapes.items():
            rows = np.flatnonzero(np.array(names.split()) == kind)
            values = np.broadcast_to(rows[:, None, None, None, None], (len(rows), 2, 8, *shape)).astype(np.float32)
            parts.append((rows, values))
        moments[split] = MixedArray.of(parts)
    config = SimpleNamespace(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scaling_factor=1.0)
    vae = SimpleNamespace(config=config, device=CPU)
    measured = gauge.OverfittingGauge.of(vae, moments, labels, True, Diffusion.of(UNetArguments()))
    for seen, held_out in zip(measured.training_sets, measured.held_out_sets, strict=True):
        assert torch.equal(seen.noise, held_out.noise), "the same noise, so the same size and number"
        assert torch.equal(seen.timesteps, held_out.timesteps)
    rows = [sorted(set(part.latents[:, 0, 0, 0].int().tolist())) for part in measured.training_sets]
    assert rows[0] == [0, 3], "one photo of each class of the wide held-out photos"
    assert rows[1] == [6, 7]


@pytest.fixture(scope="module")
def trained(mixed_photos: Path, configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vae/ and unet/: runs with --aspect-buckets."""
    folder = tmp_path_factory.mktemp("aspect")
    shared = ["--data-dir", mixed_photos, "--aspect-buckets", "--batch-size", 4, "--mixed-precision", "no",
              "--epochs", 2]  # fmt: skip
    run_here("train_vae", [*shared, "--config", configs / "vae.json", "--image-size", "32x48", "--sample-every", 1,
                           "--output-dir", folder / "vae"])  # fmt: skip
    run_here("train_unet", [*shared, "--config", configs / "unet.json", "--vae-checkpoint", folder / "vae",
                            "--views", 2, "--sample-every", 1, "--evaluate-every", 1,
                            "--output-dir", folder / "unet"])  # fmt: skip
    for run in ("vae", "unet"):
        assert json.loads((folder / run / "run.json").read_text())["sizes_px"] == [[32, 48], [48, 32]]
    return folder


def test_the_pipeline_draws_in_each_of_its_sizes(trained):
    pipe = DiffusionPipeline.from_pretrained(trained / "unet", trust_remote_code=True)
    assert list(pipe.config.image_sizes) == ["32x48", "48x32"]
    assert "32x48, 48x32, for example `pipe(height=48, width=32)`" in (trained / "unet" / "README.md").read_text()
    assert pipe.config.image_sizes["32x48"] > pipe.config.image_sizes["48x32"]
    draw = {"num_images": 2, "num_inference_steps": 2, "output_type": "np"}
    assert pipe(**draw).images.shape == (2, 32, 48, 3)
    generator = torch.Generator().manual_seed(0)
    tall = pipe(**draw, height=48, width=32, generator=generator).images
    assert tall.shape == (2, 48, 32, 3)
    generator.manual_seed(0)
    latents = torch.randn(2, 4, 12, 8, generator=generator)
    assert np.array_equal(tall, pipe(**draw, height=48, width=32, latents=latents, generator=generator).images)
    with pytest.warns(UserWarning, match=r"trained on images of 32x48, 48x32 pixels .* images of 48x48 will be worse"):
        assert pipe(**draw, height=48).images.shape == (2, 48, 48, 3)
    with pytest.raises(ValueError, match="height=30, width=48: give multiples of 8"):
        pipe(**draw, height=30)


def test_generate_draws_in_a_size_and_refuses_others(trained, tmp_path):
    flags = ["--pipeline", trained / "unet", "--num-images", 2, "--steps", 2, "--output", tmp_path / "g.png"]
    tool_here("generate", *flags, "--size", "48x32")
    assert Image.open(tmp_path / "g_individual" / "image_0001.png").size == (32, 48)
    done = tool_here("generate", *flags, "--size", "64", check=False)
    assert done.returncode == 2
    assert "--size 64: the pipeline was trained on 32x48, 48x32: give one of these sizes" in done.stderr
    done = tool_here("generate", *flags, "--size", "large", check=False)
    assert done.returncode == 2
    assert "--size large: give pixels as 128, or as 96x144 (height x width)" in done.stderr


def test_evaluate_compares_samples_and_photos_of_the_same_sizes(trained, mixed_photos, tmp_path):
    done = tool_here("evaluate", "--pipeline", trained / "unet", "--data-dir", mixed_photos, "--against", "all",
                     "--num-images", 12, "--steps", 2, "--output-dir", tmp_path)  # fmt: skip
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert results["sizes_px"] == [[32, 48], [48, 32]]
    assert "32x48 and 48x32 px" in done.stdout
    assert results["generation"]["n"] == [12, 36]
    assert results["copies"]["n"]["pictures"] == 12
    photos = ComparedPhotos.load(
        Evaluate(data_dir=str(mixed_photos), pipeline=str(trained / "unet"), against="all"),
        DiffusionPipeline.from_pretrained(trained / "unet", trust_remote_code=True),
        [WIDE, TALL],
        CPU,
    )
    assert sorted(set(photos.pixels["all"].sizes_px())) == [WIDE, TALL]
    assert len(photos.training_pixels()) == len(photos.files["train"])


def test_the_samples_of_an_evaluation_have_the_sizes_of_the_photos(trained, mixed_photos):
    pipe = DiffusionPipeline.from_pretrained(trained / "unet", trust_remote_code=True)
    args = Evaluate(
        data_dir=str(mixed_photos), pipeline=str(trained / "unet"), against="all", num_images=6, steps=1, device="cpu"
    )
    photos = ComparedPhotos.load(args, pipe, [WIDE, TALL], CPU)
    images, _, _ = make_samples(replace(args, mixed_precision="no"), pipe, photos)
    sizes_px = photos.pixels["all"].sizes_px()
    expected = [sizes_px[row] for row in stratified_rows(photos.labels["all"], 6)]
    assert sorted((image.height, image.width) for image in images) == sorted(expected)
    assert set(expected) == {WIDE, TALL}


@pytest.mark.parametrize("name", ["train_vae", "train_unet"])
def test_a_resumed_run_with_several_sizes_equals_the_uninterrupted_run(name, trained, mixed_photos, configs, tmp_path):
    flags = ["--data-dir", mixed_photos, "--aspect-buckets", "--batch-size", 2, "--grad-accum", 2, "--epochs", 3,
             "--mixed-precision", "no", "--checkpoint-every", 1]  # fmt: skip
    if name == "train_vae":
        flags += ["--config", configs / "vae.json", "--image-size", "32x48"]
        weights = "diffusion_pytorch_model.safetensors"
    else:
        flags += ["--config", configs / "unet.json", "--vae-checkpoint", trained / "vae"]
        weights = "unet/diffusion_pytorch_model.safetensors"
    run_here(name, [*flags, "--output-dir", tmp_path / "whole"])
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    first, *later = sorted((tmp_path / "resumed" / "checkpoints").iterdir())
    for checkpoint in later:
        shutil.rmtree(checkpoint)
    (tmp_path / "resumed" / weights).unlink()
    run_here(name, [*flags, "--output-dir", tmp_path / "resumed", "--resume", first])
    whole, resumed = (load_file(tmp_path / run / weights) for run in ("whole", "resumed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_unet_on_the_centre_of_photos_names_the_flag(trained, mixed_photos, configs, tmp_path, capsys):
    flags = ["--data-dir", mixed_photos, "--config", configs / "unet.json", "--batch-size", 4, "--vae-checkpoint",
             trained / "vae", "--max-train-steps", 1, "--output-dir", tmp_path]  # fmt: skip
    run_here("train_unet", flags)
    assert "notice: the VAE was trained with --aspect-buckets" in capsys.readouterr().out
    assert json.loads((tmp_path / "model_index.json").read_text())["image_sizes"] is None
