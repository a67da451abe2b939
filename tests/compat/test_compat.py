"""Files of every version of the format, this one included, load as what was saved, by each way of loading."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.commands import run_here
from tests.compat.describing import tensors_in, values_of
from tests.compat.fixtures import CHECKPOINTS, EXPECTED, Fixture, directory_of_version, names_of, unpack
from tests.compat.saving_ranks import STEPS
from tests.compat.torch_describing import TorchDescriber, describe
from tests.manager.runs import manager_of
from tests.manager.sharded import Position, new_training
from tests.unit.loading.files import archive_of

import lastgood
from lastgood._contents import verify_checkpoint
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.format.epoch import read_epoch, take_epoch
from lastgood.format.manifest import MANIFEST_VERSION
from lastgood.format.spec import FORMAT_VERSION
from lastgood.manager.catalog import RUN_LOG_NAME, read_catalog
from lastgood.manager.run_log import RunRecord, SaveRecord, read_run_log
from lastgood.storage.local import LocalStorage
from lastgood.types import RankInfo

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor"),
]

VERSIONS = range(1, FORMAT_VERSION + 1)
PRESENT = [version for version in VERSIONS if directory_of_version(version).is_dir()]
CASES = [(version, name) for version in PRESENT for name in names_of(version)]
TOGETHER = [
    (version, name)
    for version, name in CASES
    if (directory_of_version(version) / CHECKPOINTS / name / "manifest.json").exists()
]
SINGLE = {"values", "tensors", "dtypes", "opaque", "bare", "blocks"}
SEVERAL = {
    "alone",
    "independent",
    "barrier",
    "rows",
    "grid",
    "thirds",
    "replicas",
    *(f"run/step-{step}" for step in STEPS),
}

OWN = ("position", "random", "model.own")
"""What ranks do not have alike, where they have it."""

CountCases = Callable[[str, int], None]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Fixture]:
    """Copies of all checkpoints."""
    root = tmp_path_factory.mktemp("unpacked")
    return {
        (version, name): fixture
        for version in PRESENT
        for name, fixture in unpack(version, root / f"version-{version}").items()
    }


@pytest.fixture(params=CASES, ids=lambda case: f"version-{case[0]}-{case[1]}")
def old(request: pytest.FixtureRequest, unpacked: dict[tuple[int, str], Fixture]) -> Fixture:
    """One checkpoint after the other."""
    return unpacked[request.param]


def read(old: Fixture, rank: int, target: Any = None, **options: Any) -> Any:
    """What a rank of as many as saved reads."""
    if old.is_file:
        return lastgood.load(old.path, target, strict=target is not None, **options)
    reader = CheckpointReader(RankInfo(rank, len(old.expected)))
    found, missing = reader.read(str(old.path), target, **options)
    assert missing == []
    return found


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(describe(value)))


def bits_in(description: Any) -> list[tuple[str, str, list[int], str]]:
    return [(path, found["tensor"], found["shape"], found["sha256"]) for path, found in tensors_in(description)]


# That there are files of each version


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_of_the_format_has_files_of_every_kind(version: int) -> None:
    directory = directory_of_version(version)
    assert directory.is_dir(), (
        f"there are no files of format version {version}: run tests/compat/make_fixtures.py with the lastgood that "
        "writes it, and check in what it makes"
    )
    assert {*names_of(version)} >= SINGLE | SEVERAL
    assert sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) < 300 * 1024


def test_the_files_are_of_the_versions_that_their_directories_name(
    unpacked: dict[tuple[int, str], Fixture],
) -> None:
    manifests = set()
    for (version, _), old in unpacked.items():
        for path in [old.path] if old.is_file else old.path.glob("*.pt"):
            with archive_of(path) as archive:
                assert (archive.trailer.format_version, archive.index.format_version) == (version, version), path
        if old.manifest is not None:
            manifests.add(old.manifest["manifest_version"])
    assert manifests == {*range(1, MANIFEST_VERSION + 1)}


# That they load


def test_a_whole_load_gives_what_was_saved(old: Fixture, count_cases: CountCases) -> None:
    for rank, expected in enumerate(old.expected):
        if old.is_spread:
            for options in ({}, {"verify_whole": True}):
                assert values_of(as_json(read(old, rank, **options))) == expected, f"rank {rank}, {options}"
        else:
            for options in ({}, {"mmap": True}, {"verify_first": True}):
                assert as_json(read(old, rank, **options)) == expected, f"rank {rank}, {options}"
    count_cases("kept states loaded as they were saved", len(old.expected))


def test_each_key_loads_by_itself_as_it_does_in_the_whole(old: Fixture) -> None:
    for rank in range(len(old.expected)):
        whole = read(old, rank)
        if isinstance(whole, dict):
            for key, value in whole.items():
                found = read(old, rank, {key: None})
                assert values_of(as_json(found)) == values_of(as_json({key: value})), f"rank {rank}, {key!r}"


def test_a_load_in_place_fills_the_tensors_that_are_there(old: Fixture) -> None:
    for rank, expected in enumerate(old.expected):
        blank = _Blank()
        target = blank.like(read(old, rank))
        if not isinstance(target, dict):
            continue
        before = [(tensor, tensor.data_ptr()) for tensor in blank.tensors]
        assert read(old, rank, target) is target
        assert bits_in(describe(target)) == bits_in(expected), f"rank {rank}"
        assert {id(tensor) for tensor in blank.tensors} == {id(tensor) for tensor in _tensors_of(target, set())}
        assert all(tensor.data_ptr() == address for tensor, address in before)


class _Blank:
    """Makes targets: tensors of zeros where tensors were saved, nothing where anything else was."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}
        self.tensors: list[torch.Tensor] = []

    def like(self, value: Any) -> Any:
        """The same structure; what is one object there is one here."""
        if TorchDescriber().is_plain_tensor(value):
            if id(value) not in self._made:
                self._made[id(value)] = torch.zeros(value.shape, dtype=value.dtype)
                self.tensors.append(self._made[id(value)])
            return self._made[id(value)]
        if type(value).__name__ in ("dict", "OrderedDict"):
            return {key: self.like(item) for key, item in value.items()}
        holds_tensors = type(value) in (list, tuple) and any(True for _ in tensors_in(as_json(value)))
        return type(value)(map(self.like, value)) if holds_tensors else None


def _tensors_of(value: Any, seen: set[int]) -> list[torch.Tensor]:
    """The tensors that targets are filled in place with."""
    if TorchDescriber().is_plain_tensor(value):
        return [value]
    if id(value) in seen or not isinstance(value, (dict, list, tuple)):
        return []
    seen.add(id(value))
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in _tensors_of(item, seen)]


@pytest.mark.parametrize("case", TOGETHER, ids=str)
def test_any_number_of_ranks_reads_what_some_committed_together(
    unpacked: dict[tuple[int, str], Fixture], case: tuple[int, str]
) -> None:
    old = unpacked[case]
    saved = len(old.expected)
    for rank, world_size in ((0, 1), (0, saved + 1), (saved, saved + 1)):
        reader = CheckpointReader(RankInfo(rank, world_size))
        found, missing = reader.read(str(old.path), per_rank=dict.fromkeys(OWN, "modulo"))
        assert missing == []
        assert values_of(as_json(found)) == values_of(old.expected[rank % saved]), f"rank {rank} of {world_size}"


def test_torch_reads_every_file_by_itself(old: Fixture) -> None:
    files = [old.path] if old.is_file else sorted(old.path.glob("*.pt"))
    assert len(files) == len(old.expected)
    for file, expected in zip(files, old.expected, strict=True):
        found = torch.load(file, weights_only=True)
        if not old.is_spread:
            assert as_json(found) == expected
        else:  # where a tensor is spread, its parts in this file stand
            assert as_json(found["position"]) == describe_item(expected, "position")


def describe_item(description: Any, key: str) -> Any:
    """The description of what stands under a key."""
    return dict(map(tuple, description["dict"]))[f"str {key!r}"]


def test_every_byte_is_verified(old: Fixture) -> None:
    report = verify_checkpoint(str(old.path))
    assert report.problems == ()
    assert report.files == len(old.expected)
    assert run_here("verify", str(old.path)).returncode == 0


def test_inspect_shows_each_tensor(old: Fixture) -> None:
    done = run_here("inspect", str(old.path), "--json")
    assert done.returncode == 0
    shown = [entry for entry in json.loads(done.stdout)["keys"] if entry.get("shape") is not None]
    expected = [(path, found) for ranks in old.expected for path, found in tensors_in(ranks)]
    assert {(entry["path"], entry["dtype"], tuple(entry["shape"])) for entry in shown} == {
        (path, found["tensor"], tuple(found["shape"])) for path, found in expected
    }


# Runs


@pytest.fixture(params=PRESENT)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, Fixture]]:
    """A copy of the root of a manager's run, what is to be found there, and its checkpoints."""
    fixtures = unpack(request.param, tmp_path / "unpacked")
    known = json.loads((directory_of_version(request.param) / EXPECTED / "run.json").read_text())
    return tmp_path / "unpacked" / "run", known, fixtures


def test_a_run_goes_on(run: tuple[Path, dict[str, Any], dict[str, Fixture]]) -> None:
    root, known, fixtures = run
    model, optimizer = new_training(50, is_sharded=False)
    state = {"model": model, "optimizer": optimizer, "position": Position()}
    last = known["steps"][-1]
    with manager_of(root) as manager:
        assert manager.steps() == known["steps"]
        assert manager.restore(state, per_rank={"position": "first"}) == last
        assert manager.passed_over == ()
        manager.save(last + 1, state).result(0)
        assert manager.steps() == [*known["steps"], last + 1]
    expected = fixtures[f"run/step-{last}"].expected[0]
    assert bits_in(describe(model.state_dict())) == bits_in(describe_item(expected, "model"))
    assert bits_in(describe(optimizer.state_dict())) == bits_in(describe_item(expected, "optimizer"))
    assert describe(state["position"].state_dict()) == describe_item(expected, "position")


def test_what_stands_beside_the_steps_of_a_run_is_read(
    run: tuple[Path, dict[str, Any], dict[str, Fixture]],
) -> None:
    root, known, _ = run
    storage = LocalStorage()
    epoch = read_epoch(storage, str(root))
    assert epoch is not None
    assert (epoch.epoch, epoch.job) == (known["epoch"], known["job"])
    assert take_epoch(storage, str(root), "a later job", 10) == known["epoch"] + 1
    entries = read_catalog(storage, str(root)).committed
    assert [(entry.step, entry.metrics) for entry in entries] == [(n, {"loss": 1 / n}) for n in known["steps"]]
    records = read_run_log(storage, str(root))
    assert len(records) == len((root / RUN_LOG_NAME).read_text().splitlines())
    assert [record.world_size for record in records if isinstance(record, RunRecord)] == [2]
    saves = [record for record in records if isinstance(record, SaveRecord)]
    assert [(save.step, save.outcome, save.metrics) for save in saves] == [
        (n, "durable", {"loss": 1 / n}) for n in known["steps"]
    ]
