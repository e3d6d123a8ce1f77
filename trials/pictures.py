"""Mutated pictures of each format, and files that are no pictures. Right: read, or left out with a reason; no hang."""

import io
import os
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
from common import Base, Trial, fresh_folder, run
from PIL import Image

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "TGA", "PCX", "MPO")
SECONDS = 20


def picture(name: str, rng: np.random.Generator) -> bytes:
    mode = str(rng.choice(["RGB", "L", "RGBA", "P", "CMYK", "1", "I;16"]))
    pixels = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    content = io.BytesIO()
    try:
        image = Image.fromarray(rng.integers(0, 65536, (24, 32), np.uint16)) if mode == "I;16" else pixels.convert(mode)
        image.save(content, name)
    except (OSError, ValueError, KeyError):  # the format does not have this mode
        content = io.BytesIO()
        pixels.save(content, name)
    return content.getvalue()


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    values = bytearray(content)
    for _ in range(int(rng.integers(0, 12))):
        place = int(rng.integers(0, max(1, min(len(values), 200 if rng.random() < 0.5 else len(values)))))
        action = rng.integers(0, 4)
        if action == 0 and values:
            values[place] = int(rng.integers(0, 256))
        elif action == 1:
            values[place:place] = rng.bytes(int(rng.integers(1, 9)))
        elif action == 2:
            del values[place : place + int(rng.integers(1, 9))]
        else:
            values[place : place + 4] = [b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"][int(rng.integers(0, 3))]
    return bytes(values[: int(rng.integers(0, len(values) + 1))] if rng.random() < 0.15 else values)


def mutation(seed: int, number: int) -> str:
    from corel_diffusers.data.decoding import PhotoError, open_photo, upright_shape

    rng = np.random.default_rng([seed, number])
    file = fresh_folder("pictures") / f"{number}.bin"
    file.write_bytes(mutated(picture(FORMATS[number % len(FORMATS)], rng), rng))
    start = time.monotonic()
    for read in (upright_shape, open_photo):
        try:
            read(file)
        except PhotoError:
            pass
        except Exception as error:
            return f"{read.__name__}: {type(error).__name__}: {str(error)[:100]}"
    return "" if time.monotonic() - start < SECONDS else "it took too long"


def special(base: Base, kind: str) -> str:
    """Train on a folder in which one of the files is no picture."""
    folder = fresh_folder(f"special {kind}")
    photos = shutil.copytree(base.photos, folder / "photos")
    file = photos / "0001_9999.png"
    make = {
        "pipe": lambda: os.mkfifo(file),
        "device": lambda: file.symlink_to("/dev/zero"),
        "loop": lambda: file.symlink_to(file.name),
        "missing": lambda: file.symlink_to("nowhere"),
        "socket": lambda: os.mknod(file, 0o140000 | 0o600),
        "folder": lambda: file.mkdir(),
        "locked": lambda: (file.write_bytes(b"x"), file.chmod(0)),
        "empty": lambda: file.touch(),
        "bomb": lambda: bomb(file),
        "text": lambda: file.write_text("no picture"),
        "/dev/random": lambda: file.symlink_to("/dev/random"),
    }
    make[kind]()
    for words in (
        base.train_vae(folder / "run", photos=photos),
        ["prepare", "--data-dir", photos, "--output-dir", "o", "--figs-dir", "f"],
    ):
        done = run(*words, folder=folder)
        if done.code not in (0, 2) or done.has_traceback:
            return f"{words[0]}: exit code {done.code}: {done.last_line}"
    return ""


def bomb(file: Path) -> None:
    """Write a PNG that says it has 50,000 x 50,000 pixels."""
    Image.new("1", (50_000, 50_000)).save(file)


def trials(base: Base, seed: int, count: int = 1000) -> list[Trial]:
    found = [Trial(f"mutated {FORMATS[n % len(FORMATS)]} {n}", partial(mutation, seed, n)) for n in range(count)]
    kinds = ("pipe", "device", "loop", "missing", "socket", "folder", "locked", "empty", "bomb", "text", "/dev/random")
    return found + [Trial(f"special file: {kind}", partial(special, base, kind)) for kind in kinds]
