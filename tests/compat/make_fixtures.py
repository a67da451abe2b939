"""Makes the files of the current format version that every later version has to read.

    python tests/compat/make_fixtures.py

was run once for each version of the format, with the lastgood of that day; it refuses to write over what is there. The
directory of a version holds

- ``checkpoints/``: what lastgood wrote, byte for byte, save ids and times of that day included. Single files are those
  of ``lastgood.save`` for the states in ``states.py``. The directories come from one rank (``alone``), from three that
  do not coordinate (``independent``), from two that meet at a barrier (``barrier``), and from processes that vote:
  ``rows`` (FSDP2 over two), ``grid`` (FSDP2 and tensor parallelism over 2 x 2, of sizes that they do not divide),
  ``thirds`` (the same over 3 x 2), ``replicas`` (plain tensors declared to be the same on two), and ``run`` (a
  manager's two steps under FSDP2).
  Files of more than 20 KiB are packed by ``lzma``.
- ``expected/``: what has to be read from each, a description for each rank, made of the states that were saved and not
  of what was written. Where tensors are spread over ranks, their values alone: they come back whole, in memory of their
  own.

Two things were changed afterwards: the machine's name in the run's log was replaced, and the empty files of locks,
which are part of no checkpoint, were left out.
"""

import json
import lzma
import re
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.compat import saving_ranks  # noqa: E402
from tests.compat.fixtures import CHECKPOINTS, EXPECTED, PACKED, directory_of_version  # noqa: E402
from tests.compat.states import FILES, state_of_rank  # noqa: E402
from tests.compat.torch_describing import describe  # noqa: E402
from tests.helpers.saves import NotingBarrier, finished, start, writer_of  # noqa: E402
from tests.helpers.workers import Together, Worker  # noqa: E402
from tests.manager import ranks  # noqa: E402

import lastgood  # noqa: E402
from lastgood.format.epoch import read_epoch  # noqa: E402
from lastgood.format.spec import FORMAT_VERSION  # noqa: E402
from lastgood.manager.catalog import RUN_LOG_NAME  # noqa: E402
from lastgood.storage.local import LocalStorage  # noqa: E402
from lastgood.types import RankInfo  # noqa: E402

LARGE = 20 * 1024
SAVED_AT = 1_750_000_000.5
METRICS = {"loss": 0.25, "diverged": float("inf")}


def main() -> None:
    target = directory_of_version(FORMAT_VERSION)
    if target.exists():
        sys.exit(f"{target} is there: files of a version of the format are made once, and never again")
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about dtypes and layouts that are new, or old
        made = Path(scratch) / "made"
        (made / CHECKPOINTS).mkdir(parents=True)
        (made / EXPECTED).mkdir()
        make_all(made)
        pack_large(made / CHECKPOINTS)
        shutil.copytree(made, target)
    print(f"{sum(file.stat().st_size for file in target.rglob('*') if file.is_file()):,} bytes in {target}")


def make_all(made: Path) -> None:
    """All fixtures."""
    checkpoints = made / CHECKPOINTS
    for name, make_state in FILES.items():
        state = make_state()
        lastgood.save(state, checkpoints / f"{name}.pt")
        note(made, name, [describe(state)])
    note(made, "alone", [save_alone(checkpoints / "alone")])
    note(made, "independent", save_independent(checkpoints / "independent"))
    note(made, "barrier", save_at_a_barrier(checkpoints / "barrier"))
    with processes(6, made.parent) as six:
        note(made, "thirds", six.call(saving_ranks.save_thirds, str(checkpoints / "thirds")))
    with processes(4, made.parent) as four:
        note(made, "grid", four.call(saving_ranks.save_layout, str(checkpoints / "grid"), "fsdp-tp"))
    with processes(2, made.parent) as two:
        note(made, "rows", two.call(saving_ranks.save_layout, str(checkpoints / "rows"), "fsdp"))
        note(made, "replicas", two.call(saving_ranks.save_replicas, str(checkpoints / "replicas")))
        root = checkpoints / "run"
        for step, of_ranks in zip(
            saving_ranks.STEPS, zip(*two.call(saving_ranks.save_run, str(root)), strict=True), strict=True
        ):
            note(made, f"run/step-{step}", list(of_ranks))
    epoch = read_epoch(LocalStorage(), str(root))
    assert epoch is not None
    write_json(made / EXPECTED / "run.json", {"epoch": epoch.epoch, "job": epoch.job, "steps": saving_ranks.STEPS})
    log = root / RUN_LOG_NAME
    log.write_text(re.sub(r'"host":"[^"]*"', '"host":"trainer-0"', log.read_text()))
    for lock in checkpoints.rglob(".*.lock"):
        lock.unlink()


def save_alone(path: Path) -> Any:
    """One rank, with all that a save can note."""
    checkpointer = lastgood.make_sync_checkpointer(rank_info=RankInfo(0, 1))
    state = state_of_rank(0)
    checkpointer.save(str(path), state, step=2**40, saved_at=SAVED_AT, metrics=METRICS)
    checkpointer.close()
    return describe(state)


def save_independent(path: Path) -> list[Any]:
    """Three ranks that know nothing of each other."""
    for rank in range(3):
        writer_of(rank, 3).write(str(path), state_of_rank(rank), step=5)
    return [describe(state_of_rank(rank)) for rank in range(3)]


def save_at_a_barrier(path: Path) -> list[Any]:
    """Two ranks that meet at a barrier: each file has a save id of its own, and the manifest joins them."""
    meeting = threading.Barrier(2)
    writers = [writer_of(rank, 2, NotingBarrier(meeting=meeting)) for rank in range(2)]
    ended = finished([start(writer.write, str(path), state_of_rank(rank)) for rank, writer in enumerate(writers)])
    assert ended == [None, None], ended
    return [describe(state_of_rank(rank)) for rank in range(2)]


@contextmanager
def processes(count: int, scratch: Path) -> Iterator[Together]:
    """The ranks of a process group."""
    together = Together([Worker() for _ in range(count)])
    try:
        for rank, worker in enumerate(together.workers):
            worker.start(ranks.join, rank, count, str(scratch / f"rendezvous-{count}"))
        together.results()
        yield together
    finally:
        together.kill()


def note(made: Path, name: str, descriptions: list[Any]) -> None:
    """Keep what has to be read from a checkpoint, by rank."""
    write_json(made / EXPECTED / f"{name}.json", descriptions)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    encode: Callable[[Any], str] = json.JSONEncoder(separators=(",", ":")).encode
    text = encode(value) if isinstance(value, dict) else "[\n" + ",\n".join(map(encode, value)) + "\n]"
    path.write_text(text + "\n")


def pack_large(directory: Path) -> None:
    for path in [path for path in directory.rglob("*.pt") if path.stat().st_size > LARGE]:
        path.with_name(path.name + PACKED).write_bytes(lzma.compress(path.read_bytes(), preset=9))
        path.unlink()


if __name__ == "__main__":
    main()
