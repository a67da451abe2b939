"""Ranks that are threads of the test's process, and vote over a real store on the loopback interface."""

import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.distributed.barrier_ranks import finished, start
from tests.helpers.saves import state_of
from tests.helpers.workers import PATIENCE_SECS

from lastgood._coordination import connection, failures, together
from lastgood._coordination.calls import Coordination, SaveCall
from lastgood._coordination.meeting import Meeting, Outcome
from lastgood._coordination.together import Coordinator
from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig, WriterHook
from lastgood.storage.base import StorageBackend
from lastgood.types import RankInfo


def coordinations(world_size: int, job: str | None = None) -> list[Coordination]:
    """What the ranks of one checkpointer know of each other; the first has to be closed."""
    listener = socket.create_server(("127.0.0.1", 0))
    job, series = job or secrets.token_hex(16), secrets.token_hex(16)
    port = listener.getsockname()[1]
    return [
        Coordination(rank, world_size, "127.0.0.1", port, job, series, None if rank else listener)
        for rank in range(world_size)
    ]


@contextmanager
def impatient() -> Iterator[None]:
    """No store gets longer than a moment to answer."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (connection, failures, together):
            patch.setattr(module, "ANSWER_SECS", 0.2)
        yield


def join_telling_threads() -> None:
    """Wait until no rank tries to tell the others in the background that a save has failed."""
    for thread in threading.enumerate():
        if thread.name == "lastgood-give-up":
            thread.join(PATIENCE_SECS)
            assert not thread.is_alive()


def outcome_in(store: Any, call: SaveCall) -> Outcome:
    """How a save of three ranks was decided, in this store."""
    meeting = Meeting(store, f"save/{call.save_id}", 0, 3)
    assert meeting.is_decided
    return meeting.outcome()


class Hook(WriterHook):
    """Calls ``act(path)`` when this rank's bytes are durable."""

    def __init__(self, act: Callable[[str], None]) -> None:
        self.act = act

    def pre_commit(self, path: str, **kwargs: Any) -> None:
        self.act(path)

    def post_commit(self, path: str, **kwargs: Any) -> None:
        pass


class Ranks:
    """One synchronous writer a rank; all save at the same time, each its own state."""

    def __init__(
        self,
        world_size: int,
        *,
        timeout_secs: float = 600,
        no_progress_timeout_secs: float = 600,
        job: str | None = None,
        storages: dict[int, StorageBackend] | None = None,
        hooks: dict[int, Callable[[str], None]] | None = None,
        replicated: Sequence[str] = (),
    ) -> None:
        self.coordinations = coordinations(world_size, job)
        config = CheckpointWriterConfig(
            timeout_secs,  # type: ignore[arg-type]
            no_progress_timeout_secs=no_progress_timeout_secs,
        )
        self.writers = [
            CheckpointWriter(
                config,
                RankInfo(rank, world_size),
                None,
                Hook(hooks[rank]) if hooks and rank in hooks else None,
                storage=(storages or {}).get(rank),
                coordination=each,
                replicated=replicated,
            )
            for rank, each in enumerate(self.coordinations)
        ]

    def start(self, path: Path, number: int, ranks: list[int] | None = None) -> list[Any]:
        """Futures of the saves of these ranks, or all."""
        chosen = range(len(self.writers)) if ranks is None else ranks
        return [start(self.writers[rank].write, str(path), state_of(number + rank)) for rank in chosen]

    def save(self, path: Path, number: int, ranks: list[int] | None = None) -> list[BaseException | None]:
        """How each of them ended."""
        return finished(self.start(path, number, ranks))

    def end_store(self) -> None:
        """As if rank 0's checkpoint process died: the store in which the ranks meet goes with it."""
        coordinator = self.writers[0]._coordinator
        assert coordinator is not None
        coordinator._server = None
        coordinator._connection.close()

    def serve_anew(self) -> None:
        """As if rank 0 had another checkpoint process, which counts on where its trainer has come to."""
        before = self.writers[0]._coordinator
        assert before is not None
        renewed = self.writers[0]._coordinator = Coordinator(self.coordinations[0], before._timeout_secs)
        renewed._calls = before._calls

    def close(self) -> None:
        for writer in reversed(self.writers):
            writer.close()
