"""Read trained models from a folder or from the Hub. A folder is checked before anything in it is built or run."""

from pathlib import Path

from diffusers import AutoencoderKL, DiffusionPipeline

from corel_diffusers.files import UserError, first_line, read_json
from corel_diffusers.models.configs import check_layers
from corel_diffusers.saved_models import require_undamaged
from corel_diffusers.trust import require_own_code

MAX_TIMESTEPS = 100_000  # models are trained with 1000
HUB_HINT = "check the id, the connection to the Hub, and that you may read the repository"


def read_vae(location: Path | str, flag: str) -> AutoencoderKL:
    """Read an AutoencoderKL from its folder or its Hub id, or from those of a pipeline that has one.

    Args:
        flag: the flag that names the location, for messages.

    Raises:
        UserError: the VAE is damaged or cannot be loaded.
    """
    source, is_folder = f"{flag} {location}", isinstance(location, Path)
    if is_folder:
        require_undamaged(location, source)
    options = {"local_files_only": is_folder}
    try:
        try:
            config = AutoencoderKL.load_config(location, **options)
        except OSError:  # no config.json: this may be a pipeline
            options["subfolder"] = "vae"
            config = AutoencoderKL.load_config(location, **options)
        check_layers(config, "config.json")
        return AutoencoderKL.from_pretrained(location, use_safetensors=True, **options)
    except Exception as error:  # diffusers and the Hub client raise many types of errors
        hint = "train it first (train_vae.py), or give the --output-dir of a finished run or a Hub id"
        hint = hint if isinstance(location, Path) else HUB_HINT
        raise UserError(f"{source}: no VAE can be loaded ({first_line(error)}): {hint}") from None


def read_pipeline(location: Path | str, flag: str, trust_remote_code: bool = False) -> DiffusionPipeline:
    """Read a pipeline from a folder or a Hub id. The folder is checked first.

    Args:
        flag: the flag that names the location, for messages.
        trust_remote_code: run the code in the folder, whatever it is. Otherwise it must be that of this toolkit.

    Raises:
        UserError: the pipeline is damaged or cannot be loaded, or its code is not that of this toolkit.
    """
    source, is_folder = f"{flag} {location}", isinstance(location, Path)
    if is_folder:
        if not trust_remote_code:
            require_own_code(location, flag)
        require_undamaged(location, source)
        for file in location.glob("*/config.json"):
            if isinstance(values := read_json(file), dict):
                check_layers(values, f"{source}: {file.parent.name}/config.json")
        check_scheduler(location, source)
    try:
        return DiffusionPipeline.from_pretrained(
            location, trust_remote_code=is_folder or trust_remote_code, use_safetensors=True, local_files_only=is_folder
        )
    except Exception as error:  # a damaged or hostile folder can raise any type
        hint = "give the --output-dir of a train_unet.py run, or a Hub id" if is_folder else HUB_HINT
        raise UserError(f"{source} cannot be loaded ({first_line(error)}): {hint}") from None


def check_scheduler(folder: Path, source: str) -> None:
    """Raise UserError if the scheduler of a pipeline's folder has more timesteps than any model is trained with.

    Building a scheduler takes memory for each of them.

    Args:
        source: the flag and its value, for messages.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_json(file) if file.is_file() else {}
    timesteps = config.get("num_train_timesteps", 1000) if isinstance(config, dict) else None
    if not isinstance(timesteps, int) or not 1 <= timesteps <= MAX_TIMESTEPS:
        hint = f"give a whole number from 1 to {MAX_TIMESTEPS}"
        raise UserError(f"{source}: scheduler/scheduler_config.json has num_train_timesteps {timesteps}: {hint}")
