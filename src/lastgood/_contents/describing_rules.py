"""Describing what a pickle of torch's would make: each call becomes a node, or the name of what is called.

Nothing is looked up or run, and no list says what is allowed: a file that must not be loaded can still be looked at.
"""

from collections.abc import Callable
from typing import Any

from lastgood._loading.pickle_judge import PickleJudge
from lastgood._loading.pickle_symbols import (
    DictSymbol,
    GlobalSymbol,
    ListSymbol,
    StorageSymbol,
    TupleSymbol,
    UsersSymbol,
    is_count,
)
from lastgood.format.mesh import element_count
from lastgood.format.nodes import (
    BytearrayNode,
    BytesNode,
    ComplexNode,
    DeviceNode,
    OpaqueNode,
    SizeNode,
    TensorNode,
    element_span,
    scalar_node,
)
from lastgood.format.spec import DTYPES, QUANTIZED_STORAGE_CLASSES, UNTYPED

_LATIN = ("latin1", "latin-1")
_PLAIN_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")

_DTYPES_OF_CLASSES = {info.storage_class: name for name, info in DTYPES.items() if info.storage_class}
_QUANTIZED_SIZES = {name: 4 if dtype == "qint32" else 1 for dtype, name in QUANTIZED_STORAGE_CLASSES.items()}


class DescribedStorage(StorageSymbol):
    """A storage by number; ``base`` is where in it this view of it begins, in elements."""

    __slots__ = ("base", "dtype", "number")

    def __init__(self, number: int, nbytes: int, dtype: str, base: int = 0) -> None:
        super().__init__(nbytes, 8 * DTYPES[dtype].itemsize if dtype in DTYPES else 8)
        self.number = number
        self.dtype = dtype
        self.base = base


class OrderedDictSymbol(DictSymbol):
    """An OrderedDict with its instance attributes."""

    __slots__ = ("attributes",)

    def __init__(self) -> None:
        super().__init__(has_state=True)
        self.attributes = DictSymbol(has_state=False)


class SetSymbol(ListSymbol):
    """A set."""

    __slots__ = ()


def storage_kind(storage_class: Any) -> tuple[str, int] | None:
    """The dtype of a storage class and the bytes of an element; ``None`` for what is no storage class."""
    if not isinstance(storage_class, GlobalSymbol) or not storage_class.name.startswith("torch."):
        return None
    name = storage_class.name.rpartition(".")[2]
    if name in _DTYPES_OF_CLASSES:
        dtype = _DTYPES_OF_CLASSES[name]
        return dtype, DTYPES[dtype].itemsize
    if name in _QUANTIZED_SIZES:
        return UNTYPED, _QUANTIZED_SIZES[name]
    return (UNTYPED, 1) if name == "UntypedStorage" else None


def opaque(type_name: str, storages: tuple[int, ...] = ()) -> OpaqueNode:
    """A value of which only the kind is known."""
    return OpaqueNode(0, 0, 0, storages, type_name)


class DescribingRules(PickleJudge):
    """Answers the calls of one file's pickles with nodes and symbols.

    ``size`` is that of the pickles in bytes: what descriptions copy out of them may not add up to much more.
    """

    refusal = "cannot be described"

    def call(self, function: Any, arguments: Any) -> Any:
        """What a call makes; of what is not described here, the name."""
        if not isinstance(function, GlobalSymbol):
            self.unsafe("calls a value that is not a plain name")
        rule = _RULES.get(function.name)
        items = arguments.items if isinstance(arguments, TupleSymbol) else ()
        made = None
        if rule is not None and rule[0] <= len(items) <= rule[1]:
            made = rule[2](self, *items)
        return UsersSymbol(function.name) if made is None else made

    def create(self, cls: Any, arguments: Any) -> Any:
        """An object made by ``cls.__new__``."""
        if not isinstance(cls, GlobalSymbol):
            self.unsafe("makes an object of a class that is not a plain name")
        items = arguments.items if isinstance(arguments, TupleSymbol) else ()
        if cls.name == "torch.nn.parameter.Parameter" and items and isinstance(items[0], TensorNode):
            return _flagged(items[0], "p")
        if cls.name == "collections.OrderedDict" and not items:
            return OrderedDictSymbol()
        return UsersSymbol(cls.name)

    def set_state(self, instance: Any, state: Any) -> None:
        """Attributes are described of an OrderedDict only; a value of another class has no description anyway."""
        if isinstance(instance, OrderedDictSymbol) and isinstance(state, DictSymbol):
            instance.attributes = state
        elif not isinstance(instance, UsersSymbol):
            self.broken("it sets the state of a value that has none")

    def use_as_key(self, key: Any) -> None:
        """Any key can be described."""

    # One method a call. Each returns what stands for the result, or None for arguments that torch.save never writes.

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: str, flags: str) -> Any:
        if dtype not in DTYPES:
            return UsersSymbol(f"torch.Tensor ({dtype})")
        if not isinstance(size, TupleSymbol) or not isinstance(stride, TupleSymbol):
            return None
        shape, strides = size.items, stride.items
        self._spend(8 * len(shape))
        if len(shape) != len(strides) or not all(map(is_count, (offset, *shape, *strides))):
            return None
        try:
            element_count(shape)
        except ValueError as error:
            self.broken(str(error))
        needed = (offset + element_span(shape, strides)) * DTYPES[dtype].itemsize
        if 0 not in shape and needed > storage.nbytes:
            self.broken(f"a tensor of the shape {shape} on a storage of {storage.nbytes} bytes")
        return TensorNode(storage.number, dtype, storage.base + offset, shape, strides, flags)

    def _typed_tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any = False, hooks: Any = None, bits: Any = None
    ) -> Any:
        if not isinstance(storage, DescribedStorage):
            return None
        # A storage without a dtype is one of bytes.
        dtype = "uint8" if storage.dtype == UNTYPED else storage.dtype
        return self._tensor(storage, offset, size, stride, dtype, _flags(grad, bits))

    def _untyped_tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, bits: Any = None
    ) -> Any:
        if not isinstance(storage, DescribedStorage) or not isinstance(dtype, GlobalSymbol):
            return None
        return self._tensor(storage, offset, size, stride, dtype.name.removeprefix("torch."), _flags(grad, bits))

    def _parameter(self, data: Any, grad: Any, *rest: Any) -> Any:
        return _flagged(data, "pg" if grad is True else "p") if isinstance(data, TensorNode) else None

    def _tensor_of_type(self, function: Any, cls: Any, arguments: Any, state: Any) -> Any:
        name = cls.name if isinstance(cls, GlobalSymbol) else None
        made = self.call(function, arguments)
        if name not in _PLAIN_CLASSES or not isinstance(made, TensorNode):
            return UsersSymbol(name) if name and isinstance(made, TensorNode) else made
        if isinstance(state, DictSymbol) and True in _values_of(state, "requires_grad"):
            return _flagged(made, "g")
        return made

    def _special_tensor(self, *arguments: Any) -> Any:
        return UsersSymbol("torch.Tensor")

    def _latin_bytes(self, text: Any, encoding: Any) -> bytes | None:
        if type(text) is not str or encoding not in _LATIN:
            return None
        self._spend(len(text))
        try:
            return text.encode("latin-1")
        except UnicodeEncodeError:
            return None

    def _bytes(self, text: Any, encoding: Any) -> Any:
        encoded = self._latin_bytes(text, encoding)
        return None if encoded is None else BytesNode(encoded)

    def _bytearray(self, content: Any = "", encoding: Any = "latin-1") -> Any:
        encoded = content.value if isinstance(content, BytesNode) else self._latin_bytes(content, encoding)
        return None if encoded is None else BytearrayNode(encoded)

    def _set(self, items: Any) -> Any:
        if not isinstance(items, ListSymbol):
            return None
        self._spend(8 * len(items.items))
        made = SetSymbol()
        made.items = list(items.items)
        return made

    def _ordered_dict(self, pairs: Any = None) -> Any:
        made = OrderedDictSymbol()
        if isinstance(pairs, ListSymbol):  # as Python 2 wrote it
            self._spend(8 * len(pairs.items))
            for pair in pairs.items:
                if not isinstance(pair, (ListSymbol, TupleSymbol)) or len(pair.items) != 2:
                    return None
                made.items.extend(pair.items)
        return made if pairs is None or isinstance(pairs, ListSymbol) else None

    def _size(self, lengths: Any) -> Any:
        if not isinstance(lengths, TupleSymbol):
            return None
        self._spend(8 * len(lengths.items))
        integers = all(type(length) is int and -(2**63) <= length < 2**63 for length in lengths.items)
        return SizeNode(lengths.items) if integers else None

    def _complex(self, real: Any, imaginary: Any) -> Any:
        if type(real) is not float or type(imaginary) is not float:
            return None
        node = scalar_node(complex(real, imaginary))
        assert isinstance(node, ComplexNode)
        return node

    def _device(self, kind: Any, index: Any = None) -> Any:
        if type(kind) is not str or not (index is None or is_count(index)):
            return None
        kind, _, number = kind.partition(":")
        return DeviceNode(kind, int(number[:9]) if number.isdecimal() else index)


def _values_of(state: DictSymbol, wanted: str) -> list[Any]:
    return [value for key, value in zip(state.items[::2], state.items[1::2], strict=True) if key == wanted]


def _flags(grad: Any, bits: Any) -> str:
    flags = "g" if grad is True else ""
    if isinstance(bits, DictSymbol):
        flags += "c" * (True in _values_of(bits, "conj")) + "n" * (True in _values_of(bits, "neg"))
    return flags


def _flagged(node: TensorNode, letters: str) -> TensorNode:
    """The same view as an object of its own, with flags added."""
    flags = "".join(letter for letter in "pgcn" if letter in node.flags + letters)
    return TensorNode(node.storage, node.dtype, node.offset, node.shape, node.stride, flags)


_RULES: dict[str, tuple[int, int, Callable[..., Any]]] = {
    # name: fewest arguments, most arguments, rule
    "torch._utils._rebuild_tensor": (4, 4, DescribingRules._typed_tensor),
    "torch._utils._rebuild_tensor_v2": (6, 7, DescribingRules._typed_tensor),
    "torch._utils._rebuild_tensor_v3": (7, 8, DescribingRules._untyped_tensor),
    "torch._utils._rebuild_qtensor": (0, 99, DescribingRules._special_tensor),
    "torch._utils._rebuild_sparse_tensor": (0, 99, DescribingRules._special_tensor),
    "torch._utils._rebuild_nested_tensor": (0, 99, DescribingRules._special_tensor),
    "torch._utils._rebuild_meta_tensor_no_storage": (0, 99, DescribingRules._special_tensor),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": (0, 99, DescribingRules._special_tensor),
    "torch._utils._rebuild_device_tensor_from_numpy": (0, 99, DescribingRules._special_tensor),
    "torch._utils._rebuild_parameter": (3, 3, DescribingRules._parameter),
    "torch._utils._rebuild_parameter_with_state": (4, 4, DescribingRules._parameter),
    "torch._tensor._rebuild_from_type_v2": (4, 4, DescribingRules._tensor_of_type),
    "torch.Size": (1, 1, DescribingRules._size),
    "torch.device": (1, 2, DescribingRules._device),
    "collections.OrderedDict": (0, 1, DescribingRules._ordered_dict),
    "_codecs.encode": (2, 2, DescribingRules._bytes),
    "builtins.bytearray": (0, 2, DescribingRules._bytearray),
    "builtins.set": (1, 1, DescribingRules._set),
    "builtins.complex": (2, 2, DescribingRules._complex),
}
