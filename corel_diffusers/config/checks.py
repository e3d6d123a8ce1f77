"""Check the values of flags."""

import math
import os
import re
from dataclasses import field, fields
from pathlib import Path

from corel_diffusers.files import UserError, printable, require_writable

SCENES = "scenes"
LARGEST_WHOLE = 2**63 - 1  # of a number in a tensor, and of a random seed
LARGEST = {  # more than any machine can use
    **dict.fromkeys(("batch_size", "grad_accum", "num_images"), 1_000_000),
    **dict.fromkeys(("views", "nrow", "latent_dim"), 10_000),
    "num_workers": 1_000,
}
MIN_PHOTOS = 4  # minimum number of samples and of photos to compare: with fewer images, distances mean nothing
SIDES_PX = (16, 16_384)  # smallest and largest side of an image; SSIM has a window of 11 px
HUB_ID = r"[\w.-]+/[\w.-]+"  # user/name
ARCHIVE_ENDINGS = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
DATA_DIR_HINT = "check the path (relative paths start at --base-dir)"


def flag(default: object, may_change: bool = False, in_card: bool = True) -> object:
    """Return the dataclass field of a flag.

    Args:
        may_change: a resumed run may have another value. The run compares all other flags, and the contents of photos,
            VAE and config.
        in_card: the command in the model card shows this flag.
    """
    return field(default=default, metadata={"may_change": may_change, "in_card": in_card})


def require(condition: bool, name: str, value: object, hint: str) -> None:
    """Raise UserError for the value of a flag if the condition is false. `hint` tells the user what to give instead."""
    if not condition:
        raise UserError(f"{flag_name(name)} {value}: {hint}")


def require_usable(flags: object) -> None:
    """Raise UserError for a value that no command can use, whatever the flag is.

    It is empty text, text that is not UTF-8 or has control characters, or a number that is not finite or too large.

    Args:
        flags: a dataclass of flags.
    """
    for flag_field in fields(flags):
        value = getattr(flags, flag_field.name)
        for part in value if isinstance(value, tuple) else (value,):
            name = flag_field.name
            if isinstance(part, str):
                require(part.strip() != "", name, repr(part), "the value is empty: give one, or omit the flag")
                require(part == printable(part), name, ascii(part), "give text in UTF-8, without control characters")
            elif isinstance(part, float):
                require(math.isfinite(part), name, part, "give a finite number")
            elif isinstance(part, int):
                largest = LARGEST.get(name, LARGEST_WHOLE)
                require(abs(part) <= largest, name, part, f"give at most {largest:,}")


def is_main_process() -> bool:
    """Return whether this process is the first, or the only one, of those that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def flag_name(field_name: str) -> str:
    """Return the flag of a field: "--max-train-steps" for "max_train_steps", "--class" for "class_"."""
    return "--" + field_name.rstrip("_").replace("_", "-")


def user_path(base_dir: str, path: str) -> Path:
    """Return a path that the user gave. A relative path starts at --base-dir, and ~ is the home folder."""
    try:
        return Path(base_dir).expanduser() / Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such user: write the full path") from None


def require_data_dir(folder: Path) -> None:
    """Raise UserError if --data-dir is not a folder."""
    if folder.is_file() and folder.suffix.lower() in ARCHIVE_ENDINGS:
        raise UserError(f"--data-dir {folder} is an archive: unpack it, and give the folder with the photos")
    if not folder.is_dir():
        raise UserError(f"--data-dir {folder} is not a folder: {DATA_DIR_HINT}")


def cache_home() -> Path:
    """Return the folder of the caches, as the Hub client chooses it: HF_HOME, or huggingface/ in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface").expanduser()


def require_cache() -> None:
    """Raise UserError if the folder of the caches cannot be written to."""
    try:
        require_writable(cache_home(), "HF_HOME")
    except UserError as error:
        raise UserError(f"{error} by setting the environment variable HF_HOME") from None


def parse_size(text: str, flag: str = "--image-size") -> tuple[int, int]:
    """Convert "128" or "96x144" to (height, width) in pixels. Raise UserError for any other text."""
    match = re.fullmatch(r"([0-9]{1,6})(?:x([0-9]{1,6}))?", text.lower())
    smallest, largest = SIDES_PX
    if not match or not all(smallest <= int(side) <= largest for side in match.groups(match[1])):
        raise UserError(
            f"{flag} {text}: give pixels as 128, or as 96x144 (height x width), from {smallest} to {largest}"
        )
    return int(match[1]), int(match[2] or match[1])


def check_repo_id(repo_id: str, flag: str) -> None:
    """Raise UserError if the repository id is not `user/name`, before anything is built or sent."""
    if not re.fullmatch(HUB_ID, repo_id):
        raise UserError(f"{flag} {repo_id}: give user/name")


def model_location(location: str, base_dir: str, flag: str) -> Path | str:
    """Return the folder of a model as a Path, or its Hub id as a string.

    The path of a file in the folder of a model means that folder: users of older scripts give
    `vae_models/best_model.pt`. A name that begins with one of the default output folders is never a Hub id.

    Raises:
        UserError: there is no such folder, and the name cannot be a Hub id.
    """
    folder = user_path(base_dir, location)
    if folder.is_dir():
        return folder
    is_file_name = Path(location).suffix in {".pt", ".pth", ".safetensors", ".json"}
    if is_file_name and folder.parent.is_dir():
        return folder.parent
    is_local = Path(location).parts[0] in {"vae_models", "diffusion_models"} or folder.parent.is_dir()
    if re.fullmatch(HUB_ID, location) and not is_file_name and not is_local:
        return location
    trainer = "train_vae.py" if flag == "--vae-checkpoint" else "train_unet.py"
    raise UserError(
        f"{flag} {folder} is not a folder: train with {trainer} first, or give its --output-dir or a Hub id"
    )
