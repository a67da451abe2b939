"""Where the checkpoints of a training lie: one directory a step."""

import re
import shutil
from pathlib import Path

_STEP_NAME = re.compile(r"step-(\d+)")


def directory_of(step: int, directory: Path) -> Path:
    """Where the checkpoint of ``step`` belongs."""
    return directory / f"step-{step}"


def step_directories(directory: Path) -> dict[int, Path]:
    """The directories of the steps in rising order. ``step-20.backup`` is somebody else's."""
    found = {}
    for path in directory.iterdir() if directory.is_dir() else ():
        name = _STEP_NAME.fullmatch(path.name)
        if name:
            found[int(name.group(1))] = path
    return dict(sorted(found.items()))


def remove_old(directory: Path, keep: int) -> None:
    """Leave the newest ``keep`` checkpoints. Call this only once the newest is known to be durable.

    The checkpoint process of a killed training may be so late that it still writes one of the old ones. What it puts
    there in the middle of this is removed the next time.
    """
    saved = [path for path in step_directories(directory).values() if size_of(path) > 0]
    for path in saved[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def size_of(path: Path) -> int:
    """The bytes of the checkpoint in a step's directory; 0 if a killed save has left none."""
    return sum(file.stat().st_size for file in path.glob("checkpoint_*.pt"))
