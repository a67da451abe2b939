"""Pickles as hypothesis makes them up: what torch.save writes, with what it never writes in between."""

import pickle
import struct

from hypothesis import strategies as st
from tests.unit.loading.files import opcodes

COUNTS = [0, 1, 2, 4, 5, 12, 255, 2**16, 2**31 - 1, 2**31, 2**38, 2**62, 2**63 - 1, 2**63, 2**64, -1, -(2**63)]
STORAGE_CLASSES = ["FloatStorage", "BFloat16Storage", "DoubleStorage", "ByteStorage", "QInt8Storage", "QUInt4x2Storage"]
STORAGE_CLASSES += ["Tensor", "float32", "nothing", "hub", "_inductor"]
KEYS = ["0", "1", "00", "-1", "../0", "/etc/passwd", "\0", "", "0" * 300, "data.pkl"]
LOCATIONS = ["cpu", "cuda:0", "meta", "", "cpu:99999999999999999999", "evil", "\0", "x" * 300]
_ALLOWED = """
torch._utils _rebuild_tensor, _rebuild_tensor_v2, _rebuild_tensor_v3, _rebuild_qtensor, _rebuild_sparse_tensor
torch._utils _rebuild_nested_tensor, _rebuild_parameter, _rebuild_parameter_with_state, _rebuild_wrapper_subclass
torch._utils _rebuild_meta_tensor_no_storage, _rebuild_device_tensor_from_cpu_tensor, _rebuild_device_tensor_from_numpy
torch._tensor _rebuild_from_type_v2
torch.serialization _get_layout
torch Size, device, Tensor, float32, float64, FloatStorage, FloatTensor
torch.nn.parameter Parameter, Buffer
torch.storage UntypedStorage, TypedStorage
collections OrderedDict, Counter
_codecs encode
__builtin__ bytearray, set
builtins set, complex
"""
_EVIL = """
posix system
os system
subprocess Popen
builtins eval, exec, __import__, getattr
tests.hostile.canary sing, Singer
torch load, _inductor, _dynamo, onnx
torch.hub load
torch.serialization load
torch.storage UntypedStorage.from_file
torch.utils.cpp_extension load
torch._utils _import_dotted_name
runpy run_path
copyreg _reconstructor
numpy.core.multiarray _reconstruct
collections defaultdict
functools partial
importlib import_module
pickle loads
"""
GLOBALS = [
    f"{module} {attribute}"
    for module, attributes in (line.split(" ", 1) for line in (_ALLOWED + _EVIL).split("\n") if line)
    for attribute in attributes.split(", ")
]
"""Names of functions and classes, those that torch.save writes and others, with a blank after the module."""

_MEMO = st.integers(0, 5)
_TEXTS = st.sampled_from(
    ["", "a", "w", "cpu", "storage", "latin1", "module", "\xff", "\ud800", "x" * 3000, "touch /tmp/x"]
)


def text(content: str) -> bytes:
    """A text, also one that is no Unicode."""
    encoded = content.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def name(dotted: str) -> bytes:
    """A name that is looked up; ``dotted`` has a blank between module and name."""
    return pickle.GLOBAL + dotted.replace(" ", "\n").encode() + b"\n"


def tuple_of(items: list[bytes]) -> bytes:
    """A tuple of values."""
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def call(dotted: str, *arguments: bytes) -> bytes:
    """What a call of a function makes."""
    return name(dotted) + tuple_of(list(arguments)) + pickle.REDUCE


def storage(cls: str, key: bytes, location: bytes, count: bytes, *rest: bytes) -> bytes:
    """A reference to a storage; the old format has a sixth item."""
    return tuple_of([text("storage"), name(f"torch {cls}"), key, location, count, *rest]) + pickle.BINPERSID


FOUR_FLOATS = storage("FloatStorage", text("0"), text("cpu"), opcodes(4))
_COUNT = st.sampled_from(COUNTS).map(opcodes)
_SIZES = st.lists(_COUNT, max_size=4).map(tuple_of)
_ODD = st.sampled_from(
    [
        b"\x82\x01",  # EXT1
        b"\x83\x01\x00",
        b"\x84\x01\x00\x00\x00",
        b"ios\nsystem\n",  # INST
        b"(cos\nsystem\nX\x01\x00\x00\x00xo",  # OBJ
        b"Pdata\n",  # PERSID
        b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93",  # STACK_GLOBAL
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",  # BINBYTES8
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f",  # BYTEARRAY8
        b"\x8b\xff\xff\xff\x7f",  # LONG4
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",  # BINUNICODE8
        b"X\xff\xff\xff\xff",
        b"B\xff\xff\xff\x7f",
        b"T\xff\xff\xff\x7f",
        b"I99999999999999999999\n",
        b"F1e999\n",
        b"L" + b"9" * 5000 + b"L\n",
        b"S'abc'\n",
        b"Vtext\n",
        b"2",  # DUP
        b"0",  # POP
        b"1",  # POP_MARK
        b"\x97",  # NEXT_BUFFER
        b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",  # FRAME
        b"\x94",  # MEMOIZE
        b"\x92",  # NEWOBJ_EX
        b"p-1\n",
        b"g99\n",
        b"r\xff\xff\xff\xff",
        b"j\xff\xff\xff\xff",
        b"h\xfe",
        b"a",
        b"e",
        b"s",
        b"u",
        b"b",
        b"R",
        b"\x81",
        b"Q",
        b"t",
        b"U\xff",
        b"\x8a\xff",
        b"\x80\x05",
        b".",
        b"\xff",
    ]
)


@st.composite
def values(draw: st.DrawFn, depth: int = 0) -> bytes:
    """The opcodes of one value, of any kind that the format has; now and then of none."""
    kinds = ["scalar", "text", "count", "name", "get", "empty", "storage"]
    if depth < 3:
        kinds += (
            ["tensor"] * 3 + ["call"] * 3 + ["tuple", "list", "dict", "set", "object", "state", "put", "odd", "any id"]
        )
    kind = draw(st.sampled_from(kinds))
    inner = values(depth + 1)
    if kind == "scalar":
        return opcodes(draw(st.sampled_from([None, True, False, 0.5, float("nan"), 1e308])))
    if kind == "text":
        return text(draw(_TEXTS))
    if kind == "count":
        return draw(_COUNT)
    if kind == "name":
        return name(draw(st.sampled_from(GLOBALS)))
    if kind == "get":
        return pickle.BINGET + bytes([draw(_MEMO)])
    if kind == "put":
        return draw(inner) + pickle.BINPUT + bytes([draw(_MEMO)])
    if kind == "empty":
        return draw(st.sampled_from([pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.EMPTY_SET]))
    if kind == "storage":
        return draw(storages())
    if kind == "tensor":
        return draw(_tensors(inner))
    if kind == "call":
        return call(draw(st.sampled_from(GLOBALS)), *draw(st.lists(inner, max_size=4)))
    if kind == "object":
        return name(draw(st.sampled_from(GLOBALS))) + draw(inner) + pickle.NEWOBJ
    if kind == "state":
        return draw(inner) + draw(inner) + pickle.BUILD
    if kind == "any id":
        return draw(inner) + pickle.BINPERSID
    if kind == "odd":
        return draw(inner) + draw(_ODD)
    items = draw(st.lists(inner, max_size=4))
    if kind == "tuple":
        return tuple_of(items)
    if kind == "set":
        return call("__builtin__ set", pickle.EMPTY_LIST + pickle.MARK + b"".join(items) + pickle.APPENDS)
    if kind == "list":
        return pickle.EMPTY_LIST + pickle.MARK + b"".join(items) + pickle.APPENDS
    return pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS


@st.composite
def storages(draw: st.DrawFn) -> bytes:
    """A reference to a storage: mostly to one that is there."""
    cls = draw(st.sampled_from(["FloatStorage"] * 5 + STORAGE_CLASSES))
    key = text(draw(st.sampled_from(["0"] * 5 + KEYS)))
    location = text(draw(st.sampled_from(["cpu"] * 5 + LOCATIONS)))
    count = opcodes(draw(st.sampled_from([4] * 5 + COUNTS)))
    part = [pickle.NONE, pickle.NONE, tuple_of([text("v"), opcodes(1), opcodes(2)]), draw(_SIZES)]
    rest = draw(st.lists(st.sampled_from(part), max_size=1))
    return storage(cls, key, location, count, *rest)


@st.composite
def _tensors(draw: st.DrawFn, inner: st.SearchStrategy[bytes]) -> bytes:
    base = draw(storages() | inner)
    offset, sizes, strides = draw(_COUNT), draw(_SIZES), draw(_SIZES)
    hooks = call("collections OrderedDict")
    if draw(st.booleans()):
        offset, sizes, strides = opcodes(0), opcodes((2, 2)), opcodes((2, 1))
    version = draw(st.sampled_from(["v2", "v3", "q", "from type", "parameter"]))
    if version == "v3":
        dtype = name(
            draw(st.sampled_from([*GLOBALS, "torch float16", "torch complex128", "torch qint8", "torch uint64"]))
        )
        return call("torch._utils _rebuild_tensor_v3", base, offset, sizes, strides, pickle.NEWFALSE, hooks, dtype)
    if version == "q":
        quantizer = tuple_of([name("torch per_tensor_affine"), opcodes(0.5), opcodes(0)])
        return call("torch._utils _rebuild_qtensor", base, offset, sizes, strides, quantizer, pickle.NEWFALSE, hooks)
    tensor = call("torch._utils _rebuild_tensor_v2", base, offset, sizes, strides, pickle.NEWFALSE, hooks)
    if version == "parameter":
        return call("torch._utils _rebuild_parameter", tensor, pickle.NEWTRUE, hooks)
    if version == "from type":
        arguments = tuple_of([base, offset, sizes, strides, pickle.NEWFALSE, hooks])
        function = name(draw(st.sampled_from([*GLOBALS, *["torch._utils _rebuild_tensor_v2"] * 20])))
        return call("torch._tensor _rebuild_from_type_v2", function, name("torch Tensor"), arguments, pickle.EMPTY_DICT)
    return tensor


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """The opcodes of a dict of values, with now and then a byte changed or the end cut off."""
    items = [text(key) + draw(values()) for key in draw(st.sampled_from([["a"], ["a", "b"], ["a", "a"]]))]
    body = pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS
    damage = draw(st.sampled_from(["none"] * 6 + ["byte", "cut", "doubled"]))
    if damage == "byte":
        place = draw(st.integers(0, len(body) - 1))
        return body[:place] + bytes([draw(st.integers(0, 255))]) + body[place + 1 :]
    if damage == "cut":
        return body[: draw(st.integers(0, len(body)))]
    return body * 2 if damage == "doubled" else body
