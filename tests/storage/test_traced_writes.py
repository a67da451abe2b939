"""What a durable write asks of the operating system, as strace sees it: no wrapper of ours is believed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.crash.faults.tracing import path_below, why_not
from tests.helpers.workers import PATIENCE_SECS
from tests.storage import writer_process

_CALL = re.compile(r"\d+ +(?P<name>\w+)\((?P<arguments>.*)\) += 0")
_NAMES = {"renameat": "rename", "renameat2": "rename", "mkdirat": "mkdir"}


def test_hazard_09_a_file_and_its_directories_are_fsynced_by_the_operating_system(tmp_path: Path) -> None:
    if problem := why_not():
        pytest.skip(problem)
    root = tmp_path / "root"
    root.mkdir()
    path, log = root / "run" / "file", tmp_path / "log"
    calls = ",".join(("fsync", "fdatasync", "rename", "renameat", "renameat2", "mkdir", "mkdirat"))
    strace = ["strace", "-f", "-y", "-o", str(log), "-e", f"trace={calls}"]
    subprocess.run(
        [*strace, sys.executable, "-m", writer_process.__name__, str(path), "65", "100000"],
        input=5 * "\n",
        text=True,
        stdout=subprocess.DEVNULL,
        timeout=PATIENCE_SECS,
        check=True,
    )
    assert seen(log, root) == [
        ("mkdir", "run"),
        ("fsync", "."),
        ("fsync", "run/(temporary)"),
        ("rename", "run/(temporary)"),
        ("fsync", "run"),
    ]
    assert path.read_bytes() == b"A" * 100_000


def seen(log: Path, root: Path) -> list[tuple[str, str]]:
    """The calls on files below the directory that went well, in their order, each with the first path it names.

    The process has one thread: no line is split in two by another one's.
    """
    below = path_below(root)
    found = []
    for call in map(_CALL.match, log.read_text().splitlines()):
        named = None if call is None else below.search(call["arguments"])
        if call is not None and named is not None:
            path = re.sub(r"\.[^/]*\.tmp$", "(temporary)", named["path"] or ".")
            found.append((_NAMES.get(call["name"], call["name"]), path))
    return found
