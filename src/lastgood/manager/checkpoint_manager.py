"""The checkpoints of a training run in a few lines: save when it is due, resume, keep what is worth keeping."""

import copy
import os
import signal
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

from lastgood._events import logger
from lastgood._loading.per_rank import PerRankRules
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.config import CheckpointerConfig
from lastgood.errors import ConfigError, LastgoodError, SaveTimeoutError, UnsupportedStateError
from lastgood.format.index_head import noted_in_head
from lastgood.manager.arguments import check_state, check_step_and_metrics, root_path
from lastgood.manager.bookkeeping import Bookkeeping
from lastgood.manager.catalog import read_catalog, step_name
from lastgood.manager.due import DueDecision
from lastgood.manager.failures import Failures, OnFailure
from lastgood.manager.housekeeping import Housekeeping
from lastgood.manager.parts import find_coordination, make_checkpointer, opening_record
from lastgood.manager.preemption import PREEMPTION_SIGNALS, PreemptionNotice
from lastgood.manager.progress import shown_progress
from lastgood.manager.random_states import RANDOM_STATES_KEY, take_random_states
from lastgood.manager.ranks import find_ranks
from lastgood.manager.removal import PruneReport
from lastgood.manager.restoring import Restoring
from lastgood.manager.resume import PassedOver, on_all
from lastgood.manager.retention import RetentionRule, decide
from lastgood.manager.run_log import SaveRecord
from lastgood.manager.saves import SaveInFlight
from lastgood.manager.schedule import Schedule
from lastgood.manager.state import state_dict_of
from lastgood.manager.verification import require_good
from lastgood.storage._in_time import StorageInTime
from lastgood.storage.base import StorageBackend
from lastgood.storage.local import LocalStorage
from lastgood.types import RankInfo

_MOMENT_SECS = 10.0
_SHORTEST_MEETING_SECS = 1800.0
_UNFIT = (ConfigError, UnsupportedStateError)
"""What is wrong with the call: another save of the same kind would fail the same way."""


class CheckpointManager:
    """Saves and restores the state of one training run, under ``root``; the checkpoint of step n is ``root/step-n``.

    ``state``, wherever it is asked for, is a dict of objects with ``state_dict`` and ``load_state_dict`` (modules,
    optimizers, schedulers, samplers), tensors and plain values, nested at will.

    ``asynchronous``: write in the background, by a process that outlives this one; steps of optimizers wait by
    themselves until their tensors are copied. ``every_steps``, ``every_secs`` and ``overhead`` say when
    :meth:`save_if_due` saves; with several, when any does (see :class:`~lastgood.manager.schedule.Schedule`).
    ``keep`` says which checkpoints stay (a rule, or several: what one keeps stays); without, all do. ``random_states``:
    save and restore those of Python's, NumPy's, torch's and the accelerator's generators too. ``on_failure``:
    ``"warn"`` logs a save that failed and lets training go on; three in a row are raised by the next call, and by
    :meth:`close` what no later save made good. ``"raise"`` raises each. ``on_save`` is called with the
    :class:`~lastgood.manager.run_log.SaveRecord` of each save that has ended, in a thread of its own.
    ``preemption_signals`` (SIGTERM and SIGUSR1) set :attr:`preempted` instead of ending the process, which only a
    second one of the same kind does; previous handlers are called too, and come back with :meth:`close`.
    ``grace_secs`` is how long after one the process may still live. ``replicated``: the patterns of the key paths of
    plain tensors that are the same on all ranks, such as ``["model.*", "optimizer.*"]`` under data parallelism: the
    ranks divide the writing of them, and a save fails where they are not the same.

    With several ranks, that is with a default process group, every rank makes a manager, and calls :meth:`is_due`,
    :meth:`save_if_due`, :meth:`save`, :meth:`restore` and :meth:`set_aside` at the same steps: they agree there.

    A relative ``root`` is taken from the working directory of this moment, and stays there when that changes.

    A rank that saves for all, while the others have no manager, passes ``rank_info=RankInfo(0, 1)``.

    Everything is found from what is on disk. ``storage`` is another backend than local files, for synchronous managers.
    Not for use by several threads at once.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        asynchronous: bool = True,
        every_steps: int | None = None,
        every_secs: float | None = None,
        overhead: float | None = None,
        mean_secs_between_failures: float = 86400.0,
        keep: RetentionRule | Sequence[RetentionRule] = (),
        random_states: bool = False,
        on_failure: OnFailure = "warn",
        on_save: Callable[[SaveRecord], None] | None = None,
        preemption_signals: Sequence[signal.Signals] = PREEMPTION_SIGNALS,
        grace_secs: float = 30.0,
        replicated: Sequence[str] = (),
        config: CheckpointerConfig | None = None,
        rank_info: RankInfo | None = None,
        storage: StorageBackend | None = None,
    ) -> None:
        self._root = root_path(root) if storage is not None else os.path.join(os.getcwd(), root_path(root))
        self._config = copy.copy(CheckpointerConfig() if config is None else config)
        if replicated:
            self._config.replicated = replicated
        self._schedule = Schedule(every_steps, every_secs, overhead, mean_secs_between_failures)
        self._failures = Failures(on_failure)
        rules = tuple(keep) if isinstance(keep, Sequence) else (keep,)
        decide((), rules)  # refuses what is no rule
        self._timeout_secs = self._config.writer_config.no_progress_timeout_secs
        self._storage = StorageInTime(LocalStorage() if storage is None else storage, self._timeout_secs)
        self._random_states = random_states
        self._on_save = on_save
        self._grace_secs = grace_secs
        self._ranks = find_ranks(rank_info, max(_SHORTEST_MEETING_SECS, 3 * self._timeout_secs))
        self._one_of_several = self._ranks.info.global_world_size > 1
        self._is_first = self._ranks.info.global_rank == 0
        self._is_asynchronous = asynchronous
        coordination = find_coordination(self._config, self._ranks)
        self._checkpointer = make_checkpointer(
            self._config, self._ranks, storage, coordination, asynchronous=asynchronous
        )
        self._housekeeping = Housekeeping()
        self._books = Bookkeeping(self._storage, self._root, rules, self._housekeeping)
        self._restoring = Restoring(
            self._storage,
            self._root,
            self._ranks,
            CheckpointReader(self._ranks.info, storage=storage),
            self._books,
            random_states=random_states,
            writer_timeout_secs=self._timeout_secs,
            job=None if coordination is None else coordination.job,
        )
        self._in_flight: list[SaveInFlight] = []
        self._last_save: SaveInFlight | None = None
        self.passed_over: tuple[PassedOver, ...] = ()
        """What the last :meth:`restore` could not use, newest first, each with its ``step`` and ``problem``."""
        self._is_prewarmed = False
        self._is_closed = False
        self._notice = PreemptionNotice(preemption_signals)
        # A manager that nobody has any more must not swallow signals.
        weakref.finalize(self, self._notice.remove).atexit = False
        self._due = DueDecision(self._schedule, self._notice, self._ranks)
        if self._is_first:
            self._books.open(opening_record(self._ranks, rules))

    # Saving

    def save(self, step: int, state: dict[str, Any], metrics: dict[str, float] | None = None) -> Future[None]:
        """Save ``state`` as the checkpoint of ``step``; the future resolves when it survives a power cut.

        Asynchronous, this returns within milliseconds, and the state saved is that of this moment; when an earlier save
        is still being written, it waits for that. ``metrics`` (numbers under names, at most 4096 bytes as JSON) are
        kept with the checkpoint, for retention and for people.

        Raises at once what is wrong with the call (:class:`~lastgood.errors.ConfigError`,
        :class:`~lastgood.errors.UnsupportedStateError`). What goes wrong with the save is raised by the future; the
        manager raises it according to ``on_failure``, now for saves before this one.
        """
        self._require_open()
        saved = self._save(step, state, metrics, after_failures=False)
        if not self._is_asynchronous:
            self._failures.raise_if_too_many()
        return saved

    def _save(
        self, step: int, state: dict[str, Any], metrics: dict[str, float] | None, *, after_failures: bool
    ) -> Future[None]:
        began = time.perf_counter()
        path = os.path.join(self._root, step_name(step))
        state_dict: dict[str, Any] = {}

        def prepare() -> None:
            check_step_and_metrics(step, metrics)
            if not after_failures:
                self._failures.raise_if_too_many()
            state_dict.update(self._state_dict(state))

        on_all(prepare, self._ranks, f"save step {step}", path)
        noted = {"step": step, "saved_at": time.time(), "metrics": metrics}
        save = SaveInFlight(step, path, noted_in_head(noted)["metrics"], self._ended, began=began)
        self._last_save = save
        try:
            error = self._try_to_begin(save, state_dict, noted)
        except BaseException:
            self._drop(save)
            raise
        if isinstance(error, _UNFIT):
            self._drop(save)
            raise error
        if error is not None:
            self._note_returned(save)
            save.end(error)
        return save.over

    def _drop(self, save: SaveInFlight) -> None:
        save.drop()
        self._last_save = None

    def _try_to_begin(
        self, save: SaveInFlight, state_dict: dict[str, Any], noted: dict[str, Any]
    ) -> LastgoodError | None:
        """Hand the save over; returns why that failed, if it did."""
        try:
            with nullcontext() if self._is_asynchronous else shown_progress("saving"):
                futures = self._checkpointer.save(save.path, state_dict, **noted)
        except LastgoodError as error:
            return error
        self._note_returned(save)
        if futures is None:
            save.end(None)
        else:
            self._in_flight.append(save)
            save.over.add_done_callback(lambda done: self._in_flight.remove(save))
            save.follow(*futures)
        return None

    def _note_returned(self, save: SaveInFlight) -> None:
        save.returned()
        self._schedule.saved(save.step, time.monotonic(), save.stall_secs)

    def _state_dict(self, state: dict[str, Any]) -> dict[str, Any]:
        check_state(state)
        state_dict = state_dict_of(state)
        if not self._random_states:
            return state_dict
        return {**state_dict, RANDOM_STATES_KEY: take_random_states()}

    def _ended(self, save: SaveInFlight, error: BaseException | None) -> None:
        """Called by the thread that learns of it."""
        now = time.monotonic()
        if error is None:
            self._schedule.durable(now)
            self._failures.saved()
            in_a_row = 0
        else:
            self._schedule.failed(now)
            in_a_row = self._failures.failed(save.step, error)
        record = save.record(in_a_row)
        if self._is_first:
            self._books.ended(record)
        if self._on_save is not None:
            on_save = self._on_save
            self._housekeeping.do(lambda: on_save(record))

    def is_due(self, step: int) -> bool:
        """Whether :meth:`save_if_due` would save now: for those who want to do something else then, too.

        Asked again for the same step, it gives the same answer.
        """
        return self._due.is_due(step)

    def save_if_due(self, step: int, state: dict[str, Any], metrics: dict[str, float] | None = None) -> bool:
        """:meth:`save` if it is time to, or if the run has just been preempted; returns whether it was.

        Call it after every step: what a step takes is measured from call to call. The first call also gets the memory
        for the first save ready, in the background. With several ranks each call lets them meet.
        """
        if self.is_due(step):
            self.save(step, state, metrics)
            return True
        if not self._one_of_several:  # several ranks raise it together, in save()
            self._failures.raise_if_too_many()
        if not self._is_prewarmed:
            self.prewarm(state)
        return False

    @property
    def preempted(self) -> bool:
        """Whether one of the signals has come: the training should save and end.

        With several ranks it turns true on all of them at the same step, in :meth:`is_due` or :meth:`save_if_due`.
        """
        return self._due.is_preempted

    def save_before_exit(
        self,
        step: int,
        state: dict[str, Any],
        metrics: dict[str, float] | None = None,
        *,
        deadline_secs: float | None = None,
    ) -> bool:
        """A last save, unless that of ``step`` is under way or done already; returns whether it is durable in time.

        Waits for it until the deadline: ``deadline_secs`` from now, or ``grace_secs`` after the signal that came. When
        the time is over and the state has been staged, the checkpoint process goes on, if it is not killed too. Raises
        the failure of the save.
        """
        now = time.monotonic()
        came_at = self._notice.came_at
        deadline = (now if came_at is None else came_at) + self._grace_secs
        if deadline_secs is not None:
            deadline = now + deadline_secs
        obstructed = not self._wait_for_saves(deadline)
        # All ranks save, or none does.
        is_missing, is_obstructed = self._ranks.any_of(not self._is_saved(step), obstructed)
        if is_missing and is_obstructed:
            logger.warning("no time was left to save step %d: an earlier save is still being written", step)
            return False
        if is_missing:
            self._save(step, state, metrics, after_failures=True)
        is_durable = self._wait_for_saves(deadline)
        self._failures.raise_any()
        if not is_durable:
            logger.warning("the save of step %d was not durable when the time was over; it goes on", step)
        return is_durable

    def _is_saved(self, step: int) -> bool:
        last = self._last_save
        return last is not None and last.step == step and last.error is None

    def prewarm(self, state: dict[str, Any]) -> None:
        """Get memory for saves of states like this one ready, in the background, so that the first one is fast, too."""
        self._is_prewarmed = True
        if isinstance(self._checkpointer, AsyncCheckpointer):
            self._checkpointer.prewarm(self._state_dict(state)).add_done_callback(_note_prewarmed)

    def hold(self) -> AbstractContextManager[None]:
        """For changes of the state that are no optimizer's step: the block begins when nothing is being copied."""
        return self._checkpointer.hold() if isinstance(self._checkpointer, AsyncCheckpointer) else nullcontext()

    # Resuming

    def restore(
        self,
        state: dict[str, Any],
        step: int | None = None,
        *,
        strict: bool = True,
        map_location: Any = None,
        per_rank: PerRankRules | None = None,
    ) -> int | None:
        """Load the newest checkpoint that is committed and whole into ``state``; returns its step, or ``None``.

        ``None`` means that there is none at all. A checkpoint that is damaged or unfinished is passed over, which the
        log says; a damaged one is set aside under another name, never deleted, once an older one has been loaded. When
        there are checkpoints and none can be used, raises :class:`~lastgood.errors.CorruptCheckpointError`, or
        :class:`~lastgood.errors.StorageError` if the disk does not give them and none is known to be damaged. A save
        that an earlier process is still writing is waited for. With ``step``, exactly that one, or its error. With
        several ranks, a former job that still runs can save nothing under this root from then on: for a look at the
        checkpoints of a run that goes on, use :class:`~lastgood.checkpoint_reader.CheckpointReader`.

        Tensors, parameters and buffers are filled in place; other objects are given their part by ``load_state_dict``;
        plain values are put into ``state``. With ``strict``, the keys of ``state`` and of its modules have to be those
        of the checkpoint (which may hold more beside): otherwise nothing is changed, and an error names them. All bytes
        are verified in the pass that reads them. ``map_location`` is that of ``torch.load``.

        Any number of ranks may have saved, with any layout of sharded tensors (DTensor), which are read into those of
        ``state``. Where another number of ranks did, ``per_rank`` says which of the values that differ between ranks
        each one gets (see :meth:`CheckpointReader.read`); without a rule for one of them,
        :class:`~lastgood.errors.RankMismatchError` is raised before anything is changed.
        """
        self._require_open()
        check_state(state)
        if step is not None:
            check_step_and_metrics(step, None)
        self._wait_for_saves(time.monotonic() + self._timeout_secs)
        resumed = self._restoring.restore(state, step, strict=strict, map_location=map_location, per_rank=per_rank)
        self.passed_over = resumed.passed_over
        self._due.forget()
        return resumed.step

    def set_aside(self, step: int) -> None:
        """Take the checkpoint of ``step`` out of the way, under another name: no run resumes from it any more."""
        self._require_open()
        check_step_and_metrics(step, None)
        self._restoring.set_aside(step)

    # What is there

    def steps(self) -> list[int]:
        """The steps with a committed checkpoint, in rising order, as they are on disk now."""
        return [entry.step for entry in read_catalog(self._storage, self._root).committed]

    def latest(self) -> int | None:
        """The newest step with a committed checkpoint."""
        return max(self.steps(), default=None)

    def prune(self, *, dry_run: bool = False) -> PruneReport:
        """Remove at once what no rule keeps; with ``dry_run``, only say what would go, what would stay, and why.

        After each save this is done in the background; here leftovers of unfinished saves go, too. Before anything is
        removed, every byte of the newest checkpoint that stays is verified:
        :class:`~lastgood.errors.CorruptCheckpointError` if it is damaged.
        """
        self._require_open()
        return self._ranks.from_first(lambda: self._books.prune(dry_run=dry_run, clear_files=True, check=require_good))

    # The end

    def wait(self, timeout_secs: float | None = None) -> None:
        """Return when no save is under way any more, and old checkpoints have been removed.

        Raises :class:`~lastgood.errors.SaveTimeoutError` after ``timeout_secs``, and failures as ``on_failure`` says.
        """
        timeout = self._config.process_config.close_timeout_secs if timeout_secs is None else timeout_secs
        deadline = time.monotonic() + timeout
        if not (self._wait_for_saves(deadline) and self._housekeeping.wait(max(0.0, deadline - time.monotonic()))):
            paths = (
                ", ".join(save.path for save in list(self._in_flight)) or "nothing but old checkpoints to be removed"
            )
            raise SaveTimeoutError(
                f"after {timeout:g} s there still is work under way: {paths}. It goes on; earlier checkpoints are "
                "untouched.",
                phase="wait",
            )
        self._failures.raise_if_too_many()

    def _wait_for_saves(self, deadline: float) -> bool:
        with shown_progress("saving"):
            left = max(0.0, deadline - time.monotonic())
            return not wait([save.over for save in list(self._in_flight)], left).not_done

    def close(self) -> None:
        """Wait for all saves, and release everything. May be called again.

        Raises the failure of the last save, if it has failed and was not raised yet (with ``on_failure="raise"``, any
        such failure), after everything has been closed.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._notice.remove()
        try:
            with shown_progress("saving"):
                self._checkpointer.close()
        finally:
            # What the checkpointer knows reaches the saves a moment later.
            self._wait_for_saves(time.monotonic() + _MOMENT_SECS)
            self._housekeeping.wait(self._timeout_secs)
            self._housekeeping.close()
        self._failures.raise_any()

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as failure:
            # What ended the block is what its caller has to see.
            logger.error("closing the manager after an error failed, too: %s", failure)

    def _require_open(self) -> None:
        if self._is_closed:
            raise ConfigError(f"this manager of {self._root} has been closed; make another one", path=self._root)


def _note_prewarmed(done: Future[None]) -> None:
    error = done.exception()
    if error is not None:
        logger.info("getting memory ready for the first save failed, which the save itself will tell of: %s", error)
