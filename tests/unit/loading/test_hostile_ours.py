"""Files made to hurt whoever loads them, in our own format, every checksum right: refused all the same."""

import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.workers import Worker
from tests.unit.loading.files import archive_of, call_pickle, flip, forge, opcodes, verify
from tests.unit.loading.test_hostile_foreign import SECONDS, SPARE, bombs, load_in_little_memory

import lastgood
from lastgood._loading import file as loading
from lastgood.errors import CorruptCheckpointError, LastgoodError, UnsafeCheckpointError
from lastgood.format.index import StorageEntry
from lastgood.format.nodes import (
    BytearrayNode,
    ComplexNode,
    DeviceNode,
    DictNode,
    DtypeNode,
    FloatNode,
    ListNode,
    MapNode,
    OpaqueNode,
    OrderedDictNode,
    ReferenceNode,
    SetNode,
    TensorNode,
    TextNode,
    TupleNode,
)

REFUSALS = (CorruptCheckpointError, UnsafeCheckpointError)
FLOATS = (StorageEntry(16, "float32", "cpu"), struct.pack("<4f", 1, 2, 3, 4))
LONGS = (StorageEntry(16, "int64", "cpu"), struct.pack("<2q", 1, 2))
BIG = 2**62


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    started = Worker()
    yield started
    started.kill()


def tensor(
    storage: int = 0,
    dtype: str = "float32",
    offset: int = 0,
    shape: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    flags: str = "",
) -> TensorNode:
    return TensorNode(storage, dtype, offset, shape, stride, flags)


def test_the_forger_makes_real_files(tmp_path: Path) -> None:
    file = forge(tmp_path / "f.pt", DictNode({"a": tensor(), "n": 3}), [FLOATS])
    verify(file)
    for loaded in (lastgood.load(file), torch.load(file), lastgood.load(file, {"a": torch.zeros(4), "n": None})):
        assert torch.equal(loaded["a"], torch.tensor([1.0, 2, 3, 4]))
        assert loaded["n"] == 3


def impossible() -> dict[str, Any]:
    """Values of the key ``a`` that no writer writes."""
    deep: Any = 1
    for _ in range(150):
        deep = ListNode([deep])
    return {
        "storage_out_of_range": tensor(storage=2),
        "offset_out_of_range": tensor(offset=1),
        "huge_offset": tensor(offset=BIG),
        "shape_out_of_range": tensor(shape=(5,)),
        "huge_shape": tensor(shape=(BIG,)),
        "stride_out_of_range": tensor(shape=(2,), stride=(4,)),
        "huge_stride": tensor(shape=(2,), stride=(BIG,)),
        "elements_overflow": tensor(shape=(BIG, BIG), stride=(0, 0)),
        "shape_beyond_64_bits": tensor(shape=(2**64,), stride=(0,)),
        "empty_shape_beyond_64_bits": tensor(shape=(0, 2**64), stride=(1, 1)),
        "empty_stride_beyond_64_bits": tensor(shape=(0,), stride=(2**64,)),
        "unknown_dtype": tensor(dtype="evil"),
        "other_dtype": tensor(dtype="int32"),
        "strides_missing": tensor(shape=(2, 2), stride=(2,)),
        "grad_of_integers": tensor(storage=1, dtype="int64", shape=(2,), flags="g"),
        "parameter_of_integers": tensor(storage=1, dtype="int64", shape=(2,), flags="pg"),
        "reference_forward": ListNode([ReferenceNode(5), tensor()]),
        "reference_to_nothing": ReferenceNode(BIG),
        "dtype_name": DtypeNode("evil"),
        "dtype_that_is_none": DtypeNode("load"),
        "dtype_with_lines": DtypeNode("float32\nctorch\nload"),
        "device_name": DeviceNode("evil", None),
        "device_with_colon": DeviceNode("cuda:0", 0),
        "negative_device": DeviceNode("cuda", -2),
        "float_size": FloatNode(b"123"),
        "complex_size": ComplexNode(b"12345678"),
        "text_bytes": TextNode(b"\xff\xfe"),
        "list_as_key": MapNode([(ListNode([]), 1)]),
        "bytearray_as_key": MapNode([(BytearrayNode(b""), 1)]),
        "dict_as_key": OrderedDictNode([(DictNode({}), 1)], {}),
        "tuple_of_lists_as_key": MapNode([(TupleNode([1, ListNode([])]), 1)]),
        "list_in_set": SetNode([ListNode([])]),
        "opaque_beyond_the_pickle": OpaqueNode(0, BIG, 0, (), "x"),
        "opaque_beyond_the_end": OpaqueNode(BIG, 1, 0, (), "x"),
        "opaque_without_body": OpaqueNode(2, 0, 0, (), "x"),
        "opaque_with_huge_memo": OpaqueNode(2, 1, BIG, (), "x"),
        "opaque_on_no_storage": OpaqueNode(2, 1, 0, (9,), "x"),
        "nested_too_deep": deep,
    }


def attempts(file: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "whole", lambda: lastgood.load(file)
    yield "verify", lambda: verify(file)
    yield "part", lambda: lastgood.load(file, {"a": None})
    yield "in place", lambda: lastgood.load(file, {"a": torch.zeros(4)})
    yield "unverified", lambda: lastgood.load(file, verify=False)
    yield "mapped", lambda: lastgood.load(file, mmap=True)
    yield "meta", lambda: lastgood.load(file, map_location="meta")


@pytest.mark.parametrize("name", list(impossible()))
def test_an_index_that_no_writer_wrote(tmp_path: Path, name: str) -> None:
    file = forge(tmp_path / "f.pt", DictNode({"a": impossible()[name]}), [FLOATS, LONGS])
    for how, attempt in attempts(file):
        if (how, name) == ("verify", "opaque_without_body"):
            continue  # bytes are checked there; what only the pickle describes, when it is loaded
        with pytest.raises((*REFUSALS, lastgood.TargetMismatchError)) as caught:
            attempt()
        if how != "in place":
            assert isinstance(caught.value, REFUSALS), how
        assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "node",
    [
        tensor(shape=(2**40,), stride=(0,)),
        tensor(shape=(0, BIG), stride=(1, 1)),
        tensor(shape=(0, 2), stride=(BIG, BIG)),
    ],
    ids=["expanded", "empty", "empty_strides"],
)
def test_shapes_that_are_large_and_take_no_memory(tmp_path: Path, worker: Worker, node: TensorNode) -> None:
    """torch can have such tensors: they may load, but not cost anything."""
    file = forge(tmp_path / "f.pt", DictNode({"a": node}), [FLOATS])
    for target in (None, {"a": None}):
        outcome, message, memory, seconds = worker.call(load_in_little_memory, str(file), target)
        assert outcome in ("loaded", "CorruptCheckpointError"), message
        assert memory < SPARE
        assert seconds < SECONDS


def test_the_second_of_two_values_fails_and_targets_say_so(tmp_path: Path) -> None:
    """What is found only after targets were filled lists them."""
    root = DictNode({"a": tensor(), "bad": tensor(storage=1, dtype="int64", shape=(2,), flags="g")})
    file = forge(tmp_path / "f.pt", root, [FLOATS, LONGS])
    with pytest.raises(CorruptCheckpointError) as caught:
        lastgood.load(file, {"a": torch.zeros(4), "bad": None})
    assert caught.value.undefined_targets == ("a",)


def hostile_json() -> dict[str, Callable[[bytes], bytes]]:
    def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
        def edit(data: bytes) -> bytes:
            assert old in data
            return data.replace(old, new)

        return edit

    return {
        "nothing": lambda data: b"",
        "no_json": lambda data: b"\xff" * 100,
        "cut": lambda data: data[:-1],
        "more": lambda data: data + b" {}",
        "deep_arrays": lambda data: b"[" * 1_000_000,
        "deep_lists": replaced(b'["tensor"', b'["list",[' * 100_000 + b'["tensor"'),
        "deep_valid_lists": lambda data: data.replace(
            b'"n":3', b'"n":' + b'["list",[' * 20_000 + b"3" + b"]]" * 20_000
        ),
        "negative_offset": replaced(b'"float32",0', b'"float32",-1'),
        "negative_size": replaced(b"[4]", b"[-4]"),
        "fraction": replaced(b"[4]", b"[4.5]"),
        "infinite_number": replaced(b"[4]", b"[1e999]"),
        "huge_number": replaced(b"[4]", b"[" + b"9" * 100_000 + b"]"),
        "storage_size": replaced(b'"storages":[[16,', b'"storages":[[4611686018427387904,'),
        "storage_size_off_by_one": replaced(b'"storages":[[16,', b'"storages":[[17,'),
        "storage_too_small": replaced(b'"storages":[[16,', b'"storages":[[12,'),
        "no_storages": replaced(b'"storages":[', b'"storages":[],"other":['),
        "million_storages": replaced(b'"storages":[', b'"storages":[' + b'[0,"uint8","cpu"],' * 200_000),
        "unknown_member": replaced(b'"rank":0', b'"rank":0,"evil":1'),
        "missing_member": replaced(b'"rank":0,', b""),
        "negative_rank": replaced(b'"rank":0', b'"rank":-1'),
        "unknown_kind": replaced(b'["tensor"', b'["evil"'),
        "pickle_size": replaced(b'"pickle_size":', b'"pickle_size":4611686018427387'),
        "other_version": replaced(b'"format_version":1', b'"format_version":2'),
        "byte_order": replaced(b'"little"', b'"evil!!"'),
        "save_id": replaced(b"0123456789abcdef", b"fedcba9876543210"),
    }


@pytest.mark.parametrize("name", list(hostile_json()))
def test_hostile_json(tmp_path: Path, worker: Worker, name: str) -> None:
    file = forge(tmp_path / "f.pt", DictNode({"a": tensor(), "n": 3}), [FLOATS], edit_json=hostile_json()[name])
    for target in (None, {"a": None}):
        outcome, message, memory, seconds = worker.call(load_in_little_memory, str(file), target)
        assert outcome == "CorruptCheckpointError", (outcome, message)
        assert memory < file.stat().st_size + SPARE
        assert seconds < SECONDS
    with pytest.raises(CorruptCheckpointError):
        verify(file)


def test_a_storage_on_a_device_that_does_not_exist(tmp_path: Path) -> None:
    file = forge(tmp_path / "f.pt", DictNode({"a": tensor()}), [(StorageEntry(16, "float32", "evil"), FLOATS[1])])
    for target in (None, {"a": None}):
        with pytest.raises(CorruptCheckpointError, match="'evil'"):
            lastgood.load(file, target)
    assert torch.equal(lastgood.load(file, map_location="cpu")["a"], torch.tensor([1.0, 2, 3, 4]))


def test_many_references_take_no_time(tmp_path: Path, worker: Worker) -> None:
    """A list that holds the one below it twice, at sixty levels: few objects, 2**60 paths."""
    state: Any = [torch.ones(2)]
    for _ in range(60):
        state = [state, state]
    for name, writer in (("ours", lastgood.save), ("theirs", torch.save)):
        file = tmp_path / name
        writer({"a": state}, file)
        for target in (None, {"a": None}, {"a": []}):
            outcome, message, memory, seconds = worker.call(load_in_little_memory, str(file), target)
            assert outcome == "loaded", message
            assert memory < SPARE
            assert seconds < SECONDS


def test_a_container_inside_itself(tmp_path: Path) -> None:
    """No writer describes one in the index; it is either refused or made, but never followed for ever."""
    file = forge(tmp_path / "f.pt", DictNode({"a": ListNode([1, ReferenceNode(1)])}))
    for _, attempt in attempts(file):
        try:
            loaded = attempt()
        except LastgoodError:
            continue
        assert loaded is None or loaded["a"][1] is loaded["a"]


# The pickle


def test_hazard_21_code_in_our_own_file_is_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    body = b"cposix\nsystem\n" + opcodes((f"touch {canary}",)) + b"R"
    file = forge(tmp_path / "f.pt", DictNode({"a": OpaqueNode(0, len(body), 0, (), "x"), "n": 3}), bodies=body)
    for how, attempt in attempts(file):
        if how == "verify":
            attempt()  # every byte is as it was written; what loading it would mean is another question
        else:
            with pytest.raises(UnsafeCheckpointError, match=r"posix\.system"):
                attempt()
    assert lastgood.load(file, {"n": None}) == {"n": 3}
    assert not canary.exists()


def test_code_next_to_an_index_that_knows_nothing_of_it(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = call_pickle("posix system", opcodes((f"touch {canary}",)))
    file = forge(tmp_path / "f.pt", DictNode({"a": tensor()}), [FLOATS], pickled=evil)
    with pytest.raises(CorruptCheckpointError, match="describe different states"):
        lastgood.load(file)
    with pytest.raises(CorruptCheckpointError):
        verify(file)
    # Parts come from the index alone.
    assert torch.equal(lastgood.load(file, {"a": None})["a"], torch.tensor([1.0, 2, 3, 4]))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"K\x03", b"K\x04"), (b"X\x01\x00\x00\x00n", b"X\x01\x00\x00\x00m"), (b"K\x04\x85", b"K\x02\x85")],
    ids=["number", "key", "shape"],
)
def test_index_and_pickle_that_disagree(tmp_path: Path, old: bytes, new: bytes) -> None:
    root = DictNode({"a": tensor(), "n": 3})
    file = forge(tmp_path / "f.pt", root, [FLOATS])
    with archive_of(file) as archive:
        record = archive.layout.records[0]
    pickled = file.read_bytes()[record.data_offset : record.data_end]
    assert old in pickled
    forge(file, root, [FLOATS], pickled=pickled.replace(old, new))
    with pytest.raises(CorruptCheckpointError, match="describe different states"):
        lastgood.load(file)
    with pytest.raises(CorruptCheckpointError, match="describe different states"):
        verify(file)


def test_bodies_that_the_index_exchanges(tmp_path: Path) -> None:
    """The index may not show another value than the one that torch.load makes, in a partial load either."""
    bodies = [opcodes({"real": 1}), opcodes({"fake": 1})]
    first, second = (OpaqueNode(0, len(body), 0, (), "x") for body in bodies)
    root = DictNode({"a": first, "b": second})
    file = forge(tmp_path / "f.pt", root, bodies=b"".join(bodies))
    assert lastgood.load(file, {"a": None}) == {"a": {"real": 1}}
    starts = b'["opaque",%d,' % first.start, b'["opaque",%d,' % second.start

    def exchange(data: bytes) -> bytes:
        return data.replace(starts[0], b"?").replace(starts[1], starts[0]).replace(b"?", starts[1])

    forge(file, root, bodies=b"".join(bodies), edit_json=exchange)
    assert torch.load(file)["a"] == {"real": 1}
    for target in (None, {"a": None}):
        with pytest.raises(CorruptCheckpointError, match="describe different states"):
            lastgood.load(file, target)


@pytest.mark.parametrize("name", [name for name in bombs() if name != "no_end"])
def test_bombs_in_values_that_only_the_pickle_describes(tmp_path: Path, worker: Worker, name: str) -> None:
    body = bombs()[name].removeprefix(b"\x80\x02").removesuffix(b".")
    node = OpaqueNode(0, len(body), min(len(body), 200), (0,), "x")
    file = forge(tmp_path / "f.pt", DictNode({"a": node}), [FLOATS], bodies=body)
    for target in (None, {"a": None}):
        outcome, message, memory, seconds = worker.call(load_in_little_memory, str(file), target)
        assert outcome in ("CorruptCheckpointError", "UnsafeCheckpointError"), (outcome, message)
        assert memory < SPARE
        assert seconds < SECONDS
    with pytest.raises(REFUSALS):
        lastgood.load(file)


# The trailer


def hostile_trailers() -> dict[str, tuple[int, str, int]]:
    """Offset in the trailer, form, value."""
    return {
        "version": (8, "<I", 99),
        "index_offset": (24, "<Q", BIG),
        "index_size": (32, "<Q", BIG),
        "index_size_wraps": (32, "<Q", 2**64 - 1),
        "index_empty": (32, "<Q", 0),
        "blocks_offset": (40, "<Q", BIG),
        "blocks_size": (48, "<Q", BIG),
        "blocks_one_more": (48, "<Q", 24),
        "blocks_one_less": (48, "<Q", 16),
        "blocks_not_whole": (48, "<Q", 19),
        "reserved": (20, "<I", 1),
        "save_id": (56, "<Q", 1),
    }


@pytest.mark.parametrize("name", list(hostile_trailers()))
def test_hostile_trailers(tmp_path: Path, worker: Worker, name: str) -> None:
    file = forge(tmp_path / "f.pt", DictNode({"a": tensor()}), [FLOATS])
    with archive_of(file) as archive:
        trailer = archive.layout.trailer.data_offset
        assert archive.layout.blocks.size == 20
    data = bytearray(file.read_bytes())
    offset, form, value = hostile_trailers()[name]
    struct.pack_into(form, data, trailer + offset, value)
    file.write_bytes(data)
    for target in (None, {"a": None}):
        outcome, message, memory, seconds = worker.call(load_in_little_memory, str(file), target)
        assert outcome == "CorruptCheckpointError", (outcome, message)
        assert memory < SPARE
        assert seconds < SECONDS


def test_a_file_replaced_while_it_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of one file and the data of another are never put together."""
    file, other = tmp_path / "f.pt", tmp_path / "other.pt"
    lastgood.save({"a": torch.zeros(1000)}, file)
    lastgood.save({"a": torch.ones(1000)}, other)
    original = loading.map_file

    def replaced_meanwhile(path: str, size: int) -> Any:
        os.replace(other, file)
        return original(path, size)

    monkeypatch.setattr(loading, "map_file", replaced_meanwhile)
    with pytest.raises(lastgood.StorageError, match="replaced"):
        lastgood.load(file, mmap=True)


def test_flips_are_found_quickly(tmp_path: Path) -> None:
    file = forge(tmp_path / "f.pt", DictNode({"a": tensor()}), [FLOATS])
    started = time.monotonic()
    flip(file, 0)
    with pytest.raises(CorruptCheckpointError):
        lastgood.load(file)
    assert time.monotonic() - started < SECONDS
