"""Checksums of tensors that all ranks have to have the same: of one moment, as are the copies of what is written."""

import array
from collections.abc import Sequence

import torch

from lastgood._threads import run_all
from lastgood._torch_internals import version_of
from lastgood.errors import StagingError, TornSnapshotError
from lastgood.format.spec import PAGE_ALIGNED_FROM
from lastgood.sharding.checksums import checksum

_THREADS = 2


class ReplicaChecks:
    """Made in the thread that asks for a snapshot, which takes the checksums of small tensors: buffers that a forward
    pass changes are among them. The others follow in the background."""

    def __init__(self, replicas: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._checksums = array.array("I", [0]) * len(replicas)
        self._late: list[tuple[int, str, torch.Tensor, int | None]] = []
        for number, (name, tensor) in enumerate(replicas):
            if tensor.nbytes < PAGE_ALIGNED_FROM:
                self._checksums[number] = checksum(tensor)
            else:
                self._late.append((number, name, tensor, version_of(tensor)))

    def checksums(self, timeout_secs: float) -> bytes:
        """All of them, four bytes each.

        Raises :class:`~lastgood.errors.TornSnapshotError` for a tensor that was changed, as far as autograd knows,
        since the snapshot was asked for.
        """

        def timed_out() -> StagingError:
            return StagingError(
                f"no tensor that is the same on all ranks was checked for {timeout_secs:g} s; the snapshot was given "
                "up. Is the machine swapping?",
                phase="stage",
            )

        run_all(self._late, self._check, _THREADS, timeout_secs, timed_out, name="stage")
        return self._checksums.tobytes()

    def _check(self, late: tuple[int, str, torch.Tensor, int | None]) -> None:
        number, name, tensor, version = late
        self._checksums[number] = checksum(tensor)
        if version_of(tensor) != version:
            raise _torn(name)


class SourceWitnesses:
    """The versions of DTensors at the moment of the call: autograd counts changes of them, not of their parts."""

    def __init__(self, sources: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._versions = [(name, tensor, version_of(tensor)) for name, tensor in sources]

    def check(self) -> None:
        """Raise :class:`~lastgood.errors.TornSnapshotError` for one that has changed since."""
        for name, tensor, version in self._versions:
            if version_of(tensor) != version:
                raise _torn(name)


def _torn(name: str) -> TornSnapshotError:
    return TornSnapshotError(
        f"the tensor {name!r} changed after save was called and before its snapshot was taken; the snapshot was thrown "
        "away, earlier checkpoints are untouched. Optimizers' steps wait by themselves; do any other update inside "
        "`with checkpointer.hold():`, or wait for the stage future first.",
        tensor=name,
        phase="stage",
    )
