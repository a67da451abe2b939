"""SIGKILL among three ranks: of one checkpoint process or all, of one trainer or all, at named phases and at random.

Nobody waits long for the dead. A checkpoint process that was killed fails the save in flight, and is replaced; after
the death of a trainer another job resumes, all ranks from the same step, and saves. What one rank knows to be durable
is there, whole, for all.
"""

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.crash.kills.lives import PROCESS, TRAINER, Life, Stop, Sweep, hear_until, require, side_by_side
from tests.crash.kills.trainers import KEPT, OF_A_RANK, train_together
from tests.crash.kills.training import assert_whole
from tests.helpers.saves import read
from tests.survival.traces import names

from lastgood.errors import CheckpointNotFoundError, UncommittedCheckpointError
from lastgood.format.epoch import EPOCH_NAME
from lastgood.manager.catalog import RUN_LOG_NAME, Condition, read_catalog
from lastgood.storage.local import LocalStorage

RANKS = range(3)
KILLS_A_JOB = 5
LONGEST_WAIT_SECS = 0.1
TIMEOUT_SECS = 40
"""How long checkpoint processes wait for one of which nobody can say that it is gone, as its trainer died with it.

A new process imports torch, writes and syncs before it votes, which took up to 9 s on two cores beside four processes
that did nothing but compute and sync, and longer on a busier machine. The others must not take it for gone.
"""

SAVES_UNTIL_MISSED = 12
PLACES = [
    Stop(owner, f"{edge} {phase}")
    for owner, phases in {
        TRAINER: ("stall", "take", "stage", "wait for slot"),
        PROCESS: ("save", "write", "fsync", "publish", "barrier", "commit"),
    }.items()
    for phase in phases
    for edge in ("begin", "end")
]
FATES = ("one trainer", "all trainers", "one trainer and its process", "all trainers and processes")
CLEAR = ("CheckpointProcessError: Child process terminated unexpectedly", "BarrierTimeoutError: rank ")


class Kill(NamedTuple):
    """Who is killed, and where: when a rank has come to a place, or at a random moment."""

    trainers: tuple[int, ...]
    processes: tuple[int, ...]
    stop: Stop | None
    stopping: int

    def __str__(self) -> str:
        where = f"rank {self.stopping} at {self.stop}" if self.stop else "a random moment"
        return f"trainers {self.trainers} and processes {self.processes} at {where}"


def kills_of(rng: random.Random, count: int) -> list[list[Kill]]:
    """Of one job after another: some of checkpoint processes, which the job survives, and at last one of trainers."""
    jobs = []
    for first in range(0, count, KILLS_A_JOB):
        kills = []
        for number in range(first, min(first + KILLS_A_JOB, count)):
            one = (rng.choice(RANKS),)
            trainers: tuple[int, ...] = ()
            processes = one if rng.random() < 0.75 else tuple(RANKS)
            if number in (first + KILLS_A_JOB - 1, count - 1):
                fate = rng.choices(FATES, (3, 3, 1, 3))[0]
                trainers = one if fate.startswith("one") else tuple(RANKS)
                processes = trainers if "process" in fate else ()
            kills.append(Kill(trainers, processes, rng.choice([*PLACES, *[None] * len(PLACES)]), rng.choice(RANKS)))
        jobs.append(kills)
    return jobs


class Run:
    """A run under a root, which one job after another goes on with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.newest = 0
        self.numbers: list[dict[int, int]] = [{0: rank} for rank in RANKS]
        """Of the states of each rank, by step."""

    def newest_read(self) -> tuple[int, list[int]]:
        """The newest committed step as all ranks find it, whole, and the numbers of their states; 0 if there is none.

        While a job goes on, it may be gone before all of it has been read: then there is a newer one.
        """
        last = 0
        while True:
            entries = read_catalog(LocalStorage(), str(self.root)).entries
            assert {entry.condition for entry in entries} <= {Condition.COMMITTED, Condition.UNFINISHED}
            step = max((entry.step for entry in entries if entry.is_committed), default=0)
            if not step:
                return 0, list(RANKS)
            try:
                states = [read(self.root / f"step-{step}", rank, len(RANKS)) for rank in RANKS]
            except (CheckpointNotFoundError, UncommittedCheckpointError):
                assert step > last, f"step {step} is the newest, and cannot be read"
                last = step
            else:
                return step, [assert_whole(state, OF_A_RANK) for state in states]

    def check(self, lives: list[Life], promised: int) -> None:
        """What was promised is there, or something newer, and is what the ranks saved there."""
        step, numbers = self.newest_read()
        assert step >= max(promised, self.newest), f"step {step} is the newest, and {promised} was promised"
        known_or_asked = list(zip(self.numbers, lives, strict=True))
        require(
            lives,
            lambda: all(step in known or step in life.asked for known, life in known_or_asked),
            f"that all ranks have asked for the save of step {step}, which is there",
        )
        for known, life in known_or_asked:
            known |= life.asked
        assert numbers == [known[step] for known in self.numbers], f"not what was saved as step {step}"
        self.newest = step

    def unfinished(self) -> set[int]:
        """Steps of which something is there, and no commit record."""
        entries = read_catalog(LocalStorage(), str(self.root)).entries
        return {entry.step for entry in entries if not entry.is_committed}

    def assert_tidy(self) -> None:
        """After a job that came to its end, the last checkpoints are there, and nothing of the dead beside them."""
        entries = read_catalog(LocalStorage(), str(self.root)).entries
        kept = [entry.step for entry in entries if entry.is_committed]
        assert kept == [self.newest - 1, self.newest]
        assert len(kept) == KEPT
        files = [*(f"checkpoint_{rank}.pt" for rank in RANKS), "manifest.json"]
        for step in kept:
            assert names(self.root / f"step-{step}") == files
        steps = {f"step-{entry.step}" for entry in entries}
        assert {*names(self.root)} == steps | {RUN_LOG_NAME, EPOCH_NAME}


class Job:
    """Three trainers with a checkpoint process each."""

    def __init__(self, folder: Path, run: Run, number: int) -> None:
        self._run = run
        self._held = ExitStack()
        self.lives: list[Life] = []
        rendezvous = folder / f"rendezvous-{number}"
        for rank in RANKS:
            orders = folder / f"rank-{rank}"
            orders.mkdir(exist_ok=True)
            arguments = str(run.root), number, rank, len(RANKS), str(rendezvous), TIMEOUT_SECS
            life = Life(orders, train_together, *arguments)
            self.lives.append(self._held.enter_context(life))
            life.start()
        self._whole_since = 1
        """No process has died since this step was asked for."""

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def resume(self) -> None:
        """All ranks go on from the newest step, and save."""
        require(self.lives, lambda: all(life.resumed for life in self.lives), "where all resume")
        expected = [(self._run.newest, known[self._run.newest]) for known in self._run.numbers]
        assert [life.resumed for life in self.lives] == expected
        self._require_saves_after(self._run.newest)

    def _require_saves_after(self, step: int) -> None:
        require(
            self.lives,
            lambda: all(life.has_process and max(life.durable, default=0) > step for life in self.lives),
            f"a save of a step after {step}, on all ranks",
        )

    @property
    def _asked(self) -> int:
        return max(max(life.asked, default=0) for life in self.lives)

    @property
    def _durable(self) -> set[int]:
        """What one rank at least knows to be so."""
        return {step for life in self.lives for step in life.durable}

    def come_to(self, kill: Kill, rng: random.Random) -> bool:
        """Let the ranks go on to where the kill is to come; whether they have come there."""
        life, begun = self.lives[kill.stopping], self._asked
        if kill.stop is None:
            # Ranks in step with each other need a while to come to where a save is.
            news = sum(each.news for each in self.lives) + rng.randrange(20)
            require(self.lives, lambda: sum(each.news for each in self.lives) >= news, "news")
            hear_until(self.lives, lambda: False, rng.uniform(0, LONGEST_WAIT_SECS))
            return True
        life.order(kill.stop)
        require(
            self.lives, lambda: bool(life.stopped) or self._asked > begun + SAVES_UNTIL_MISSED, f"the place {kill.stop}"
        )
        if life.stopped:
            return True
        life.withdraw_order()
        return False

    def kill(self, kill: Kill) -> None:
        for rank in RANKS:
            victims = [PROCESS] * (rank in kill.processes) + [TRAINER] * (rank in kill.trainers)
            self.lives[rank].kill(*victims)
        for life in self.lives:
            life.let_go_on()

    def live_on(self) -> None:
        """After the death of processes: what is in flight fails with clear words, everywhere; the next save is good."""
        begun = self._asked
        failed = [len(life.failed) for life in self.lives]
        self._require_saves_after(begun + 1)
        for life, before in zip(self.lives, failed, strict=True):
            assert len(life.failed) <= before + 2, life.failed
            for error in life.failed.values():
                assert error.startswith(CLEAR), error
                assert f"waited {TIMEOUT_SECS}" not in error, error
        self._whole_since = begun + 2
        self._run.check(self.lives, max(max(life.durable) for life in self.lives))
        # Of what retention is removing at this moment, nothing is left a moment later.
        require(self.lives, lambda: not self._run.unfinished() & self._durable, "a commit of what was acknowledged")

    def end(self, kill: Kill, rng: random.Random) -> None:
        """After the death of trainers: the others notice, and end, of themselves or not; so do all processes."""
        left = [life for rank, life in enumerate(self.lives) if rank not in kill.trainers]
        if left and rng.random() < 0.5:
            require(left, lambda: all(life.lost for life in left), "that the others notice")
            for life in left:
                assert life.lost is not None
                assert life.lost.startswith(("BarrierTimeoutError", "CheckpointProcessError")), life.lost
                life.exit()
        self.wait_for_ends()
        durable = self._durable
        staged = set.intersection(*({*life.staged} for life in self.lives))
        if not kill.processes:
            durable |= {step for step in staged if step >= self._whole_since}
        self._run.check(self.lives, max(durable))

    def finish(self) -> None:
        self._require_saves_after(self._run.newest + KEPT)
        for life in self.lives:
            life.tell_to_finish()
        require(self.lives, lambda: all(life.closed for life in self.lives), "the end of the training")
        for life in self.lives:
            life.exit()
        self.wait_for_ends()
        self._run.check(self.lives, max(self.lives[0].durable))

    def wait_for_ends(self) -> None:
        for life in self.lives:
            life.wait_for_ends()

    def __str__(self) -> str:
        return "\n".join(f"rank {rank}: {life}" for rank, life in enumerate(self.lives))


class SweepOfThree(Sweep):
    """Kills of a run of three ranks; ``longest_secs`` is what the survivors took to be done with one."""

    def __init__(self, folder: Path, seed: str, kills: list[list[Kill]]) -> None:
        super().__init__(folder, seed)
        self._run = Run(folder / "run")
        self._kills = kills
        self.longest_secs = dict.fromkeys(("checkpoint processes alone", "trainers"), 0.0)

    def go(self) -> None:
        for number, kills in enumerate(self._kills, 1):
            if self.is_given_up:
                return
            rng = random.Random(f"{self._seed}/{number}")
            with Job(self._folder, self._run, number) as job:
                job.resume()
                for kill in kills:
                    try:
                        self._kill(job, kill, rng)
                    except BaseException as error:
                        error.add_note(f"job {number} of sweep {self._seed}: {kill}\n{job}")
                        raise
        with Job(self._folder, self._run, len(self._kills) + 1) as job:
            job.resume()
            job.finish()
        self._run.assert_tidy()

    def _kill(self, job: Job, kill: Kill, rng: random.Random) -> None:
        if not job.come_to(kill, rng):
            assert kill.stop is not None
            self.missed.append(kill.stop)
        began = time.monotonic()
        job.kill(kill)
        if kill.trainers:
            job.end(kill, rng)
        else:
            job.live_on()
        of_whom = "trainers" if kill.trainers else "checkpoint processes alone"
        self.longest_secs[of_whom] = max(self.longest_secs[of_whom], time.monotonic() - began)


@pytest.mark.parametrize(
    ("count", "at_once"),
    [
        pytest.param(4, 1, id="4"),
        pytest.param(200, 2, marks=[pytest.mark.crash, pytest.mark.timeout(3000)], id="200"),
    ],
)
def test_whichever_ranks_are_killed_nobody_waits_for_the_dead_and_the_next_job_resumes(
    tmp_path: Path, rng_seed: int, count: int, at_once: int, count_cases: Callable[[str, int], None]
) -> None:
    jobs = kills_of(random.Random(rng_seed), count)
    sweeps = [SweepOfThree(tmp_path / str(part), f"{rng_seed}/{part}", jobs[part::at_once]) for part in range(at_once)]
    side_by_side(sweeps)
    missed = [stop for sweep in sweeps for stop in sweep.missed]
    print(f"nobody came by: {missed}")
    for of_whom in sweeps[0].longest_secs:
        longest = max(sweep.longest_secs[of_whom] for sweep in sweeps)
        print(f"the longest until survivors were done with a kill of {of_whom}: {longest:.1f} s")
    kills = [kill for job in jobs for kill in job]
    assert len(missed) <= max(1, count // 10)
    count_cases("kills among three ranks that vote, of checkpoint processes alone", sum(not k.trainers for k in kills))
    count_cases("kills among three ranks that vote, of trainers", sum(bool(k.trainers) for k in kills))
