"""Holding optimizers back while their tensors are being copied."""

import weakref
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lastgood import _events


class Staging(Protocol):
    """A staging that is under way."""

    def reads_any(self, addresses: set[int]) -> bool:
        """Whether it still has to read a storage that begins at one of these addresses."""

    def wait(self) -> None:
        """Return when it is over, has failed, or has taken too long: then it fails."""


class Stager(Protocol):
    """Who knows of the staging under way."""

    @property
    def current(self) -> Staging | None:
        """The staging under way, if there is one."""


class OptimizerGuard:
    """Makes ``step()`` of every torch optimizer wait while a snapshot is read from its tensors.

    Uses torch's public hook for all optimizers, fused ones too. Steps that were compiled or captured in a graph with
    the hook left out are not held back. The guard does not keep its stager alive.
    """

    def __init__(self, stager: Stager) -> None:
        reference = weakref.ref(stager)

        def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            guarded = reference()
            staging = None if guarded is None else guarded.current
            if staging is not None and _is_read(optimizer, staging):
                with _events.phase("hold", type(optimizer).__name__):
                    staging.wait()

        self._hook = register_optimizer_step_pre_hook(before_step)
        weakref.finalize(stager, self._hook.remove).atexit = False

    def remove(self) -> None:
        """Let optimizers step freely again. May be called several times."""
        self._hook.remove()


def _is_read(optimizer: torch.optim.Optimizer, staging: Staging) -> bool:
    try:
        return staging.reads_any(_addresses(optimizer))
    except (RuntimeError, NotImplementedError):
        return True  # sparse and distributed tensors: where their bytes are cannot be asked


def _addresses(optimizer: torch.optim.Optimizer) -> set[int]:
    """Where the storages of all tensors begin that a step may change."""
    found = {
        parameter.untyped_storage().data_ptr() for group in optimizer.param_groups for parameter in group["params"]
    }
    for values in optimizer.state.values():
        if isinstance(values, dict):
            found.update(
                value.untyped_storage().data_ptr() for value in values.values() if isinstance(value, torch.Tensor)
            )
    return found
