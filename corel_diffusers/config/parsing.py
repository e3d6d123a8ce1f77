"""Parse the command line of a training script."""

import gc
import inspect
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import TypeVar

import tyro
import yaml

from corel_diffusers.config.commands import Evaluate, Generate, Prepare, Push, PushDataset, Sampling, TuneDecoder
from corel_diffusers.config.other_flags import FLAGS, SAMPLING_FLAGS, translate
from corel_diffusers.config.train import Env, Train
from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.config.tyro_errors import parse_flags
from corel_diffusers.files import UserError, one_line_errors, read_json

Flags = TypeVar("Flags", bound=TrainingArguments)
Command = TypeVar("Command", Train, Env, Prepare, Generate, Evaluate, TuneDecoder, Push, PushDataset)


def parse_script(kind: type[Flags]) -> Flags:
    """Parse the command line of a script that is started as a program.

    The script then imports torch, which takes seconds. Until that is done, Ctrl-C ends it at once, without a traceback,
    and the garbage collector rests: it would look at a million new objects again and again. `run_script` starts it.
    """
    with one_line_errors():
        flags = parse(kind)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()
    return flags


def parse(kind: type[Flags], words: Sequence[str] | None = None, prog: str | None = None) -> Flags:
    """Parse the command line of a training script and return the checked flags, an object of the class `kind`.

    --config-file and the flags of diffusers' examples are replaced by our flags first.

    Args:
        words: the words of the command line (default: those of this process).
        prog: the name of the command in `--help` (default: that of this process).

    Raises:
        UserError: a value that no run can use, or no photos are given.
    """
    use_files_for_plots()
    words = translate(with_config_file(sys.argv[1:] if words is None else list(words), kind))
    # in a dataclass of dataclasses, tyro shows one box per group
    names = [re.sub(r"^(VAE|UNet)|Flags$", "", group.__name__).lower() for group in kind.GROUPS]
    boxes = [
        (name, tyro.conf.OmitArgPrefixes[group], field(default=group()))
        for name, group in zip(names, kind.GROUPS, strict=True)
    ]
    parsed = parse_flags(
        make_dataclass("Boxes", boxes),
        words,
        FLAGS,
        prog=prog,
        description=inspect.getdoc(kind),
        config=(tyro.conf.DisallowNone,),
    )
    flags = kind(**{name: value for name_of_box in names for name, value in vars(getattr(parsed, name_of_box)).items()})
    require_photos(flags := flags.checked())
    return flags


def parse_command(kind: type[Command], words: Sequence[str], prog: str) -> Command:
    """Parse the words of a command that is not a training script, and return the checked flags.

    `train` has few flags. It understands their names in other programs, and its errors name the commands with the rest.
    `generate` and `evaluate` understand other names of their own flags.

    Raises:
        UserError: a flag is unknown, or has a value that cannot be used.
    """
    more = "; train-vae and train-unet have more flags" if kind is Train else ""
    words = translate(words, FLAGS if kind is Train else SAMPLING_FLAGS if issubclass(kind, Sampling) else {})
    options = {"prog": prog, "description": inspect.getdoc(kind), "config": (tyro.conf.DisallowNone,)}
    return parse_flags(kind, words, more_help=more, **options).checked()


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


def with_config_file(words: list[str], kind: type[TrainingArguments]) -> list[str]:
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
        return [*flags_of_file(file, kind), *rest]
    return words


def flags_of_file(file: Path, kind: type[TrainingArguments]) -> list[str]:
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
    return words_of(values.get("flags", values), kind)  # in the run.json of a run, they are under "flags"


def words_of(values: Mapping[str, object], kind: type) -> list[str]:
    """Return flags by name as the words of a command line. None leaves a flag out.

    Args:
        kind: the class of the flags, with their defaults.
    """
    words = []
    for name, value in values.items():
        flag = "--" + str(name).strip("_").replace("_", "-")  # the field of --class is class_
        if isinstance(value, bool):
            is_on_by_default = getattr(kind, flag[2:].replace("-", "_"), False) is True
            words += [flag] if value else [flag.replace("--", "--no-", 1)] if is_on_by_default else []
        elif value is not None:
            words += [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words
