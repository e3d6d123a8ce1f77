"""Photos in the formats, depths and colours that cameras and programs write."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from corel_diffusers.data.decoding import PhotoError, open_photo
from corel_diffusers.data.tree import photo_endings

# red, green and blue of AdobeRGB, adapted to D50
ADOBE_RGB = {
    b"rXYZ": (0.60974, 0.31111, 0.01947),
    b"gXYZ": (0.20528, 0.62567, 0.06087),
    b"bXYZ": (0.14919, 0.06322, 0.74457),
}


def wide_profile() -> bytes:
    """Return the profile of sRGB with the primary colours of AdobeRGB."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for place in range(struct.unpack(">I", profile[128:132])[0]):
        name, offset, _ = struct.unpack(">4sII", profile[132 + 12 * place : 144 + 12 * place])
        if name in ADOBE_RGB:
            profile[offset + 8 : offset + 20] = struct.pack(">3i", *(round(v * 65536) for v in ADOBE_RGB[name]))
    return bytes(profile)


def linear_grey_profile() -> bytes:
    """Return the smallest ICC profile of grey values that are proportional to the light."""
    curve = b"curv" + bytes(4) + struct.pack(">I", 0)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)))
    text = b"desc" + bytes(4) + struct.pack(">I", 2) + b"g\0" + bytes(78)
    tags, body = [], b""
    for name, data in ((b"desc", text), (b"wtpt", white), (b"kTRC", curve)):
        tags.append((name, 128 + 4 + 12 * 3 + len(body), len(data)))
        body += data + bytes(-len(data) % 4)
    table = struct.pack(">I", 3) + b"".join(name + struct.pack(">II", *place) for name, *place in tags)
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"none", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)))
    return header + bytes(128 - len(header)) + table + body


def colours(mode: str = "RGB") -> Image.Image:
    """Return a photo with smooth colours, 40 x 40 px."""
    ramp = np.linspace(20, 230, 40)
    channels = [np.broadcast_to(ramp, (40, 40)), np.broadcast_to(ramp[:, None], (40, 40)), np.full((40, 40), 90)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8)).convert(mode)


def png_of_16_bits(values: np.ndarray) -> bytes:
    """Return a PNG of uint16 (H, W, 3), which Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_is_converted_as_by_the_library(mode, tmp_path):
    photo, profile = colours(mode), wide_profile()
    photo.save(tmp_path / "photo.png", icc_profile=profile)
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    expected = ImageCms.profileToProfile(photo.convert("RGB"), source, ImageCms.createProfile("sRGB"))
    assert np.array_equal(np.asarray(open_photo(tmp_path / "photo.png")), np.asarray(expected))
    assert not np.array_equal(np.asarray(expected), np.asarray(photo.convert("RGB"))), "the profile matters"


def test_the_profile_of_a_grey_photo_with_transparency_is_that_of_the_grey_photo(tmp_path):
    """The tone curve of the profile is linear, so that mid grey becomes brighter."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = colours("L")
    for mode in ("L", "LA"):
        grey.convert(mode).save(tmp_path / f"{mode}.png", icc_profile=linear_grey_profile())
    grey.save(tmp_path / "rgb profile.png", icc_profile=profile)
    opaque, transparent = (np.asarray(open_photo(tmp_path / f"{mode}.png")) for mode in ("L", "LA"))
    assert np.array_equal(opaque, transparent)
    assert opaque.mean() > np.asarray(grey).mean() + 20
    assert np.array_equal(np.asarray(open_photo(tmp_path / "rgb profile.png"))[..., 0], np.asarray(grey))


def test_a_damaged_colour_profile_is_ignored(tmp_path):
    colours().save(tmp_path / "photo.png", icc_profile=b"no profile")
    assert np.array_equal(np.asarray(open_photo(tmp_path / "photo.png")), np.asarray(colours()))


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_the_bits_that_are_used_decide_about_the_brightness(bits, tmp_path):
    expected = np.asarray(colours())
    values = np.rint(expected / 255 * (2**bits - 1)).astype(np.uint16)
    values[0, 0] = 2**bits - 1
    assert np.abs(np.asarray(open_photo(png_of_16_bits(values))).astype(int) - expected)[1:].max() <= 1
    Image.fromarray(values[..., 0]).save(tmp_path / "grey.png")
    grey = np.asarray(open_photo(tmp_path / "grey.png")).astype(int)
    assert np.abs(grey[..., 0] - expected[..., 0])[1:].max() <= 1


@pytest.mark.parametrize("ending", [".avif", ".jfif", ".jpe", ".jp2", ".mpo", ".ppm", ".tga", ".tif", ".webp"])
def test_formats_that_pillow_opens_are_photos(ending, tmp_path):
    if ending == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    assert ending in photo_endings()
    colours().save(tmp_path / f"photo{ending}", "JPEG" if ending in (".jfif", ".jpe") else None)
    difference = np.asarray(open_photo(tmp_path / f"photo{ending}")).astype(int) - np.asarray(colours())
    assert np.abs(difference).mean() < 4


def tiff_of_16_bits(values: np.ndarray, planar: int) -> bytes:
    """Return a TIFF of uint16 (H, W, 3), which Pillow cannot write. planar 2: one plane after the other."""
    height, width = values.shape[:2]
    planes = values.transpose(2, 0, 1)[:, None] if planar == 2 else values[None]
    strips = [plane.astype("<u2").tobytes() for plane in planes]
    data, count = b"".join(strips), len(strips)
    places = struct.pack(f"<{2 * count}I", *(8 + n * len(strips[0]) for n in range(count)), *map(len, strips))
    bits, first = 8 + len(data), 8 + len(data) + 6
    offsets = (first, first + 4 * count) if count > 1 else (8, len(data))
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, bits), (259, 3, 1, 1), (262, 3, 1, 2),
            (273, 4, count, offsets[0]), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, count, offsets[1]),
            (284, 3, 1, planar)]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    body = data + struct.pack("<3H", 16, 16, 16) + places
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory


def test_16_bits_in_separate_planes_are_refused(tmp_path):
    values = 257 * np.asarray(colours()).astype(np.uint16)
    together = np.asarray(open_photo(tiff_of_16_bits(values, planar=1)))
    assert np.abs(together.astype(int) - np.asarray(colours())).max() <= 1
    with pytest.raises(PhotoError, match="16-bit colours in separate planes"):
        open_photo(tiff_of_16_bits(values, planar=2))


def test_a_tiff_with_a_preview_is_one_photo_and_a_document_is_not(tmp_path):
    photo = colours()
    for name, second in (("preview", photo.resize((20, 20))), ("document", colours().rotate(90))):
        photo.save(tmp_path / f"{name}.tif", save_all=True, append_images=[second])
    assert np.array_equal(np.asarray(open_photo(tmp_path / "preview.tif")), np.asarray(photo))
    with pytest.raises(PhotoError, match=r"animated or multi-page \(2 frames\)"):
        open_photo(tmp_path / "document.tif")


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    pointer: Path = tmp_path / "photo.png"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:919d\nsize 330454\n")
    with pytest.raises(PhotoError, match="run git lfs pull"):
        open_photo(pointer)
