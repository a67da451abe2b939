"""SIGKILL of a trainer, of its checkpoint process, or of both: at every named phase, and at random moments.

One run is killed again and again, and goes on each time. After each death the newest checkpoint that was acknowledged
is there, or a newer one, bit for bit; the next save goes well, and clears away what was left.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.crash.kills.lives import PROCESS, TRAINER, Life, Stop, Sweep, hear_until, side_by_side
from tests.crash.kills.places import EVERY
from tests.crash.kills.trainers import KEPT, MOST_STEPS, number_of, train_alone
from tests.crash.kills.training import Training, assert_whole
from tests.helpers.saves import temporaries
from tests.manager.runs import directories, manager_of
from tests.survival.traces import names

from lastgood.manager.retention import KeepLast
from lastgood.storage._file_lock import lock_file
from lastgood.storage.local import LocalStorage

pytestmark = pytest.mark.long

AT_ONCE = 2
"""So many runs are killed side by side."""

STEPS_LOOKED_AT = 6
MOST_TIMES = 3
LONGEST_WAIT_SECS = 0.06
"""About what a save takes: a random kill comes up to this long after something has been heard."""

VICTIMS = ((TRAINER,), (PROCESS,), (TRAINER, PROCESS), (PROCESS, TRAINER))

NAMED = {
    TRAINER: {
        *("begin restore", "end restore", "begin read", "end read", "begin prewarm", "end prewarm"),
        *("begin reserve", "end reserve", "begin stall", "end stall", "begin take", "end take", "begin stage"),
        *("end stage", "end staged", "begin wait for slot", "end wait for slot", "begin hold", "end hold"),
        *("end save", "end write", "end fsync", "end commit", "end durable", "begin retention", "end retention"),
    },
    PROCESS: {
        *("begin save", "end save", "begin write", "end write", "begin fsync", "end fsync", "begin commit"),
        "end commit",
    },
}
"""The phases of a run with one rank. What the checkpoint process has done ends once more where the trainer hears it."""

Kill = tuple[Stop | None, tuple[str, ...]]
"""Where (or at a random moment), and who, in which order."""


class Run:
    """A run under a root, which one life after another goes on with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.newest = 0, 0
        """The newest step that is there for certain, and the number of its state."""
        self.latest_asked = 0
        """The latest step of which there may be anything."""

    def check(self, number: int, life: Life, *, process_lived: bool) -> None:
        """After a life: what was acknowledged is there, and the run can go on."""
        assert life.resumed in (None, self.newest)  # None: it did not come to that
        before, numbers = self.newest[0], {**life.asked, self.newest[0]: self.newest[1]}
        self.latest_asked = max(self.latest_asked, *life.asked, 0)
        # A process that only lost its trainer has finished what was staged.
        promised = max([before, *life.durable, *(life.staged if process_lived else ())])
        assert not (life.failed and process_lived)
        if self.root.exists():
            left = [name for directory in directories(self.root) for name in temporaries(self.root / directory)]
            assert len(left) <= 1, left
        with manager_of(self.root, keep=KeepLast(KEPT)) as manager:
            training = Training()
            state = training.state()
            step = manager.restore(state) or 0
            assert not any(passed.is_damaged for passed in manager.passed_over)
            assert step >= promised, f"step {step} is the newest, and {promised} was promised"
            assert assert_whole(state) == numbers[step], f"the state of step {step} is not the one that was saved"
            training.took_over(state)
            training.go_to(number_of(number, MOST_STEPS))
            manager.save(step + 1, training.state()).result(0)
            manager.wait()
        self.newest = step + 1, training.number
        self.assert_tidy()

    def assert_tidy(self) -> None:
        """There are the last checkpoints, and nothing else: no temporary, and no lock that anybody holds.

        But for later steps: a trainer that outlived its checkpoint process had begun one, behind the save that failed,
        when it was killed too. A directory is left of that until a run comes to a still later step.
        """
        newest = self.newest[0]
        kept = [f"step-{step}" for step in range(max(1, newest - KEPT + 1), newest + 1)]
        later = {f"step-{step}" for step in range(newest + 1, self.latest_asked + 1)}
        found = {*directories(self.root)}
        assert found - later == {*kept}
        for name in found & later:
            assert not LocalStorage().has_writers(str(self.root / name))
            assert {*names(self.root / name)} <= {lock_file("checkpoint_0.pt")}
        for name in kept:
            assert not LocalStorage().has_writers(str(self.root / name))
            # Beside a checkpoint that was committed at its last breath, a process leaves the empty file of its lock.
            left = {lock_file("checkpoint_0.pt")} if name != kept[-1] else set()
            assert {"checkpoint_0.pt"} <= {*names(self.root / name)} <= {"checkpoint_0.pt"} | left


class SweepOfOne(Sweep):
    """Kills of a run of one rank."""

    def __init__(self, folder: Path, seed: str, kills: list[Kill]) -> None:
        super().__init__(folder, seed)
        self._run = Run(folder / "run")
        self._kills = kills

    def go(self) -> None:
        for number, (stop, victims) in enumerate(self._kills, 1):
            if self.is_given_up:
                return
            with Life(self._folder, train_alone, str(self._run.root), number) as life:
                try:
                    self._end(life.start(stop), random.Random(f"{self._seed}/{number}"), stop, victims)
                    self._run.check(number, life, process_lived=PROCESS not in victims)
                except BaseException as error:
                    where = stop or "a random moment"
                    error.add_note(f"kill {number} of sweep {self._seed}: {' and '.join(victims)} at {where}; {life}")
                    raise

    def _end(self, life: Life, rng: random.Random, stop: Stop | None, victims: tuple[str, ...]) -> None:
        if stop is None:
            news = rng.randrange(1, 40)
            life.require(lambda: life.news >= news, "news")
            hear_until([life], lambda: False, rng.uniform(0, LONGEST_WAIT_SECS))
        else:
            life.require(lambda: bool(life.stopped) or len(life.durable) > 2 * STEPS_LOOKED_AT, "the place")
            if not life.stopped:
                self.missed.append(stop)
                life.withdraw_order()
        life.require(lambda: life.has_process or PROCESS not in victims, "the checkpoint process")
        life.kill(*victims)
        life.let_go_on()
        if TRAINER not in victims:
            self._live_on(life)
            if rng.random() < 0.5:
                life.tell_to_finish()
                life.require(lambda: life.closed, "the end of the training")
                life.exit()
        life.wait_for_ends()

    def _live_on(self, life: Life) -> None:
        """The trainer of a dead checkpoint process: what was in flight fails clearly; a new one does the next."""
        asked = max(life.asked, default=0)
        life.require(lambda: max(life.durable, default=0) > asked + 1, "a save after the death of the process")
        assert len(life.failed) <= 2, life.failed
        for error in life.failed.values():
            assert error.startswith("CheckpointProcessError: Child process terminated unexpectedly"), error
            assert "SIGKILL" in error


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Stop]:
    """All places, each as often as it is come by in a few saves; found by letting a life pass them all."""
    folder = tmp_path_factory.mktemp("looking")
    return sorted(stop for owner in NAMED for stop in places_of(folder, owner) if stop.times <= MOST_TIMES)


def places_of(folder: Path, owner: str) -> list[Stop]:
    with manager_of(folder / owner) as manager:  # so that there is something to resume from
        manager.save(1, Training(1).state()).result(0)
    with Life(folder, train_alone, str(folder / owner), 1).start(Stop(owner, EVERY)) as life:
        life.require(lambda: len(life.durable) >= STEPS_LOOKED_AT, "some saves")
        life.require(lambda: {stop.place for stop in life.passed} >= NAMED[owner], "every phase")
        life.tell_to_finish()
        life.require(lambda: life.closed, "the end of the training")
        life.exit()
        life.wait_for_ends()
    assert {stop.place for stop in life.passed} == NAMED[owner]
    return life.passed


def kills_of(rng: random.Random, places: list[Stop], count: int) -> list[Kill]:
    """Half at named places, as far as there are that many, each with every victim; the others at random moments."""
    kills: list[Kill] = [(stop, victims) for stop in places for victims in VICTIMS[:3]]
    rng.shuffle(kills)
    del kills[count // 2 :]
    kills += [(None, rng.choice(VICTIMS)) for _ in range(count - len(kills))]
    rng.shuffle(kills)
    return kills


@pytest.mark.parametrize(
    "count", [20, pytest.param(1000, marks=[pytest.mark.crash, pytest.mark.timeout(3000)], id="1000")]
)
def test_whoever_is_killed_whenever_what_was_acknowledged_is_there_and_the_run_goes_on(
    tmp_path: Path, rng_seed: int, places: list[Stop], count: int, count_cases: Callable[[str, int], None]
) -> None:
    kills = kills_of(random.Random(rng_seed), places, count)
    sweeps = [SweepOfOne(tmp_path / str(part), f"{rng_seed}/{part}", kills[part::AT_ONCE]) for part in range(AT_ONCE)]
    side_by_side(sweeps)
    missed = [stop for sweep in sweeps for stop in sweep.missed]
    print(f"nobody came by: {missed}")
    at_places = sum(stop is not None for stop, _ in kills) - len(missed)
    # The first life of a run has nothing to read, say: of few places, some may be such.
    assert len(missed) <= max(3, at_places / 10)
    count_cases("kills of one rank's trainer, checkpoint process or both at a named phase", at_places)
    count_cases("kills of one rank's trainer, checkpoint process or both at a random moment", count - at_places)
