"""Save models in one piece, and notice when a saved model or checkpoint is damaged."""

import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from corel_diffusers.files import UserError, explain_full_disk, printable, read_json, write_json

ENTRY_FILES = ("model_index.json", "config.json")  # loading a pipeline or a model starts from one of these files
MANIFEST = "manifest.json"  # path of a file -> [bytes, CRC-32], of all other files of a saved model or checkpoint
DECODER_TUNING = "decoder_tuning.json"  # in the folder of a pipeline: how its decoder was tuned


@contextmanager
def atomic_model_save(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to save a model in, and move its files into `folder` at the end of the context.

    `folder` may contain other files too. The file from which loading starts (ENTRY_FILES) is removed first and moved
    last, so that new weights are never loaded with an old config. If the process is killed in between,
    `finish_model_save` completes the save.
    """
    finish_model_save(folder)
    staged = folder / ".publishing"
    shutil.rmtree(staged, ignore_errors=True)
    with explain_full_disk(folder):
        staged.mkdir(parents=True)
        yield staged
        write_manifest(staged)
        # complete: finish_model_save can now finish the save, even after a kill
        os.replace(staged, folder / ".published")
        finish_model_save(folder)


def finish_model_save(folder: Path) -> None:
    """Move the files that `atomic_model_save` has completed into `folder`. Continue a move that a kill interrupted."""
    complete = folder / ".published"
    if not complete.is_dir():
        return
    files = sorted(
        (f for f in complete.rglob("*") if f.is_file()), key=lambda f: f.parent == complete and f.name in ENTRY_FILES
    )
    for marker in ENTRY_FILES:
        if complete / marker in files:
            (folder / marker).unlink(missing_ok=True)
    for file in files:
        target = folder / file.relative_to(complete)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    shutil.rmtree(complete)


def write_manifest(folder: Path) -> None:
    """Write the size and the CRC-32 of each file of a saved model or checkpoint, so that a damaged file is noticed."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    sums = {file.relative_to(folder).as_posix(): [file.stat().st_size, crc32_of(file)] for file in files}
    write_json(folder / MANIFEST, sums)


def update_manifest(file: Path) -> None:
    """Write the size and the CRC-32 of a file that has changed to the manifest in its folder, if there is one."""
    manifest = file.with_name(MANIFEST)
    if manifest.is_file():
        write_json(manifest, read_json(manifest) | {file.name: [file.stat().st_size, crc32_of(file)]})


def changed_files(folder: Path) -> dict[str, str]:
    """Return the files that are no longer as the manifest of the folder says -> what has changed.

    The result is empty without a manifest: earlier versions and other programs write none.
    """
    if not (folder / MANIFEST).is_file():
        return {}
    changed = {}
    try:
        for name, (size, crc) in read_json(folder / MANIFEST).items():
            file = folder / name
            if not file.is_file():
                changed[name] = "is missing"
            elif file.stat().st_size != size or crc32_of(file) != crc:
                changed[name] = "has changed since it was saved"
    except (UserError, AttributeError, TypeError, ValueError):
        return {MANIFEST: "cannot be read"}
    except OSError as error:
        return {str(folder): f"cannot be read ({error.strerror})"}
    return {printable(name): reason for name, reason in changed.items()}  # a stranger may have written the manifest


def decoder_tuning(folder: Path) -> dict | None:
    """Return how the decoder of the pipeline in `folder` was tuned, or None if it was not tuned.

    It was not if the VAE has been replaced since, as train_unet.py does when it continues.
    """
    file, weights = folder / DECODER_TUNING, folder / "vae" / "diffusion_pytorch_model.safetensors"
    if not file.is_file() or not weights.is_file():
        return None
    tuning = read_json(file)
    return tuning if tuning.get("vae_crc32") == crc32_of(weights) else None


def crc32_of(file: Path) -> int:
    """Return the CRC-32 of a file."""
    crc = 0
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            crc = zlib.crc32(block, crc)
    return crc


def require_undamaged(folder: Path, source: str) -> None:
    """Check a saved model by its manifest. Give a notice for each file that is not weights: a user may edit it.

    Args:
        source: the flag and its value, for messages.

    Raises:
        UserError: a file of weights has changed or is missing.
    """
    for name, reason in changed_files(folder).items():
        if name.endswith(".safetensors"):
            raise UserError(f"{source}: {name} {reason}: copy it again, or remove {MANIFEST} if the change is yours")
        print(f"notice: {source}: {name} {reason}")
