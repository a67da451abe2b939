"""What the fuzz targets share: files in memory, what is watched of a case, and the run under atheris.

``python -m tests.hostile.fuzz_archive [directory of new inputs] [options of libFuzzer]`` fuzzes for as long as it may.
Without atheris, targets can be called with any bytes, and that is what the tests do with the corpus.
"""

import contextlib
import functools
import importlib.util
import json
import random
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.json_edits import edit, encoded

HAS_ATHERIS = importlib.util.find_spec("atheris") is not None
CORPUS = Path(__file__).with_name("corpus")
TARGETS = ("archive", "pickle", "manifest")
MEBIBYTE = 1024 * 1024
SPARE = 64 * MEBIBYTE
_LARGEST_EDITED = 4000
"""JSON that is larger is changed byte by byte alone: walking through it takes long."""

_IS_FUZZING = HAS_ATHERIS and "--fuzzing" in sys.argv


def instrumented() -> contextlib.AbstractContextManager[Any]:
    """Imports in this context report to the fuzzer which of their branches are taken."""
    if not _IS_FUZZING:
        return contextlib.nullcontext()
    import atheris

    return atheris.instrument_imports(include=["lastgood"])


class MemoryFile:
    """A stored file that is in memory."""

    def __init__(self, data: bytes, path: str = "/run/step-5/checkpoint_0.pt") -> None:
        self.path = path
        self.size = len(data)
        self._data = data

    def read_into(self, offset: int, target: memoryview) -> None:
        from lastgood.errors import corrupt

        assert offset >= 0, "nobody reads before the start of a file"
        if offset + target.nbytes > self.size:
            raise corrupt(self.path, "it ends before it should")
        target.cast("B")[:] = self._data[offset : offset + target.nbytes]

    def expect_other_readers(self) -> None:
        pass

    def close(self) -> None:
        pass


class TooMuchMemoryError(AssertionError):
    """A case took more memory than its bytes and a constant."""


def watched(check: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """The target, which also fails for memory that its input does not justify."""

    def run(data: bytes) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        check(data)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if grown > SPARE + len(data):
            raise TooMuchMemoryError(f"{grown / MEBIBYTE:.0f} MiB for {len(data)} bytes")

    return run


def _limit_memory() -> None:
    """Let a large allocation fail, instead of the machine."""
    size = 1024 * int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (size + 2048 * MEBIBYTE, resource.RLIM_INFINITY))


def _mutated(json_form: bytes, data: bytes, most: int, seed: int) -> bytes:
    """The next input: bytes changed at random, or JSON in its structure, which the fuzzer would hardly find."""
    import atheris

    chance = random.Random(seed)
    if data[:1] == json_form and len(data) < _LARGEST_EDITED and chance.random() < 0.7:
        with contextlib.suppress(ValueError, RecursionError):
            return (json_form + encoded(edit(json.loads(data[1:]), chance.choice)))[:most]
    changed: bytes = atheris.Mutate(data, most)  # looked up now: it is another function before the fuzzing begins
    return changed


def main(name: str, check: Callable[[bytes], None], json_form: bytes | None = None) -> None:
    """Fuzz a target, from the corpus on; new inputs go to the first directory named in the arguments, if there is one.

    Inputs that begin with ``json_form`` go on as JSON.
    """
    if not HAS_ATHERIS:
        sys.exit("atheris is not installed: 'pip install atheris'")
    import atheris

    arguments = [word for word in sys.argv[1:] if word != "--fuzzing"]
    options = ["-timeout=10", "-rss_limit_mb=4096", "-max_len=20000"]
    check(b"")  # what is imported late, and made once, is no input's doing
    for seed in sorted((CORPUS / name).iterdir()):
        check(seed.read_bytes())
    _limit_memory()
    mutators = {} if json_form is None else {"custom_mutator": functools.partial(_mutated, json_form)}
    with tempfile.TemporaryDirectory() as nowhere:
        directories = [word for word in arguments if not word.startswith("-")] or [nowhere]
        options += [word for word in arguments if word.startswith("-")]
        atheris.Setup([sys.argv[0], *options, *directories, str(CORPUS / name)], watched(check), **mutators)
        atheris.Fuzz()
