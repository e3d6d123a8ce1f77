"""Parse the command line of a training script."""

import inspect

import tyro

from corel_diffusers.config.training import TrainingArguments


def parse(kind: type[TrainingArguments]) -> TrainingArguments:
    """Parse the command line and return the checked flags, an object of the class `kind`.

    Raises:
        UserError: a value that no run can use.
    """
    return tyro.cli(kind, description=inspect.getdoc(kind)).checked()
