"""Write the flags of a run down: as a command line for model cards, and as values for --config-file."""

from dataclasses import fields
from pathlib import Path

from corel_diffusers.config.checks import flag_name
from corel_diffusers.config.training import TrainingArguments

OF_ONE_START = ("plan", "resume", "config_file", "change_precision")  # flags of one start of a run, not of the run


def given_flags(args: TrainingArguments) -> dict:
    """Return the values that differ from the defaults, by name: what --config-file reads from run.json."""
    values = {field.name: getattr(args, field.name) for field in fields(args) if field.name not in OF_ONE_START}
    defaults = {field.name: field.default for field in fields(args)}
    return {name: value for name, value in values.items() if value != defaults[name]}


def command_line(args: TrainingArguments) -> str:
    """Return the command line that gives these settings.

    Absolute paths are shortened to their last part, because the command line is written to public model cards.
    """
    words = ["python", f"{args.script}.py"]
    for field in fields(args):
        value = getattr(args, field.name)
        if value == field.default or not field.metadata.get("in_card", True):
            continue
        option = flag_name(field.name)
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
            continue
        values = value if isinstance(value, tuple) else (value,)
        shown = [Path(str(v)).name if Path(str(v)).is_absolute() else str(v) for v in values]
        words += [option, *(f'"{v}"' if " " in v else v for v in shown)]
    return " ".join(words)
