"""One rank's part in the commits of a checkpointer: it votes, and rank 0 counts."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import msgspec

from lastgood import _events
from lastgood._coordination.calls import Coordination, SaveCall, SaveCalls, hold_epoch, root_of
from lastgood._coordination.connection import (
    ANSWER_SECS,
    Connection,
    StoreUnreachableError,
    serve,
)
from lastgood._coordination.counting import count_votes
from lastgood._coordination.departures import departed_of, has_any_departed, say_departed
from lastgood._coordination.exchange import RANK_0_IS_GONE, Exchange, save_prefix
from lastgood._coordination.failures import GIVEN_UP, FailedSaves, fail_in, give_up_in, given_up_by, hear_in, tell_in
from lastgood._coordination.meeting import ALL_CAME, Meeting, Outcome, pause_after, rank_list, wait_for
from lastgood._coordination.tables import send_tables
from lastgood.errors import BarrierTimeoutError, ConfigError, CorruptCheckpointError, StorageError
from lastgood.format.archive import open_archive
from lastgood.format.commit import read_manifest
from lastgood.format.epoch import Epoch, check_epoch, publish, publishing
from lastgood.format.manifest import checkpoint_file, encode_manifest, manifest_file
from lastgood.format.vote import Ballot, ballot_of
from lastgood.storage.base import StorageBackend

ReplicaChecksums = Callable[[], Sequence[int]]
"""Gives the CRC-32s of the tensors that have to be the same on all ranks, in the order of their names."""

_FAREWELL_SECS = 5.0
_FIRST_COUNT_SECS = 1.0
"""After so long for the first time, and then ever more seldom, it is asked who has departed: all ranks ask."""

_SAVES_REMEMBERED = 64


class Coordinator:
    """Makes a rank's parts of saves, one after the other. On rank 0 it serves the store, until :meth:`close`."""

    def __init__(self, coordination: Coordination, timeout_secs: float) -> None:
        self.coordination = coordination
        self._calls = SaveCalls(coordination)
        self._failures = FailedSaves(coordination, timeout_secs)
        self._timeout_secs = timeout_secs
        self._server = None if coordination.listener is None else serve(coordination.listener, coordination.world_size)
        self._connection = Connection(
            coordination.host, coordination.port, served_here=coordination.listener is not None
        )
        self._former: deque[str] = deque(maxlen=_SAVES_REMEMBERED)
        self._tables: set[str] = set()
        self._last: SaveTogether | None = None

    def save(self, call: SaveCall | None, path: str, storage: StorageBackend) -> "SaveTogether":
        """This rank's part in a save, which has not begun; without a ``call``, it is asked for at this moment."""
        call = self._failures.with_news(self._calls.new(path) if call is None else call)
        over = (*call.former, *(save_id for save_id, _ in call.failed))
        self._former.extend(save_id for save_id in over if save_id not in self._former)
        self._last = SaveTogether(
            self.coordination,
            self._connection,
            self._failures,
            call,
            path,
            storage,
            self._timeout_secs,
            self._former,
            self._tables,
        )
        return self._last

    def depart(self) -> None:
        """This rank's trainer has ended, and all it asked for is done: nobody need wait for it. Never raises."""
        if self.coordination.rank == 0:
            return  # its store goes with it
        self._failures.close()
        try:
            if not self._connection.is_open:
                self._connection.open(ANSWER_SECS)
            self._connection.call(lambda store: say_departed(store, self.coordination.rank), ANSWER_SECS)
        except StoreUnreachableError as failure:
            _events.logger.info("could not tell the other ranks that this one's trainer has ended: %s", failure)

    def close(self) -> None:
        """Once the others know how this rank's saves ended, or cannot be told; rank 0's store is gone then.

        Where nothing has failed, rank 0 stays a moment at most, and the others leave at once.
        """
        self._failures.close()
        if self._last is not None:
            self._last.wait_until_all_know()
        self._connection.close()
        self._server = None
        self.coordination.close()


class SaveTogether:
    """One rank's part in one save, in this order: :meth:`begin`, :meth:`publication`, :meth:`vote`, :meth:`commit`.

    :meth:`give_up` may come at any time, and ends the save for all ranks, unless it is decided.
    """

    def __init__(
        self,
        coordination: Coordination,
        connection: Connection,
        failures: FailedSaves,
        call: SaveCall,
        path: str,
        storage: StorageBackend,
        timeout_secs: float,
        former: deque[str],
        tables: set[str],
    ) -> None:
        self._tables = tables
        self.save_id = call.save_id
        self._rank, self._world_size = coordination.rank, coordination.world_size
        self._exchange = Exchange(connection, call.save_id, path, self._rank, self._world_size, timeout_secs)
        self._coordination = coordination
        self._failures, self._call = failures, call
        self._epoch = call.epoch
        self._path = path
        self._root = root_of(path)
        self._storage = storage
        self._timeout_secs = timeout_secs
        self._former = former
        self._is_told = False
        """Whether the others know how it ended, as far as that is up to this rank."""
        self._has_heard = False
        self._is_open = False
        self._is_over = False

    # Up to the vote

    def begin(self) -> None:
        """For rank 0, when it has the lock of its file: from now on the others may publish theirs.

        Raises :class:`~lastgood.errors.SupersededError` if another job has taken over.
        """
        if self._rank != 0:
            return
        if self._epoch is None:
            self._epoch = hold_epoch(self._storage, self._root, self._coordination.job, self._timeout_secs, look=False)
        check_epoch(self._storage, self._root, self._epoch)
        self._open(self._timeout_secs)
        opening = msgspec.json.encode(self._epoch).decode()
        self._exchange.ask(lambda store: store.set(self._exchange.key("opened"), opening), ANSWER_SECS)

    def _open(self, timeout_secs: float) -> None:
        if self._is_open:
            return
        self._exchange.open(timeout_secs)
        self._is_open = True
        self._exchange.ask(self._tell_former_failures, timeout_secs)
        self._failures.arrived(self._call)

    def _tell_former_failures(self, store: Any) -> None:
        for save_id, reason in self._call.failed:
            tell_in(store, self._coordination, save_id, Outcome(reason, (self._rank,)))

    @contextmanager
    def publication(self) -> Iterator[None]:
        """While the block runs, this rank's file may be given its name: no other job has taken over."""
        epoch = self._epoch or self._wait_for_epoch()
        with publishing(self._storage, self._root, epoch, self._timeout_secs):
            yield

    def _wait_for_epoch(self) -> Epoch:
        self._open(self._timeout_secs)
        opened = self._exchange.key("opened")
        if not self._exchange.came(opened):
            self._give_up(Outcome(f"rank {self._rank} waited {self._timeout_secs:g} s for rank 0 to begin", (0,)))
            self._raise_unless_all_came()
        found = self._exchange.ask(lambda store: store.get(opened), ANSWER_SECS)
        if found == GIVEN_UP.encode():
            self._raise_unless_all_came()
        return msgspec.json.decode(found, type=Epoch)

    def vote(self, replica_checksums: ReplicaChecksums | None = None) -> None:
        """This rank's file stands under its name: tell what is in it. Returns once every rank has voted.

        Raises :class:`~lastgood.errors.BarrierTimeoutError` if one gave up, or did not come in time.
        """
        ballot = self._ballot(replica_checksums)
        try:
            self._cast(ballot)
            self._wait_for_all()
        except BarrierTimeoutError:
            # Rank 0 may have had this vote, with all others, and have committed before it was lost.
            if not (self._exchange.is_cut_off and self._is_committed()):
                raise
            self._is_over = True

    def _ballot(self, replica_checksums: ReplicaChecksums | None) -> Ballot:
        with closing(self._storage.open(checkpoint_file(self._path, self._rank))) as file:
            archive = open_archive(file)
            if archive is None:
                raise self._not_mine()
            return ballot_of(archive, self.save_id, replica_checksums() if replica_checksums else ())

    def _cast(self, ballot: Ballot) -> None:
        def put(store: Any) -> int:
            send_tables(store, self._rank, ballot.tables)
            store.set(self._exchange.key("vote", self._rank), ballot.vote)
            return self._exchange.meeting(store).arrive()

        number = self._exchange.ask(put)
        if number == 0:
            raise ConfigError(
                f"rank {self._rank} has voted in this save of {self._path} before: another process runs as the same "
                "rank. The checkpoint is not committed, earlier ones are untouched. End that process, and restart all "
                "ranks together.",
                path=self._path,
                rank=self._rank,
                phase="vote",
            )
        if number == self._world_size:
            self._exchange.ask(lambda store: self._exchange.meeting(store).decide(ALL_CAME), ANSWER_SECS)

    def _wait_for_all(self) -> None:
        if not self._was_decided_in_time():
            missing = self._exchange.ask(lambda store: self._exchange.meeting(store).missing())
            # If none is: the last one came this very moment, or ended before it could say so.
            waited = f"rank {self._rank} waited {self._timeout_secs:g} s for {rank_list(missing)}"
            self._give_up(Outcome(waited, missing) if missing else ALL_CAME)
        self._raise_unless_all_came()
        self._exchange.ask(self._forget_former)

    def _was_decided_in_time(self) -> bool:
        """Wait for the votes of all ranks; one whose trainer has ended without asking for this save decides it."""
        begun, next_count_secs = time.monotonic(), _FIRST_COUNT_SECS

        def is_decided(left_secs: float) -> bool:
            nonlocal next_count_secs
            if self._exchange.has(self._exchange.key("decided"), left_secs):
                return True
            if time.monotonic() - begun >= next_count_secs:
                next_count_secs *= 2
                self._give_up_if_any_has_departed(left_secs)
            return False

        return wait_for(is_decided, self._timeout_secs, self._world_size)

    def _give_up_if_any_has_departed(self, timeout_secs: float) -> None:
        departed = self._exchange.ask(self._departed_without_vote, timeout_secs)
        if departed:
            self._give_up(Outcome(f"{rank_list(departed)} ended, and had not asked for this save", departed))

    def _departed_without_vote(self, store: Any) -> tuple[int, ...]:
        # In this order: whoever is found to have departed first, and then to be missing, votes no more.
        departed = departed_of(store, self._exchange.meeting(store).missing()) if has_any_departed(store) else ()
        still_missing = set(self._exchange.meeting(store).missing()) if departed else set()
        return tuple(rank for rank in departed if rank in still_missing)

    def _raise_unless_all_came(self) -> None:
        outcome = self._exchange.ask(lambda store: self._exchange.meeting(store).outcome(), ANSWER_SECS)
        if outcome.reason is not None:
            self._is_told = True
            self._hear()
            raise self._exchange.error(outcome.reason, outcome.missing)

    def _forget_former(self, store: Any) -> None:
        """All have voted in this save: they are done with those before it."""
        while self._former:
            save_id = self._former.popleft()
            meeting = Meeting(store, save_prefix(save_id), self._rank, self._world_size)
            meeting.forget()
            store.delete_key(meeting.key("vote", self._rank))
            if self._rank == 0:
                meeting.forget_all()
                for what in ("opened", "result", "heard", "all heard"):
                    store.delete_key(meeting.key(what))

    # The commit

    def commit(self) -> None:
        """Rank 0 publishes the manifest; the others return once it has, or raise what kept it from that."""
        if self._is_over:
            return
        if self._rank == 0:
            self._publish_manifest()
        else:
            self._wait_for_manifest()

    def _publish_manifest(self) -> None:
        assert self._epoch is not None, "rank 0 has begun the save"
        manifest = count_votes(self._exchange, self._world_size, self.save_id, self._tables)
        no_other_job = publishing(self._storage, self._root, self._epoch, self._timeout_secs)
        publish(self._storage, manifest_file(self._path), encode_manifest(manifest), no_other_job, replace=False)
        # It is committed, whether or not the others can be told: they look for the manifest themselves then.
        self._is_told = True
        with contextlib.suppress(BarrierTimeoutError):
            self._exchange.ask(lambda store: self._tell_result(store, ALL_CAME), ANSWER_SECS)

    def _wait_for_manifest(self) -> None:
        result = self._exchange.key("result")
        was_heard = False
        try:
            if self._exchange.came(result):
                outcome = Outcome.decode(self._exchange.ask(lambda store: store.get(result), ANSWER_SECS))
                was_heard = True
                self._hear()
            else:
                outcome = Outcome(f"rank 0 had all votes, and has not committed within {self._timeout_secs:g} s", (0,))
        except BarrierTimeoutError as error:
            outcome = Outcome(f"{error.__cause__}{RANK_0_IS_GONE}", (0,))
        self._is_told = True
        # What rank 0 says counts: it may have published, and not know whether that survives a power cut.
        if outcome.reason is not None and (was_heard or not self._is_committed()):
            raise self._exchange.error(outcome.reason, outcome.missing)

    def _is_committed(self) -> bool:
        """Whether the manifest is there, and stays. Only rank 0 can say more, and it does not."""
        try:
            manifest = read_manifest(self._storage, self._path)
            # Rank 0 may have ended between giving it its name and making that certain.
            self._storage.settle(self._path)
        except (CorruptCheckpointError, StorageError):
            return False
        return manifest is not None and manifest.save_id == self.save_id

    # Failures

    def give_up(self, error: BaseException) -> None:
        """This rank's part has failed: tell the others, unless they know. Takes seconds at most.

        Raises nothing but what interrupts it.
        """
        if self._is_told:
            return
        outcome = given_up_by(self._rank, error)
        if self._exchange.is_cut_off or not self._could_tell(outcome):
            self._failures.tell(self._call, outcome)

    def _could_tell(self, outcome: Outcome) -> bool:
        try:
            # Anew, if an interruption has taken the connection.
            self._exchange.open(ANSWER_SECS)
            self._open(ANSWER_SECS)
            self._exchange.ask(lambda store: fail_in(store, self._rank, self.save_id, outcome), ANSWER_SECS)
            self._hear()
        except BarrierTimeoutError as failure:
            _events.logger.info("the other ranks hear later that the save to %s failed (%s)", self._path, failure)
            return False
        # This store may be gone before all have heard.
        self._failures.note(self._call, outcome)
        return True

    def _give_up(self, outcome: Outcome) -> None:
        self._exchange.ask(lambda store: give_up_in(store, self.save_id, outcome), ANSWER_SECS)

    def _tell_result(self, store: Any, outcome: Outcome) -> None:
        store.set(self._exchange.key("result"), outcome.encode())

    def _hear(self) -> None:
        """Rank 0 may leave once everybody knows how it ended."""
        if self._rank == 0 or self._has_heard:
            return
        self._has_heard = True
        with contextlib.suppress(BarrierTimeoutError):
            self._exchange.ask(lambda store: hear_in(store, self.save_id, self._world_size), ANSWER_SECS)

    def wait_until_all_know(self) -> None:
        """For rank 0, whose store the others are reading; a moment at most."""
        if self._rank != 0 or not self._is_open or self._world_size == 1:
            return
        with contextlib.suppress(BarrierTimeoutError):
            # The others hear when they look the next time.
            longest = _FAREWELL_SECS + 2 * pause_after(0, self._world_size)
            wait_for(lambda left: self._exchange.has(self._exchange.key("all heard"), left), longest, 1)

    # Words

    def _not_mine(self) -> CorruptCheckpointError:
        name = os.path.join(self._path, os.path.basename(checkpoint_file("", self._rank)))
        return CorruptCheckpointError(
            f"{name} is not the file that rank {self._rank} has just written there; the checkpoint is not committed. "
            "Does another job save to the same directory?",
            path=name,
            rank=self._rank,
            phase="vote",
        )
