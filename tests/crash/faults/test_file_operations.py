"""Faults at every file operation of saves, loads, verification, retention, resuming: errors, short transfers, silence.

Whatever happens, it goes well or says clearly why not; what was there is there, bit for bit; and the next save is good
and clears away what is left.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.crash.faults.cases import Setting, Trial, some
from tests.crash.faults.loads import LoadFile, LoadInPlace, LoadNew, LoadOfTwoRanks, LoadPart, Verify
from tests.crash.faults.managed import Prune, Resume, SaveOfRun
from tests.crash.faults.saves import (
    FirstSave,
    Overwrite,
    SaveFile,
    SaveOfVotingRank0,
    SaveOfVotingRank1,
    SaveWithManifest,
)

SETTINGS = [
    *(Setting(FirstSave), Setting(FirstSave, has_direct_io=False)),
    *(Setting(Overwrite), Setting(Overwrite, has_direct_io=False)),
    *map(Setting, (SaveFile, SaveWithManifest, SaveOfVotingRank0, SaveOfVotingRank1, SaveOfRun, Prune, Resume)),
    *(Setting(LoadNew), Setting(LoadNew, is_cold=False)),
    *(Setting(LoadInPlace), Setting(LoadInPlace, is_cold=False)),
    *map(Setting, (LoadPart, LoadFile, LoadOfTwoRanks, Verify)),
]
ALL_SETTINGS = pytest.mark.parametrize("setting", SETTINGS, ids=str)

ERRORS = "single faults of file operations"
ENDS = "devices that fail for good at some file operation"
SILENCES = "devices that fall silent at some file operation"


@pytest.fixture
def trial(setting: Setting, tmp_path: Path) -> Trial:
    template, changed = tmp_path / "prepared", tmp_path / "changed"
    for directory in (template, changed):
        directory.mkdir()
    return Trial(setting, template, changed)


@ALL_SETTINGS
def test_a_fault_of_any_file_operation_is_harmless_or_a_clear_error(
    trial: Trial, rng_seed: int, count_cases: Callable[[str, int], None]
) -> None:
    rng = random.Random(rng_seed)
    count_cases(ERRORS, trial.run(some(trial.faults(), 8, rng)))
    count_cases(ERRORS, trial.run(some(trial.hiccups_of_the_device(), 1, rng)))
    count_cases(ENDS, trial.run(some(trial.ends_of_the_device(), 1, rng)))


@pytest.mark.crash
@pytest.mark.timeout(1200)
@ALL_SETTINGS
def test_every_fault_of_every_file_operation(
    trial: Trial, rng_seed: int, count_cases: Callable[[str, int], None]
) -> None:
    count_cases(ERRORS, trial.run(trial.faults() + trial.hiccups_of_the_device()))
    count_cases(ENDS, trial.run(trial.ends_of_the_device()))
    silences = trial.silences_of_the_device()
    count_cases(SILENCES, trial.run(random.Random(rng_seed).sample(silences, min(3, len(silences)))))
