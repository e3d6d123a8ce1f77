"""The built-in data set `scenes`: deterministic, varied, and with the same columns as any other source."""

import numpy as np

from corel_diffusers.data.decoding import fit_photo
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.scenes import CLASS_NAMES, draw_scene, draw_scenes


def test_the_seed_determines_the_images():
    first, again, other = draw_scenes(12), draw_scenes(12), draw_scenes(12, seed=1)
    for a, b, c in zip(first, again, other, strict=True):
        assert np.array_equal(np.asarray(a["image"]), np.asarray(b["image"]))
        assert not np.array_equal(np.asarray(a["image"]), np.asarray(c["image"]))


def test_a_nearest_mean_classifier_works_and_images_of_a_class_differ():
    def images(label: int, first: int, count: int) -> np.ndarray:
        scenes = [draw_scene(label, np.random.default_rng([9, label, first + n])) for n in range(count)]
        return np.stack([np.asarray(fit_photo(scene, (16, 16)), np.float32) for scene in scenes])

    train = [images(label, 0, 30) for label in range(len(CLASS_NAMES))]
    means = np.stack([part.mean(0) for part in train])
    correct = [
        np.abs(image - means).mean((1, 2, 3)).argmin() == label for label in range(6) for image in images(label, 30, 10)
    ]
    assert np.mean(correct) > 0.8
    assert all(part.std(0).mean() > 8 for part in train), "light, colour and layout vary"


def test_scenes_load_like_any_other_source():
    photos = load_photos("scenes", classes=["6"])
    assert photos["train"].features["label"].names == ["hot-air balloon"]
    assert len(photos["train"]) + len(photos["validation"]) == 200
