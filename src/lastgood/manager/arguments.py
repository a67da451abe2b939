"""What users give to a manager, looked at before anything is done with it."""

import os
from typing import Any

from lastgood.errors import ConfigError
from lastgood.format.index_head import LARGEST_METRICS, are_metrics
from lastgood.manager.random_states import RANDOM_STATES_KEY

_LARGEST_STEP = 10**18 - 1


def root_path(root: str | os.PathLike[str]) -> str:
    path = os.fspath(root)
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{root!r} is no root for checkpoints: pass the name of a directory")
    return path


def check_step_and_metrics(step: int, metrics: dict[str, float] | None) -> None:
    if type(step) is not int or not 0 <= step <= _LARGEST_STEP:
        raise ConfigError(f"the step is {step!r}; it has to be an int from 0 to {_LARGEST_STEP}")
    if metrics is not None and not are_metrics(metrics):
        raise ConfigError(
            f"the metrics of step {step} have to be a dict of numbers (int or float) under strings, of at most "
            f"{LARGEST_METRICS} bytes as JSON; they are {metrics!r:.200}. Use float(loss) or loss.item() for tensors."
        )


def check_state(state: Any) -> None:
    if not isinstance(state, dict):
        raise ConfigError(f"the state is a {type(state).__name__}; it has to be a dict, such as {{'model': model}}")
    if RANDOM_STATES_KEY in state:
        raise ConfigError(f"the key {RANDOM_STATES_KEY!r} of the state is the manager's own; choose another name")
