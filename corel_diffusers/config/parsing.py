"""Parse the command line of a training script."""

import inspect
import os
import sys
from pathlib import Path

import tyro
import yaml

from corel_diffusers.config.diffusers_flags import translate
from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.files import UserError, read_json


def parse(kind: type[TrainingArguments]) -> TrainingArguments:
    """Parse the command line and return the checked flags, an object of the class `kind`.

    Raises:
        UserError: a value that no run can use.
    """
    use_files_for_plots()
    flags = tyro.cli(kind, args=training_words(sys.argv[1:]), description=inspect.getdoc(kind)).checked()
    require_photos(flags)
    return flags


def training_words(words: list[str]) -> list[str]:
    """Return the words of a command line with --config-file and the flags of diffusers' examples replaced by ours."""
    return translate(with_config_file(words))


def require_photos(flags: TrainingArguments) -> None:
    """Raise UserError if the command line names no photos."""
    if not flags.data_dir and not flags.dataset_name:
        raise UserError(
            "--data-dir is missing: give a folder of photos, or --dataset-name user/name, "
            "or --data-dir scenes to try the script on photos that it draws"
        )


def use_files_for_plots() -> None:
    """Let matplotlib draw to files. A notebook hands its own backend to the commands that it starts.

    This environment may lack that backend, and then importing matplotlib would fail.
    """
    os.environ["MPLBACKEND"] = "agg"


def with_config_file(words: list[str]) -> list[str]:
    """Replace --config-file by the flags in that file, at the beginning: flags of the command line come later and win.

    The file is YAML or JSON with `name: value`, or the run.json of a run.

    Raises:
        UserError: the file cannot be read.
    """
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != "--config-file":
            continue
        if not equals and index + 1 == len(words):
            raise UserError("--config-file: give the path of a YAML or JSON file")
        file = Path(value if equals else words[index + 1]).expanduser()
        rest = words[:index] + words[index + (1 if equals else 2) :]
        return [*flags_of_file(file), *rest]
    return words


def flags_of_file(file: Path) -> list[str]:
    """Return the flags in a file as the words of a command line: see `with_config_file`."""
    if not file.is_file():
        raise UserError(f"--config-file {file}: no such file")
    try:
        is_json = file.suffix == ".json"
        values = read_json(file) if is_json else yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config-file {file} is not valid YAML ({str(error).splitlines()[0]}): correct it") from None
    if not isinstance(values, dict):
        raise UserError(f"--config-file {file}: expected lines such as `image-size: 64`")
    values, words = values.get("flags", values), []  # in the run.json of a run, they are under "flags"
    for name, value in values.items():
        flag = "--" + str(name).replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words
