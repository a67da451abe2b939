"""One snapshot being staged: what is copied at once, what is copied in the background, and what is checked then."""

import itertools
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

import msgspec
import torch

from lastgood._memory import address_of, copy_memory, memory_at
from lastgood._snapshot import Placement, Snapshot, replica_checks_at
from lastgood._staging.arena import Arena
from lastgood._staging.device_copies import DeviceCopies, runtime_of
from lastgood._staging.plan import NOTHING, Planner, Selection, Taken, arena_size
from lastgood._staging.replica_checks import ReplicaChecks, SourceWitnesses
from lastgood._staging.witnesses import Witnesses
from lastgood._threads import run_all
from lastgood.errors import SaveTimeoutError, StagingError
from lastgood.format.image import lay_out_data
from lastgood.format.in_memory import lay_down
from lastgood.types import STATE_DICT

PIECE_SIZE = 8 << 20
COPY_THREADS = 2
MOST_REPORTS = 256
"""How often the writer is told of progress, at most: telling costs little, but not nothing."""


class StagingOptions(msgspec.Struct, frozen=True):
    """What a job takes from the stager's configuration."""

    timeout_secs: float
    full_check: bool
    non_blocking: bool


class StagingJob:
    """Made in the thread that asks for a snapshot, which takes what has to be of that moment; run in another.

    ``arena`` is one that is laid out for the plan of ``taken`` already, if there is one: small tensors then go straight
    to their places. ``give_back`` takes :attr:`arena` when the snapshot is done with, and whether it is of further use.
    """

    def __init__(
        self,
        state: STATE_DICT,
        taken: Taken,
        arena: Arena | None,
        options: StagingOptions,
        give_back: Callable[[Arena | None, bool], None],
    ) -> None:
        # Where copies have been given up, they may still write to it: it lives as long as their threads.
        self.snapshot = Snapshot(lambda reusable: give_back(None if self._gave_up_copies else self.arena, reusable))
        self.arena = arena
        self.error: BaseException | None = None
        self._state: STATE_DICT | None = state
        self._options = options
        self._over = threading.Event()
        self.timed_out = False
        self._gave_up_copies = False
        self._private: tuple[bytearray, list[int]] | None = None
        self._take(taken)
        self._copy_early()

    def _take(self, taken: Taken) -> None:
        self._taken = taken
        self._early = taken.plan.early
        self._late_small = taken.plan.late_small
        self._devices = {
            device: DeviceCopies(runtime_of(device), device, non_blocking=self._options.non_blocking)
            for device in {part.device for part in taken.device_parts.values()}
        }
        late = [*self._late_small.numbers, *taken.plan.large]
        self._witnesses = Witnesses(taken, late, full_check=self._options.full_check)
        self._read_addresses = _storage_addresses(taken, late)
        self._sources = SourceWitnesses(taken.sources)
        self._replicas = ReplicaChecks(taken.replicas) if taken.replicas else None

    def _copy_early(self) -> None:
        """Copy the small storages to their places, or, where these are not there yet, to memory of our own."""
        if self.arena is not None:
            self._copy_small(self._early, self._targets(self._early))
        elif self._early.numbers:
            offsets = list(itertools.accumulate(self._early.sizes, initial=0))
            buffer = bytearray(offsets.pop())
            self._private = buffer, offsets
            base = address_of(buffer)
            self._copy_small(self._early, [base + offset for offset in offsets])

    def _targets(self, selection: Selection) -> list[int]:
        """Where storages belong in the arena, as addresses."""
        assert self.arena is not None  # whoever calls this has seen to that
        return list(map(self.arena.address.__add__, selection.of(self._taken.plan.offsets)))

    def _copy_small(self, selection: Selection, targets: list[int]) -> None:
        """Copy whole storages to addresses; on the CPU in one loop that never leaves the interpreter's C code."""
        taken = self._taken
        if not taken.device_parts:
            deque(map(copy_memory, targets, selection.of(taken.addresses), selection.sizes), 0)
            return
        on_device: dict[torch.device, list[tuple[torch.Tensor, memoryview]]] = {}
        for number, target, size in zip(selection.numbers, targets, selection.sizes, strict=True):
            part = taken.device_parts.get(number)
            if part is None:
                copy_memory(target, taken.addresses[number], size)
            else:
                on_device.setdefault(part.device, []).append((part, memory_at(target, size)))
        for device, pairs in on_device.items():
            self._devices[device].copy([source for source, _ in pairs], [target for _, target in pairs])

    # In the staging thread

    def prepare(self, planner: Planner, *, caller_waits: bool = False) -> int:
        """Find out how large the arena has to be. Call it first, before :attr:`arena` is set.

        When the tensors turn out not to be what they were the last time, begins again if whoever asked for the snapshot
        is waiting for it. Otherwise the moment of the call is over, and nothing may be read for it any more: raises
        :class:`~lastgood.errors.StagingError`.
        """
        if not planner.holds(self._taken):
            if not caller_waits:
                planner.forget()
                raise StagingError(
                    "the tensors of the state are of other dtypes, shapes or flags than at the last save, or share "
                    "memory otherwise; among so many this is found only after save has returned. The snapshot was "
                    "thrown away, earlier checkpoints are untouched, and the next save goes through.",
                    phase="stage",
                )
            assert self._state is not None  # only end() lets go of it
            self._private = None
            self._take(planner.take_anew(self._state))
            plan = self._taken.plan
            self._early, self._late_small = (
                NOTHING,
                Selection([*plan.early.numbers, *plan.late_small.numbers], plan.sizes),
            )
        return arena_size(self._taken.plan.describe())

    def run(self) -> None:
        """Copy everything into :attr:`arena`, and make sure that it is of one moment."""
        assert self.arena is not None  # whoever runs it has seen to that
        self.snapshot.placed.set_result(lay_out(self.arena, self._taken))
        if self._private is not None:
            buffer, offsets = self._private
            sources = map(address_of(buffer).__add__, offsets)
            deque(map(copy_memory, self._targets(self._early), sources, self._early.sizes), 0)
            self._private = None
        targets = self._targets(self._late_small)
        for number in self._late_small.numbers:
            self._witnesses.require_memory(number)
        self._copy_small(self._late_small, targets)
        for number, target in zip(self._late_small.numbers, targets, strict=True):
            self._witnesses.check(number, target)
        self._copy_large(self._taken.plan.large)
        self._sources.check()
        self._leave_replica_checksums()

    def _leave_replica_checksums(self) -> None:
        """Leave the checksums of what other ranks write in the arena, for them to be compared."""
        assert self.arena is not None  # run() has checked
        if self._replicas is not None:
            start, end = replica_checks_at(self._taken.plan.describe())
            self.arena.memory(start, end - start)[:] = self._replicas.checksums(self._options.timeout_secs)

    def _copy_large(self, numbers: list[int]) -> None:
        plan, path = self._taken.plan, "the snapshot"
        pieces = [
            (number, start, min(PIECE_SIZE, plan.sizes[number] - start))
            for number in numbers
            for start in range(0, plan.sizes[number], PIECE_SIZE)
        ]
        progress = _Progress(
            self.snapshot, [plan.offsets[number] + start for number, start, _ in pieces], plan.data_end
        )

        def timed_out() -> StagingError:
            self._gave_up_copies = True
            return StagingError(
                f"no piece of {path} was copied for {self._options.timeout_secs:g} s; it was given up. Is the machine "
                "swapping, or are the tensors mapped from a file that cannot be read?",
                phase="stage",
            )

        run_all(
            list(enumerate(pieces)),
            partial(self._copy_piece, progress, _Countdown(numbers, plan.sizes)),
            COPY_THREADS,
            self._options.timeout_secs,
            timed_out,
            name="stage",
        )
        progress.finish()

    def _copy_piece(
        self, progress: "_Progress", remaining: "_Countdown", task: tuple[int, tuple[int, int, int]]
    ) -> None:
        position, (number, start, size) = task
        assert self.arena is not None  # run() has checked
        taken = self._taken  # keeps the memory alive, should this copy be given up and go on all the same
        target = self.arena.address + taken.plan.offsets[number]
        part = taken.device_parts.get(number)
        if part is None:
            self._witnesses.require_memory(number)
            copy_memory(target + start, taken.addresses[number] + start, size)
        else:
            self._devices[part.device].copy([part[start : start + size]], [memory_at(target + start, size)])
        if remaining.last_of(number):
            self._witnesses.check(number, target)
        progress.done(position)

    def end(self, error: BaseException | None) -> None:
        """Staging is over: tell whoever writes, let go of the state, and let those who wait go on."""
        if error is None and self.timed_out:
            error = SaveTimeoutError(
                f"staging took longer than {self._options.timeout_secs:g} s, and training did not wait any longer; "
                "the snapshot was thrown away, earlier checkpoints are untouched. Raise staging_timeout_secs if the "
                "state is that large.",
                phase="stage",
            )
        self.error = error
        if error is not None and not self.snapshot.placed.done():
            self.snapshot.placed.set_exception(error)
        # Training goes on before the writer has been told, which may have to wait.
        self._state = None
        # Nor may the tensors live until they are written: they are the user's memory, and whoever lets go of them last
        # must not be a thread that the end of the interpreter finds in the middle of that (torch aborts then).
        del self._taken, self._witnesses, self._replicas, self._sources
        self._over.set()
        self.snapshot.report_end(error)

    # In any thread

    def reads_any(self, addresses: set[int]) -> bool:
        """Whether a storage that begins at one of these addresses has not been copied for certain."""
        return self._read_addresses is None or not self._read_addresses.isdisjoint(addresses)

    def wait(self) -> None:
        """Return when staging is over; after the time-out it fails, and this returns, from then on at once."""
        if not self.timed_out and not self._over.wait(self._options.timeout_secs):
            self.timed_out = True

    @property
    def is_over(self) -> bool:
        """Whether the tensors may be changed."""
        return self._over.is_set()


def lay_out(arena: Arena, taken: Taken) -> Placement:
    """Write into the arena what is known before the data; its headers are there already if it was laid out before."""
    plan = taken.plan
    description = plan.describe()
    if arena.content != plan.content:
        memory = arena.memory(0, arena_size(description))
        is_laid_out = arena.content is not None and arena.content[0] == plan.number
        arena.content = None
        if is_laid_out:
            [pickled, *_] = lay_out_data(plan.pickle_size, len(description.byteorder), []).records
            memory[pickled.data_offset : pickled.data_end] = plan.pickle_bytes()
        else:
            layout = plan.layout()
            lay_down(memory[: layout.end], layout, plan.pickle_bytes(), description.byteorder)
        memory[description.storage_sizes_offset : description.index_body_offset] = plan.storage_sizes()
        body_end = description.index_body_offset + description.index_body_size
        memory[description.index_body_offset : body_end] = plan.index_body()
        arena.content = plan.content
        plan.forget_contents()
    return Placement(arena.descriptor, arena.number, arena.size, description)


def _storage_addresses(taken: Taken, numbers: list[int]) -> set[int] | None:
    """Where the storages begin that are read late; ``None`` if that is not known of one of them."""
    found = set()
    for number in numbers:
        tensors = taken.tensors.get(number)
        if not tensors:
            return None
        found.add(tensors[0].untyped_storage().data_ptr())
    found.update(replica.untyped_storage().data_ptr() for _, replica in taken.replicas)
    return found


class _Countdown:
    """How many pieces of each storage are still to be copied."""

    def __init__(self, numbers: list[int], sizes: list[int]) -> None:
        self._left = {number: -(-sizes[number] // PIECE_SIZE) for number in numbers}
        self._lock = threading.Lock()

    def last_of(self, number: int) -> bool:
        """Count one piece; whether it was the last."""
        with self._lock:
            self._left[number] -= 1
            return not self._left[number]


class _Progress:
    """Up to where the image is there without a gap, when its pieces end in any order."""

    def __init__(self, snapshot: Snapshot, offsets: list[int], end: int) -> None:
        self._snapshot = snapshot
        self._ends = [*offsets[1:], end]
        self._done = [False] * len(offsets)
        self._next = 0
        self._reported = 0
        self._step = end // MOST_REPORTS
        self._lock = threading.Lock()

    def done(self, position: int) -> None:
        with self._lock:
            self._done[position] = True
            while self._next < len(self._done) and self._done[self._next]:
                self._next += 1
            staged = self._ends[self._next - 1] if self._next else 0
            if staged - self._reported >= self._step:
                self._reported = staged
                self._snapshot.report_progress(staged)

    def finish(self) -> None:
        if not self._ends or self._reported < self._ends[-1]:
            self._snapshot.report_progress(self._ends[-1] if self._ends else 0)
