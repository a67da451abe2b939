"""Checkpointers: what a training script calls."""

import abc
from concurrent.futures import Future
from typing import Any

from lastgood.checkpoint_reader import CheckpointReader
from lastgood.checkpoint_writer import CheckpointWriter
from lastgood.errors import require_all
from lastgood.types import STATE_DICT

_LONGEST_WRITE_SECS = 3600.0
"""How long a synchronous save waits for a writer of the user's own that returns a future."""


class Checkpointer(abc.ABC):
    """Saves and loads state dicts under paths."""

    @abc.abstractmethod
    def save(self, path: str, state_dict: STATE_DICT, **kwargs: Any) -> tuple[Future[None], Future[None]] | None:
        """Save ``state_dict`` at ``path``.

        Synchronous: ``None``, once the checkpoint is durable. Asynchronous: two futures, of staging and of the write.
        """

    @abc.abstractmethod
    def load(
        self,
        path: str,
        state_dict: STATE_DICT | None = None,
        *,
        default_map_location: Any = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> STATE_DICT:
        """Load from ``path``: everything, or just the keys of ``state_dict``, into its tensors in place."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release what the checkpointer holds."""


class SyncCheckpointer(Checkpointer):
    """Saves before it returns: no process, no shared memory, a bounded amount of memory whatever the state's size."""

    def __init__(self, writer: CheckpointWriter, reader: CheckpointReader) -> None:
        self._writer = writer
        self._reader = reader

    def save(self, path: str, state_dict: STATE_DICT, **kwargs: Any) -> None:
        """Save ``state_dict`` at ``path``; when this returns, the checkpoint survives a power cut.

        ``kwargs`` reach the writer's hooks. See :meth:`CheckpointWriter.write` for the order of things and the errors.
        """
        pending = self._writer.write(path=path, state_dict=state_dict, **kwargs)
        if pending is not None:
            # A writer of the user's own that goes on in the background: durable is what its future says.
            pending.result(_LONGEST_WRITE_SECS)

    def load(
        self,
        path: str,
        state_dict: STATE_DICT | None = None,
        *,
        default_map_location: Any = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> STATE_DICT:
        """Load what was saved at ``path``, verified.

        With ``state_dict``, only its keys are read, into its tensors in place, and the same dict is returned; with
        ``strict=True``, :class:`~lastgood.errors.MissingKeysError` (a ``RuntimeError``) names those that are missing,
        after the others have been loaded. ``kwargs`` reach the reader: see :meth:`CheckpointReader.read`.
        """
        loaded, missing = self._reader.read(
            path=path, state_dict=state_dict, map_location=default_map_location, **kwargs
        )
        return require_all(loaded, missing, path, strict=strict)

    def close(self) -> None:
        """Close the writer."""
        self._writer.close()
