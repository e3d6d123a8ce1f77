"""The state of a run."""

import math
from dataclasses import dataclass, field


@dataclass
class RunState:
    """The progress of a run, apart from its weights.

    It is saved as JSON: use numbers, not tensors, and lists, not tuples. Only the values of the main process are saved.
    """

    step: int = 0
    seconds: float = 0.0
    best: float = math.inf  # lowest validation loss
    to_beat: float = math.inf  # early stopping: a better loss is lower than this by early_stopping_delta
    validations_waited: int = 0  # early stopping: validations since the last better loss
    recent: list[float] = field(default_factory=list)  # oscillation check: the losses in its window
    # training metrics of the current epoch: name -> [sum, number of forward passes]
    sums: dict[str, list] = field(default_factory=dict)
    kl_weight: float = 0.0
    stop_reason: str = ""
    returns: int = 0  # how often the run went back to a checkpoint, see training/divergence.py
    rate_factor: float = 1.0  # factor of the learning rate: smaller after a return
