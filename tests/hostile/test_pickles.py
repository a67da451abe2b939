"""Pickles that torch.save never writes, in torch's formats and inside our own files: nothing of them is ever run."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hostile import pickles
from tests.hostile.pickles import FOUR_FLOATS, call, name, storage, text, tuple_of
from tests.hostile.samples import Reader, Sample
from tests.unit.loading.files import forge, opcodes, zip_of
from tests.unit.loading.test_hostile_foreign import legacy_file

import lastgood
from lastgood.format.index import StorageEntry
from lastgood.format.nodes import DictNode, OpaqueNode, TensorNode

GetSample = Callable[[str], Sample]
CountCases = Callable[[str, int], None]

FORMS = ["torch zip", "torch legacy", "ours"]
MADE_UP = "pickles that torch.save never writes"
DATA = struct.pack("<4f", 1, 2, 3, 4)


def put(sample: Sample, form: str, body: bytes) -> None:
    """Write a file of this form around a pickle's opcodes."""
    file = sample.directory / "checkpoint_0.pt"
    if form == "torch zip":
        zip_of(file, b"\x80\x02" + body + b".", {"0": DATA})
    elif form == "torch legacy":
        old = body.replace(FOUR_FLOATS, storage("FloatStorage", text("0"), text("cpu"), opcodes(4), b"N"))
        legacy_file(file, b"\x80\x02" + old + b".", {"0": DATA})
    else:
        opaque = OpaqueNode(0, len(body), min(len(body), 6), (0,), "x")
        tensor = TensorNode(0, "float32", 0, (4,), (1,), "")
        forge(file, DictNode({"a": opaque, "t": tensor}), [(StorageEntry(16, "float32", "cpu"), DATA)], bodies=body)


@settings(max_examples=100)
@given(body=pickles.bodies(), form=st.sampled_from(FORMS))
def test_no_pickle_breaks_a_reader(
    reader: Reader, sample: GetSample, count_cases: CountCases, body: bytes, form: str
) -> None:
    found = sample("values")
    put(found, form, body)
    reader.read(found, ways=("load", "load keys", "map", "verify", "inspect"))
    count_cases(MADE_UP, 1)


def test_a_tensor_of_which_only_a_pickle_tells_goes_to_the_meta_device(tmp_path: Path) -> None:
    lastgood.save({"a": torch.eye(3).to_sparse()}, tmp_path / "x")
    loaded = lastgood.load(tmp_path / "x", map_location="meta")["a"]
    assert (loaded.is_meta, loaded.shape, loaded.layout) == (True, (3, 3), torch.sparse_coo)


@pytest.mark.parametrize("form", ["torch zip", "torch legacy"])
def test_a_storage_on_no_device_is_damage(reader: Reader, sample: GetSample, form: str) -> None:
    found = sample("values")
    rest = [b"N"] if form == "torch legacy" else []
    put(found, form, b"}(" + text("a") + storage("FloatStorage", text("0"), text("evil"), opcodes(4), *rest) + b"u")
    assert reader.read(found, ways=["load", "load file"]).of("load").error == "CorruptCheckpointError"


def asked_for(trace: Path) -> Iterator[bytes]:
    """Opcodes that ask for a function to be called, in every way that pickles have."""
    words = text(str(trace))
    for function in ("tests.hostile.canary sing", "tests.hostile.canary Singer"):
        module, attribute = function.split()
        found = name(function)
        yield found + tuple_of([words]) + b"R"
        yield b"(" + words + f"i{module}\n{attribute}\n".encode()
        yield b"(" + found + words + b"o"
        yield found + tuple_of([words]) + b"\x81"
        yield found + tuple_of([words]) + b"}\x92"
        yield found + b")\x81" + words + b"b"
        yield text(module) + text(attribute) + b"\x93" + tuple_of([words]) + b"R"
        yield b"\x82\xf0" + tuple_of([words]) + b"R"
        yield call("torch._tensor _rebuild_from_type_v2", found, found, tuple_of([words]), b"}")
        yield call("torch._utils _rebuild_wrapper_subclass", found, *[words] * 6)
        yield call("collections OrderedDict") + found + b"b"
        yield tuple_of([text("storage"), found, words, text("cpu"), opcodes(4)]) + b"Q"
        yield tuple_of([text("module"), found, words, words]) + b"Q"
        yield found + b"Q"
    system = text(f"touch {trace}")
    yield call("posix system", system)
    yield call("builtins eval", text(f"open({str(trace)!r}, 'w')"))
    yield call("functools partial", name("posix system"), system) + b")R"
    yield call("builtins getattr", name("posix system"), text("__call__")) + tuple_of([system]) + b"R"
    yield name("posix system.__call__") + tuple_of([system]) + b"R"
    yield name("torch serialization.os.system") + tuple_of([system]) + b"R"
    yield name("torch._utils _rebuild_tensor_v2.__globals__") + b")R"


@pytest.mark.parametrize("form", FORMS)
def test_hazard_21_whoever_asks_for_a_function_is_refused(
    reader: Reader, sample: GetSample, count_cases: CountCases, tmp_path: Path, form: str
) -> None:
    found, trace = sample("values"), tmp_path / "trace"
    for body in asked_for(trace):
        put(found, form, b"}(" + text("a") + body + b"u")
        seen = reader.read(found)
        for way in ("load", "load file", "load unverified", "load keys", "map"):
            # Keys of our own file are read from its index: those that no pickle describes, without the pickle.
            assert seen.of(way).error in ("UnsafeCheckpointError", "CorruptCheckpointError"), (body, seen.of(way))
        count_cases(MADE_UP, 1)
    assert not trace.exists()
