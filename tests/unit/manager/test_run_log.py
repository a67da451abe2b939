"""The log of a run: lines that survive a torn one, and that nobody depends on."""

import json
import logging
from pathlib import Path

import pytest

from lastgood.manager.run_log import (
    RemoveRecord,
    RestoreRecord,
    RunRecord,
    SaveRecord,
    SetAsideRecord,
    StepProblem,
    StepReasons,
    append_record,
    end_torn_line,
    protected_by,
    read_run_log,
)
from lastgood.storage.local import LocalStorage

RECORDS = [
    RunRecord(time=1.0, pid=7, host="node", world_size=2, rules=[{"rule": "keep last", "count": 3}], lastgood="1"),
    RestoreRecord(time=2.0, step=None, seconds=0.1, passed_over=[StepProblem(3, "damaged")]),
    SaveRecord(time=3.0, step=4, outcome="durable", stall_secs=0.1, durable_secs=0.5, phases={"write": 0.2}),
    SetAsideRecord(time=4.0, step=3, name="step-3.set-aside", problem="damaged"),
    RemoveRecord(time=5.0, removed=[StepReasons(1, ["old"])], kept=[StepReasons(4, ["the newest"])]),
]


def test_records_come_back_as_they_were_and_are_json_lines(tmp_path: Path) -> None:
    for record in RECORDS:
        append_record(LocalStorage(), str(tmp_path), record)
    assert read_run_log(LocalStorage(), str(tmp_path)) == RECORDS
    lines = (tmp_path / "lastgood.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["run", "restore", "save", "set aside", "remove"]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_cut_short_costs_no_other(tmp_path: Path, cut: int) -> None:
    append_record(LocalStorage(), str(tmp_path), RECORDS[0])
    append_record(LocalStorage(), str(tmp_path), RECORDS[2])
    log = tmp_path / "lastgood.jsonl"
    log.write_bytes(log.read_bytes()[:-cut])
    end_torn_line(LocalStorage(), str(tmp_path))
    append_record(LocalStorage(), str(tmp_path), RECORDS[3])
    # Without its newline alone, the line is whole.
    expected = [RECORDS[0], RECORDS[2], RECORDS[3]] if cut == 1 else [RECORDS[0], RECORDS[3]]
    assert read_run_log(LocalStorage(), str(tmp_path)) == expected


def test_lines_of_other_versions_and_rubbish_are_left_out(tmp_path: Path) -> None:
    with (tmp_path / "lastgood.jsonl").open("wb") as log:
        log.write(b'{"kind":"moon landing","time":1.0}\nnot json\n\xff\xfe\n\n[1]\n')
    append_record(LocalStorage(), str(tmp_path), RECORDS[2])
    assert read_run_log(LocalStorage(), str(tmp_path)) == [RECORDS[2]]


def test_no_log_is_an_empty_one(tmp_path: Path) -> None:
    end_torn_line(LocalStorage(), str(tmp_path))
    assert read_run_log(LocalStorage(), str(tmp_path / "nowhere")) == []
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "lastgood.jsonl").mkdir()
    with caplog.at_level(logging.WARNING, "lastgood"):
        append_record(LocalStorage(), str(tmp_path), RECORDS[0])
        end_torn_line(LocalStorage(), str(tmp_path))
    assert len(caplog.records) == 2


def test_a_saves_numbers_have_names_for_a_metrics_system() -> None:
    record = SaveRecord(
        time=1.0,
        step=2,
        outcome="failed",
        stall_secs=0.25,
        nbytes=7,
        phases={"wait for slot": 0.125},
        failures_in_a_row=2,
    )
    assert record.scalars() == {
        "checkpoint/stall_secs": 0.25,
        "checkpoint/nbytes": 7.0,
        "checkpoint/failures_in_a_row": 2.0,
        "checkpoint/phase_wait_for_slot_secs": 0.125,
    }


def test_a_run_stands_on_what_it_saved_or_resumed_from_last() -> None:
    saved = SaveRecord(time=3.0, step=40, outcome="durable", stall_secs=0.1)
    failed = SaveRecord(time=3.0, step=50, outcome="failed", stall_secs=0.1)
    resumed = RestoreRecord(time=2.0, step=30, seconds=0.1)
    fresh = RestoreRecord(time=2.0, step=None, seconds=0.1)
    assert protected_by([]) == {}
    assert protected_by([fresh, failed]) == {}
    assert protected_by([saved, resumed, failed, fresh]) == {30: "the run resumed from it"}
    assert protected_by([resumed, saved, failed]) == {40: "the last that was saved"}
