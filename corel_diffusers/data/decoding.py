"""Open a photo file as an RGB image.

Photos can be rotated by EXIF, have an alpha channel, be CMYK or 16-bit, or be truncated. `open_photo` converts every
file that can be shown. For other files it raises PhotoError with a reason. `prepare` and the training scripts both use
it.
"""

import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from corel_diffusers.files import UserError

# Pillow warns from about 90 megapixels, but 100-megapixel cameras exist. It still raises an error at twice its limit.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
MIN_SIDE_PX = 32


class PhotoError(Exception):
    """A file cannot be used as a photo. The message is the reason in a few words."""


def open_photo(file: Path | str | bytes) -> Image.Image:
    """Open a photo (path or bytes) as 8-bit RGB, with its EXIF rotation applied and its alpha channel on white.

    Raises:
        PhotoError: the file cannot be used as a photo.
        UserError: the system cannot read the file (disk, permissions). The photo itself may be good, so later runs must
            not treat it as damaged.
    """
    try:
        photo = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        frames = getattr(photo, "n_frames", 1)
        if frames > 1 and photo.format != "MPO":  # an MPO is a JPEG of a phone, followed by a preview
            raise PhotoError(f"animated or multi-page ({frames} frames)")
        photo.load()
        if orientation(photo) != 1:
            photo = ImageOps.exif_transpose(photo)
    except UnidentifiedImageError:
        raise PhotoError("not an image") from None
    except Image.DecompressionBombError:
        raise PhotoError("too many pixels to open safely") from None
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, struct.error) as error:
        if getattr(error, "errno", None):
            raise unreadable_file(file, error) from None
        raise PhotoError("truncated" if "truncated" in str(error) else f"damaged ({error})") from None
    if min(photo.size) < MIN_SIDE_PX:
        raise PhotoError(f"tiny ({photo.width}x{photo.height} px)")
    if photo.mode.startswith("I") or photo.mode == "F":
        photo = to_eight_bits(photo)
    if photo.has_transparency_data:
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    return photo.convert("RGB")


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
    """Convert a 16-bit, 32-bit or float greyscale image to 8 bits. 16-bit values are divided by 257: 65535 becomes 255.

    A float image has the range 0 to 1 if its maximum is at most 1, and 0 to 255 otherwise. A 32-bit image has 8-bit
    values if its maximum is at most 255, and 16-bit values otherwise.
    """
    values = np.asarray(photo).astype(np.float64)
    if photo.mode == "F":
        scale = 255 if values.max() <= 1 else 1
    elif photo.mode == "I" and values.max() <= 255:
        scale = 1
    else:
        scale = 1 / 257
    return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))


def fit_photo(photo: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    """Resize and centre-crop a photo to (height, width), with Lanczos, the best antialiasing filter for reduction."""
    return ImageOps.fit(photo, (size_px[1], size_px[0]), Image.Resampling.LANCZOS)
