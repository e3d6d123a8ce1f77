"""Values of flags and of configs that no run can use. Right: exit code 2 and one line, before anything is written."""

import contextlib
import dataclasses
import io
import json
import sys
import typing
from functools import partial
from pathlib import Path
from unittest.mock import patch

from common import Base, Trial, fresh_folder, rng_of

NUMBERS = {"float": ["nan", "inf", "-inf", "x", ""], "int": ["1" * 30, "-" + "9" * 30, "1.5", "x", ""]}
TEXTS = ["", " ", "a\x1b[2Jb", "a\nb", "caf\udce9"]
CONFIG_VALUES = [-1, 0, "x", None, [], {}, 10**9, float("nan"), True, [[1]], "../../etc/passwd"]


def of_command_line(words: list[str], folder: Path) -> str:
    from corel_diffusers import cli

    output, before = io.StringIO(), set(folder.rglob("*"))
    try:
        with (
            patch.object(sys, "argv", ["corel-diffusers", *words]),
            contextlib.redirect_stderr(output),
            contextlib.redirect_stdout(output),
        ):
            cli.main()
        return "accepted"
    except SystemExit as ended:
        if ended.code != 2:
            return f"exit code {ended.code}"
    except BaseException as error:
        return f"a traceback: {type(error).__name__}: {str(error)[:100]}"
    text = output.getvalue()
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    if "\x1b[2J" in text:
        return "the escape sequence reached the screen"
    if len(lines) != 1:
        return f"{len(lines)} error lines"
    return "" if set(folder.rglob("*")) == before else "something was written"


def of_config(script: str, values: dict) -> str:
    from corel_diffusers.files import UserError
    from corel_diffusers.models.unet import build_unet
    from corel_diffusers.models.vae import build_vae

    file = fresh_folder(f"config {abs(hash(json.dumps(values, sort_keys=True)))}") / "config.json"
    file.write_text(json.dumps(values))
    try:
        vae = build_vae(str(file) if script == "vae" else "tiny", (32, 32))
        if script == "unet":
            build_unet(str(file), (32, 32), vae, 3)
    except UserError:
        return ""
    except BaseException as error:
        return f"a traceback: {type(error).__name__}: {str(error)[:100]}"
    return ""  # a value that diffusers accepts


def trials(base: Base, seed: int, count: int = 600) -> list[Trial]:
    from corel_diffusers.cli import COMMANDS

    folder = fresh_folder("flags")
    needed = {
        "train": ["--data-dir", "scenes"],
        "prepare": ["--data-dir", str(base.photos)],
        "env": [],
        "train-vae": ["--data-dir", "scenes"],
        "train-unet": ["--data-dir", "scenes", "--vae-checkpoint", str(base.vae)],
        "tune-decoder": ["--pipeline", str(base.unet), "--data-dir", str(base.photos)],
        "generate": ["--pipeline", str(base.unet)],
        "evaluate": ["--pipeline", str(base.unet), "--data-dir", str(base.photos)],
        "push": ["--pipeline", str(base.unet), "--repo-id", "a/b", "--dry-run"],
        "push-dataset": ["--data-dir", str(base.photos), "--repo-id", "a/b", "--dry-run"],
    }
    found = []
    for command, (kind, _) in COMMANDS.items():
        for field in dataclasses.fields(kind):
            option = "--" + field.name.rstrip("_").replace("_", "-")
            kind_of_field = str(typing.get_type_hints(kind)[field.name])
            if "Literal" in kind_of_field:
                values = ["nothing", ""]
            elif "bool" in kind_of_field or kind_of_field == "<class 'bool'>":
                continue
            else:
                number = next((n for n in NUMBERS if n in kind_of_field), None)
                values = NUMBERS[number] if number and "str" not in kind_of_field else TEXTS
            for value in values:
                words = [command, *needed[command], "--base-dir", str(folder)]
                if option == "--base-dir" or command == "env":
                    words = [command, *needed[command]]
                if "tuple[float" in kind_of_field:
                    words += [option, value, "1"]
                else:
                    words += [option, value] if not value.startswith("-") else [f"{option}={value}"]
                found.append(Trial(f"{command} {option} {value!a}", partial(of_command_line, words, folder)))
    for script in ("vae", "unet"):
        config = json.loads((base.folder / f"{script}.json").read_text())
        for name in config:
            for value in CONFIG_VALUES:
                title = f"config of the {script}, {name} = {json.dumps(value)}"
                found.append(Trial(title, partial(of_config, script, config | {name: value})))
    rng_of(seed, "flags").shuffle(found)
    return found[:count]
