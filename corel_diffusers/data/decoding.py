"""Open a photo file as an RGB image.

Photos can be rotated by EXIF, have an alpha channel, be CMYK or 16-bit, or be truncated. `open_photo` converts every
file that can be shown. For other files it raises PhotoError with a reason. `prepare` and the training scripts both use
it.
"""

import errno
import io
import struct
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

from corel_diffusers import internals
from corel_diffusers.data.tree import register_heif
from corel_diffusers.files import UserError

# Pillow warns from about 90 megapixels, but 100-megapixel cameras exist. It still raises an error at twice its limit.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
MIN_SIDE_PX = 32
GREY_LEVELS = 3  # the channels of a grey photo differ by at most this much, of 255
# EXIF orientation -> how to turn the photo upright. ImageOps.exif_transpose also writes the EXIF data again, and fails
# if any of it is damaged.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PhotoError(Exception):
    """A file cannot be used as a photo. The message is the reason in a few words."""


def open_photo(file: Path | str | bytes) -> Image.Image:
    """Open a photo (path or bytes) as 8-bit RGB, with its EXIF rotation applied and its alpha channel on white.

    Raises:
        PhotoError: the file cannot be used as a photo.
        UserError: the system cannot read the file (disk, permissions). The photo itself may be good, so later runs must
            not treat it as damaged.
    """
    register_heif()
    try:
        photo = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        frames = getattr(photo, "n_frames", 1)
        # an MPO is a JPEG of a phone, followed by a preview; a HEIC file of a phone can hold a burst
        if frames > 1 and photo.format not in ("MPO", "HEIF") and not has_previews_only(photo, frames):
            raise PhotoError(f"animated or multi-page ({frames} frames)")
        if has_deep_planes(photo):
            raise PhotoError("a TIFF with 16-bit colours in separate planes, which Pillow misreads: save it as PNG")
        photo = load_deep_colours(photo, file)
        if (turn := TURNS.get(orientation(photo))) is not None:
            photo = photo.transpose(turn)
    except UnidentifiedImageError:
        raise PhotoError("a pointer of git lfs: run git lfs pull" if is_lfs_pointer(file) else "not an image") from None
    except Image.DecompressionBombError:
        raise PhotoError("too many pixels to open safely") from None
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, RuntimeError, struct.error) as error:
        if getattr(error, "errno", None) not in (None, errno.EINVAL):  # a damaged file can name an impossible place
            raise unreadable_file(file, error) from None
        raise PhotoError("truncated" if "truncated" in str(error) else f"damaged ({error})") from None
    if min(photo.size) < MIN_SIDE_PX:
        raise PhotoError(f"tiny ({photo.width}x{photo.height} px)")
    if photo.mode.startswith("I") or photo.mode == "F":
        photo = to_eight_bits(photo)
    photo = to_srgb(photo)
    if photo.has_transparency_data:
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    return photo.convert("RGB")


def upright_shape(file: Path | str | bytes) -> tuple[int, int]:
    """Return the height and the width of a photo as a viewer shows it. Only its header is read.

    Raises:
        PhotoError: the header cannot be read.
        UserError: see `open_photo`.
    """
    register_heif()
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as photo:
            width, height = photo.size
            if photo.format == "TIFF":  # some versions of Pillow have turned its size already
                width, height = photo.tag_v2[TiffImagePlugin.IMAGEWIDTH], photo.tag_v2[TiffImagePlugin.IMAGELENGTH]
            # without EXIF data in the header of a PNG, Pillow would decode the photo to search for it at the end
            has_orientation = photo.format != "PNG" or "exif" in photo.info
            is_turned = has_orientation and orientation(photo) >= 5  # from 5 on, by 90 degrees
            return (width, height) if is_turned else (height, width)
    except Image.DecompressionBombError as error:
        raise PhotoError(str(error)) from None
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, RuntimeError, KeyError, struct.error) as error:
        if getattr(error, "errno", None) not in (None, errno.EINVAL):
            raise unreadable_file(file, error) from None
        raise PhotoError(str(error)) from None


def has_previews_only(photo: Image.Image, frames: int) -> bool:
    """Return whether all pages of a TIFF after the first one are smaller, as previews of cameras and scanners are."""
    if photo.format != "TIFF":
        return False
    width, height = photo.size
    for frame in range(1, frames):
        photo.seek(frame)
        if photo.width >= width or photo.height >= height:
            return False
    photo.seek(0)
    return True


def has_deep_planes(photo: Image.Image) -> bool:
    """Return whether a photo is a TIFF with more than 8 bits per colour, and one plane after the other."""
    if photo.format != "TIFF":
        return False
    bits = photo.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    return photo.tag_v2.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 and len(bits) > 1 and max(bits) > 8


def to_srgb(photo: Image.Image) -> Image.Image:
    """Convert the colours of a photo to sRGB with its own colour profile, as a viewer does.

    A photo without a profile, with a damaged one, or with that of sRGB is returned unchanged.
    """
    profile = photo.info.get("icc_profile")
    if not profile:
        return photo
    if photo.mode in ("P", "PA"):  # the profile is that of the palette
        photo = photo.convert("RGBA" if photo.has_transparency_data else "RGB")
    colours = photo.mode.removesuffix("A")
    if colours not in ("RGB", "L", "CMYK"):
        return photo
    try:
        transform = transform_to_srgb(profile, colours)
        if transform is None:
            return photo
        if colours == photo.mode:
            return ImageCms.applyTransform(photo, transform)
        converted = ImageCms.applyTransform(photo.convert(colours), transform)  # it knows no alpha channel
        converted.putalpha(photo.getchannel("A"))
        return converted
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return photo


@lru_cache(maxsize=64)  # the photos of a camera have the same profile
def transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion of a colour profile to sRGB for photos of this mode, or None if it changes nothing."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "RGB":
        steps = np.linspace(0, 255, 6).astype(np.uint8)
        colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
        converted = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform))
        if np.abs(converted.astype(int) - colours).max() <= 1:
            return None
    return transform


def load_deep_colours(photo: Image.Image, file: Path | str | bytes) -> Image.Image:
    """Load a photo. If its 16-bit colours use only 10 or 12 bits, as cameras and scanners write them, scale them.

    Pillow keeps the high byte of 16-bit colours. With 12 bits that byte is at most 15, so the photo would be black.
    """
    low_bytes = internals.raw_mode_of_low_bytes(photo)
    photo.load()
    if low_bytes is None:
        return photo
    high = np.asarray(photo)
    colours = high[..., :3]  # the alpha channel has all its bits
    if colours.max() > 15:  # all 16 bits are used
        return photo
    other = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    internals.read_with(other, low_bytes)
    values = 256 * colours.astype(np.uint16) + np.asarray(other)[..., :3]
    scaled = Image.fromarray(np.rint(values * (255 / largest_value(values))).astype(np.uint8))
    if photo.mode == "RGBA":
        scaled.putalpha(photo.getchannel("A"))
    scaled.info = photo.info
    return scaled


def largest_value(values: np.ndarray) -> int:
    """Return the largest value of the smallest bit depth (8, 10, 12 or 16 bits) that holds all values."""
    return next((limit for limit in (255, 1023, 4095, 65535) if values.max() <= limit), values.max())


def is_lfs_pointer(file: Path | str | bytes) -> bool:
    """Return whether a file is a pointer of git lfs: a text that stands for a photo that was not fetched."""
    if isinstance(file, bytes):
        return file.startswith(b"version https://git-lfs")
    try:
        with open(file, "rb") as opened:
            return opened.read(24).startswith(b"version https://git-lfs")
    except OSError:
        return False


def unreadable_file(file: Path | str | bytes, error: OSError) -> UserError:
    """Return the error for a file that exists but that the disk or its permissions do not let us read."""
    return UserError(
        f"{file} cannot be read ({error.strerror}): check the disk and the file permissions, then start again"
    )


def orientation(photo: Image.Image) -> int:
    """Return the EXIF orientation: 1 (upright) if it is missing or cannot be read."""
    try:
        return photo.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, ValueError, SyntaxError, struct.error):
        return 1


def to_eight_bits(photo: Image.Image) -> Image.Image:
    """Convert a 16-bit, 32-bit or float greyscale image to 8 bits.

    The largest value that its bit depth allows becomes 255: see `largest_value`. The range of a float image is 0 to 1,
    0 to 255 or 0 to 65535, whichever holds 99.9 % of its values.
    """
    values = np.asarray(photo)
    if photo.mode == "F":
        values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
        typical_maximum = np.percentile(values, 99.9)  # a filter can leave single values above 1
        scale = 255 if typical_maximum <= 1 else 1 if typical_maximum <= 255 else 255 / 65535
    else:
        scale = 255 / largest_value(values)
    result = np.empty(values.shape, np.uint8)
    for rows in range(0, len(values), 64):  # in parts: float64 takes four times the memory of the photo
        scaled = np.rint(values[rows : rows + 64].astype(np.float64) * scale)
        result[rows : rows + 64] = np.clip(scaled, 0, 255)
    return Image.fromarray(result)


def is_grey(photo: Image.Image) -> bool:
    """Return whether an RGB photo has no colours. JPEG rounding and a few coloured pixels are allowed."""
    small = np.asarray(photo.resize((64, 64), Image.Resampling.BOX)).astype(int)
    return bool(np.ptp(small, axis=2).max() <= GREY_LEVELS)


def fit_photo(photo: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    """Resize and centre-crop a photo to (height, width), with Lanczos, the best antialiasing filter for reduction."""
    return ImageOps.fit(photo, (size_px[1], size_px[0]), Image.Resampling.LANCZOS)
