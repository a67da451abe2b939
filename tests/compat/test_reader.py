"""``docs/reader.py`` reads every file without lastgood and torch, and refuses what is damaged."""

import ast
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from tests.compat.describing import tensors_in, values_of, without_torch
from tests.compat.fixtures import Fixture, unpack
from tests.compat.reading_alone import describe_all, load_module
from tests.compat.torch_describing import TorchDescriber
from tests.helpers.sharded import USUAL, model_state, publish, replace_file, row, save_spread, spread
from tests.unit.capture.states import states
from tests.unit.loading.files import archive_of

import lastgood

READER = Path(__file__).parents[2] / "docs" / "reader.py"
ALONE = Path(__file__).with_name("reading_alone.py")
DAMAGE = (ValueError, LookupError, TypeError, zipfile.BadZipFile)

CountCases = Callable[[str, int], None]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fixture]:
    """The files of the version that the reader reads."""
    return unpack(1, tmp_path_factory.mktemp("unpacked") / "version-1")


@pytest.fixture(scope="module")
def reader() -> Any:
    """The reader, as a module of this process."""
    return load_module(str(READER))


def test_it_has_less_than_a_hundred_lines_and_imports_the_standard_library_and_numpy() -> None:
    text = READER.read_text()
    assert len(text.splitlines()) < 100
    imported = set()
    for statement in ast.walk(ast.parse(text)):
        if isinstance(statement, ast.Import):
            imported |= {name.name.partition(".")[0] for name in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            imported.add(str(statement.module).partition(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy"}


def test_it_reads_every_file_where_there_is_neither_torch_nor_lastgood(
    unpacked: dict[str, Fixture], tmp_path: Path, count_cases: CountCases
) -> None:
    packages = Path(numpy.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):
        if (packages / name).exists():
            (tmp_path / name).symlink_to(packages / name)
    paths = [str(old.path) for old in unpacked.values()]
    done = subprocess.run(
        [sys.executable, "-I", "-S", ALONE, tmp_path, READER, *paths], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["known"] == []
    for old in unpacked.values():
        described = found["described"][str(old.path)]
        for rank, expected in enumerate(old.expected):
            state = described[rank]["state"]
            state = values_of(state) if old.is_spread else state
            assert state == without_torch(expected), f"{old.name}, rank {rank}"
            assert described[rank]["keys"] == first_keys(expected), f"{old.name}, rank {rank}"
        assert len(described) == len(old.expected)
    count_cases("kept states read without lastgood and torch", sum(len(old.expected) for old in unpacked.values()))


def first_keys(description: Any) -> list[str]:
    """The key paths of tensors, each under the first of its keys."""
    paths: dict[int, str] = {}
    for path, found in tensors_in(description):
        paths.setdefault(id(found), path)
    return list(paths.values())


def test_as_a_command_it_prints_the_tensors(unpacked: dict[str, Fixture]) -> None:
    old = unpacked["rows"]
    done = subprocess.run([sys.executable, READER, old.path], capture_output=True, text=True, timeout=100, check=True)
    expected = [
        f"{rank} {path} {found['tensor']} {found['shape']}"
        for rank, description in enumerate(old.expected)
        for path, found in tensors_in(description)
    ]
    assert done.stdout.splitlines() == expected


@pytest.mark.filterwarnings("ignore")  # torch's about kinds of tensors that are new, or old
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(state=states())
def test_it_reads_whatever_state_is_saved_today(reader: Any, tmp_path: Path, state: Any) -> None:
    described = json.loads(json.dumps(_AnyDescriber().describe(state)))
    # NumPy has no arithmetic for them.
    assume(not any(found["tensor"] == "complex32" and "c" in found["flags"] for _, found in tensors_in(described)))
    path = tmp_path / "state.pt"
    try:
        lastgood.save(state, path)
    except lastgood.UnsupportedStateError:
        return
    found = json.loads(json.dumps(describe_all(reader, str(path))[0]["state"]))
    assert _comparable(found) == _comparable(without_torch(described))


class _AnyDescriber(TorchDescriber):
    def describe_other(self, value: Any) -> Any:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        try:
            return {"opaque": kind} if value is torch.quint8 else super().describe_other(value)
        except TypeError:
            return {"opaque": kind}


def _comparable(description: Any) -> Any:
    """Without what is not the same in torch: how memory is shared, and bytes of a bool other than 0 and 1."""
    if isinstance(description, list):
        return [_comparable(item) for item in description]
    if not isinstance(description, dict):
        return description
    left_out = {"memory", "sha256"} if description.get("tensor") == "bool" else {"memory"}
    return {name: _comparable(item) for name, item in description.items() if name not in left_out}


# What it refuses


def test_it_refuses_a_file_in_whose_records_any_byte_has_changed(
    unpacked: dict[str, Fixture], reader: Any, rng_seed: int, tmp_path: Path, count_cases: CountCases
) -> None:
    chance, path = random.Random(rng_seed), tmp_path / "file.pt"
    whole = unpacked["bare"].path.read_bytes()
    with archive_of(unpacked["bare"].path) as archive:
        offsets = [at for record in archive.layout.records for at in range(record.data_offset, record.data_end)]
    for at in offsets:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DAMAGE):
            reader.read(path)
    path.write_bytes(whole)
    assert describe_all(reader, str(path))[0]["state"] == values_of(unpacked["bare"].expected[0]) | {"memory": [0, 0]}
    count_cases("flipped bits refused by the reader without lastgood", len(offsets))


@pytest.mark.parametrize("block", [0, 1, 2])
def test_it_compares_each_block_and_not_just_what_the_zip_says(
    unpacked: dict[str, Fixture], reader: Any, tmp_path: Path, block: int
) -> None:
    source, made = unpacked["blocks"].path, tmp_path / "made.pt"
    for change in (0, 1):
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(made, "w") as new:
            for name in old.namelist():
                data = bytearray(old.read(name))
                if name == "archive/data/0":
                    data[block * 2**20 + 70] ^= change
                new.writestr(name, bytes(data))
        with zipfile.ZipFile(made) as new:
            assert new.testzip() is None
        if change:
            with pytest.raises(ValueError, match="damaged"):
                reader.read(made)
        else:
            reader.read(made)


def test_it_refuses_a_damaged_manifest(
    unpacked: dict[str, Fixture], reader: Any, rng_seed: int, tmp_path: Path, count_cases: CountCases
) -> None:
    chance, directory = random.Random(rng_seed), tmp_path / "copy"
    shutil.copytree(unpacked["barrier"].path, directory)
    manifest = directory / "manifest.json"
    whole = manifest.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << chance.randrange(8)
        manifest.write_bytes(damaged)
        with pytest.raises(DAMAGE):
            reader.read(directory)
    manifest.write_bytes(whole)
    assert len(reader.read(directory)) == 2
    count_cases("flipped bits refused by the reader without lastgood", len(whole))


@pytest.mark.parametrize("name", ["barrier", "rows", "grid", "thirds", "replicas"])
def test_it_refuses_what_was_not_committed_as_it_is(
    unpacked: dict[str, Fixture], reader: Any, tmp_path: Path, name: str
) -> None:
    source = unpacked[name].path

    def copied(directory: str) -> Path:
        shutil.copytree(source, tmp_path / directory)
        return tmp_path / directory

    one_file = source / "checkpoint_1.pt"
    with pytest.raises(ValueError, match="never committed"):
        reader.read(one_file)
    without_manifest = copied("without manifest")
    (without_manifest / "manifest.json").unlink()
    with pytest.raises(ValueError, match="never committed"):
        reader.read(without_manifest)
    without_file = copied("without file")
    (without_file / "checkpoint_1.pt").unlink()
    with pytest.raises(FileNotFoundError):
        reader.read(without_file)
    exchanged = copied("exchanged")
    os.rename(exchanged / "checkpoint_1.pt", exchanged / "other")
    os.rename(exchanged / "checkpoint_0.pt", exchanged / "checkpoint_1.pt")
    os.rename(exchanged / "other", exchanged / "checkpoint_0.pt")
    with pytest.raises(ValueError, match="never committed"):
        reader.read(exchanged)


def test_it_refuses_files_of_another_save(unpacked: dict[str, Fixture], reader: Any, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(unpacked["run/step-2"].path, mixed)
    shutil.copy(unpacked["run/step-4"].path / "checkpoint_1.pt", mixed / "checkpoint_1.pt")
    with pytest.raises(ValueError, match="never committed"):
        reader.read(mixed)


def test_it_refuses_tensors_of_which_files_hold_parts_twice_or_not_at_all(reader: Any, tmp_path: Path) -> None:
    state = model_state()
    manifest = save_spread(tmp_path, state, row(2), USUAL)
    assert reader.read(tmp_path)[1][2]["model"]["w"].tolist() == state["model"]["w"].tolist()
    replace_file(tmp_path, manifest, 1, spread(state, row(2), USUAL, rank=0))
    with pytest.raises(ValueError, match="damaged"):
        reader.read(tmp_path)


@pytest.mark.parametrize(
    "change", [{"dtype": "int32"}, {"shape": (7, 30)}, {"placements": ("S(1)",)}, {"name": "v"}], ids=list
)
def test_it_refuses_a_manifest_that_describes_other_tensors(reader: Any, tmp_path: Path, change: Any) -> None:
    manifest = save_spread(tmp_path, model_state(), row(2), {"model.w": ["S(0)"]})
    assert len(reader.read(tmp_path)) == 2
    tensors = [msgspec.structs.replace(tensor, **change) for tensor in manifest.tensors]
    publish(tmp_path, msgspec.structs.replace(manifest, tensors=tensors))
    with pytest.raises(ValueError, match="damaged"):
        reader.read(tmp_path)
