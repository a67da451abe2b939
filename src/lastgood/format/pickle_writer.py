"""From the index to data.pkl: the canonical pickle that torch.load reads.

The pickle is a function of the index alone (and of the bodies of its opaque values, which are spliced in as they
are). A reader computes it again and compares: an index and a pickle that disagree are found out.
"""

import itertools
import pickle
import struct
from collections.abc import Sequence
from typing import Any

from lastgood.format.index import Index, InvalidIndexError, StorageEntry
from lastgood.format.nodes import (
    NUMBERED,
    BytearrayNode,
    BytesNode,
    ComplexNode,
    DeviceNode,
    DictNode,
    DtypeNode,
    FloatNode,
    IntNode,
    ListNode,
    MapNode,
    Node,
    OpaqueNode,
    OrderedDictNode,
    ReferenceNode,
    SetNode,
    ShardedNode,
    SizeNode,
    TensorNode,
    TextNode,
    TupleNode,
    unpack_floats,
)
from lastgood.format.spec import DTYPES

PROTOCOL = b"\x80\x02"

_pack_u32 = struct.Struct("<I").pack
_pack_i32 = struct.Struct("<i").pack
_pack_double = struct.Struct(">d").pack

_TUPLE_ENDINGS = {0: pickle.EMPTY_TUPLE, 1: pickle.TUPLE1, 2: pickle.TUPLE2, 3: pickle.TUPLE3}


def encode_pickle(index: Index, opaque_bodies: bytes | memoryview, opaque: Sequence[OpaqueNode]) -> bytes:
    """The bytes of data.pkl. ``opaque_bodies`` holds the bodies of the ``opaque`` nodes end to end, in order.

    ``OpaqueNode.start`` is not looked at: it follows from where the bodies come to stand (see
    :func:`place_opaque_values`). Raises :class:`InvalidIndexError` for a node that has no pickle.
    """
    writer = _PickleWriter(index.storages, memoryview(opaque_bodies), opaque)
    writer.emit(index.root)
    return b"".join([PROTOCOL, *writer.parts, pickle.STOP])


def place_opaque_values(index: Index, opaque_bodies: bytes, opaque: Sequence[OpaqueNode]) -> bytes:
    """:func:`encode_pickle`, setting ``start`` of every opaque node to where its body came to stand."""
    writer = _PickleWriter(index.storages, memoryview(opaque_bodies), opaque)
    writer.emit(index.root)
    if opaque:
        starts = list(itertools.accumulate(map(len, writer.parts), initial=len(PROTOCOL)))
        for node, part_number in zip(opaque, writer.opaque_parts, strict=True):
            node.start = starts[part_number]
    return b"".join([PROTOCOL, *writer.parts, pickle.STOP])


class PickleTemplate:
    """A pickle whose plain values can be exchanged without writing it anew."""

    def __init__(self, segments: list[bytes]) -> None:
        self._segments = segments
        self.size = sum(map(len, segments))

    def exchange(self, number: int, value: Node) -> None:
        """Put ``value`` in the place of plain value ``number``; :func:`is_exchangeable` is true of both."""
        place, encoded = 2 * number + 1, _plain_scalar(value)
        self.size += len(encoded) - len(self._segments[place])
        self._segments[place] = encoded

    def render(self) -> bytes:
        """The bytes of data.pkl."""
        return b"".join(self._segments)


def encode_template(index: Index) -> PickleTemplate:
    """The pickle of an index without opaque values.

    Its plain values are numbered in the order in which they are described: those of which :func:`is_exchangeable` is
    true and that are not inside keys or sets.
    """
    writer = _PickleWriter(index.storages, memoryview(b""), ())
    writer.emit(index.root)
    parts = [PROTOCOL, *writer.parts, pickle.STOP]
    segments: list[bytes] = []
    start = 0
    for place in writer.plain_parts:
        place += 1  # the protocol stands before
        segments += (b"".join(parts[start:place]), bytes(parts[place]))
        start = place + 1
    return PickleTemplate([*segments, b"".join(parts[start:])])


def is_exchangeable(node: Node) -> bool:
    """Whether the pickle of this node is the same wherever it stands."""
    return node is None or isinstance(node, (bool, int, float, str, IntNode, FloatNode, TextNode))


_CONSTANT_MEMOS = 256
"""How many memo entries are kept for names that come again and again; further ones are written out each time."""


class _PickleWriter:
    """Emits pickle opcodes for nodes. Memo numbers: first those of the opaque bodies, then those of constants, then
    one for each numbered object.
    """

    def __init__(self, storages: list[StorageEntry], opaque_bodies: memoryview, opaque: Sequence[OpaqueNode]) -> None:
        self.parts: list[bytes | memoryview] = []
        self.opaque_parts: list[int] = []
        self.plain_parts: list[int] = []
        """Which parts are plain values that could be exchanged."""
        self._fixed = 0
        self._storages = storages
        self._bodies = opaque_bodies
        self._body_position = 0
        self._first_memo = sum(node.memo_size for node in opaque)
        self._first_numbered = self._first_memo + _CONSTANT_MEMOS
        self._numbered = 0
        self._constants: dict[bytes, bytes] = {}
        self._int_tuples: dict[tuple[int, ...], bytes] = {}
        self._forms: dict[tuple[Any, ...], tuple[bytes, bytes]] = {}

    def emit(self, node: Node) -> None:
        kind = type(node)
        if kind is TensorNode:
            self.parts.append(self._tensor(node))  # type: ignore[arg-type]
            return
        if isinstance(node, NUMBERED):
            self._emit_container(node)
        elif isinstance(node, (TupleNode, ShardedNode)):
            self._emit_tuple(node)
        elif isinstance(node, OpaqueNode):
            self._emit_opaque(node)
        elif isinstance(node, ReferenceNode):
            self.parts.append(_get(self._first_numbered + node.number))
        else:
            if not self._fixed and is_exchangeable(node):
                self.plain_parts.append(len(self.parts))
            self.parts.append(self._scalar(node))

    def _emit_fixed(self, node: Node) -> None:
        """What stands in a key or a set: another value would be another structure."""
        self._fixed += 1
        self.emit(node)
        self._fixed -= 1

    # Containers

    def _emit_container(self, node: Node) -> None:
        memo = self._put_numbered()
        if isinstance(node, DictNode):
            self.parts += (pickle.EMPTY_DICT, memo)
            self._emit_items([(key, value) for key, value in node.items.items()])
        elif isinstance(node, MapNode):
            self.parts += (pickle.EMPTY_DICT, memo)
            self._emit_items(node.items)
        elif isinstance(node, OrderedDictNode):
            self.parts += (self._new_ordered_dict(), memo)
            self._emit_items(node.items)
            if node.attributes:
                self.parts.append(pickle.EMPTY_DICT)
                self._emit_items(list(node.attributes.items()))
                self.parts.append(pickle.BUILD)
        elif isinstance(node, ListNode):
            self.parts += (pickle.EMPTY_LIST, memo)
            if node.items:
                self.parts.append(pickle.MARK)
                for item in node.items:
                    self.emit(item)
                self.parts.append(pickle.APPENDS)
        elif isinstance(node, SetNode):
            self.parts += (self._global("__builtin__", "set"), pickle.EMPTY_LIST)
            if node.items:
                self.parts.append(pickle.MARK)
                for item in node.items:
                    self._emit_fixed(item)
                self.parts.append(pickle.APPENDS)
            self.parts += (pickle.TUPLE1, pickle.REDUCE, memo)
        elif isinstance(node, BytearrayNode):
            text = node.value.decode("latin-1").encode()
            arguments = _text(text) + self._latin1() + pickle.TUPLE2
            self.parts += (self._global("__builtin__", "bytearray"), arguments, pickle.REDUCE, memo)

    def _emit_items(self, items: "list[tuple[Node, Node]] | list[tuple[str, Node]]") -> None:
        if not items:
            return
        parts = self.parts
        parts.append(pickle.MARK)
        for key, value in items:
            if type(key) is str:
                parts.append(_text(key.encode()))
            else:
                self._emit_fixed(key)
            if type(value) is TensorNode:
                parts.append(self._tensor(value))
            else:
                self.emit(value)
        parts.append(pickle.SETITEMS)

    def _emit_tuple(self, node: TupleNode | ShardedNode) -> None:
        length = len(node.items)
        if length > 3:
            self.parts.append(pickle.MARK)
        for item in node.items:
            self.emit(item)
        self.parts.append(_TUPLE_ENDINGS.get(length, pickle.TUPLE))

    def _emit_opaque(self, node: OpaqueNode) -> None:
        self.opaque_parts.append(len(self.parts))
        end = self._body_position + node.length
        if end > len(self._bodies):
            raise InvalidIndexError("opaque values longer than data.pkl")
        self.parts.append(self._bodies[self._body_position : end])
        self._body_position = end

    # Tensors

    def _tensor(self, node: TensorNode) -> bytes:
        entry = self._storages[node.storage]
        form = (node.dtype, node.shape, node.stride, node.flags, node.offset, entry.nbytes, entry.dtype, entry.location)
        known = self._forms.get(form)
        if known is None:
            encoded = self._tensor_parts(node, entry)
            # What comes first brings constants that the same tensor form, coming again, refers to.
            self._forms[form] = self._tensor_parts(node, entry)
        else:
            encoded = known
        before, after = encoded
        key = b"%d" % node.storage
        return b"".join((before, pickle.BINUNICODE, _pack_u32(len(key)), key, after, self._put_numbered()))

    def _tensor_parts(self, node: TensorNode, entry: StorageEntry) -> tuple[bytes, bytes]:
        """The pickle of a tensor before and after its storage's key."""
        dtype = DTYPES[node.dtype]
        typed = entry.dtype == node.dtype and dtype.storage_class is not None
        parameter = "p" in node.flags
        requires_grad = pickle.NEWTRUE if "g" in node.flags else pickle.NEWFALSE
        # torch's _rebuild_tensor_v3 fails when asked for a tensor that requires grad: that is set afterwards instead.
        grad_afterwards = not typed and not parameter and "g" in node.flags
        before = []
        if parameter:
            before = [self._global("torch._utils", "_rebuild_parameter")]
        elif grad_afterwards:
            before = [self._global("torch._tensor", "_rebuild_from_type_v2"), pickle.MARK]
        before.append(self._global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"))
        if grad_afterwards:
            before.append(self._global("torch", "Tensor"))
        before += [
            pickle.MARK,
            pickle.MARK,
            self._constant(_text(b"storage")),
            self._global("torch", str(dtype.storage_class))
            if typed
            else self._global("torch.storage", "UntypedStorage"),
        ]
        after = [
            self._constant(_text(entry.location.encode())),
            _integer(entry.nbytes // dtype.itemsize if typed else entry.nbytes),
            pickle.TUPLE,
            pickle.BINPERSID,
            _integer(node.offset),
            self._int_tuple(node.shape),
            self._int_tuple(node.stride),
            # A Parameter is a call around its data; the data itself never requires grad.
            pickle.NEWFALSE if parameter or grad_afterwards else requires_grad,
            self._new_ordered_dict(),
        ]
        if not typed:
            after.append(self._global("torch", node.dtype))
        if "c" in node.flags or "n" in node.flags:
            after.append(_view_bits(node.flags))
        after.append(pickle.TUPLE)
        if grad_afterwards:
            after += (pickle.EMPTY_DICT, _text(b"requires_grad"), pickle.NEWTRUE, pickle.SETITEM, pickle.TUPLE)
        after.append(pickle.REDUCE)
        if parameter:
            after += (requires_grad, self._new_ordered_dict(), pickle.TUPLE3, pickle.REDUCE)
        return b"".join(before), b"".join(after)

    def _int_tuple(self, values: tuple[int, ...]) -> bytes:
        encoded = self._int_tuples.get(values)
        if encoded is None:
            encoded = b"".join(map(_integer, values)) + _TUPLE_ENDINGS.get(len(values), pickle.TUPLE)
            if len(values) > 3:
                encoded = pickle.MARK + encoded
            self._int_tuples[values] = encoded
        return encoded

    # Scalars

    def _scalar(self, node: Node) -> bytes:
        if is_exchangeable(node):
            return _plain_scalar(node)
        if isinstance(node, BytesNode):
            text = _text(node.value.decode("latin-1").encode())
            return self._global("_codecs", "encode") + text + self._latin1() + pickle.TUPLE2 + pickle.REDUCE
        return self._torch_scalar(node)

    def _torch_scalar(self, node: Node) -> bytes:
        if isinstance(node, ComplexNode):
            real, imaginary = (pickle.BINFLOAT + _pack_double(part) for part in unpack_floats(node.value))
            return self._global("__builtin__", "complex") + real + imaginary + pickle.TUPLE2 + pickle.REDUCE
        if isinstance(node, SizeNode):
            return self._global("torch", "Size") + self._int_tuple(node.items) + pickle.TUPLE1 + pickle.REDUCE
        if isinstance(node, DtypeNode):
            return self._global("torch", node.name)
        if isinstance(node, DeviceNode):
            number = b"" if node.index is None else _integer(node.index)
            arguments = _text(node.device_type.encode()) + number + (pickle.TUPLE2 if number else pickle.TUPLE1)
            return self._global("torch", "device") + arguments + pickle.REDUCE
        raise InvalidIndexError(f"no pickle for a {type(node).__name__}")

    def _latin1(self) -> bytes:
        return self._constant(_text(b"latin1"))

    # The memo

    def _new_ordered_dict(self) -> bytes:
        return self._global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE

    def _global(self, module: str, name: str) -> bytes:
        if "\n" in name:
            raise InvalidIndexError(f"{name!r} is no name")
        return self._constant(pickle.GLOBAL + module.encode() + b"\n" + name.encode() + b"\n")

    def _constant(self, encoded: bytes) -> bytes:
        """The value itself, remembered, the first time; a reference to it from then on."""
        known = self._constants.get(encoded)
        if known is not None:
            return known
        memo = self._first_memo + len(self._constants)
        if memo >= self._first_numbered:
            return encoded
        self._constants[encoded] = _get(memo)
        return encoded + _put(memo)

    def _put_numbered(self) -> bytes:
        self._numbered += 1
        return _put(self._first_numbered + self._numbered - 1)


def _plain_scalar(node: Node) -> bytes:
    """The pickle of a value that is the same wherever it stands."""
    if node is None:
        return pickle.NONE
    if isinstance(node, bool):
        return pickle.NEWTRUE if node else pickle.NEWFALSE
    if isinstance(node, int):
        return _integer(node)
    if isinstance(node, float):
        return pickle.BINFLOAT + _pack_double(node)
    if isinstance(node, str):
        return _text(node.encode())
    if isinstance(node, IntNode):
        return _long(int.from_bytes(node.value, "little", signed=True))
    if isinstance(node, FloatNode):
        return pickle.BINFLOAT + node.value
    if isinstance(node, TextNode):
        return _text(node.value)
    raise InvalidIndexError(f"a {type(node).__name__} is no plain value")


def _put(memo: int) -> bytes:
    return pickle.BINPUT + bytes((memo,)) if memo < 256 else pickle.LONG_BINPUT + _pack_u32(memo)


def _get(memo: int) -> bytes:
    return pickle.BINGET + bytes((memo,)) if memo < 256 else pickle.LONG_BINGET + _pack_u32(memo)


def _text(encoded: bytes) -> bytes:
    return pickle.BINUNICODE + _pack_u32(len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return pickle.BININT1 + bytes((value,))
    if 0 <= value < 65536:
        return pickle.BININT2 + struct.pack("<H", value)
    if -(2**31) <= value < 2**31:
        return pickle.BININT + _pack_i32(value)
    return _long(value)


def _long(value: int) -> bytes:
    encoded = pickle.encode_long(value)
    if len(encoded) < 256:
        return pickle.LONG1 + bytes((len(encoded),)) + encoded
    return pickle.LONG4 + _pack_i32(len(encoded)) + encoded


def _view_bits(flags: str) -> bytes:
    """The dict of metadata in which torch keeps the conjugate and the negative bit of a view."""
    names = [name for letter, name in (("c", b"conj"), ("n", b"neg")) if letter in flags]
    items = b"".join(_text(name) + pickle.NEWTRUE for name in names)
    return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
