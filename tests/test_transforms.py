"""Decoding photos of every kind to RGB, and the pixel cache."""

import errno
import io
import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import launch
from datasets import Dataset, Features, load_dataset
from datasets import Image as ImageFeature
from PIL import ExifTags, Image, ImageOps

from corel_diffusers.data import augmented_crops, content_keys, pixels
from corel_diffusers.data.cache import ShardedArray
from corel_diffusers.data.content_keys import content_key
from corel_diffusers.data.decoding import PhotoError, fit_photo, open_photo
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import cache_pixels
from corel_diffusers.files import UserError

RGB = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def test_rgb_png_is_decoded_exactly():
    assert np.array_equal(np.asarray(open_photo(encoded(Image.fromarray(RGB), "PNG"))), RGB)


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = open_photo(encoded(Image.fromarray(RGB), "PNG", exif=exif))
    assert np.array_equal(np.asarray(photo), np.rot90(RGB, -1))


def test_alpha_is_composited_on_white():
    alpha = np.dstack([RGB, np.full((40, 60), 128, np.uint8)])
    expected = RGB * (128 / 255) + 255 * (127 / 255)
    assert np.abs(np.asarray(open_photo(encoded(Image.fromarray(alpha), "PNG"))).astype(float) - expected).max() <= 1


def test_sixteen_bits_keep_their_brightness():
    grey = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    photo = np.asarray(open_photo(encoded(Image.fromarray(grey), "PNG")))
    assert np.abs(photo[..., 0] - grey / 257).max() <= 0.5
    assert photo.shape == (40, 60, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_black_16_bit_image_and_damaged_exif_are_accepted():
    black = open_photo(encoded(Image.fromarray(np.zeros((40, 60), np.uint16)), "PNG"))
    assert np.asarray(black).max() == 0
    damaged = encoded(Image.fromarray(RGB), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert open_photo(damaged).size == (60, 40)


@pytest.mark.parametrize("orientation", range(10))
def test_photos_are_turned_as_by_pillow(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    photo = encoded(Image.fromarray(RGB), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(photo)))
    assert np.array_equal(np.asarray(open_photo(photo)), np.asarray(expected))


def test_a_photo_with_damaged_exif_data_is_turned():
    """The text of the camera's name has the type of a float: Pillow cannot write it again."""
    tags = struct.pack("<HHII", 0x112, 3, 1, 6) + struct.pack("<HHII", 0x10F, 12, 1, 8)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + tags + bytes(12)
    assert open_photo(encoded(Image.fromarray(RGB), "JPEG", exif=exif)).size == (40, 60)


def test_cmyk_palette_and_grey_become_rgb():
    flat = Image.new("RGB", (60, 40), (200, 60, 30))
    assert (
        np.abs(
            np.asarray(open_photo(encoded(flat.convert("CMYK"), "JPEG", quality=95))).astype(int) - np.asarray(flat)
        ).max()
        < 20
    )
    assert np.array_equal(
        np.asarray(open_photo(encoded(flat.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"))), np.asarray(flat)
    )
    assert open_photo(encoded(flat.convert("L"), "PNG")).mode == "RGB"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"this is no picture", "not an image"),
        (b"", "not an image"),
        (encoded(Image.fromarray(RGB), "PNG")[:-3000], "truncated|damaged"),
        (encoded(Image.fromarray(RGB).resize((400, 300)), "JPEG")[:4000], "truncated"),
        (encoded(Image.fromarray(RGB[:8, :8]), "PNG"), r"tiny \(8x8 px\)"),
        (encoded(Image.fromarray(RGB), "GIF", save_all=True, append_images=[Image.fromarray(RGB[::-1])]), "animated"),
    ],
)
def test_a_file_that_is_not_a_photo_is_refused_with_its_reason(content, reason):
    with pytest.raises(PhotoError, match=reason):
        open_photo(content)


def test_a_photo_that_the_disk_refuses_is_not_damaged(raw_photos, monkeypatch):
    """If it counted as damaged, every later run would leave it out too."""
    photos, original_open = load_photos(raw_photos), Image.open

    def refuse(file: object) -> Image.Image:
        if str(file).endswith("0001_0003.png"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return original_open(file)

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(
        UserError, match=r"0001_0003\.png cannot be read \(Permission denied\): check the disk and the file permissions"
    ):
        cache_pixels(photos, (33, 33))
    monkeypatch.undo()
    assert {split: len(part) for split, part in cache_pixels(photos, (33, 33))[0].items()} == photos.num_rows

    def closed(path: object, size: int) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(content_keys, "file_sample", closed)
    with pytest.raises(
        UserError, match=r"cannot be read \(Permission denied\): check the disk and the file permissions"
    ):
        cache_pixels(photos, (34, 34))


def test_fit_photo_takes_height_and_width_and_equals_pillow():
    photo = Image.fromarray(RGB)
    assert fit_photo(photo, (16, 32)).size == (32, 16)
    assert np.array_equal(
        np.asarray(fit_photo(photo, (16, 32))), np.asarray(ImageOps.fit(photo, (32, 16), Image.Resampling.LANCZOS))
    )


def test_cached_pixels_equal_uncached_pixels(raw_photos):
    photos, pixels = cache_pixels(load_photos(raw_photos), (32, 40))
    for split, part in photos.items():
        expected = np.stack([np.asarray(fit_photo(row["image"].convert("RGB"), (32, 40))) for row in part])
        assert np.array_equal(pixels[split].values, expected)
    batch = pixels["train"].batch(np.array([1, 0]))
    assert batch.shape == (2, 3, 32, 40)
    assert torch.equal(
        batch[0], torch.from_numpy(pixels["train"].values[1].copy()).permute(2, 0, 1).float() / 127.5 - 1
    )
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_cache_is_reused_until_a_photo_or_the_size_changes(raw_photos, tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    shutil.copytree(raw_photos, folder)
    _, first = cache_pixels(load_photos(folder), (32, 32))

    decoded = []
    monkeypatch.setattr(pixels, "open_photo", lambda file: decoded.append(file) or open_photo(file))
    _, again = cache_pixels(load_photos(folder), (32, 32))
    assert not decoded
    assert np.array_equal(first["train"].values, again["train"].values)

    _, other_size = cache_pixels(load_photos(folder), (16, 16))
    assert other_size["train"].values.shape[1:3] == (16, 16)
    assert decoded, "another size is decoded"

    name = load_photos(folder)["train"]["file_name"][0]
    Image.new("RGB", (48, 48), "red").save(folder / name)
    os.utime(folder / name, ns=(1, 1))
    _, changed = cache_pixels(load_photos(folder), (32, 32))
    assert (changed["train"].values[0] == np.array([255, 0, 0])).all()
    assert np.array_equal(changed["train"].values[1:], first["train"].values[1:])


def test_unreadable_photos_are_left_out_and_named(raw_photos, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(raw_photos, folder)
    name = load_photos(folder)["train"]["file_name"][2]
    (folder / name).write_bytes((folder / name).read_bytes()[:200])
    before = load_photos(folder)
    for _ in range(2):  # the first time decoded, the second time read from the cache
        photos, pixels = cache_pixels(before, (32, 32))
        assert len(photos["train"]) == len(pixels["train"]) == len(before["train"]) - 1
        assert name not in photos["train"]["file_name"][:]
        assert name in capsys.readouterr().out
    all_pixels = cache_pixels(load_photos(raw_photos), (32, 32))[1]["train"].values
    assert np.array_equal(pixels["train"].values, np.delete(all_pixels, 2, axis=0))
    assert isinstance(pixels["train"].values, ShardedArray), "the pixels stay on disk"


@pytest.mark.parametrize(("size_px", "kept_px"), [(32, 48), (16, 40), (64, 64)])
def test_large_pixels_are_limited_by_the_size_of_the_photos(size_px, kept_px, raw_photos):
    large = pixels.cache_large_pixels(load_photos(raw_photos), (size_px, size_px))  # the photos have 48 px
    assert large.values.shape[1:3] == (kept_px, kept_px)


def test_random_crops_follow_their_parameters_and_leave_other_photos_unchanged():
    large = torch.randint(0, 256, (3, 40, 60, 3), dtype=torch.uint8)
    fitted = torch.randint(0, 256, (3, 16, 24, 3), dtype=torch.uint8)
    crop_params = torch.tensor([[0.0, 0.999, 0.0], [1.0, 0.5, 0.5], [0.5, 0.5, 0.5]])
    crops = augmented_crops.random_crops(
        large, fitted, torch.tensor([True, True, False]), crop_params, torch.zeros(3, 2)
    )
    assert torch.allclose(crops[0], pixels.to_float(large[:1, 24:40, 0:24])[0], atol=1e-5), (
        "the smallest crop is not resized"
    )
    full_photo = pixels.to_float(large[1:2])
    assert torch.allclose(
        crops[1], torch.nn.functional.interpolate(full_photo, (16, 24), mode="bicubic", antialias=True)[0].clamp(-1, 1)
    )
    assert torch.equal(crops[2], pixels.to_float(fitted)[2])
    jittered = augmented_crops.random_crops(
        large, fitted, torch.zeros(3, dtype=torch.bool), crop_params, torch.tensor([[0.1, 0.0], [0.0, 0.05], [0, 0]])
    )
    original = pixels.to_float(fitted)
    assert torch.allclose(jittered[0], (original[0] * 1.1).clamp(-1, 1))
    assert torch.allclose(jittered[1], (original[1] + 0.05).clamp(-1, 1))


def test_the_key_of_a_memory_mapped_dataset_is_its_fingerprint(raw_photos, tmp_path):
    """The photos are not read for the key, and the key changes when a photo changes."""
    files = sorted(raw_photos.glob("*.png"))

    def write(photos: list[Path]) -> None:
        rows = [{"bytes": photo.read_bytes(), "path": None} for photo in photos]
        Dataset.from_dict({"image": rows}, Features({"image": ImageFeature()})).to_parquet(tmp_path / "photos.parquet")

    def key() -> object:
        part = load_dataset("parquet", data_files=str(tmp_path / "photos.parquet"), cache_dir=str(tmp_path / "cache"))[
            "train"
        ].select([0, 2])
        return content_key(part, Unread(part.cast_column("image", ImageFeature(decode=False))["image"]))

    class Unread(list):
        def __iter__(self):
            raise AssertionError("the photos are read")

    write(files[:3])
    before = key()
    assert key() == before
    write([*files[:2], files[3]])
    assert key() != before


@pytest.mark.parametrize("size", [20_000, 200_000])
def test_a_changed_file_with_the_same_size_and_restored_time_gets_a_new_key(size, tmp_path):
    photo = tmp_path / "photo.bmp"
    content = bytearray(np.random.default_rng(0).bytes(size))
    keys = []
    for change in (None, 0, size // 2, size - 1):
        if change is not None:
            content[change] ^= 1
        photo.write_bytes(content)
        os.utime(photo, ns=(10**18, 10**18))
        keys.append(content_keys.file_key({"bytes": None, "path": str(photo)}))
    assert len(set(keys)) == 4


def test_the_typical_size_is_measured_on_photos_of_all_classes(tmp_path):
    for label, side in ((1, 40), (2, 100), (3, 100)):
        for index in range(20):
            (tmp_path / str(label)).mkdir(exist_ok=True)
            Image.new("RGB", (side, side), (label, index, 0)).save(tmp_path / str(label) / f"{index}.png")
    assert pixels.native_side_px(load_photos(tmp_path)) == 100


def test_a_photo_of_more_pixels_than_pillow_expects_gives_no_warning(tmp_path):
    """A process of its own, because pytest resets the filters of warnings. `prepare` imports only decoding.py."""
    Image.fromarray(RGB).save(tmp_path / "photo.png")
    code = f"""
from PIL import Image
from corel_diffusers.data.decoding import open_photo
Image.MAX_IMAGE_PIXELS = {RGB.shape[0] * RGB.shape[1]} - 1
open_photo({str(tmp_path / "photo.png")!r})
"""
    assert not launch(sys.executable, "-c", code).stderr
