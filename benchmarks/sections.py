"""What is measured: the contenders of each section, and what is aimed at."""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import device_limit
import loaders
import savers
from page_cache import make_cold, make_warm
from peak_memory import extra_peak_bytes
from report import Aim, MemorySection, Section
from states import State, empty_copy, require_same, small_tensors_state
from timing import Contender, measure_in_turns

SMALL_TENSORS = 100_000
MEMORY_LIMIT = 64 << 20
LIMIT_SHARE = 0.9

WRITE_LIMITS = {
    "limit: O_DIRECT, 2 threads, 16 MiB": False,
    "limit: the same, preallocated": True,
}
READ_LIMITS = {
    "limit: O_DIRECT, 2 threads, 16 MiB": (2, 16 << 20),
    "limit: O_DIRECT, 4 threads, 8 MiB": (4, 8 << 20),
}
LIMIT_PIECE = 16 << 20


@dataclass(frozen=True)
class Rounds:
    """How many, and whether memory is touched before each call: at hand, instead of as the machine has it."""

    number: int
    touch_memory: bool


Prepare = Callable[[Sequence[str]], None]


def measure_memory(state: State, directory: str) -> MemorySection:
    """Extra peak memory of each saver, and of a load in place by lastgood."""
    extra: dict[str, int] = {}
    base = os.path.join(directory, "memory")
    target, tiny, tiny_target = empty_copy(state), small_tensors_state(100), empty_copy(small_tensors_state(100))
    for name, save in savers.SAVERS.items():
        # First a tiny state, for imports and thread pools.
        try:
            paths = save(tiny, base)
        except Exception:
            if name == savers.LASTGOOD:
                raise
            continue  # the section on saving says why
        if name == savers.LASTGOOD:
            loaders.load_into_with_lastgood(paths, tiny_target)
        savers.remove(paths)
        extra[name] = extra_peak_bytes(partial(_save_noting_paths, save, state, base, paths))
        if name == savers.LASTGOOD:
            load = partial(loaders.load_into_with_lastgood, paths, target)
            extra[loaders.LASTGOOD_INTO] = extra_peak_bytes(load)
        savers.remove(paths)
    return MemorySection(state.nbytes, extra, {savers.LASTGOOD: MEMORY_LIMIT, loaders.LASTGOOD_INTO: MEMORY_LIMIT})


def measure_saves(state: State, directory: str, how: Rounds) -> Section:
    """Every saver, and the device's limit; each file is new, and gone before the next one."""
    contenders = write_limits(state.nbytes, os.path.join(directory, "limit"))
    contenders += _save_contenders(list(savers.SAVERS), state, directory)
    aims = [Aim(savers.LASTGOOD, tuple(WRITE_LIMITS), LIMIT_SHARE)]
    for name, at_least in ((savers.TORCH, 2.5), (savers.SAFETENSORS, 1.0), (savers.FASTSAFETENSORS, 1.0)):
        aims.append(Aim(savers.LASTGOOD, (name,), at_least))
    return _section("save", "durable synchronous save", state.nbytes, contenders, how, aims)


def write_limits(nbytes: int, path: str) -> list[Contender]:
    """Writing so many bytes past the page cache, in each of the ways that may be the fastest."""

    def write(preallocate: bool) -> None:
        device_limit.write_file(path, nbytes, threads=2, piece_size=LIMIT_PIECE, preallocate=preallocate)

    def remove() -> None:
        with contextlib.suppress(FileNotFoundError):  # the limit could not be measured
            os.unlink(path)

    return [Contender(name, partial(write, preallocate), after=remove) for name, preallocate in WRITE_LIMITS.items()]


def measure_cold_loads(state: State, files: dict[str, list[str]], how: Rounds) -> Section:
    """In place and fresh, with nothing in the page cache, beside the device's limit for reading."""
    ours = files[savers.LASTGOOD]
    contenders = [
        Contender(
            name,
            partial(device_limit.read_file, ours[0], threads=threads, piece_size=piece_size),
            before=partial(make_cold, ours),
        )
        for name, (threads, piece_size) in READ_LIMITS.items()
    ]
    contenders += _into_contenders(state, files, make_cold)
    contenders += _load_contenders(loaders.FRESH, state, files, make_cold)
    aims = []
    for ours_name, peers in ((loaders.LASTGOOD_INTO, loaders.INTO), (loaders.LASTGOOD, loaders.FRESH)):
        aims.append(Aim(ours_name, tuple(READ_LIMITS), LIMIT_SHARE))
        aims += [Aim(ours_name, (name,), 1.0) for name in peers if name != ours_name]
    return _section("load_cold", "load, cold page cache", state.nbytes, contenders, how, aims)


def measure_warm_loads(state: State, files: dict[str, list[str]], how: Rounds) -> Section:
    """In place and fresh, with the whole file in the page cache."""
    contenders = _into_contenders(state, files, make_warm) + _load_contenders(loaders.FRESH, state, files, make_warm)
    aims = [
        Aim(loaders.LASTGOOD_INTO, (loaders.SAFETENSORS_INTO,), 1 / 1.2),
        Aim(loaders.LASTGOOD, (loaders.TORCH,), 2.0),
    ]
    return _section("load_warm", "load, warm page cache", state.nbytes, contenders, how, aims)


def measure_mapping(state: State, files: dict[str, list[str]], how: Rounds) -> Section:
    """How long until tensors are there whose data is read when it is touched."""
    contenders = _load_contenders(loaders.MAPPED, state, files, make_warm)
    aims = [Aim(loaders.LASTGOOD_MAP, (name,), 1.0) for name in (loaders.TORCH_MAP, loaders.SAFETENSORS_MAP)]
    return _section("map", "lazy mapping, warm page cache", state.nbytes, contenders, how, aims, moves_data=False)


def measure_small_tensors(directory: str, how: Rounds) -> list[Section]:
    """Saving many small tensors, and loading them fresh with nothing in the page cache."""
    save_names = [savers.LASTGOOD, savers.TORCH, savers.SAFETENSORS]
    load_names = [loaders.LASTGOOD, loaders.TORCH, loaders.SAFETENSORS_MAP]
    chosen = {name: entry for name, entry in (loaders.FRESH | loaders.MAPPED).items() if name in load_names}
    found = []
    state = small_tensors_state(SMALL_TENSORS)
    contenders = _save_contenders(save_names, state, directory)
    aims = [Aim(savers.LASTGOOD, (savers.TORCH,), 10.0)]
    title = "durable save of 100,000 small tensors"
    found.append(_section("small_save", title, state.nbytes, contenders, how, aims, moves_data=False))
    files = files_of_savers(save_names, state, directory)
    contenders = _load_contenders(chosen, state, files, make_cold)
    aims = [Aim(loaders.LASTGOOD, (loaders.TORCH,), 10.0)]
    title = "load of 100,000 small tensors, fresh, cold page cache"
    found.append(_section("small_load", title, state.nbytes, contenders, how, aims, moves_data=False))
    remove_files(files)
    return found


def files_of_savers(names: Sequence[str], state: State, directory: str) -> dict[str, list[str]]:
    """The files of each saver that works here."""
    files: dict[str, list[str]] = {}
    for name in names:
        try:
            files[name] = savers.SAVERS[name](state, os.path.join(directory, f"state-{len(files)}"))
        except Exception:
            if name == savers.LASTGOOD:
                raise
    return files


def remove_files(files: dict[str, list[str]]) -> None:
    """Delete the files of all savers."""
    for paths in files.values():
        savers.remove(paths)


def _section(
    key: str,
    title: str,
    nbytes: int,
    contenders: Sequence[Contender],
    how: Rounds,
    aims: Sequence[Aim],
    *,
    moves_data: bool = True,
) -> Section:
    touched = nbytes + nbytes // 4 if how.touch_memory else 0
    results, left_out = measure_in_turns(title, contenders, how.number, touched_bytes=touched)
    return Section(key, title, nbytes, results, aims, moves_data, left_out)


def _save_contenders(names: Sequence[str], state: State, directory: str) -> list[Contender]:
    contenders: list[Contender] = []
    for name in names:
        base = os.path.join(directory, f"save-{len(contenders)}")
        paths: list[str] = []
        run = partial(_save_noting_paths, savers.SAVERS[name], state, base, paths)
        after = partial(savers.remove, paths)
        contenders.append(Contender(name, run, after=after, required=name == savers.LASTGOOD))
    return contenders


def _save_noting_paths(save: savers.Save, state: State, base: str, paths: list[str]) -> None:
    paths += save(state, base)


def _into_contenders(state: State, files: dict[str, list[str]], prepare: Prepare) -> list[Contender]:
    target = empty_copy(state)
    contenders = []
    for name, (load_into, saver) in loaders.INTO.items():
        if saver in files:
            run = partial(load_into, files[saver], target)
            check = partial(_check_target, target, state, name)
            required = name == loaders.LASTGOOD_INTO
            contenders.append(Contender(name, run, partial(prepare, files[saver]), check, required=required))
    return contenders


def _check_target(target: State, state: State, name: str, result: Any) -> None:
    require_same(result, state.flat if result is target.flat else state.tree, name)
    require_same(target.flat, state.flat, name)
    for tensor in target.flat.values():  # so that the next one has to load them itself
        tensor.zero_()


def _load_contenders(
    table: dict[str, tuple[loaders.Load, str]], state: State, files: dict[str, list[str]], prepare: Prepare
) -> list[Contender]:
    contenders = []
    for name, (load, saver) in table.items():
        if saver in files:
            run = partial(load, files[saver])
            check = partial(_check_result, state, name)
            required = name in (loaders.LASTGOOD, loaders.LASTGOOD_MAP)
            contenders.append(Contender(name, run, partial(prepare, files[saver]), check, required=required))
    return contenders


def _check_result(state: State, name: str, result: Any) -> None:
    require_same(result, state.tree if result.keys() == state.tree.keys() else state.flat, name)
