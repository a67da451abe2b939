"""Processes that become the ranks of one process group after another."""

from pathlib import Path

from tests.distributed import matrix_ranks
from tests.helpers.workers import Together, Worker


class Ranks(Together):
    """Processes that become one process group."""

    def join(self, rendezvous: str) -> None:
        """Become one process group."""
        for rank, worker in enumerate(self.workers):
            worker.start(matrix_ranks.join, rank, len(self.workers), rendezvous)
        self.results()


class Pool:
    """As many processes as the largest group needs, started when they are first needed."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._workers: list[Worker] = []
        self._joined: Ranks | None = None
        self._groups = 0

    def ranks(self, world_size: int) -> Ranks:
        """Processes that are the ranks of a group of this size, and of no other."""
        if self._joined is not None and len(self._joined.workers) == world_size:
            return self._joined
        self.disband()
        while len(self._workers) < world_size:
            self._workers.append(Worker())
        ranks = Ranks(self._workers[:world_size])
        self._groups += 1
        ranks.join(str(self._scratch / f"group-{self._groups}"))
        self._joined = ranks
        return ranks

    def alone(self) -> Ranks:
        """One process that is in no group."""
        self.disband()
        if not self._workers:
            self._workers.append(Worker())
        ranks = Ranks(self._workers[:1])
        ranks.call(matrix_ranks.prepare)
        return ranks

    def disband(self) -> None:
        """End the process group, if there is one, and close what its ranks have opened."""
        joined, self._joined = self._joined, None
        if joined is None:
            joined = Ranks(self._workers[:1])
        joined.call(matrix_ranks.leave)

    def kill(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.kill()
