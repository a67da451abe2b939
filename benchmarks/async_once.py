"""One asynchronous saver in a process of its own: for its memory, and for what may use up a process's resources.

Run as a program by :func:`run_alone`, it prints a line of JSON for each save. It imports little at the top: processes
that it starts may import it once more.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import Any, TextIO

FIRST, LATER = "first", "later"


def run_alone(saver: str, state: str, directory: str, timeout: float, *, memory: bool) -> tuple[dict[str, Any], str]:
    """What the program says by kind of save, and why it says no more; at the time-out it is killed."""
    command = [sys.executable, os.path.abspath(__file__), saver, state, directory, str(timeout)]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command + ["--memory"] * memory,
            stdout=output,
            stderr=errors,
            start_new_session=True,  # so that all that it starts can be killed with it
        )
        try:
            status = process.wait(timeout)
            why = "" if status == 0 else _last_line(errors) or f"exit status {status}"
        except subprocess.TimeoutExpired:
            why = f"not over after {timeout:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        output.seek(0)
        lines = output.read().splitlines()
    shutil.rmtree(os.path.join(directory, _NAME), ignore_errors=True)
    found: dict[str, Any] = {}
    for line in lines:
        if line.startswith("{"):
            found.update(json.loads(line))
    return found, found.pop("error", why)


_NAME = "async-alone"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("saver")
    parser.add_argument("state", help="a kind and a number, as states.make_state takes them")
    parser.add_argument("directory")
    parser.add_argument("timeout", type=float)
    parser.add_argument("--memory", action="store_true", help="measure the memory of a first save, and no times")
    options = parser.parse_args()
    from timing import reason

    try:
        _measure(options)
    except Exception as error:
        print(json.dumps({"error": reason(error)}), flush=True)
        os._exit(0)  # what has failed may keep the interpreter from ending


def _measure(options: argparse.Namespace) -> None:
    import process_tree
    from async_rounds import Entry, opened, timed_save
    from async_savers import ASYNC_SAVERS
    from states import make_state
    from timing import release_memory, settle

    state = make_state(options.state)
    entry = Entry(options.saver, ASYNC_SAVERS[options.saver], options.saver)
    base = os.path.join(options.directory, _NAME)
    os.mkdir(base)
    path = os.path.join(base, FIRST)
    if options.memory:
        release_memory()
        before = process_tree.memory_bytes()
        with process_tree.Peak() as peak, opened(entry) as saver:
            timed_save(saver, path, state, options.timeout)
        print(json.dumps({FIRST: max(0, peak.nbytes - before)}), flush=True)
        return
    with opened(entry) as saver:
        for kind in (FIRST, LATER):
            path = os.path.join(base, kind)
            settle(0)
            laps = timed_save(saver, path, state, options.timeout)
            print(json.dumps({kind: vars(laps)}), flush=True)
            shutil.rmtree(path)


def _last_line(file: TextIO) -> str:
    file.seek(0)
    lines = file.read().strip().splitlines()
    return lines[-1].strip()[:200] if lines else ""


if __name__ == "__main__":
    main()
