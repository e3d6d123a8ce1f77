"""Distances against the libraries' own, copies that were planted, and the command on a trained pipeline and on folders."""

import importlib.util
import json
import shutil
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT, make_photos, tool
from diffusers import DDPMScheduler
from PIL import Image, ImageFilter
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.kid import poly_mmd

from corel_diffusers.data.duplicates import duplicate_groups, photo_hashes
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.scenes import CLASS_NAMES, draw_scene
from corel_diffusers.data.transforms import Pixels, cache_pixels, to_float
from corel_diffusers.evaluation import evaluate as evaluation
from corel_diffusers.evaluation import features as feature_networks
from corel_diffusers.evaluation import memorization, metrics, report
from corel_diffusers.evaluation.evaluate import reconstruct, reconstruction_scores, render
from corel_diffusers.files import UserError
from corel_diffusers.hub import write_card
from corel_diffusers.models import build_unet, build_vae
from corel_diffusers.perceptual import PerceptualLoss
from corel_diffusers.precision import autocast
from pipeline import CorelPipeline

CPU = torch.device("cpu")


def gaussian(n, d=12, shift=0.0, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, 1, (n, d)))


def test_kid_is_torchmetrics_on_the_same_features():
    a, b = gaussian(40), gaussian(40, shift=0.3, seed=1)
    assert metrics.kernel_distance(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)


def test_kid_of_sets_of_two_sizes_is_the_mean_over_all_pairs():
    a, b = gaussian(7), gaussian(5, seed=1)
    k = lambda x, y: (float(x @ y) / 12 + 1) ** 3  # noqa: E731
    within = [np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    between = np.mean([k(x, y) for x in a for y in b])
    assert metrics.kernel_distance(a, b) == pytest.approx(sum(within) - 2 * between)


def test_pictures_made_from_the_photos_are_as_far_as_pictures_made_from_others():
    """Photos, and noisy versions of them: with their own photos left out the mean is that of versions of other photos."""
    own, others, counted = [], [], []
    for seed in range(200):
        photos, more, noise = gaussian(20, seed=seed), gaussian(20, seed=1000 + seed), 0.5 * gaussian(20, seed=2000 + seed)
        own.append(metrics.kernel_distance(photos + noise, photos, paired=True))
        counted.append(metrics.kernel_distance(photos + noise, photos))
        others.append(metrics.kernel_distance(more + noise, photos))
        low, high = metrics.kernel_interval(photos + noise, photos, paired=True, resamples=50)
        assert low < own[-1] < high
    spread = np.std(others) / 200**0.5
    assert abs(np.mean(own) - np.mean(others)) < 3 * spread
    assert np.mean(counted) < np.mean(others) - 10 * spread, "the pairs themselves make it too low"
    assert metrics.precision_recall(photos, photos, paired=True)[0] < 1


@pytest.mark.parametrize("counts", [(60, 50), (60, 9), (8, 9)])  # of 12 values: more pictures than values, or fewer
def test_frechet_distance_is_scipys_matrix_root(counts):
    a, b = gaussian(counts[0]), gaussian(counts[1], shift=0.5, seed=1) * 1.5
    covariance = [np.cov(x.numpy().T) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariance[0] @ covariance[1]).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(covariance[0] + covariance[1] - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_a_set_against_itself_is_at_distance_zero():
    a = gaussian(30, d=100)  # fewer pictures than values: no covariance of full rank
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert metrics.precision_recall(a, a) == (1.0, 1.0)
    assert metrics.kernel_distance(a, a, paired=True) == pytest.approx(0, abs=1e-9)
    assert metrics.kernel_distance(a, a) < 0, "each picture beside itself makes it too low"


def test_precision_and_recall_by_hand():
    photos = torch.tensor([[0.0], [1.0], [2.0], [10.0]], dtype=torch.float64)
    pictures = torch.tensor([[0.5], [1.5], [30.0], [31.0]], dtype=torch.float64)
    precision, recall = metrics.precision_recall(pictures, photos, neighbour=1)
    assert precision == 0.5, "two pictures lie within 1 of a photo, or 8 of the lonely one"
    assert recall == 0.75, "three photos lie within 1 of a picture"


def classed(counts, seed, d=12):
    """Draws of a perfect model, and of photos: so many of each class, whose means lie far apart -> features, labels."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    means = 1.5 * gaussian(len(counts), d, seed=99)
    return means[labels] + gaussian(len(labels), d, seed=seed), labels


@pytest.mark.parametrize(
    ("pictures", "photos"),
    [
        ([42] * 6, [8, 8, 8, 8, 9, 9]),  # 252 and 50, as of `evaluate`
        ([8] * 6, [5] * 6),  # 48 and 30, as of `--evaluate-every`
        ([2] * 6, [5] * 6),
        ([5] * 12, [60] * 3 + [1] * 9),  # other shares, and classes of one photo
        ([3] * 4, [1] * 4),  # of no class there are two
    ],
)
def test_a_perfect_model_reads_zero_at_any_size_and_class_mix(pictures, photos):
    found, counted = [], []
    for seed in range(200):
        (a, labels_a), (b, labels_b) = classed(pictures, 2 * seed), classed(photos, 2 * seed + 1)
        found.append(metrics.kernel_distance(a, b, labels_a=labels_a, labels_b=labels_b))
        counted.append(metrics.kernel_distance(a, b))
    error = np.std(found) / 200**0.5
    assert abs(np.mean(found)) < 3 * error
    assert abs(np.mean(counted)) > 5 * error, "as if all were drawn at random it is off"


def test_pictures_without_labels_read_zero_beside_photos_in_fixed_numbers():
    found, counted, shares = [], [], torch.tensor([0.2, 0.3, 0.5])
    for seed in range(200):
        drawn = torch.multinomial(shares, 40, replacement=True, generator=torch.Generator().manual_seed(seed)).bincount(minlength=3)
        a, (b, labels_b) = classed(drawn.tolist(), 2 * seed)[0], classed([2, 3, 5], 2 * seed + 1)
        found.append(metrics.kernel_distance(a, b, labels_b=labels_b))
        counted.append(metrics.kernel_distance(a, b))
    error = np.std(found) / 200**0.5
    assert abs(np.mean(found)) < 3 * error
    assert np.mean(counted) < -5 * error


def test_kid_with_labels_is_the_mean_over_pairs_of_classes():
    """By hand: classes 0 and 1 of shares 2/3 and 1/3 among the photos."""
    a, labels_a, b, labels_b = gaussian(5), torch.tensor([0, 0, 1, 1, 1]), gaussian(6, seed=1), torch.tensor([0, 0, 0, 0, 1, 1])
    k = lambda x, y: (float(x @ y) / 12 + 1) ** 3  # noqa: E731
    expected = 0.0
    for (left, labels_left), (right, labels_right), factor in (
        ((a, labels_a), (a, labels_a), 1), ((b, labels_b), (b, labels_b), 1), ((a, labels_a), (b, labels_b), -2),
    ):  # fmt: skip
        for (one, share), (other, other_share) in product(((0, 2 / 3), (1, 1 / 3)), repeat=2):
            pairs = product((labels_left == one).nonzero().flatten(), (labels_right == other).nonzero().flatten())
            values = [k(left[i], right[j]) for i, j in pairs if left is not right or i != j]
            expected += factor * share * other_share * np.mean(values)
    assert metrics.kernel_distance(a, b, labels_a=labels_a, labels_b=labels_b) == pytest.approx(expected)


@pytest.fixture(scope="module")
def scene_features(network):
    """Real features of 40 scenes of each of six classes, of the same blurred, and the labels."""
    scenes = [draw_scene(label, np.random.default_rng([label, place])).resize((32, 32)) for label in range(6) for place in range(40)]
    blurred = [scene.filter(ImageFilter.GaussianBlur(0.7)) for scene in scenes]
    features = (feature_networks.extract(network, feature_networks.as_array(pictures)) for pictures in (scenes, blurred))
    return *features, torch.arange(6).repeat_interleave(40)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("sizes", [(120, 48), (48, 30)])
def test_the_interval_covers_repeated_draws_of_real_features(scene_features, alike, sizes):
    """As many of each class, drawn from the scenes, against others of them or blurred ones; the truth is the distance of all."""
    photos, blurred, labels = scene_features
    pictures = photos if alike else blurred
    truth = float((metrics.kernel(pictures, pictures) + metrics.kernel(photos, photos) - 2 * metrics.kernel(pictures, photos)).mean())
    rng, inside, widths, values = np.random.default_rng(0), 0, [], []
    for _ in range(400):
        rows = [torch.from_numpy((rng.integers(40, size=(6, size // 6)) + 40 * np.arange(6)[:, None]).ravel()) for size in sizes]
        sets = pictures[rows[0]], photos[rows[1]], False, labels[rows[0]], labels[rows[1]]
        low, high = metrics.kernel_interval(*sets, resamples=400)
        inside += low <= truth <= high
        values.append(metrics.kernel_distance(*sets))
        widths.append(high - low)
    assert 0.91 * 400 <= inside <= 0.99 * 400, f"a 95 % interval covered {inside} of 400 times"
    assert 0.8 < np.mean(widths) / (3.92 * np.std(values)) < 1.2
    assert abs(np.mean(values) - truth) < 3 * np.std(values) / 20


def test_the_interval_of_halves_is_that_of_the_splits():
    features, labels = classed([12, 12, 9], 0)
    found = metrics.halves(features, labels)
    rng, distances = np.random.default_rng(0), []
    for _ in range(100):
        order = rng.permutation(33)
        order = order[np.argsort(labels[order], kind="stable")]
        a, b = order[::2], order[1::2]
        distances.append(1e3 * metrics.kernel_distance(features[a], features[b], False, labels[a], labels[b]))
    assert found["kid_e3"] == pytest.approx(np.mean(distances))
    assert np.mean([found["kid_e3_low"] <= value <= found["kid_e3_high"] for value in distances]) == pytest.approx(0.94, abs=0.02)


def test_reconstructions_have_no_frechet_distance_to_their_own_photos():
    """Both sets share the chance that chose the photos: it is far below that of reconstructions of others."""
    photos, others = gaussian(50), gaussian(50, seed=1)
    noise = 0.3 * gaussian(50, seed=2)
    assert metrics.frechet_distance(photos + noise, photos) < 0.5 * metrics.frechet_distance(others + noise, photos)
    assert metrics.compare(photos + noise, photos, paired=True)["fd"] is None
    floor = metrics.compare(photos + noise, photos, paired=True)
    results = {"held_out": "test", "generation": metrics.compare(others, photos), "reconstruction": floor}
    assert [row[3] for row in report.distance_rows(results)[1:]] == [f"{results['generation']['fd']:.1f}", "-"]


def test_a_class_is_judged_by_its_held_out_photos_where_there_are_enough():
    pictures, train, held_out = classed([6, 6], 0), classed([20, 20], 1), classed([8, 3], 2)
    both = torch.cat([train[0], held_out[0]]), torch.cat([train[1], held_out[1]])
    found = evaluation.class_scores(["many", "few"], pictures, train, both, held_out)
    assert [found[name]["against"] for name in ("many", "few")] == ["held-out", "all"]
    assert found["many"]["kid_e3"] == pytest.approx(1e3 * metrics.kernel_distance(pictures[0][:6], held_out[0][:8]))
    assert found["few"]["n"] == [6, 23]
    assert [row[1] for row in report.class_rows({"classes": found})[1:]] == ["held-out", "all, trained on too"]


def test_the_interval_covers_the_true_distance():
    """Sets of 60 and 40 from two normals; the truth is the kernel's closed form, by moments of independent coordinates."""
    d, shift = 6, 0.5

    def mean_kernel(mean_a, mean_b):  # E (x.y / d + 1)^3 of independent x, y with these means and unit variance
        big = np.random.default_rng(9)
        x, y = big.normal(mean_a, 1, (400_000, d)), big.normal(mean_b, 1, (400_000, d))
        return ((x * y).sum(1) / d + 1) ** 3

    truth = float((mean_kernel(0, 0) + mean_kernel(shift, shift) - 2 * mean_kernel(0, shift)).mean())
    inside, widths, values = 0, [], []
    for trial in range(100):
        a, b = gaussian(60, d, 0, 2 * trial), gaussian(40, d, shift, 2 * trial + 1)
        low, high = metrics.kernel_interval(a, b, resamples=300)
        inside += low <= truth <= high
        assert low <= metrics.kernel_distance(a, b) <= high
        widths.append(high - low)
        values.append(metrics.kernel_distance(a, b))
    assert np.mean(widths) < 2 * 3.92 * np.std(values), "it is as wide as the values spread, not wider than twice that"
    assert inside >= 90, f"a 95 % interval covered {inside} of 100 times"


def test_colours_by_hand():
    left = np.zeros((2, 4, 3), np.uint8)
    left[:, :2] = (200, 100, 0)  # red - green 100, (red + green) / 2 - blue 150 on one half, 0 on the other
    found = metrics.colour_statistics(np.stack([left, left[:, ::-1]]))
    assert [found[name] for name in ("red", "green", "blue")] == [100, 50, 0]
    assert found["contrast"] == pytest.approx(np.std([200, 100, 0, 0, 0, 0]))
    assert found["colourfulness"] == pytest.approx(np.hypot(50, 75) + 0.3 * np.hypot(50, 75))


def test_class_match_and_diversity():
    photos = torch.cat([gaussian(20, shift=-2), gaussian(20, shift=2, seed=1)])
    labels = torch.arange(2).repeat_interleave(20)
    own = torch.cat([gaussian(5, shift=-2, seed=2), gaussian(5, shift=2, seed=3)])
    assert metrics.class_match(own, torch.arange(2).repeat_interleave(5), photos, labels).all()
    assert not metrics.class_match(own, 1 - torch.arange(2).repeat_interleave(5), photos, labels).any()
    assert metrics.within_class_distance(photos, labels) > 5 * metrics.within_class_distance(photos * 0.1, labels)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    return cache_pixels(load_photos(make_photos(tmp_path_factory.mktemp("many") / "corel", classes=4, each=12)), (48, 48))[1]


@pytest.fixture
def vae(configs):
    torch.manual_seed(0)
    return build_vae(str(configs / "vae.json"), (48, 48)).eval()


@pytest.fixture(scope="module")
def network():
    return feature_networks.load_network("efficientnet-lite0", CPU)


@pytest.mark.parametrize("plant", ["as it is", "mirrored", "cropped", "mirrored, cropped and noisy"])
def test_planted_copies_are_found(pixels, plant):
    finder = memorization.CopyFinder.of(pixels["train"], pixels["train"], CPU)
    copies = np.array(pixels["train"].values[:8])
    if "mirrored" in plant:
        copies = copies[:, :, ::-1]
    if "cropped" in plant:
        copies = np.stack([memorization.cropped(copy, (0.9, 0.03, 0.06)) for copy in copies])
    if "noisy" in plant:
        copies = np.clip(copies + np.random.default_rng(0).normal(0, 4, copies.shape), 0, 255).astype(np.uint8)
    in_pixels, in_features = finder.search(np.ascontiguousarray(copies))
    assert in_pixels.photo.tolist() == list(range(8))
    assert in_pixels.share_below(memorization.PIXEL_RATIO) >= 0.75
    if plant in ("as it is", "mirrored"):
        assert in_features.photo.tolist() == list(range(8))
        assert in_features.share_below(finder.feature_ratio) == 1


def test_a_corner_of_a_photo_is_found_in_features(pixels):
    finder = memorization.CopyFinder.of(pixels["train"], pixels["train"], CPU)
    corners = product((0, 1 / 8), repeat=2)
    copies = np.stack([memorization.cropped(pixels["train"].values[0], (7 / 8, left, top)) for left, top in corners])
    found = finder.in_features(np.concatenate([copies, copies[:, :, ::-1]]))
    assert found.photo.tolist() == [0] * 8
    assert found.share_below(finder.feature_ratio) == 1


@pytest.mark.parametrize("mirrored", [False, True])
def test_plain_pictures_are_no_duplicates_of_each_other(mirrored):
    """Of drawn scenes 145 hang together by their hashes, though they are others: beside such a group a new one would stand out."""
    scenes = np.stack(
        [np.asarray(draw_scene(label, np.random.default_rng([3, label, i])).resize((48, 48))) for label in (0, 1, 5) for i in range(80)]
    )
    scenes = np.ascontiguousarray(scenes[:, :, ::-1]) if mirrored else scenes
    by_hash = np.bincount(duplicate_groups([photo_hashes(Image.fromarray(scene)) for scene in scenes]))
    finder = memorization.CopyFinder.of(*[Pixels(scenes, f"plain-{mirrored}")] * 2, CPU)
    assert by_hash.max() > 10
    assert finder.groups.bincount().max() <= 3
    novel = np.stack(
        [np.asarray(draw_scene(label, np.random.default_rng([4, label, i])).resize((48, 48))) for label in (0, 1, 5) for i in range(20)]
    )
    assert finder.in_pixels(novel).share_below(memorization.PIXEL_RATIO) == 0


@pytest.mark.parametrize("brighter", [0, 15, 25])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_copy_of_a_photo_that_is_there_twice_is_found(pixels, mirrored, brighter):
    photos = np.array(pixels["train"].values)
    saved_again = np.clip(photos[:1] + np.random.default_rng(0).normal(brighter, 2, photos[:1].shape), 0, 255).astype(np.uint8)
    saved_again = saved_again[:, :, ::-1] if mirrored else saved_again
    twice = Pixels(np.concatenate([photos, saved_again]), f"twice-{mirrored}-{brighter}")
    finder = memorization.CopyFinder.of(twice, twice, CPU)
    in_pixels, in_features = finder.search(photos[:1])
    assert in_pixels.photo.tolist() == in_features.photo.tolist() == [0]
    assert in_pixels.second.item() not in (0, len(photos))
    assert in_pixels.share_below(memorization.PIXEL_RATIO) == 1
    assert in_features.share_below(finder.feature_ratio) == 1


def test_in_features_the_crop_that_lies_as_the_picture_does_is_looked_at_as_well(pixels):
    finder = memorization.CopyFinder.of(pixels["train"], pixels["train"], CPU)
    copies = memorization.planted_copies(np.array(pixels["train"].values))
    alone, aligned = finder.in_features(copies), finder.search(copies)[1]
    own = torch.arange(len(copies))
    assert (aligned.ratio[aligned.photo == own] < finder.feature_ratio).sum() > 1.2 * (
        alone.ratio[alone.photo == own] < finder.feature_ratio
    ).sum()


def test_nothing_stands_out_of_photos_that_are_all_the_same():
    found = memorization.two_nearest(torch.zeros(1, 3), torch.zeros(3, dtype=torch.long))
    assert found.ratio.tolist() == [float("inf")]


def test_of_burst_photos_two_are_looked_at():
    distance, groups = torch.tensor([5.0, 1.0, 2.0, 3.0, 4.0, 9.0]), torch.tensor([1, 0, 0, 0, 0, 2])
    assert memorization.likeliest(distance, groups) == [1, 2, 0, 5]


def test_the_nearest_crops_of_the_likeliest_photos_are_those_of_all(pixels):
    photos = np.array(pixels["train"].values)
    copies = memorization.planted_copies(photos[:6])
    finder = memorization.CopyFinder.of(pixels["train"], pixels["train"], CPU)
    found = finder.search(copies)[0]
    places, scales = np.linspace(0, 1, 9), (0.66, 0.68, 0.7, 0.79, 0.81, 0.83, 0.91, 0.93, 0.95)
    crops = [(scale, (1 - scale) * left, (1 - scale) * top) for scale in scales for left in places for top in places]
    views = [torch.from_numpy(memorization.resize(photos, 32, crop).reshape(len(photos), -1)) for crop in crops]
    distance = memorization.distances(torch.from_numpy(memorization.resize(copies[:, :, ::-1], 32).reshape(6, -1)), views)
    of_all = memorization.two_nearest(distance, finder.groups)
    assert found.photo.tolist() == of_all.photo.tolist() == list(range(6))
    a_copy = of_all.ratio < memorization.PIXEL_RATIO
    assert a_copy.sum() >= 5
    assert (found.ratio[a_copy] < memorization.PIXEL_RATIO).all()


def test_two_photos_tell_no_ratio_that_is_a_number_of_nothing(pixels):
    two = Pixels(np.array(pixels["train"].values[:2]), "two")
    assert memorization.CopyFinder.of(two, two, CPU).feature_ratio == 0


def test_held_out_photos_are_no_copies(pixels):
    finder = memorization.CopyFinder.of(pixels["train"], pixels["train"], CPU)
    assert finder.shares(*finder.search(pixels["validation"].values[:]))["pixels"] == 0


def test_the_features_of_copies_are_means_of_nine_places(pixels):
    photos = pixels["train"].values[:2]
    places = feature_networks.extract(feature_networks.efficientnet_places(CPU), photos).numpy().reshape(2, 1280, 3, 3)
    with torch.no_grad():
        feature_map = feature_networks.efficientnet_map(CPU)(torch.from_numpy(photos)).numpy()
    for row, column in np.ndindex(3, 3):
        mean = feature_map[:, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].mean((2, 3))
        assert places[:, :, row, column] == pytest.approx(mean / np.linalg.norm(mean, axis=1, keepdims=True), abs=1e-3)
    mean = feature_networks.extract(feature_networks.load_network("efficientnet-lite0", CPU), photos)
    assert mean.numpy() == pytest.approx(feature_map.mean((2, 3)), abs=1e-5)


def test_views_of_a_photo_are_itself_and_windows_of_a_larger_map(pixels):
    photos = pixels["train"].values[:2]
    views = feature_networks.extract(feature_networks.efficientnet_crops(CPU), photos).reshape(2, feature_networks.VIEWS, -1)
    assert torch.equal(views[:, 0], feature_networks.extract(feature_networks.efficientnet_places(CPU), photos))
    with torch.no_grad():
        larger = feature_networks.efficientnet_map(CPU)(torch.from_numpy(photos), 256)
    assert larger.shape == (2, 1280, 8, 8)
    last = feature_networks.nine_places(larger[:, :, 1:, 1:])
    assert torch.allclose(views[:, -1].float(), last, atol=1e-3)


def test_photo_features_are_cached_and_the_uncached_ones(pixels, network):
    cached = feature_networks.photo_features(network, pixels["validation"])
    assert torch.equal(cached, feature_networks.extract(network, pixels["validation"].values))
    network_gone = feature_networks.Network(network.name, network.width, network.device, None)
    assert torch.equal(cached, feature_networks.photo_features(network_gone, pixels["validation"])), "the second time, nothing is computed"


def test_dinov2_is_transformers_own(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=224)).eval()
    model.save_pretrained(tmp_path)
    network = feature_networks.dinov2(CPU, str(tmp_path))
    pictures = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = model(((pictures / 255 - mean) / std).permute(0, 3, 1, 2)).last_hidden_state[:, 0]
    assert torch.allclose(feature_networks.extract(network, pictures.numpy()), expected.double(), atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is here, its weights may be")
def test_a_network_that_cannot_be_had_is_named_with_the_way_out():
    with pytest.raises(UserError, match="--features inception cannot be loaded .* use --features efficientnet-lite0"):
        feature_networks.load_network("inception", CPU)


def test_evaluate_a_pipeline(trained_unet, raw_photos, tmp_path):
    done = tool("evaluate", "--pipeline", trained_unet, "--data-dir", raw_photos, "--against", "all", "--num-images", 12, "--steps", 2,
                "--output-dir", tmp_path / "out")  # fmt: skip
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["generation"]["n"] == [12, 18]
    assert found["features"] == "efficientnet-lite0"
    assert set(found["classes"]) == set(CLASS_NAMES[:3])
    assert found["generation"]["kid_e3"] > 10 * abs(found["halves"]["kid_e3"]), "two epochs make no pictures"
    assert 5 < found["reconstruction"]["psnr_db"] < 30
    assert found["copies"]["pictures"]["pixels"] == 0
    assert found["reconstruction"]["fd"] is None
    planted = found["copies"]["planted"]
    told = f"the search finds {planted['pixels']:.0%} of them in pixels and {planted['features']:.0%} in features"
    assert told in done.stdout
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert told in page
    assert page.count("data:image/png;base64,") == 4
    assert 'src="http' not in page
    assert "KID x1000" in done.stdout
    assert f"{found['generation']['kid_e3']:.1f} [" in done.stdout


def test_each_class_is_drawn_as_often_as_it_is_photographed():
    pipe = SimpleNamespace(config=SimpleNamespace(class_names={"0": "dog", "1": "beach"}))
    labels, as_photos = evaluation.labels_to_draw(pipe, ["beach", "dog"], torch.tensor([0] * 9 + [1] * 3), 8)
    assert labels == [1] * 6 + [0] * 2
    assert as_photos.tolist() == [0] * 6 + [1] * 2
    assert evaluation.labels_to_draw(pipe, ["dog"], torch.tensor([0] * 5), 2)[0] == [0, 0], "of --classes dog, dogs only"
    assert evaluation.labels_to_draw(pipe, ["cat"], torch.tensor([0] * 5), 3) == ([0, 1, 0], None)


def test_evaluate_one_class(trained_unet, raw_photos, tmp_path):
    done = tool("evaluate", "--pipeline", trained_unet, "--data-dir", raw_photos, "--against", "all", "--num-images", 6, "--steps", 2,
                "--classes", CLASS_NAMES[1], "--output-dir", tmp_path)  # fmt: skip
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(found["classes"]) == [CLASS_NAMES[1]]
    assert found["generation"]["n"] == [6, 6]
    assert found["classes"][CLASS_NAMES[1]]["match_photos"] is None, "no photo is held out"
    assert f"of {CLASS_NAMES[1]}, 32x32 px, against all photos" in done.stdout


def test_reconstruction_in_parts_is_that_of_all_at_once(network):
    rng = np.random.default_rng(0)
    photos = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    made = np.clip(photos + rng.normal(0, rng.uniform(5, 40, (40, 1, 1, 1)), photos.shape), 0, 255).astype(np.uint8)
    found = reconstruction_scores(made, photos, network, feature_networks.extract(network, photos))
    a, b = (to_float(torch.from_numpy(x)) / 2 + 0.5 for x in (made, photos))
    assert found["psnr_db"] == pytest.approx(float(peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3))), rel=1e-6)
    assert found["ssim"] == pytest.approx(float(structural_similarity_index_measure(a, b, data_range=1.0)), rel=1e-5)
    with torch.no_grad():
        assert found["perceptual"] == pytest.approx(float(PerceptualLoss("efficientnet-lite0")(2 * a - 1, 2 * b - 1)), rel=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_photos_are_reconstructed_in_the_precision_that_samples_are_decoded_in(vae, pixels, configs, precision):
    photos = np.array(pixels["validation"].values)
    pipe = CorelPipeline(vae, build_unet(str(configs / "unet.json"), (48, 48), vae, None), DDPMScheduler())
    latents = vae.encode(to_float(torch.from_numpy(photos))).latent_dist.mean
    with autocast(precision, "cpu"), torch.no_grad():
        expected = feature_networks.as_array(pipe.decode(latents * vae.config.scaling_factor, "pil"))
    assert np.array_equal(reconstruct(vae, photos, precision), expected)


def test_rendered_photos_are_cached_by_the_vaes_weights(vae, pixels, monkeypatch):
    first = render(vae, pixels["validation"])
    assert np.array_equal(first.values, reconstruct(vae, pixels["validation"].values))
    monkeypatch.setattr(evaluation, "reconstruct", lambda *a: pytest.fail("computed again"))
    assert np.array_equal(render(vae, pixels["validation"]).values, first.values)
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.5
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        render(vae, pixels["validation"])


def test_pictures_are_searched_for_copies_of_every_photo_that_is_not_held_out(raw_photos, tmp_path):
    tool("prepare", "--data-dir", raw_photos, "--output-dir", tmp_path / "data", "--no-visualize", "--test-fraction", 0.34)
    prepared = tmp_path / "data" / "corel" / "corel_all"
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in [*load_photos(prepared)["validation"]["file_name"][:], load_photos(prepared)["train"]["file_name"][0]]:
        shutil.copy(prepared / name, pictures)
    tool("evaluate", "--pictures", pictures, "--data-dir", prepared, "--output-dir", tmp_path / "out")
    copies = json.loads((tmp_path / "out" / "evaluation.json").read_text())["copies"]
    assert copies["pictures"]["pixels"] == 1
    assert copies["planted"]["pixels"] > 0.3, "photos, mirrored and cropped off the middle, are found"
    assert copies["held_out"]["pixels"] == 0


def test_the_card_quotes_the_evaluation_of_its_own_weights_only(trained_unet, raw_photos, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(trained_unet, folder, ignore=shutil.ignore_patterns("checkpoints"))
    tool("evaluate", "--pipeline", folder, "--data-dir", raw_photos, "--against", "all", "--num-images", 4, "--steps", 1)
    quoted = "copies of training photos, in pixels and in features"
    assert quoted in (folder / "README.md").read_text()
    with (folder / "unet" / "diffusion_pytorch_model.safetensors").open("ab") as file:
        file.write(b"x")
    write_card(folder)
    assert quoted not in (folder / "README.md").read_text()


@pytest.mark.skipif(not (ROOT.parent / "shared" / "tools" / "kid.py").is_file(), reason="the reference script is not here")
def test_folders_give_the_reference_scripts_number(library_efficientnet, tmp_path):
    pictures, photos = (
        make_photos(tmp_path / "a", each=4, size_px=(64, 64)),
        make_photos(tmp_path / "b", classes=5, each=4, size_px=(64, 64)),
    )
    tool("evaluate", "--pictures", pictures, "--data-dir", photos, "--against", "all", "--output-dir", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["generation"]
    spec = importlib.util.spec_from_file_location("kid", ROOT.parent / "shared" / "tools" / "kid.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    a, b = (reference.features(folder, 64, library_efficientnet) for folder in (pictures, photos))
    assert found["kid_e3"] == pytest.approx(1e3 * reference.kernel_distance(a, b), abs=1e-3), "features of other batches round differently"
    assert found["fd"] == pytest.approx(reference.frechet_distance(a, b), rel=1e-6)


def test_a_test_split_is_set_aside_and_judged_by(raw_photos, tmp_path):
    tool("prepare", "--data-dir", raw_photos, "--output-dir", tmp_path / "data", "--no-visualize", "--test-fraction", 0.34)
    photos = load_photos(tmp_path / "data" / "corel" / "corel_all")
    assert {split: len(part) for split, part in photos.items()} == {"train": 9, "validation": 3, "test": 6}
    assert photos["validation"]["file_name"][:] == load_photos(raw_photos)["validation"]["file_name"][:], "the others stay where they were"
    folder = tmp_path / "pictures"
    folder.mkdir()
    for place in range(4):
        Image.new("RGB", (32, 32), (60 * place, 0, 0)).save(folder / f"{place}.png")
    done = tool("evaluate", "--pictures", folder, "--data-dir", tmp_path / "data" / "corel" / "corel_all", "--output-dir", tmp_path / "out")
    assert "4 pictures, 32x32 px, against the test photos" in done.stdout
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["train_against_held_out"]["n"] == [9, 6]
    assert found["copies"]["held_out"]["pixels"] == 0


def test_photos_that_were_trained_on_are_noticed_when_they_are_held_out_later(trained_unet, raw_photos, tmp_path):
    photos = load_photos(raw_photos)
    assert (trained_unet / "training_photos.txt").read_text().split() == photos["train"]["file_name"][:]
    assert evaluation.trained_on(trained_unet, photos["validation"]["file_name"][:]) == 0
    tool("prepare", "--data-dir", raw_photos, "--output-dir", tmp_path / "data", "--no-visualize", "--test-fraction", 0.34)
    done = tool("evaluate", "--pipeline", trained_unet, "--data-dir", tmp_path / "data" / "corel" / "corel_all", "--num-images", 4,
                "--steps", 1, "--output-dir", tmp_path / "out")  # fmt: skip
    assert "6 of them were not held back when the model was trained: these numbers are too good" in done.stdout


def test_the_stage_gate_says_what_the_vae_allows(vae, pixels):
    line = evaluation.reconstruction_limit(vae, pixels["validation"])
    photos = np.asarray(pixels["validation"].values)
    errors = ((reconstruct(vae, photos) / 255.0 - photos / 255.0) ** 2).mean((1, 2, 3))
    assert f"PSNR {np.mean(-10 * np.log10(errors)):.1f} dB" in line
    assert line.endswith("that is poor: train the VAE longer first"), "a fresh VAE brings nothing back"


def test_a_picture_that_cannot_be_read_is_named(raw_photos, tmp_path):
    for place in range(5):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{place}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    done = tool("evaluate", "--pictures", tmp_path, "--data-dir", raw_photos, check=False)
    assert done.returncode == 2
    assert "2.png cannot be used (not a picture)" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--pictures", "nowhere"], "--pictures nowhere: this is no folder"),
        (["--dataset-name", "user/photos"], "give --data-dir or --dataset-name"),
        (["--against", "test"], "--against test: no photos were set aside as test"),
        (["--guidance-interval", "0.8", "0.2"], "--guidance-interval 0.8 0.2: give two numbers"),
    ],
)
def test_bad_flags_end_in_one_line(flags, expected, trained_unet, raw_photos):
    done = tool("evaluate", "--pipeline", trained_unet, "--data-dir", raw_photos, *flags, check=False)
    assert done.returncode == 2
    assert expected in done.stderr.splitlines()[-1]


def test_no_kid_where_the_labels_leave_it_open(tmp_path):
    """Two photos of one class are like each other, and where no class has two held out nothing tells how much."""
    features = gaussian(12)
    one_each, two_each = torch.arange(12), torch.arange(6).repeat(2)
    assert metrics.kernel_distance(gaussian(20, seed=1), features, labels_b=one_each) is None
    assert metrics.kernel_distance(gaussian(20, seed=1), features, labels_b=two_each) is not None
    assert (
        metrics.kernel_distance(features[:4], features[4:], labels_a=torch.zeros(4), labels_b=torch.tensor([0, 1, 1, 1, 1, 1, 1, 1]))
        is None
    )
    found = metrics.compare(features, features, labels_b=one_each)
    assert found["kid_e3"] is found["kid_e3_low"] is None
    assert report.with_interval(found) == "-"
    assert metrics.halves(features, one_each)["kid_e3"] is None
    assert metrics.halves(features, two_each)["kid_e3"] is not None
