"""Files that torch.save wrote: whole, partly, in place, from every format that torch.load still reads."""

import io
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from tests.unit.capture.comparing import assert_same
from tests.unit.capture.states import states
from tests.unit.loading.files import flip, verify, zip_of

import lastgood
from lastgood.errors import CorruptCheckpointError

FORMATS: dict[str, dict[str, Any]] = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}

MAP_LOCATIONS: dict[str, Any] = {
    "none": None,
    "cpu": "cpu",
    "device": torch.device("cpu"),
    "meta": "meta",
    "meta_device": torch.device("meta"),
    "dict": {"cpu": "meta"},
    "other_dict": {"cuda:0": "cpu"},
    "function": lambda storage, location: storage,
    "function_that_declines": lambda storage, location: None,
    "function_to_meta": lambda storage, location: torch.UntypedStorage(storage.nbytes(), device="meta"),
}


PYTHON_2_PICKLE = b"\x80\x02ccollections\nOrderedDict\n](](U\x01aK\x01e](U\x01bK\x02ee\x85R."
"""What Python 2 made of an OrderedDict: a list of lists, and byte strings for names."""


def state() -> dict[str, Any]:
    base = torch.arange(24.0).reshape(4, 6)
    weight = torch.nn.Parameter(torch.ones(3, 3))
    return {
        "plain": torch.arange(7),
        "transposed": base.t(),
        "strided": base[::2, 1::2],
        "embed": weight,
        "head": weight,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(5.0),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j]),
        "tuple": (1, torch.ones(2), "x"),
        "list": [torch.zeros(2), {"deep": 2.5}],
        "ordered": OrderedDict(a=1),
        3: "number",
        "bytes": b"\x00\xff",
        "bytearray": bytearray(b"ab"),
        "set": {1, 2},
        "counter": Counter("aab"),
        "size": torch.Size([2, 3]),
        "size with a number below zero": torch.Size([-1, 3]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "large": 2**70,
        "complex_number": 1j,
    }


def without_storages(value: Any) -> Any:
    """The value with meta tensors as what they are made of, as two of them never compare equal."""
    if isinstance(value, torch.Tensor):
        return (type(value), value.device.type, value.dtype, tuple(value.shape), value.stride(), value.requires_grad)
    if isinstance(value, dict):
        return {key: without_storages(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_storages(item) for item in value)
    return value


@pytest.mark.parametrize("name", list(MAP_LOCATIONS))
@pytest.mark.parametrize("writer", ["zip", "legacy", "lastgood"])
def test_map_location_means_what_it_means_for_torch_load(tmp_path: Path, writer: str, name: str) -> None:
    file = tmp_path / "state.pt"
    if writer == "lastgood":
        lastgood.save(state(), file)
    else:
        torch.save(state(), file, **FORMATS[writer])
    if writer == "legacy" and name == "function_to_meta":
        pytest.skip("torch.load cannot do this")
    expected = torch.load(file, map_location=MAP_LOCATIONS[name])
    found = lastgood.load(file, map_location=MAP_LOCATIONS[name])
    assert without_storages(found) == without_storages(expected)
    if found["plain"].device.type == "cpu":
        assert_same(found, expected)
    made = lastgood.load(file, dict.fromkeys(state()), map_location=MAP_LOCATIONS[name])
    assert without_storages(made) == without_storages(expected)


@pytest.mark.parametrize("writer", ["zip", "lastgood"])
def test_a_map_location_function_sees_storages_and_their_tags(tmp_path: Path, writer: str) -> None:
    file = tmp_path / "state.pt"
    (torch.save if writer == "zip" else lastgood.save)({"a": torch.ones(3)}, file)
    for target in (None, {"a": None}):
        calls: list[Any] = []

        def note(storage: Any, location: str, calls: list[Any] = calls) -> None:
            calls.append((type(storage), location))

        lastgood.load(file, target, map_location=note)
        assert calls == [(torch.UntypedStorage, "cpu")]


def test_what_a_map_location_function_raises_comes_through(tmp_path: Path) -> None:
    lastgood.save({"a": torch.ones(3)}, tmp_path / "ours")
    torch.save({"a": torch.ones(3)}, tmp_path / "theirs")

    def refuse(storage: Any, location: str) -> Any:
        raise ZeroDivisionError("mine")

    def confuse(storage: Any, location: str) -> Any:
        raise ValueError("mine")

    for name in ("ours", "theirs"):
        for target in (None, {"a": None}):
            with pytest.raises(ZeroDivisionError, match="mine"):
                lastgood.load(tmp_path / name, target, map_location=refuse)
    with pytest.raises(ValueError, match=r"^mine$"):
        lastgood.load(tmp_path / "ours", map_location=confuse)


def test_a_device_that_is_not_there_is_reported_before_anything_is_changed(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    file = tmp_path / "state.pt"
    lastgood.save({"given": torch.ones(3), "made": torch.ones(3)}, file)
    given_tensor = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"torch\.cuda.is_available"):
        lastgood.load(file, {"given": given_tensor, "made": None}, map_location="cuda:0")
    assert torch.equal(given_tensor, torch.zeros(3))


@pytest.mark.parametrize("writer", list(FORMATS))
def test_the_whole_file_and_parts_of_it(tmp_path: Path, writer: str) -> None:
    file = tmp_path / "state.pt"
    torch.save(state(), file, **FORMATS[writer])
    expected = torch.load(file)
    assert_same(lastgood.load(file), expected)
    assert_same(lastgood.load(file, dict.fromkeys(expected)), expected)
    assert_same(lastgood.load(file, verify=False), expected)
    assert_same(lastgood.load(file, verify_first=True), expected)
    made = lastgood.load(file, {"embed": None, "head": None})
    assert made["embed"] is made["head"]
    assert type(made["embed"]) is torch.nn.Parameter


@pytest.mark.parametrize("writer", list(FORMATS))
def test_hazard_19_in_place_from_views_and_transposed_tensors(tmp_path: Path, writer: str) -> None:
    file = tmp_path / "state.pt"
    torch.save(state(), file, **FORMATS[writer])
    given_tensors: dict[str, Any] = {
        "plain": torch.zeros(7, dtype=torch.int64),
        "transposed": torch.zeros(6, 4),
        "strided": torch.zeros(3, 2).t(),
        "embed": torch.nn.Parameter(torch.zeros(3, 3)),
        "empty": torch.zeros(0, 3),
        "scalar": torch.zeros(()),
        "half": torch.zeros(6, dtype=torch.bfloat16)[::2],
    }
    target: dict[str, Any] = {**given_tensors, "tuple": (None, torch.zeros(2), None), "gone": {"x": 1}}
    version = given_tensors["embed"]._version
    with pytest.raises(RuntimeError, match=r"missing keys: \['gone'\]"):
        lastgood.load(file, target, strict=True)
    for name, tensor in given_tensors.items():
        assert target[name] is tensor
        assert torch.equal(tensor.detach(), state()[name].detach()), name
    assert given_tensors["embed"].requires_grad
    assert given_tensors["embed"]._version > version
    assert type(target["tuple"]) is tuple
    assert torch.equal(target["tuple"][1], torch.ones(2))


def test_a_target_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    torch.save({"a": torch.ones(3), "b": torch.ones(4)}, file)
    good = torch.zeros(3)
    with pytest.raises(RuntimeError, match="'b'"):
        lastgood.load(file, {"a": good, "b": torch.zeros(5)})
    assert torch.equal(good, torch.zeros(3))


@pytest.mark.parametrize("names", [["a"], ["a", "sparse"]], ids=str)
@pytest.mark.parametrize("writer", list(FORMATS))
def test_parts_keep_nothing_of_the_file(tmp_path: Path, writer: str, names: list[str]) -> None:
    """What was loaded stays what it is when the file is written over in place, and changes do not reach the file."""
    file = tmp_path / "state.pt"
    torch.save({"a": torch.ones(3), "sparse": torch.eye(2).to_sparse()}, file, **FORMATS[writer])
    before = file.read_bytes()
    changed = lastgood.load(file, dict.fromkeys(names))
    changed["a"].add_(1)
    assert file.read_bytes() == before
    made = lastgood.load(file, dict.fromkeys(names))
    with file.open("r+b") as handle:
        handle.write(bytes(len(before)))
    assert torch.equal(made["a"], torch.ones(3))
    if "sparse" in made:
        assert torch.equal(made["sparse"].to_dense(), torch.eye(2))


@pytest.mark.parametrize("writer", ["zip", "lastgood"])
def test_mmap_is_lazy_and_private(tmp_path: Path, writer: str) -> None:
    file = tmp_path / "state.pt"
    original = {"w": torch.arange(600_000.0), "n": 3}
    (torch.save if writer == "zip" else lastgood.save)(original, file)
    before = file.read_bytes()
    mapped = lastgood.load(file, mmap=True)
    assert_same(mapped, torch.load(file, mmap=True))
    mapped["w"].zero_()
    assert file.read_bytes() == before
    # Lazy: damage to the data is nobody's business until it is read.
    flip(file, before.index(original["w"][1000:1010].numpy().tobytes()))
    assert lastgood.load(file, mmap=True)["n"] == 3
    with pytest.raises(CorruptCheckpointError):
        lastgood.load(file)


def test_files_without_checksums_say_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(5.0)}, file)
    finally:
        torch.serialization.set_crc32_options(True)
    for target in (None, {"a": torch.zeros(5)}):
        with pytest.raises(CorruptCheckpointError, match=r"set_crc32_options.*verify=False"):
            lastgood.load(file, target)
    assert torch.equal(lastgood.load(file, verify=False)["a"], torch.arange(5.0))
    assert torch.equal(lastgood.load(file, {"a": torch.zeros(5)}, verify=False)["a"], torch.arange(5.0))


def test_a_directory_of_plain_torch_files(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"rank": rank, "w": torch.full((3,), float(rank))}, tmp_path / f"checkpoint_{rank}.pt")
    for rank in range(2):
        reader = lastgood.CheckpointReader(lastgood.RankInfo(rank, 2))
        loaded, missing = reader.read(str(tmp_path))
        assert (loaded["rank"], missing) == (rank, [])
        target = {"w": torch.zeros(3), "more": None}
        loaded, missing = reader.read(str(tmp_path), target)
        assert loaded is target
        assert missing == ["more"]
        assert torch.equal(target["w"], torch.full((3,), float(rank)))


def test_verification_of_torch_files(tmp_path: Path) -> None:
    for writer, options in FORMATS.items():
        torch.save(state(), tmp_path / writer, **options)
        verify(tmp_path / writer)
    size = (tmp_path / "zip").stat().st_size
    flip(tmp_path / "zip", size // 2)
    with pytest.raises(CorruptCheckpointError):
        verify(tmp_path / "zip")


def test_what_python_2_wrote(tmp_path: Path) -> None:
    file = zip_of(tmp_path / "old.pt", PYTHON_2_PICKLE)
    assert torch.load(file) == OrderedDict(a=1, b=2)
    assert lastgood.load(file) == OrderedDict(a=1, b=2)


class Custom:
    """A class of a user's, to be allowed by add_safe_globals."""

    def __init__(self, value: int) -> None:
        self.value = value


def with_custom_classes() -> dict[str, Callable[[], Any]]:
    return {
        "instance": lambda: Custom(5),
        "linear": lambda: torch.nn.Linear(2, 2),
        "builtin_dict": lambda: {"a": range(3)},
    }


@pytest.mark.parametrize("name", list(with_custom_classes()))
@pytest.mark.parametrize("writer", list(FORMATS))
def test_what_the_user_allows_loads(tmp_path: Path, writer: str, name: str) -> None:
    file = tmp_path / "state.pt"
    if (writer, name) == ("legacy", "linear"):
        pytest.skip("torch's safe loader takes no modules from the legacy format")
    torch.save({"x": with_custom_classes()[name](), "w": torch.ones(2)}, file, **FORMATS[writer])
    with pytest.raises(lastgood.UnsafeCheckpointError):
        lastgood.load(file)
    allowed: list[Any] = [Custom, torch.nn.Linear, range, set]
    with torch.serialization.safe_globals(allowed):
        found = lastgood.load(file, {"x": None, "w": torch.zeros(2)})
        assert type(found["x"]) is type(with_custom_classes()[name]())
        assert torch.equal(found["w"], torch.ones(2))
        assert type(lastgood.load(file)["x"]) is type(found["x"])


@settings(max_examples=60)
@given(states())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nothing_that_torch_writes_and_reads_is_refused(state: Any) -> None:
    """The judge of pickles knows everything that torch.save writes and torch.load takes."""
    with tempfile.TemporaryDirectory() as directory:
        for number, options in enumerate(FORMATS.values()):
            file = Path(directory) / f"{number}.pt"
            try:
                torch.save(state, file, **options)
                torch.load(io.BytesIO(file.read_bytes()))
            except Exception:  # torch's own limits are its own affair
                continue
            lastgood.load(file)


class Subclassed(torch.Tensor):
    """A tensor class of a user's."""


def odd_values() -> dict[str, Callable[[], Any]]:
    def with_attribute() -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.ones(2))
        parameter.note = "kept"  # type: ignore[attr-defined]
        return parameter

    def channels() -> torch.Tensor:
        scales, points = torch.tensor([0.1, 0.2]), torch.tensor([0, 1])
        return torch.quantize_per_channel(torch.ones(2, 3), scales, points, 0, torch.quint8)

    return {
        "quantized": lambda: torch.quantize_per_tensor(torch.arange(6.0).reshape(2, 3), 0.5, 3, torch.qint8).t(),
        "quantized_channels": channels,
        "coo": lambda: torch.eye(3).to_sparse(),
        "coo_scalar": lambda: torch.tensor(3.0).to_sparse(),
        "csr": lambda: torch.eye(3).to_sparse_csr(),
        "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "parameter_with_attribute": with_attribute,
        "subclass": lambda: torch.ones(3).as_subclass(Subclassed),
        "storage": lambda: torch.ones(3).untyped_storage(),
        "typed_storage": lambda: torch.ones(3).storage(),
        "meta": lambda: torch.ones(3, device="meta"),
        "layout": lambda: torch.sparse_csr,
        "expanded": lambda: torch.ones(1).expand(1000),
        "resized": lambda: torch.ones(5)[:0],
        "half_complex": lambda: torch.ones(2, dtype=torch.complex32),
        "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
        "many_dimensions": lambda: torch.ones((1,) * 70),
    }


def plain(tensor: torch.Tensor) -> torch.Tensor:
    dense = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
    return dense.to(torch.complex64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(odd_values()))
def test_everything_that_torch_has_a_way_to_write(tmp_path: Path, name: str) -> None:
    file = tmp_path / "state.pt"
    with torch.serialization.safe_globals([Subclassed]):
        for options in FORMATS.values():
            if options and name == "nested":
                continue  # torch itself reads the sizes of these from memory that it never filled
            torch.save({"x": odd_values()[name](), "w": torch.ones(2)}, file, **options)
            try:
                expected = torch.load(file)["x"]
            except Exception:  # the old format has no way back for all of them
                assert options
                continue
            found = lastgood.load(file)["x"]
            assert type(found) is type(expected)
            if isinstance(found, torch.Tensor):
                assert (found.layout, found.dtype) == (expected.layout, expected.dtype)
            if name == "nested":
                assert all(map(torch.equal, found.unbind(), expected.unbind()))
            elif isinstance(found, torch.Tensor) and name != "meta":
                assert found.shape == expected.shape
                assert torch.equal(plain(found), plain(expected))
            assert torch.equal(lastgood.load(file, {"w": torch.zeros(2)})["w"], torch.ones(2))
            assert type(lastgood.load(file, {"x": None})["x"]) is type(expected)


def test_a_container_inside_itself(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    cycle: list[Any] = [1]
    cycle.append(cycle)
    torch.save({"x": cycle, "w": torch.ones(2)}, file)
    found = lastgood.load(file)["x"]
    assert found[1] is found
    assert torch.equal(lastgood.load(file, {"w": None})["w"], torch.ones(2))
