"""Turn the boxes in which tyro explains a wrong command line into one line, as all other errors have it."""

import contextlib
import io
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TypeVar

import tyro

from corel_diffusers.files import UserError

Kind = TypeVar("Kind")
HELP_HINT = re.compile(r"run:? (.* --help)|see (.* --help)")


def parse_flags(
    kind: type[Kind], words: Sequence[str], known: Iterable[str] = (), more_help: str = "", **options: object
) -> Kind:
    """Parse words as an object of the dataclass `kind`, with `tyro.cli`. `--help` prints the help and exits.

    Args:
        known: more flags that the program understands, to be proposed for a misspelt one.
        more_help: text after the command that shows the help.

    Raises:
        UserError: a flag is unknown, has no value, or has a value of another type.
    """
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            return tyro.cli(kind, args=list(words), **options)
        except SystemExit as ended:
            if ended.code != 2:  # the help was printed, or a signal was received
                raise
    raise UserError(one_line(printed.getvalue(), known, more_help))


def one_line(box: str, known: Iterable[str], more_help: str) -> str:
    """Return the content of one of tyro's boxes as one line. known, more_help: see `parse_flags`."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    # without its title, and with borders without its last line: a screen that is not UTF-8 gets no borders
    lines = plain.strip().splitlines()[1 : -1 if plain.startswith("╭") else None]
    lines = [re.sub(r"^│|│\s*$", "", line).strip() for line in lines]
    sections: list[list[str]] = [[]]
    for line in lines:
        if line and set(line) <= {"─", "-"}:
            sections.append([])
        else:
            sections[-1].append(line)
    reason, *more = filter(None, (" ".join(filter(None, section)) for section in sections))
    reason = reason.split(" Got errors:")[0].rstrip(".").removeprefix("Error parsing ")
    reason = re.sub(r": no type matching \S+ could be instantiated from \[(.*)\]$", r" \1", reason)
    for section in more:
        if meant := re.match(r"Perhaps you meant: (--[\w-]+)", section):
            reason += f": perhaps you meant {meant[1]}"
        elif expected := re.match(r"Argument helptext: (.*?[A-Z}]) (?=[A-Z0-9])", section):
            reason += f": expected {expected[1]}"
        elif section.startswith("Available subcommands"):
            reason += f": {section[0].lower()}{section[1:]}"
        elif hint := HELP_HINT.search(section):
            reason += f" (see {hint[1] or hint[2]}{more_help})"
    unknown = re.match(r"Unrecognized options: (--[\w-]+)", reason)
    if unknown and "perhaps you meant" not in reason:
        near = get_close_matches(unknown[1].replace("_", "-"), known, n=1, cutoff=0.75)
        reason = reason.replace(" (see ", f": perhaps you meant {near[0]} (see ") if near else reason
    if missing := re.match(r"Missing from [^:]*: (--\S+ \S+) (.*?)\.? \(required\)", reason):
        reason = reason.replace(missing[0], f"{missing[1]} is missing: {missing[2]}")
        return reason
    if word := re.match(r"Unrecognized options: ([^-\s]\S*)", reason):
        hint = "this flag takes no value" if word[1].lower() in ("true", "false") else "give the flag before its value"
        reason = reason.replace(" (see ", f": {hint} (see ", 1)
    return reason[0].lower() + reason[1:]
