"""Looking into a checkpoint: the same is seen in each format, little is read, nothing is run, and nothing hurts."""

import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.saves import commit_together, save, state_of
from tests.unit.contents.samples import CountingStorage, every_kind, save_in_each_form
from tests.unit.loading.files import call_pickle, edit_pickle, opcodes, zip_of

import lastgood
from lastgood._contents import FileContents, open_contents, tensors
from lastgood._contents.reading import values
from lastgood._contents.shown import show_value
from lastgood.errors import CheckpointNotFoundError, CorruptCheckpointError, LastgoodError, UnsafeCheckpointError
from lastgood.format.nodes import ReferenceNode, TensorNode, walk_nodes

MEBIBYTE = 1024 * 1024


def only_file(path: Path) -> FileContents:
    (file,) = open_contents(str(path)).files
    return file


def seen(path: Path) -> list[tuple[str, str]]:
    return [(key, show_value(node)) for key, node in values(only_file(path))]


# What is seen


def test_the_same_state_looks_the_same_in_each_format(tmp_path: Path) -> None:
    paths = save_in_each_form(tmp_path, every_kind())
    ours = seen(paths["lastgood"])
    assert len(ours) > 50
    for kind, path in paths.items():
        assert only_file(path).kind == kind
        assert seen(path) == ours


def test_tensors_have_the_shapes_dtypes_and_sizes_that_torch_sees(tmp_path: Path) -> None:
    state = every_kind()
    for path in save_in_each_form(tmp_path, state).values():
        found = {tensor.path: tensor for tensor in tensors(only_file(path))}
        for key, expected in state["model"].items():
            tensor = found[f"model.{key}"]
            assert (tensor.shape, f"torch.{tensor.dtype}") == (tuple(expected.shape), str(expected.dtype))
            assert tensor.nbytes == expected.nbytes
        assert "p" in found["parameters.0.weight"].flags
        assert "c" in found["conj"].flags


def test_tied_and_overlapping_tensors_are_told_apart(tmp_path: Path) -> None:
    for path in save_in_each_form(tmp_path, every_kind()).values():
        found = {tensor.path: tensor for tensor in tensors(only_file(path))}
        assert found["tied.again"].first_path == "tied.a"
        assert found["tied.part"].first_path is None
        assert len({found[f"tied.{name}"].storage for name in ("a", "again", "transposed", "part")}) == 1
        assert found["parameters.0.weight"].storage == found["model.0.weight"].storage


def test_storage_bytes_stand_where_the_description_says(tmp_path: Path) -> None:
    state = {"a": torch.arange(5, dtype=torch.int32), "b": torch.tensor([1.5, -2.0], dtype=torch.float64)}
    for path in save_in_each_form(tmp_path, state).values():
        file = only_file(path)
        data = path.read_bytes()
        for tensor in tensors(file):
            offset = file.places[tensor.storage].offset
            assert data[offset : offset + tensor.nbytes] == state[tensor.path].numpy().tobytes()


def test_what_a_save_notes_is_there(tmp_path: Path) -> None:
    path = tmp_path / "step-10"
    lastgood.make_sync_checkpointer().save(str(path), state_of(1), step=10, saved_at=1.7e9, metrics={"loss": 0.5})
    (file,) = open_contents(str(path)).files
    assert (file.step, file.saved_at, file.metrics) == (10, 1.7e9, {"loss": 0.5})
    assert (file.rank, file.world_size, file.byteorder) == (0, 1, sys.byteorder)
    assert file.nbytes == os.path.getsize(file.path)


def test_a_directory_has_the_files_of_all_ranks(tmp_path: Path) -> None:
    assert commit_together(tmp_path / "c", 1, 3) == [None] * 3
    contents = open_contents(str(tmp_path / "c"))
    assert [file.rank for file in contents.files] == [0, 1, 2]
    assert contents.notes == ()
    os.unlink(tmp_path / "c" / "manifest.json")
    notes = open_contents(str(tmp_path / "c")).notes
    assert "never committed" in notes[0]
    assert notes[1:] == (
        "its files have different save ids: they are of different saves, or of ranks that met at a barrier",
    )
    os.unlink(tmp_path / "c" / "checkpoint_1.pt")
    assert any("ranks 1 " in note for note in open_contents(str(tmp_path / "c")).notes)


def test_a_directory_of_torchs_files_takes_the_ranks_from_their_names(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save(state_of(rank), tmp_path / f"checkpoint_{rank}.pt")
    assert [file.rank for file in open_contents(str(tmp_path)).files] == [0, 1]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("nothing")
    (tmp_path / "empty").mkdir()
    for name in ("missing", "other", "empty"):
        with pytest.raises(CheckpointNotFoundError, match=name):
            open_contents(str(tmp_path / name))


# What is read


@pytest.mark.parametrize("kind", ["lastgood", "torch zip"])
def test_no_tensor_data_is_read(tmp_path: Path, kind: str) -> None:
    state = {f"w{number}": torch.ones(4 * MEBIBYTE) for number in range(4)}
    path = tmp_path / "large.pt"
    lastgood.save(state, path) if kind == "lastgood" else torch.save(state, path)
    storage = CountingStorage()
    assert len(list(tensors(open_contents(str(path), storage).files[0]))) == 4
    assert path.stat().st_size > 64 * MEBIBYTE
    assert 0 < storage.bytes_read < 256 * 1024


def test_torch_is_not_imported(tmp_path: Path) -> None:
    paths = save_in_each_form(tmp_path, every_kind())
    program = """
import sys
from lastgood._contents import open_contents, tensors, verify_checkpoint
for path in sys.argv[1:]:
    assert len(list(tensors(open_contents(path).files[0]))) > 10
    assert verify_checkpoint(path).is_good
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, *map(str, paths.values())], check=True, timeout=60)


# Files made to hurt


def doubling_tuples(levels: int) -> bytes:
    data = b"\x80\x02K\x01K\x01\x86q\x00"
    for _ in range(levels):
        data += b"h\x00h\x00\x86q\x00"
    return data + b"."


def nested_dicts(depth: int) -> bytes:
    return b"\x80\x02" + b"}X\x01\x00\x00\x00a" * depth + b"N" + b"s" * depth + b"."


def tensor_pickle(numel: int, shape: tuple[int, ...], key: str = "0") -> bytes:
    identity = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + opcodes(key) + opcodes("cpu") + opcodes(numel) + b"tQ"
    )
    stride = opcodes((1,) * len(shape))
    arguments = b"(" + identity + b"K\x00" + opcodes(shape) + stride + b"\x89}t"
    return call_pickle("torch._utils _rebuild_tensor_v2", arguments)


def repeated_bytes() -> bytes:
    text = b"X" + struct.pack("<I", 300_000) + b"a" * 300_000 + b"q\x00"
    call = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    return b"\x80\x02](" + text + call * 20_000 + b"e."


def repeated_tuple() -> bytes:
    return b"\x80\x02](" + b"(" + b"K\x01" * 40_000 + b"tq\x00" + b"h\x00" * 40_000 + b"e."


HOSTILE: dict[str, bytes] = {
    "a tuple that holds itself twice, sixty times over": doubling_tuples(60),
    "a tuple repeated": repeated_tuple(),
    "bytes made again and again": repeated_bytes(),
    "a tensor larger than its storage": tensor_pickle(4, (5,)),
    "a storage that is not there": tensor_pickle(4, (4,), key="7"),
    "a storage larger than its record": tensor_pickle(400, (4,)),
    "a tensor of more elements than there are numbers": tensor_pickle(4, (2**62, 2**62)),
    "another protocol": pickle.dumps({"a": 1}, 4),
    "no end": b"\x80\x02}",
    "an empty stack": b"\x80\x02.",
    "a memo entry that is not there": b"\x80\x02h\x05.",
    "a call of a call": b"\x80\x02cos\nsystem\n)R)R.",
    "a key without a value": b"\x80\x02}(K\x01u.",
    "an unknown opcode": b"\x80\x02\xff.",
}


@pytest.mark.parametrize("pickled", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_pickle_that_cannot_be_is_refused(tmp_path: Path, pickled: bytes) -> None:
    path = zip_of(tmp_path / "hostile.pt", pickled, {"0": bytes(16)})
    with pytest.raises((CorruptCheckpointError, UnsafeCheckpointError), match=r"hostile\.pt"):
        open_contents(str(path))


def test_what_the_hostile_pickles_are_made_of_is_described_where_it_is_right(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "right.pt", tensor_pickle(4, (4,)), {"0": bytes(16)})
    assert seen(path) == [("", "float32 [4]")]
    assert len(seen(zip_of(tmp_path / "tuples.pt", doubling_tuples(5)))) == 2 ** (5 + 2) - 1


def test_code_is_named_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "was run"
    path = zip_of(tmp_path / "code.pt", call_pickle("os system", opcodes((f"touch '{marker}'",))))
    assert seen(path) == [("", "<os.system>")]
    assert not marker.exists()


def test_what_is_too_deep_to_describe_is_cut(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "deep.pt", nested_dicts(100_000))
    shown = seen(path)
    assert 50 < len(shown) < 200
    assert "deep" in shown[-1][1]


def test_a_list_that_holds_itself_is_described(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "cycle.pt", b"\x80\x02]q\x00h\x00a.")
    assert seen(path) == [("", "list of 1"), ("[0]", "<the same object as before>")]


def test_references_lead_to_what_was_described_before(tmp_path: Path) -> None:
    for path in save_in_each_form(tmp_path, every_kind()).values():
        file = only_file(path)
        references = [node for node, _ in walk_nodes(file.root) if isinstance(node, ReferenceNode)]
        assert references
        resolved = dict(values(file))
        assert isinstance(resolved["tied.again"], TensorNode)
        assert isinstance(resolved["same list"], ReferenceNode)


@pytest.mark.parametrize("kind", ["lastgood", "torch zip", "torch legacy"])
def test_no_prefix_of_a_file_is_taken_for_a_file(tmp_path: Path, kind: str) -> None:
    whole = save_in_each_form(tmp_path, every_kind())[kind]
    data = whole.read_bytes()
    for size in {*range(0, len(data), max(1, len(data) // 50)), len(data) - 1}:
        path = tmp_path / "cut.pt"
        path.write_bytes(data[:size])
        with pytest.raises((CorruptCheckpointError, UnsafeCheckpointError)):
            open_contents(str(path))


@settings(max_examples=200)
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=5))
def test_a_changed_pickle_is_described_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, int]]
) -> None:
    path = tmp_path_factory.mktemp("changed") / "file.pt"
    torch.save({"w": torch.ones(3), "o": [torch.nn.Parameter(torch.ones(2, 2)), {"lr": 0.1, "b": (1, 2)}]}, path)

    def change(pickled: bytes) -> bytes:
        data = bytearray(pickled)
        for where, byte in changes:
            data[int(where * len(data))] = byte
        return bytes(data)

    edit_pickle(path, change)
    try:
        described: Any = list(tensors(only_file(path)))
    except LastgoodError as error:
        described = str(error)
    assert described is not None


def test_independent_ranks_need_no_manifest(tmp_path: Path) -> None:
    for rank in range(2):
        save(tmp_path, rank, rank, 2)
    assert open_contents(str(tmp_path)).notes == ()
