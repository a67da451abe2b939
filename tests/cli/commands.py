"""What tests of the command share: running it for real, and roots of runs to run it on."""

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import lastgood
from lastgood.cli import main
from lastgood.storage.base import Buffer
from lastgood.storage.local import LocalStorage

PROGRAM = "from lastgood.cli import main; main()"
NOTING_TORCH = """
import sys
from lastgood.cli import main
try:
    main()
finally:
    print("torch imported:", "torch" in sys.modules, file=sys.stderr)
"""
WRITER = """
import sys
from lastgood.storage.local import LocalStorage
storage, path = LocalStorage(), sys.argv[1]
lock = storage.try_lock(path)
write = storage.begin(path, 1000)
write.write_at(0, memoryview(b"half of it"))
print("writing", flush=True)
sys.stdin.read()
"""
IMPORTING_TORCH = ("cat", "diff", "export")
WITHOUT = ("NO_COLOR", "FORCE_COLOR", "LASTGOOD_DEBUG", "TTY_COMPATIBLE")
PLAIN = {"TERM": "dumb", "COLUMNS": "80", "TZ": "UTC", "LC_ALL": "C.UTF-8"}


def run(
    *words: str | Path, program: str = PROGRAM, environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """The command without a terminal; as a process of its own, unless that would import torch, which takes seconds."""
    if words and words[0] in IMPORTING_TORCH and program is PROGRAM and not (environment or options):
        return run_here(*map(str, words))
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        stdin=subprocess.DEVNULL,
        env=_environment(environment),
        timeout=100,
        **{"capture_output": True, "text": True, **options},
    )


def run_here(*words: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has torch already."""
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        for name in WITHOUT:
            patch.delenv(name, raising=False)
        for name, value in PLAIN.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["lastgood", *words])
        with pytest.raises(SystemExit) as ended:
            main()
    return subprocess.CompletedProcess(words, int(ended.value.code or 0), output.getvalue(), errors.getvalue())


def run_json(*words: str | Path, status: int = 0) -> Any:
    """The one document that ``--json`` answers with."""
    done = run(*words, "--json")
    assert (done.returncode, done.stderr) == (status, "")
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def run_in_terminal(*words: str | Path, environment: Mapping[str, str] | None = None) -> str:
    """What the command shows in a terminal, control sequences included."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env=_environment({"TERM": "xterm-256color", **(environment or {})}),
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # how a terminal says that nobody has its other end any more
        pass
    os.close(ours)
    process.wait(100)
    return shown.decode()


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in WITHOUT} | PLAIN | dict(more or {})


def assert_one_line_of_error(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert done.stderr.startswith("lastgood: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def save_steps(root: Path, steps: Iterable[int], *, saved_at: float = 1.7e9, noted: int | None = None) -> None:
    """Checkpoints of one rank, an hour between one step and the next, ``loss`` falling from step to step."""
    checkpointer = lastgood.make_sync_checkpointer()
    for number, step in enumerate(steps):
        checkpointer.save(
            str(root / f"step-{step}"),
            {"weights": [float(step)] * 10, "step": step},
            step=step if noted is None else noted,
            saved_at=saved_at + 3600 * number,
            metrics={"loss": 1 / (1 + step)},
        )


def write_log(root: Path, *records: Mapping[str, Any], torn: str = "") -> None:
    """The log of a run, as a manager leaves it; ``torn`` is the beginning of a line that a crash cut short."""
    root.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"time": 1.7e9, **record}) + "\n" for record in records]
    (root / "lastgood.jsonl").write_text("".join(lines) + torn)


def run_record(*rules: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "run", "pid": 1, "host": "node", "world_size": 1, "rules": list(rules), "lastgood": "0"}


def save_record(step: int, error: str | None = None, **more: Any) -> dict[str, Any]:
    outcome = "durable" if error is None else "failed"
    return {"kind": "save", "step": step, "outcome": outcome, "stall_secs": 0.01, "error": error, **more}


def start_writer(path: Path) -> "subprocess.Popen[str]":
    """A process in the middle of writing the file ``path``. End it by a kill: that is what leaves debris."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate(timeout=60)


def tree(root: Path) -> dict[str, tuple[int, int, Buffer]]:
    """Everything below ``root``: mode, time of the last change, and content."""
    found: dict[str, tuple[int, int, Buffer]] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.lstat()
        found[str(path)] = (status.st_mode, status.st_mtime_ns, path.read_bytes() if path.is_file() else b"")
    return found


STORAGE = LocalStorage()
