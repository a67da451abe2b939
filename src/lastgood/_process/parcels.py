"""Values of the user's own on their way to the checkpoint process: pickled here, unpickled there.

A value that lives in the user's ``__main__`` makes the process import that file, as ``__mp_main__``, when the parcel
is opened, and not otherwise. What :mod:`multiprocessing` passes on by descriptor (its own pipes and queues, tensors in
shared memory) goes along as descriptors.
"""

import contextlib
import io
import os
import pickle
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import context, process, spawn
from multiprocessing.reduction import ForkingPickler
from types import FunctionType
from typing import Any

from lastgood._process.pipe import close_all
from lastgood.errors import ConfigError

_MAIN_NAMES = ("__main__", "__mp_main__")


@dataclass(frozen=True)
class MainModule:
    """How the user's main module was started: ``python -m name``, or ``python path``."""

    name: str | None
    path: str | None
    arguments: list[str]


@dataclass(frozen=True)
class Parcel:
    """A pickled value; it can be sent, together with so many descriptors."""

    data: bytes
    main: MainModule | None
    descriptor_count: int


class _MainDetector:
    """Mixed into a pickler: whether what it pickles can be found only in the user's main module."""

    needs_main = False

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, (type, FunctionType)) and value.__module__ in _MAIN_NAMES:
            self.needs_main = True
        return NotImplemented


class _PlainPickler(_MainDetector, pickle.Pickler):
    pass


class _SharingPickler(_MainDetector, ForkingPickler):
    pass


class _Descriptors:
    """What multiprocessing asks, while something is pickled for a child, to take descriptors along."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def duplicate_for_child(self, descriptor: int) -> int:
        self.numbers.append(os.dup(descriptor))
        return len(self.numbers) - 1

    @staticmethod
    def DupFd(index: int) -> "SentDescriptor":
        return SentDescriptor(index)


class SentDescriptor:
    """A descriptor in a parcel: ``detach()`` gives its number in the process that opens it, once."""

    def __init__(self, index: int) -> None:
        self._index = index

    def detach(self) -> int:
        descriptors: list[int] = _opening.descriptors
        number, descriptors[self._index] = descriptors[self._index], -1
        return number


_opening = threading.local()


def pack(value: object, what: str, *, sharing: bool) -> tuple[Parcel, list[int]]:
    """Pickle ``value``; the descriptors belong to the caller. Raises :class:`ConfigError` when it cannot be pickled.

    With ``sharing``, tensors and multiprocessing's objects stay the same memory in both processes; without, they
    are copied or refused.
    """
    target = io.BytesIO()
    descriptors = _Descriptors()
    pickler: _SharingPickler | _PlainPickler
    try:
        if sharing:
            with _passing(descriptors):
                pickler = _SharingPickler(target, pickle.HIGHEST_PROTOCOL)
                pickler.dump(value)
        else:
            pickler = _PlainPickler(target, pickle.HIGHEST_PROTOCOL)
            pickler.dump(value)
        main = _main_module() if pickler.needs_main else None
    except Exception as error:
        close_all(descriptors.numbers)
        raise ConfigError(
            f"{what} cannot be passed to the checkpoint process: {error}. What is passed has to be picklable: "
            "functions and classes at the top level of a module, for example."
        ) from error
    return Parcel(target.getvalue(), main, len(descriptors.numbers)), descriptors.numbers


def unpack(parcel: Parcel, descriptors: Sequence[int]) -> Any:
    """The value. Its descriptors are used up or closed, whether this succeeds or raises."""
    _opening.descriptors = list(descriptors)
    try:
        if parcel.main is not None:
            _import_main(parcel.main)
        return pickle.loads(parcel.data)
    finally:
        close_all([number for number in _opening.descriptors if number >= 0])
        _opening.descriptors = []


@contextlib.contextmanager
def _passing(descriptors: _Descriptors) -> Iterator[None]:
    before = context.get_spawning_popen()
    context.set_spawning_popen(descriptors)  # type: ignore[arg-type]
    try:
        yield
    finally:
        context.set_spawning_popen(before)


def _main_module() -> MainModule:
    module = sys.modules["__main__"]
    name = getattr(getattr(module, "__spec__", None), "name", None)
    path = getattr(module, "__file__", None)
    if name is not None and name.rpartition(".")[2] == "__main__":
        raise ValueError(f"it lives in {path}, which cannot be imported without running it; move it to another module")
    if name is None and (path is None or not os.path.exists(path)):
        raise ValueError("it was defined in an interactive session or by -c; move it to a module, a file")
    return MainModule(name, None if path is None else os.path.abspath(path), list(sys.argv))


def _import_main(main: MainModule) -> None:
    if sys.modules["__main__"].__name__ == "__mp_main__":
        return  # it has been imported for another parcel
    here = process.current_process()
    # Code that is not behind `if __name__ == "__main__"` must not start processes from here, without end.
    here._inheriting = True  # type: ignore[attr-defined]
    try:
        how = {"init_main_from_path": main.path} if main.name is None else {"init_main_from_name": main.name}
        spawn.prepare({"sys_argv": main.arguments, **how})
    finally:
        del here._inheriting  # type: ignore[attr-defined]


def refuse_while_main_is_imported() -> None:
    """For what starts a checkpoint process: it must not be started by the process's own import of the main module."""
    if getattr(process.current_process(), "_inheriting", False):
        raise ConfigError(
            "a checkpoint process is being started while the checkpoint process imports your main module, because a "
            "function that you passed lives there. Put what your script does behind `if __name__ == '__main__':`, or "
            "the function into a module of its own."
        )
