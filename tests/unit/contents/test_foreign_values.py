"""What torch.save writes of unusual values is described as far as it can be, and named where it cannot."""

import collections
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tests.unit.loading.files import call_pickle, opcodes, zip_of

from lastgood._contents import open_contents, tensors
from lastgood._contents.reading import values
from lastgood._contents.shown import show_value
from lastgood.errors import CorruptCheckpointError, UnsafeCheckpointError


class Named(torch.Tensor):
    pass


def parameter_with_attributes() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    parameter.note = "a word"  # type: ignore[attr-defined]
    return parameter


VALUES: dict[str, tuple[Any, str]] = {
    "a dtype without a storage class": (torch.ones(2, dtype=torch.uint16), "uint16 [2]"),
    "a float8": (torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn [2]"),
    "a Parameter with attributes": (parameter_with_attributes(), "float32 [2, 3]"),
    "a tensor of a class of its own": (torch.ones(2).as_subclass(Named), f"<{__name__}.Named>"),
    "a sparse tensor": (torch.eye(2).to_sparse(), "<torch.Tensor>"),
    "a tensor without data": (torch.empty(2, device="meta"), "<torch.Tensor>"),
    "a storage": (torch.ones(2).untyped_storage(), "<torch.UntypedStorage>"),
    "a layout": (torch.strided, "<torch.serialization._get_layout>"),
    "a counter": (collections.Counter("aab"), "<collections.Counter>"),
    "a function": (struct.pack, "<_struct.pack>"),
    "an array": (numpy.ones(2), "<numpy._core.multiarray._reconstruct>"),
    "an empty bytearray": (bytearray(), "bytearray of length 0"),
    "a long number": (10**100, "an int of 336 bits"),
    "a long text": ("x" * 500, repr("x" * 52) + "... (length 500)"),
    "a tuple of one": ((1,), "(1,)"),
    "a device": (torch.device("cpu"), "torch.device('cpu')"),
}


@pytest.mark.parametrize(("value", "expected"), VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize("new_format", [True, False])
def test_an_unusual_value_is_described_or_named(tmp_path: Path, value: Any, expected: str, new_format: bool) -> None:
    path = tmp_path / "theirs.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"v": value}, path, _use_new_zipfile_serialization=new_format)
    (file,) = open_contents(str(path)).files
    assert show_value(dict(values(file))["v"]) == expected


def test_flags_of_tensors_are_seen(tmp_path: Path) -> None:
    state = {
        "conj": torch.ones(3, dtype=torch.complex64).conj(),
        "neg": torch.ones(3, dtype=torch.complex64).conj().imag,
        "grad": torch.ones(2, requires_grad=True),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "buffer": torch.nn.Buffer(torch.ones(2)),
        "parameter": parameter_with_attributes(),
    }
    torch.save(state, tmp_path / "x")
    found = {tensor.path: tensor.flags for tensor in tensors(open_contents(str(tmp_path / "x")).files[0])}
    assert found == {"conj": "c", "neg": "n", "grad": "g", "frozen": "p", "buffer": "", "parameter": "pg"}


def test_attributes_of_ordered_dicts_are_kept(tmp_path: Path) -> None:
    state = torch.nn.Linear(2, 2).state_dict()
    torch.save(state, tmp_path / "x")
    root: Any = open_contents(str(tmp_path / "x")).files[0].root
    assert list(root.attributes) == ["_metadata"]


def test_ordered_dicts_of_python_2_are_read(tmp_path: Path) -> None:
    pairs = b"]" + b"(" + opcodes(["a", 1]) + opcodes(["b", 2]) + b"e\x85"
    path = zip_of(tmp_path / "x", call_pickle("collections OrderedDict", pairs))
    found = [(key, show_value(node)) for key, node in values(open_contents(str(path)).files[0])]
    assert found == [("", "OrderedDict of 2"), ("a", "1"), ("b", "2")]


def test_views_of_storages_in_the_oldest_files_are_found(tmp_path: Path) -> None:
    path = tmp_path / "x"
    torch.save(torch.arange(6.0), path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    # The last item of a storage's id was a part of it: (key, offset, size).
    end = data.index(b"Ntq")
    part = b"(" + opcodes("part") + opcodes(2) + opcodes(4) + b"t"
    path.write_bytes(data[:end] + part + data[end + 1 :].replace(b"K\x06\x85", b"K\x04\x85"))
    (file,) = open_contents(str(path)).files
    (tensor,) = tensors(file)
    node: Any = file.root
    assert (tensor.shape, node.offset) == ((4,), 2)
    start = file.places[0].offset + 4 * node.offset
    assert struct.unpack_from("<4f", path.read_bytes(), start) == (2, 3, 4, 5)
    outside = b"(" + opcodes("part") + opcodes(4) + opcodes(4) + b"t"
    path.write_bytes(data[:end] + outside + data[end + 1 :])
    with pytest.raises(CorruptCheckpointError, match="outside"):
        open_contents(str(path))


CALLS = {
    "torch._utils _rebuild_tensor_v2": (1, 2, 3, 4, 5, 6),
    "torch._utils _rebuild_tensor_v3": (1, 2, 3, 4, 5, 6, 7),
    "torch._utils _rebuild_parameter": (1, 2, 3),
    "torch._tensor _rebuild_from_type_v2": (1, 2, 3),
    "torch Size": (("a",),),
    "torch device": (1,),
    "collections OrderedDict": (1,),
    "_codecs encode": ("\u20ac", "latin1"),
    "builtins bytearray": ("a", "utf-8"),
    "builtins set": (1,),
    "builtins complex": ("a", 1),
}


@pytest.mark.parametrize(("name", "arguments"), CALLS.items(), ids=CALLS.keys())
def test_calls_with_arguments_that_torch_never_writes_are_named(
    tmp_path: Path, name: str, arguments: tuple[Any, ...]
) -> None:
    path = zip_of(tmp_path / "x", call_pickle(name, opcodes(arguments)))
    (file,) = open_contents(str(path)).files
    assert show_value(file.root) == f"<{name.replace(' ', '.')}>"


def test_a_call_of_a_value_and_a_state_for_a_plain_value_are_refused(tmp_path: Path) -> None:
    for pickled in (b"\x80\x02K\x01)R.", b"\x80\x02K\x01)\x81."):
        with pytest.raises(UnsafeCheckpointError, match="not a plain name"):
            open_contents(str(zip_of(tmp_path / "x", pickled)))
    with pytest.raises(CorruptCheckpointError, match="state"):
        open_contents(str(zip_of(tmp_path / "x", b"\x80\x02]}b.")))


def test_a_zip_that_holds_no_pickle_and_a_file_of_something_else_are_no_checkpoints(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("archive/notes.txt", "nothing")
    (tmp_path / "x.txt").write_text("nothing")
    for name, said in (("x.zip", r"data\.pkl"), ("x.txt", "does not begin like a file")):
        with pytest.raises(CorruptCheckpointError, match=said):
            open_contents(str(tmp_path / name))
