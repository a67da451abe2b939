"""A run to report on: a few real checkpoints of a small GPT, and a log of many more saves, failures and restarts.

``python -m tests.report.sample_run DIRECTORY`` makes one to look at.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lastgood
from lastgood.manager.catalog import step_name
from lastgood.manager.retention import KeepBest, KeepEvery, KeepLast, rules_to_json
from lastgood.manager.run_log import (
    Record,
    RemoveRecord,
    RestoreRecord,
    RunRecord,
    SaveRecord,
    SetAsideRecord,
    StepProblem,
    StepReasons,
    append_record,
)
from lastgood.storage.local import LocalStorage

START = 1_795_500_000.0
EVERY_STEPS, EVERY_SECS = 10, 180.0
SAVES = 300
RULES = [KeepLast(3), KeepEvery(1000), KeepBest(2, "loss", "min")]
FAILED = {
    77: "StorageError: no space left on device",
    78: "StorageError: no space left on device",
    203: "TornSnapshotError: the tensor at key 'model.lm_head.weight' changed",
}
RESTARTS = {120: 118, 240: 238}
"""The save before which a process was started again, and the one that it looked at first to go on from."""

DAMAGED = 2380
KEPT = [1000, 2000, 2860, 2920, 2970, 2980, 2990, 3000]
UNFINISHED = 3010


def gpt_state(step: int, *, layers: int = 6, width: int = 64, words: int = 1000) -> dict[str, Any]:
    """A state as a training has it: a model, an optimizer's moments, and plain values. Moves a little each step."""
    import torch

    start, moved = torch.Generator().manual_seed(1), torch.Generator().manual_seed(step)
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (words, width),
        "transformer.wpe.weight": (128, width),
    }
    for layer in range(layers):
        name = f"transformer.h.{layer}"
        shapes |= {
            f"{name}.ln_1.weight": (width,),
            f"{name}.attn.c_attn.weight": (3 * width, width),
            f"{name}.attn.c_proj.weight": (width, width),
            f"{name}.mlp.c_fc.weight": (4 * width, width),
            f"{name}.mlp.c_proj.weight": (width, 4 * width),
        }
    model = {
        name: torch.randn(shape, generator=start) + torch.randn(shape, generator=moved) * 0.002 * number
        for number, (name, shape) in enumerate(shapes.items(), 1)
    }
    moments = {
        place: {"step": torch.tensor(float(step)), "exp_avg": value * 0.01, "exp_avg_sq": value**2 * 0.001}
        for place, value in enumerate(model.values())
    }
    model["lm_head.weight"] = model["transformer.wte.weight"]
    return {"model": model, "optimizer": {"state": moments, "param_groups": [{"lr": 3e-4}]}, "epoch": step // 500}


def build(root: Path, *, seed: int = 7) -> Path:
    """Make the run under ``root``: committed steps, an unfinished one, one set aside, and the log."""
    log = list(log_records(seed))
    noted = {record.step: record for record in log if isinstance(record, SaveRecord)}
    checkpointer = lastgood.make_sync_checkpointer()
    for step in KEPT:
        metrics = noted[step].metrics
        path = str(root / step_name(step))
        checkpointer.save(path, gpt_state(step), step=step, saved_at=noted[step].time, metrics=metrics)
    checkpointer.close()
    (root / step_name(UNFINISHED)).mkdir()
    (root / f"{step_name(DAMAGED)}.set-aside").mkdir()
    write_log(root, log)
    return root


def write_log(root: Path, records: list[Record]) -> None:
    """Write the records as a manager does."""
    for record in records:
        append_record(LocalStorage(), str(root), record)


def log_records(seed: int, saves: int = SAVES) -> Iterator[Record]:
    """A log as a manager writes it."""
    rng = random.Random(seed)
    yield _run(START - 5, pid=4021)
    for number in range(1, saves + 1):
        time = START + number * EVERY_SECS
        if number in RESTARTS:
            yield _run(time - 100, pid=4021 + number)
            yield from _resume(RESTARTS[number] * EVERY_STEPS, time - 98)
        yield _save(rng, number, time)
        if number % 10 == 0 and number > 20:
            gone = [step for step in range(number * 10 - 200, number * 10 - 100, 10) if step % 1000]
            yield RemoveRecord(
                time=time + 4,
                removed=[StepReasons(step, ["none of the rules keeps it"]) for step in gone],
                kept=[StepReasons(number * EVERY_STEPS, ["the newest"])],
            )


def _run(time: float, *, pid: int) -> RunRecord:
    return RunRecord(time=time, pid=pid, host="node-7", world_size=1, rules=rules_to_json(RULES), lastgood="0.1")


def _resume(step: int, time: float) -> Iterator[Record]:
    if step != DAMAGED:
        yield RestoreRecord(time=time, step=step, seconds=1.3)
        return
    problem = "a block of the tensor at key 'model.lm_head.weight' does not match its checksum"
    yield SetAsideRecord(time=time, step=step, name=f"{step_name(step)}.set-aside", problem=problem)
    yield RestoreRecord(time=time + 1, step=step - 10, seconds=2.6, passed_over=[StepProblem(step, problem)])


def _save(rng: random.Random, number: int, time: float) -> SaveRecord:
    slow = 6.0 if number % 90 == 40 else 1.0
    stall, staged = rng.lognormvariate(-3.4, 0.25) * slow, rng.lognormvariate(-0.9, 0.2) * slow
    written = rng.lognormvariate(0.9, 0.3) * slow
    failed = number in FAILED
    return SaveRecord(
        time=time,
        step=number * EVERY_STEPS,
        outcome="failed" if failed else "durable",
        stall_secs=stall,
        staged_secs=staged,
        durable_secs=None if failed else staged + written,
        nbytes=None if failed else 2_470_000_000 + number * 1000,
        phases={"stage": staged, "write": written, "fsync": written / 9},
        metrics={"loss": 1.8 + 3.0 / (1 + number / 20) + rng.uniform(-0.03, 0.03)},
        error=FAILED.get(number),
        failures_in_a_row=1 if failed else 0,
    )


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
