"""Evaluation: distances against other libraries, planted copies, and the command on a pipeline and on folders."""

import importlib.util
import json
import shutil
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT, make_photos, tool_here
from diffusers import DDPMScheduler
from PIL import Image, ImageFilter
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.kid import poly_mmd

from corel_diffusers.data.duplicates import duplicate_groups, photo_hashes
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import Pixels, cache_pixels, to_float
from corel_diffusers.data.scenes import CLASS_NAMES, draw_scene
from corel_diffusers.evaluation import classes, kid, memorization, metrics, photo_crops, reconstruction, report
from corel_diffusers.evaluation import evaluate as evaluation
from corel_diffusers.evaluation import features as feature_networks
from corel_diffusers.evaluation.judge import stratified_rows
from corel_diffusers.evaluation.reconstruction import reconstruct, reconstruction_scores, vae_rendering
from corel_diffusers.files import UserError
from corel_diffusers.hub.cards import write_card
from corel_diffusers.losses.perceptual import PerceptualLoss
from corel_diffusers.models.unet import build_unet
from corel_diffusers.models.vae import build_vae
from corel_diffusers.runtime.precision import autocast
from pipeline import CorelPipeline

CPU = torch.device("cpu")


def gaussian(n, d=12, shift=0.0, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, 1, (n, d)))


def test_kid_equals_that_of_torchmetrics():
    a, b = gaussian(40), gaussian(40, shift=0.3, seed=1)
    assert kid.kernel_distance(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)


def test_kid_of_sets_of_different_sizes_is_the_mean_over_all_pairs():
    a, b = gaussian(7), gaussian(5, seed=1)
    k = lambda x, y: (float(x @ y) / 12 + 1) ** 3  # noqa: E731
    within = [np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    between = np.mean([k(x, y) for x in a for y in b])
    assert kid.kernel_distance(a, b) == pytest.approx(sum(within) - 2 * between)


def test_paired_images_have_the_same_kid_as_images_made_from_other_photos():
    """Compare noisy versions of photos with the photos.

    With `paired`, the mean KID must equal that of noisy versions of other photos.
    """
    paired_kids, other_kids, all_pair_kids = [], [], []
    for seed in range(200):
        photos, other_photos, noise = (
            gaussian(20, seed=seed),
            gaussian(20, seed=1000 + seed),
            0.5 * gaussian(20, seed=2000 + seed),
        )
        paired_kids.append(kid.kernel_distance(photos + noise, photos, paired=True))
        all_pair_kids.append(kid.kernel_distance(photos + noise, photos))
        other_kids.append(kid.kernel_distance(other_photos + noise, photos))
        low, high = kid.kernel_interval(photos + noise, photos, paired=True, resamples=50)
        assert low < paired_kids[-1] < high
    standard_error = np.std(other_kids) / 200**0.5
    assert abs(np.mean(paired_kids) - np.mean(other_kids)) < 3 * standard_error
    assert np.mean(all_pair_kids) < np.mean(other_kids) - 10 * standard_error, (
        "with the pairs of a photo and its own version, KID is too low"
    )
    assert metrics.precision_recall(photos, photos, paired=True)[0] < 1


@pytest.mark.parametrize("counts", [(60, 50), (60, 9), (8, 9)])  # more or fewer images than the 12 dimensions
def test_frechet_distance_equals_that_of_scipys_matrix_root(counts):
    a, b = gaussian(counts[0]), gaussian(counts[1], shift=0.5, seed=1) * 1.5
    covariance = [np.cov(x.numpy().T) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariance[0] @ covariance[1]).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(covariance[0] + covariance[1] - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_the_distance_of_a_set_to_itself_is_zero():
    a = gaussian(30, d=100)  # fewer images than dimensions: the covariance does not have full rank
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert metrics.precision_recall(a, a) == (1.0, 1.0)
    assert kid.kernel_distance(a, a, paired=True) == pytest.approx(0, abs=1e-9)
    assert kid.kernel_distance(a, a) < 0, "with the pairs of an image and itself, KID is too low"


def test_precision_and_recall_equal_values_computed_by_hand():
    photos = torch.tensor([[0.0], [1.0], [2.0], [10.0]], dtype=torch.float64)
    samples = torch.tensor([[0.5], [1.5], [30.0], [31.0]], dtype=torch.float64)
    precision, recall = metrics.precision_recall(samples, photos, neighbour=1)
    assert precision == 0.5, "two samples are within 1 of a photo, or within 8 of the isolated photo"
    assert recall == 0.75, "three photos are within 1 of a sample"


def random_features(counts, seed, d=12):
    """Return random features and labels, with `counts[label]` images of each class. The class means are far apart.

    Samples of a perfect model and photos are both drawn like this.
    """
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    means = 1.5 * gaussian(len(counts), d, seed=99)
    return means[labels] + gaussian(len(labels), d, seed=seed), labels


@pytest.mark.parametrize(
    ("sample_counts", "photo_counts"),
    [
        ([42] * 6, [8, 8, 8, 8, 9, 9]),  # 252 samples and 50 photos, like `evaluate`
        ([8] * 6, [5] * 6),  # 48 samples and 30 photos, like `--evaluate-every`
        ([2] * 6, [5] * 6),
        ([5] * 12, [60] * 3 + [1] * 9),  # different class fractions, and classes with one photo
        ([3] * 4, [1] * 4),  # no class has two photos
    ],
)
def test_kid_of_a_perfect_model_is_zero_at_any_size_and_class_mix(sample_counts, photo_counts):
    kids, unlabelled_kids = [], []
    for seed in range(200):
        (a, labels_a), (b, labels_b) = (
            random_features(sample_counts, 2 * seed),
            random_features(photo_counts, 2 * seed + 1),
        )
        kids.append(kid.kernel_distance(a, b, labels_a=labels_a, labels_b=labels_b))
        unlabelled_kids.append(kid.kernel_distance(a, b))
    standard_error = np.std(kids) / 200**0.5
    assert abs(np.mean(kids)) < 3 * standard_error
    assert abs(np.mean(unlabelled_kids)) > 5 * standard_error, "without labels, KID is biased"


def test_kid_of_unlabelled_samples_is_zero_if_the_photos_have_fixed_class_counts():
    kids, unlabelled_kids, class_fractions = [], [], torch.tensor([0.2, 0.3, 0.5])
    for seed in range(200):
        random_counts = torch.multinomial(
            class_fractions, 40, replacement=True, generator=torch.Generator().manual_seed(seed)
        ).bincount(minlength=3)
        a, (b, labels_b) = (
            random_features(random_counts.tolist(), 2 * seed)[0],
            random_features([2, 3, 5], 2 * seed + 1),
        )
        kids.append(kid.kernel_distance(a, b, labels_b=labels_b))
        unlabelled_kids.append(kid.kernel_distance(a, b))
    standard_error = np.std(kids) / 200**0.5
    assert abs(np.mean(kids)) < 3 * standard_error
    assert np.mean(unlabelled_kids) < -5 * standard_error


def test_kid_with_labels_is_the_mean_over_pairs_of_classes():
    """Compute KID by hand. The class fractions of the photos are 2/3 and 1/3."""
    a, labels_a, b, labels_b = (
        gaussian(5),
        torch.tensor([0, 0, 1, 1, 1]),
        gaussian(6, seed=1),
        torch.tensor([0, 0, 0, 0, 1, 1]),
    )
    k = lambda x, y: (float(x @ y) / 12 + 1) ** 3  # noqa: E731
    expected = 0.0
    for (left, labels_left), (right, labels_right), factor in (
        ((a, labels_a), (a, labels_a), 1), ((b, labels_b), (b, labels_b), 1), ((a, labels_a), (b, labels_b), -2),
    ):  # fmt: skip
        for (one, fraction), (other, other_fraction) in product(((0, 2 / 3), (1, 1 / 3)), repeat=2):
            pairs = product((labels_left == one).nonzero().flatten(), (labels_right == other).nonzero().flatten())
            values = [k(left[i], right[j]) for i, j in pairs if left is not right or i != j]
            expected += factor * fraction * other_fraction * np.mean(values)
    assert kid.kernel_distance(a, b, labels_a=labels_a, labels_b=labels_b) == pytest.approx(expected)


@pytest.fixture(scope="module")
def scene_features(network):
    """Return the features of 40 scenes of each of six classes, the features of the blurred scenes, and the labels."""
    scenes = [
        draw_scene(label, np.random.default_rng([label, index])).resize((32, 32))
        for label in range(6)
        for index in range(40)
    ]
    blurred = [scene.filter(ImageFilter.GaussianBlur(0.7)) for scene in scenes]
    features = (feature_networks.extract(network, feature_networks.as_array(images)) for images in (scenes, blurred))
    return *features, torch.arange(6).repeat_interleave(40)


@pytest.mark.parametrize("same_distribution", [True, False])
@pytest.mark.parametrize("sizes", [(120, 48), (48, 30)])
def test_the_interval_covers_the_true_kid_of_real_features(scene_features, same_distribution, sizes):
    """Compare random scenes with other random scenes, or with blurred ones, with equal numbers per class.

    The true KID is that of all scenes.
    """
    photo_features, blurred, labels = scene_features
    sample_features = photo_features if same_distribution else blurred
    true_kid = float(
        (
            kid.kernel(sample_features, sample_features)
            + kid.kernel(photo_features, photo_features)
            - 2 * kid.kernel(sample_features, photo_features)
        ).mean()
    )
    rng, hits, widths, kids = np.random.default_rng(0), 0, [], []
    for _ in range(400):
        rows = [
            torch.from_numpy((rng.integers(40, size=(6, size // 6)) + 40 * np.arange(6)[:, None]).ravel())
            for size in sizes
        ]
        sets = sample_features[rows[0]], photo_features[rows[1]], False, labels[rows[0]], labels[rows[1]]
        low, high = kid.kernel_interval(*sets, resamples=400)
        hits += low <= true_kid <= high
        kids.append(kid.kernel_distance(*sets))
        widths.append(high - low)
    assert 0.91 * 400 <= hits <= 0.99 * 400, f"a 95 % interval contained the true KID {hits} times of 400"
    assert 0.8 < np.mean(widths) / (3.92 * np.std(kids)) < 1.2
    assert abs(np.mean(kids) - true_kid) < 3 * np.std(kids) / 20


def test_the_interval_of_halves_contains_95_percent_of_the_splits():
    features, labels = random_features([12, 12, 9], 0)
    scores = metrics.halves(features, labels)
    rng, kids = np.random.default_rng(0), []
    for _ in range(100):
        order = rng.permutation(33)
        order = order[np.argsort(labels[order], kind="stable")]
        a, b = order[::2], order[1::2]
        kids.append(1e3 * kid.kernel_distance(features[a], features[b], False, labels[a], labels[b]))
    assert scores["kid_e3"] == pytest.approx(np.mean(kids))
    assert np.mean([scores["kid_e3_low"] <= value <= scores["kid_e3_high"] for value in kids]) == pytest.approx(
        0.94, abs=0.02
    )


def test_reconstructions_have_no_frechet_distance_to_their_own_photos():
    """Both sets share the random choice of the photos, so the distance is far too low."""
    photos, other_photos = gaussian(50), gaussian(50, seed=1)
    noise = 0.3 * gaussian(50, seed=2)
    assert metrics.frechet_distance(photos + noise, photos) < 0.5 * metrics.frechet_distance(
        other_photos + noise, photos
    )
    assert metrics.compare(photos + noise, photos, paired=True)["fd"] is None
    reconstruction = metrics.compare(photos + noise, photos, paired=True)
    results = {
        "held_out": "test",
        "generation": metrics.compare(other_photos, photos),
        "reconstruction": reconstruction,
    }
    assert [row[3] for row in report.distance_rows(results)[1:]] == [f"{results['generation']['fd']:.1f}", "-"]


def test_a_class_is_compared_with_its_held_out_photos_if_there_are_enough():
    samples, train, held_out = random_features([6, 6], 0), random_features([20, 20], 1), random_features([8, 3], 2)
    all_photos = torch.cat([train[0], held_out[0]]), torch.cat([train[1], held_out[1]])
    scores = classes.class_scores(["many", "few"], samples, train, all_photos, held_out)
    assert [scores[name]["against"] for name in ("many", "few")] == ["held-out", "all"]
    assert scores["many"]["kid_e3"] == pytest.approx(1e3 * kid.kernel_distance(samples[0][:6], held_out[0][:8]))
    assert scores["few"]["n"] == [6, 23]
    assert [row[1] for row in report.class_rows({"classes": scores})[1:]] == [
        "held-out photos",
        "all photos, also training photos",
    ]


def test_the_interval_covers_the_true_kid_of_normal_distributions():
    """Compare sets of 60 and 40 from two normal distributions. The true KID is the mean over 400,000 random pairs."""
    d, shift = 6, 0.5

    def mean_kernel(mean_a, mean_b):  # (x.y / d + 1)^3 of independent x, y with these means and unit variance
        rng = np.random.default_rng(9)
        x, y = rng.normal(mean_a, 1, (400_000, d)), rng.normal(mean_b, 1, (400_000, d))
        return ((x * y).sum(1) / d + 1) ** 3

    true_kid = float((mean_kernel(0, 0) + mean_kernel(shift, shift) - 2 * mean_kernel(0, shift)).mean())
    hits, widths, kids = 0, [], []
    for trial in range(100):
        a, b = gaussian(60, d, 0, 2 * trial), gaussian(40, d, shift, 2 * trial + 1)
        low, high = kid.kernel_interval(a, b, resamples=300)
        hits += low <= true_kid <= high
        assert low <= kid.kernel_distance(a, b) <= high
        widths.append(high - low)
        kids.append(kid.kernel_distance(a, b))
    assert np.mean(widths) < 2 * 3.92 * np.std(kids), "the interval is at most twice as wide as the spread of KID"
    assert hits >= 90, f"a 95 % interval contained the true KID {hits} times of 100"


def test_colour_statistics_equal_values_computed_by_hand():
    image = np.zeros((2, 4, 3), np.uint8)
    image[:, :2] = (200, 100, 0)  # left half: red - green = 100, (red + green) / 2 - blue = 150; right half: 0
    statistics = metrics.colour_statistics(np.stack([image, image[:, ::-1]]))
    assert [statistics[name] for name in ("red", "green", "blue")] == [100, 50, 0]
    assert statistics["contrast"] == pytest.approx(np.std([200, 100, 0, 0, 0, 0]))
    assert statistics["colourfulness"] == pytest.approx(np.hypot(50, 75) + 0.3 * np.hypot(50, 75))


def test_class_match_and_within_class_distance():
    photos = torch.cat([gaussian(20, shift=-2), gaussian(20, shift=2, seed=1)])
    labels = torch.arange(2).repeat_interleave(20)
    samples = torch.cat([gaussian(5, shift=-2, seed=2), gaussian(5, shift=2, seed=3)])
    assert metrics.class_match(samples, torch.arange(2).repeat_interleave(5), photos, labels).all()
    assert not metrics.class_match(samples, 1 - torch.arange(2).repeat_interleave(5), photos, labels).any()
    assert metrics.within_class_distance(photos, labels) > 5 * metrics.within_class_distance(photos * 0.1, labels)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    return cache_pixels(
        load_photos(make_photos(tmp_path_factory.mktemp("many") / "corel", classes=4, each=12)), (48, 48)
    )[1]


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
        copies = np.stack([photo_crops.crop_image(copy, (0.9, 0.03, 0.06)) for copy in copies])
    if "noisy" in plant:
        copies = np.clip(copies + np.random.default_rng(0).normal(0, 4, copies.shape), 0, 255).astype(np.uint8)
    in_pixels, in_features = finder.search(np.ascontiguousarray(copies))
    assert in_pixels.photo.tolist() == list(range(8))
    assert in_pixels.share_below(memorization.PIXEL_RATIO) >= 0.75
    if plant in ("as it is", "mirrored"):
        assert in_features.photo.tolist() == list(range(8))
        assert in_features.share_below(finder.feature_ratio) == 1


def test_a_copy_of_a_corner_is_found_in_features(pixels):
    finder = memorization.CopyFinder.of(pixels["train"], pixels["train"], CPU)
    corners = product((0, 1 / 8), repeat=2)
    copies = np.stack([photo_crops.crop_image(pixels["train"].values[0], (7 / 8, left, top)) for left, top in corners])
    nearest = finder.in_features(np.concatenate([copies, copies[:, :, ::-1]]))
    assert nearest.photo.tolist() == [0] * 8
    assert nearest.share_below(finder.feature_ratio) == 1


@pytest.mark.slow
def test_different_images_with_little_detail_are_not_near_duplicates():
    """By their hashes alone, many different drawn scenes would be one group, and a new scene would count as a copy.

    Every second scene is mirrored, because the mirror image of a photo is a near duplicate too.
    """
    scenes = np.stack([np.asarray(draw_scene(0, np.random.default_rng([3, 0, i])).resize((48, 48))) for i in range(40)])
    scenes[1::2] = scenes[1::2, :, ::-1].copy()
    hash_group_sizes = np.bincount(duplicate_groups([photo_hashes(Image.fromarray(scene)) for scene in scenes]))
    finder = memorization.CopyFinder.of(*[Pixels(scenes, "plain")] * 2, CPU)
    assert hash_group_sizes.max() > 10
    assert finder.groups.bincount().max() <= 3
    new_scenes = np.stack(
        [np.asarray(draw_scene(0, np.random.default_rng([4, 0, i])).resize((48, 48))) for i in range(40)]
    )
    assert finder.in_pixels(new_scenes).share_below(memorization.PIXEL_RATIO) == 0


@pytest.mark.parametrize("brighter", [0, 15, 25])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_copy_of_a_duplicated_photo_is_found(pixels, mirrored, brighter):
    photos = np.array(pixels["train"].values)
    saved_again = np.clip(photos[:1] + np.random.default_rng(0).normal(brighter, 2, photos[:1].shape), 0, 255).astype(
        np.uint8
    )
    saved_again = saved_again[:, :, ::-1] if mirrored else saved_again
    twice = Pixels(np.concatenate([photos, saved_again]), f"twice-{mirrored}-{brighter}")
    finder = memorization.CopyFinder.of(twice, twice, CPU)
    in_pixels, in_features = finder.search(photos[:1])
    assert in_pixels.photo.tolist() == in_features.photo.tolist() == [0]
    assert in_pixels.second.item() not in (0, len(photos))
    assert in_pixels.share_below(memorization.PIXEL_RATIO) == 1
    assert in_features.share_below(finder.feature_ratio) == 1


def test_the_crop_found_in_pixels_improves_the_search_in_features(pixels):
    finder = memorization.CopyFinder.of(pixels["train"], pixels["train"], CPU)
    copies = memorization.planted_copies(np.array(pixels["train"].values))
    without_crop, with_crop = finder.in_features(copies), finder.search(copies)[1]
    expected = torch.arange(len(copies))
    assert (with_crop.ratio[with_crop.photo == expected] < finder.feature_ratio).sum() > 1.2 * (
        without_crop.ratio[without_crop.photo == expected] < finder.feature_ratio
    ).sum()


def test_the_ratio_is_infinite_if_all_photos_are_duplicates():
    nearest = memorization.two_nearest(torch.zeros(1, 3), torch.zeros(3, dtype=torch.long))
    assert nearest.ratio.tolist() == [float("inf")]


def test_at_most_two_photos_of_a_group_are_candidates():
    distance, groups = torch.tensor([5.0, 1.0, 2.0, 3.0, 4.0, 9.0]), torch.tensor([1, 0, 0, 0, 0, 2])
    assert memorization.nearest_candidates(distance, groups) == [1, 2, 0, 5]


def test_the_two_stage_search_finds_the_same_copies_as_an_exhaustive_search(pixels):
    photos = np.array(pixels["train"].values)
    copies = memorization.planted_copies(photos[:6])
    finder = memorization.CopyFinder.of(pixels["train"], pixels["train"], CPU)
    nearest = finder.search(copies)[0]
    offsets, scales = np.linspace(0, 1, 9), (0.66, 0.68, 0.7, 0.79, 0.81, 0.83, 0.91, 0.93, 0.95)
    crops = [(scale, (1 - scale) * left, (1 - scale) * top) for scale in scales for left in offsets for top in offsets]
    all_crops = [torch.from_numpy(photo_crops.resize(photos, 32, crop).reshape(len(photos), -1)) for crop in crops]
    distance = photo_crops.distances(
        torch.from_numpy(photo_crops.resize(copies[:, :, ::-1], 32).reshape(6, -1)), all_crops
    )
    exhaustive = memorization.two_nearest(distance, finder.groups)
    assert nearest.photo.tolist() == exhaustive.photo.tolist() == list(range(6))
    is_copy = exhaustive.ratio < memorization.PIXEL_RATIO
    assert is_copy.sum() >= 5
    assert (nearest.ratio[is_copy] < memorization.PIXEL_RATIO).all()


def test_the_calibrated_ratio_of_two_photos_is_zero(pixels):
    two = Pixels(np.array(pixels["train"].values[:2]), "two")
    assert memorization.CopyFinder.of(two, two, CPU).feature_ratio == 0


def test_held_out_photos_do_not_count_as_copies(pixels):
    finder = memorization.CopyFinder.of(pixels["train"], pixels["train"], CPU)
    assert finder.shares(*finder.search(pixels["validation"].values[:]))["pixels"] == 0


def test_the_features_for_copies_are_the_means_of_nine_cells(pixels):
    photos = pixels["train"].values[:2]
    cells = feature_networks.extract(feature_networks.efficientnet_cells(CPU), photos).numpy().reshape(2, 1280, 3, 3)
    with torch.no_grad():
        feature_map = feature_networks.efficientnet_map(CPU)(torch.from_numpy(photos)).numpy()
    for row, column in np.ndindex(3, 3):
        mean = feature_map[:, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].mean((2, 3))
        assert cells[:, :, row, column] == pytest.approx(mean / np.linalg.norm(mean, axis=1, keepdims=True), abs=1e-3)
    mean = feature_networks.extract(feature_networks.load_network("efficientnet-lite0", CPU), photos)
    assert mean.numpy() == pytest.approx(feature_map.mean((2, 3)), abs=1e-5)


def test_crop_features_are_the_full_photo_and_windows_of_a_larger_feature_map(pixels):
    photos = pixels["train"].values[:2]
    crop_features = feature_networks.extract(feature_networks.efficientnet_crops(CPU), photos).reshape(
        2, feature_networks.NUM_CROPS, -1
    )
    assert torch.equal(crop_features[:, 0], feature_networks.extract(feature_networks.efficientnet_cells(CPU), photos))
    with torch.no_grad():
        larger_map = feature_networks.efficientnet_map(CPU)(torch.from_numpy(photos), 256)
    assert larger_map.shape == (2, 1280, 8, 8)
    last_corner = feature_networks.cell_means(larger_map[:, :, 1:, 1:])
    assert torch.allclose(crop_features[:, -1].float(), last_corner, atol=1e-3)


def test_cached_photo_features_equal_uncached_ones(pixels, network):
    cached = feature_networks.photo_features(network, pixels["validation"])
    assert torch.equal(cached, feature_networks.extract(network, pixels["validation"].values))
    network_without_run = feature_networks.Network(network.name, network.width, network.device, None)
    assert torch.equal(cached, feature_networks.photo_features(network_without_run, pixels["validation"])), (
        "the second call must read the cache"
    )


def test_dinov2_features_equal_those_of_transformers(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=224)).eval()
    model.save_pretrained(tmp_path)
    network = feature_networks.dinov2(CPU, str(tmp_path))
    images = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = model(((images / 255 - mean) / std).permute(0, 3, 1, 2)).last_hidden_state[:, 0]
    assert torch.allclose(feature_networks.extract(network, images.numpy()), expected.double(), atol=1e-5)


@pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is not None,
    reason="torch-fidelity is installed, so its weights may be too",
)
def test_a_network_that_cannot_be_loaded_is_named_with_a_hint():
    with pytest.raises(UserError, match="--features inception cannot be loaded .* use --features efficientnet-lite0"):
        feature_networks.load_network("inception", CPU)


def test_evaluate_measures_a_pipeline(trained_unet, raw_photos, tmp_path):
    done = tool_here("evaluate", "--pipeline", trained_unet, "--data-dir", raw_photos, "--against", "all",
                     "--num-images", 12, "--steps", 2, "--output-dir", tmp_path / "out")  # fmt: skip
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert results["generation"]["n"] == [12, 18]
    assert results["features"] == "efficientnet-lite0"
    assert set(results["classes"]) == set(CLASS_NAMES[:3])
    assert results["generation"]["kid_e3"] > 10 * abs(results["halves"]["kid_e3"]), (
        "after two epochs the samples are noise"
    )
    assert 5 < results["reconstruction"]["psnr_db"] < 30
    assert results["copies"]["pictures"]["pixels"] == 0
    assert results["reconstruction"]["fd"] is None
    planted = results["copies"]["planted"]
    line = (
        f"the search for copies finds {planted['pixels']:.0%} of them in pixels "
        f"and {planted['features']:.0%} in features"
    )
    assert line in done.stdout
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert line in page
    assert page.count("data:image/png;base64,") == 4
    assert 'src="http' not in page
    scale = "noise has about 400, a good small model of 64 px about 45"
    assert scale in done.stdout
    assert scale in page
    assert "notice: the VAE's reconstructions are poor, and samples cannot be better" in done.stdout
    assert "the VAE&#39;s reconstructions are poor" in page
    assert report.scale_line(results | {"features": "inception"}) == ""
    good = results["reconstruction"] | {"psnr_db": 24.0, "kid_e3_low": 20.0}
    assert report.on_vae(results | {"reconstruction": good}) == []
    assert f"{results['generation']['kid_e3']:.1f} [" in done.stdout


def test_samples_have_the_class_fractions_of_the_photos():
    pipe = SimpleNamespace(config=SimpleNamespace(class_names={"0": "dog", "1": "beach"}))
    all_labels = torch.tensor([0] * 9 + [1] * 3)
    labels, photo_labels = evaluation.labels_to_draw(pipe, ["beach", "dog"], all_labels[stratified_rows(all_labels, 8)])
    assert labels == [1] * 6 + [0] * 2
    assert photo_labels.tolist() == [0] * 6 + [1] * 2
    assert evaluation.labels_to_draw(pipe, ["dog"], torch.tensor([0] * 2))[0] == [0, 0], "--classes dog gives only dogs"
    assert evaluation.labels_to_draw(pipe, ["cat"], torch.tensor([0] * 3)) == ([0, 1, 0], None)


def test_evaluate_measures_one_class(trained_unet, raw_photos, tmp_path):
    done = tool_here("evaluate", "--pipeline", trained_unet, "--data-dir", raw_photos, "--against", "all",
                     "--num-images", 6, "--steps", 2, "--classes", CLASS_NAMES[1],
                     "--output-dir", tmp_path)  # fmt: skip
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(results["classes"]) == [CLASS_NAMES[1]]
    assert results["generation"]["n"] == [6, 6]
    assert results["classes"][CLASS_NAMES[1]]["match_photos"] is None, "no photos are held out"
    assert f"only {CLASS_NAMES[1]}, 32x32 px, compared with all photos" in done.stdout


def test_reconstruction_scores_of_batches_equal_those_of_all_photos_at_once(network):
    rng = np.random.default_rng(0)
    photos = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    reconstructions = np.clip(photos + rng.normal(0, rng.uniform(5, 40, (40, 1, 1, 1)), photos.shape), 0, 255).astype(
        np.uint8
    )
    scores = reconstruction_scores(reconstructions, photos, network, feature_networks.extract(network, photos))
    a, b = (to_float(torch.from_numpy(x)) / 2 + 0.5 for x in (reconstructions, photos))
    assert scores["psnr_db"] == pytest.approx(
        float(peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3))), rel=1e-6
    )
    assert scores["ssim"] == pytest.approx(float(structural_similarity_index_measure(a, b, data_range=1.0)), rel=1e-5)
    with torch.no_grad():
        assert scores["perceptual"] == pytest.approx(
            float(PerceptualLoss("efficientnet-lite0")(2 * a - 1, 2 * b - 1)), rel=1e-4
        )


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_photos_are_reconstructed_in_the_precision_of_the_samples(vae, pixels, configs, precision):
    photos = np.array(pixels["validation"].values)
    pipe = CorelPipeline(vae, build_unet(str(configs / "unet.json"), (48, 48), vae, None), DDPMScheduler())
    latents = vae.encode(to_float(torch.from_numpy(photos))).latent_dist.mean
    with autocast(precision, "cpu"), torch.no_grad():
        expected = feature_networks.as_array(pipe.decode(latents * vae.config.scaling_factor, "pil"))
    assert np.array_equal(reconstruct(vae, photos, precision), expected)


def test_reconstructed_photos_are_cached_by_the_weights_of_the_vae(vae, pixels, monkeypatch):
    expected = vae_rendering(vae, pixels["validation"])
    assert np.array_equal(expected.values, reconstruct(vae, pixels["validation"].values))
    monkeypatch.setattr(reconstruction, "reconstruct", lambda *a: pytest.fail("not read from the cache"))
    assert np.array_equal(vae_rendering(vae, pixels["validation"]).values, expected.values)
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.5
    with pytest.raises(pytest.fail.Exception, match="not read from the cache"):
        vae_rendering(vae, pixels["validation"])


def prepare_with_test_split(raw_photos: Path, folder: Path) -> Path:
    """Prepare the photos with a test split, and return the prepared folder of all classes."""
    flags = ["--data-dir", raw_photos, "--output-dir", folder, "--no-visualize", "--test-fraction", 0.34]
    tool_here("prepare", *flags)
    return folder / "corel" / "corel_all"


def test_images_can_be_copies_of_every_photo_that_is_not_held_out(raw_photos, tmp_path):
    prepared = prepare_with_test_split(raw_photos, tmp_path / "data")
    images = tmp_path / "pictures"
    images.mkdir()
    for name in [*load_photos(prepared)["validation"]["file_name"][:], load_photos(prepared)["train"]["file_name"][0]]:
        shutil.copy(prepared / name, images)
    tool_here("evaluate", "--pictures", images, "--data-dir", prepared, "--output-dir", tmp_path / "out")
    copies = json.loads((tmp_path / "out" / "evaluation.json").read_text())["copies"]
    assert copies["pictures"]["pixels"] == 1
    assert copies["planted"]["pixels"] > 0.3, "mirrored, off-centre crops of photos are found"
    assert copies["held_out"]["pixels"] == 0


def test_the_model_card_shows_only_the_evaluation_of_its_own_weights(trained_unet, raw_photos, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(trained_unet, folder, ignore=shutil.ignore_patterns("checkpoints"))
    tool_here(
        "evaluate", "--pipeline", folder, "--data-dir", raw_photos, "--against", "all", "--num-images", 4, "--steps", 1
    )
    row_title = "copies of training photos, in pixels and in features"
    assert row_title in (folder / "README.md").read_text()
    with (folder / "unet" / "diffusion_pytorch_model.safetensors").open("ab") as file:
        file.write(b"x")
    write_card(folder)
    assert row_title not in (folder / "README.md").read_text()


@pytest.mark.skipif(
    not (ROOT.parent / "shared" / "tools" / "kid.py").is_file(), reason="the reference script is missing"
)
def test_distances_of_folders_equal_those_of_the_reference_script(library_efficientnet, tmp_path):
    images, photos = (
        make_photos(tmp_path / "a", each=4, size_px=(64, 64)),
        make_photos(tmp_path / "b", classes=5, each=4, size_px=(64, 64)),
    )
    tool_here(
        "evaluate", "--pictures", images, "--data-dir", photos, "--against", "all", "--output-dir", tmp_path / "out"
    )
    distances = json.loads((tmp_path / "out" / "evaluation.json").read_text())["generation"]
    spec = importlib.util.spec_from_file_location("kid", ROOT.parent / "shared" / "tools" / "kid.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    a, b = (reference.features(folder, 64, library_efficientnet) for folder in (images, photos))
    assert distances["kid_e3"] == pytest.approx(1e3 * reference.kernel_distance(a, b), abs=1e-3), (
        "features are rounded differently in other batches"
    )
    assert distances["fd"] == pytest.approx(reference.frechet_distance(a, b), rel=1e-6)


def test_evaluate_compares_with_the_test_split(raw_photos, tmp_path):
    prepared = prepare_with_test_split(raw_photos, tmp_path / "data")
    photos = load_photos(prepared)
    assert {split: len(part) for split, part in photos.items()} == {"train": 9, "validation": 3, "test": 6}
    assert photos["validation"]["file_name"][:] == load_photos(raw_photos)["validation"]["file_name"][:], (
        "the validation photos stay the same"
    )
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(4):
        Image.new("RGB", (32, 32), (60 * index, 0, 0)).save(folder / f"{index}.png")
    done = tool_here("evaluate", "--pictures", folder, "--data-dir", prepared, "--output-dir", tmp_path / "out")
    assert "4 samples, 32x32 px, compared with the test photos" in done.stdout
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert results["train_against_held_out"]["n"] == [9, 6]
    assert results["copies"]["held_out"]["pixels"] == 0


def test_evaluate_warns_if_the_model_was_trained_on_held_out_photos(trained_unet, raw_photos, tmp_path):
    photos = load_photos(raw_photos)
    assert (trained_unet / "training_photos.txt").read_text().split() == photos["train"]["file_name"][:]
    assert evaluation.count_trained_on(trained_unet, photos["validation"]["file_name"][:]) == 0
    prepared = prepare_with_test_split(raw_photos, tmp_path / "data")
    done = tool_here("evaluate", "--pipeline", trained_unet, "--data-dir", prepared,
                     "--num-images", 4, "--steps", 1, "--output-dir", tmp_path / "out")  # fmt: skip
    assert "the model was trained on 6 of these photos, so the numbers are too good" in done.stdout


def test_the_line_on_the_vae_reports_psnr_and_warns_if_it_is_poor(vae, pixels):
    line = reconstruction.reconstruction_limit(vae, pixels["validation"])
    photos = np.asarray(pixels["validation"].values)
    errors = ((reconstruct(vae, photos) / 255.0 - photos / 255.0) ** 2).mean((1, 2, 3))
    assert f"PSNR {np.mean(-10 * np.log10(errors)):.1f} dB" in line
    assert line.endswith("that is poor: train the VAE longer first"), "an untrained VAE reconstructs nothing"


def test_an_image_that_cannot_be_read_is_named(raw_photos, tmp_path):
    for index in range(5):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{index}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    done = tool_here("evaluate", "--pictures", tmp_path, "--data-dir", raw_photos, check=False)
    assert done.returncode == 2
    assert "2.png cannot be used (not an image)" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--pictures", "nowhere"], "--pictures nowhere: this is not a folder"),
        (["--pictures", ".", "--num-images", 9], "--num-images 9: omit it: all images in the folder of --pictures"),
        (["--dataset-name", "user/photos"], "give --data-dir or --dataset-name"),
        (["--against", "test"], "--against test: no photos were set aside as test"),
        (["--guidance-interval", "0.8", "0.2"], "--guidance-interval 0.8 0.2: give two numbers"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, expected, trained_unet, raw_photos):
    done = tool_here("evaluate", "--pipeline", trained_unet, "--data-dir", raw_photos, *flags, check=False)
    assert done.returncode == 2
    assert expected in done.stderr.splitlines()[-1]


def test_there_is_no_kid_if_the_labels_do_not_allow_an_unbiased_estimate():
    """Photos of one class are similar. Without two held-out photos of one class, nothing shows how similar they are."""
    features = gaussian(12)
    one_per_class, two_per_class = torch.arange(12), torch.arange(6).repeat(2)
    assert kid.kernel_distance(gaussian(20, seed=1), features, labels_b=one_per_class) is None
    assert kid.kernel_distance(gaussian(20, seed=1), features, labels_b=two_per_class) is not None
    labels_a, labels_b = torch.zeros(4), torch.tensor([0, 1, 1, 1, 1, 1, 1, 1])
    assert kid.kernel_distance(features[:4], features[4:], labels_a=labels_a, labels_b=labels_b) is None
    result = metrics.compare(features, features, labels_b=one_per_class)
    assert result["kid_e3"] is result["kid_e3_low"] is None
    assert report.with_interval(result) == "-"
    assert metrics.halves(features, one_per_class)["kid_e3"] is None
    assert metrics.halves(features, two_per_class)["kid_e3"] is not None
