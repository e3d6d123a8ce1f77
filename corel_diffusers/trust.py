"""Decide whether the code that lies in a model's folder may run."""

from pathlib import Path

from corel_diffusers.files import UserError

OWN_PIPELINE = Path(__file__).parents[1] / "pipeline.py"  # beside the package, also where the package is installed


def require_own_code(folder: Path, flag: str) -> None:
    """Raise UserError if a pipeline's folder has other code than this toolkit's pipeline.py, byte for byte.

    Loading a pipeline runs the code in its folder. A folder from somebody else can hold any code.

    Args:
        flag: the flag that names the folder.
    """
    code = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.py"))
    own = OWN_PIPELINE.read_bytes()
    foreign = [name for name in code if name != "pipeline.py" or (folder / name).read_bytes() != own]
    if foreign:
        raise UserError(
            f"{flag} {folder} has code that is not of this version of corel_diffusers ({', '.join(foreign[:3])}): "
            "read it, then give --trust-remote-code"
        )
