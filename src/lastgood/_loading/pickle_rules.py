"""Which calls a pickle may make: those that ``torch.save`` writes, on what the file really holds."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from lastgood._loading.pickle_judge import PickleJudge
from lastgood._loading.pickle_symbols import (
    PLAIN,
    USERS,
    BytesSymbol,
    DictSymbol,
    GlobalSymbol,
    ListSymbol,
    StorageSymbol,
    TensorSymbol,
    TupleSymbol,
    is_count,
)
from lastgood.errors import UnsafeCheckpointError
from lastgood.format.nodes import element_span
from lastgood.format.spec import DTYPES, QUANTIZED_STORAGE_CLASSES

LARGEST_KEY = 1000
"""A tuple that is used as a key may hold this many values, those of tuples in it included."""

_ITEM_COST = 8
_LATIN = ("latin1", "latin-1")

_ITEMSIZES: dict[str, int] = {info.storage_class: info.itemsize for info in DTYPES.values() if info.storage_class}
_ITEMSIZES |= {
    name: getattr(torch, dtype).itemsize for dtype, name in QUANTIZED_STORAGE_CLASSES.items() if hasattr(torch, dtype)
}
_ITEMSIZES["UntypedStorage"] = 1
_PACKED_BITS = {"QUInt4x2Storage": 4, "QUInt2x4Storage": 2}
"""Storages of which each byte holds several elements: their size counts bytes, the shapes of tensors elements."""


def storage_of(storage_class: Any, numel: Any) -> StorageSymbol | None:
    """A storage as a persistent id describes it, by class and size; ``None`` if these are none."""
    if not (isinstance(storage_class, GlobalSymbol) and storage_class.name.startswith("torch.") and is_count(numel)):
        return None
    name = storage_class.name.rpartition(".")[2]
    itemsize = _ITEMSIZES.get(name)
    return None if itemsize is None else StorageSymbol(numel * itemsize, _PACKED_BITS.get(name, 8 * itemsize))


class PickleRules(PickleJudge):
    """Judges the calls of one file's pickles. What they refuse raises; what they allow returns what would be made.

    ``size`` is that of the file in bytes: what calls copy or hash may not add up to much more.
    """

    def __init__(self, path: str, size: int) -> None:
        super().__init__(path, size)
        self._users = _names_that_the_user_allowed()
        self._dict_items = 0

    def call(self, function: Any, arguments: Any) -> Any:
        """A call of ``function``."""
        if not isinstance(function, GlobalSymbol):
            self.unsafe("calls a value that is not a plain name")
        if self._is_users(function.name):
            return USERS
        rule = _RULES.get(function.name)
        if rule is None:
            self._refuse_name(function.name)
        made = None
        if isinstance(arguments, TupleSymbol):
            least, most, judge = rule
            if least <= len(arguments.items) <= most:
                made = judge(self, *arguments.items)
        if made is None:
            self.unsafe(f"calls {function.name} with arguments that it never gets")
        return made

    def create(self, cls: Any, arguments: Any) -> Any:
        """An object made by ``cls.__new__``."""
        if not isinstance(cls, GlobalSymbol):
            self.unsafe("makes an object of a class that is not a plain name")
        if self._is_users(cls.name):
            return USERS
        items = arguments.items if isinstance(arguments, TupleSymbol) else (None,)
        if cls.name == "torch.nn.parameter.Parameter" and items and isinstance(items[0], TensorSymbol):
            return items[0]
        if cls.name in ("collections.OrderedDict", "collections.Counter") and not items:
            return DictSymbol(has_state=True)
        self._refuse_name(cls.name)

    def set_state(self, instance: Any, state: Any) -> None:
        """The setting of an object's attributes."""
        if instance is USERS:
            return
        if not (isinstance(instance, DictSymbol) and instance.has_state and isinstance(state, DictSymbol)):
            self.unsafe("sets the state of a value that has none")

    def use_as_key(self, key: Any) -> None:
        """The use of a value as a key of a dict or set."""
        self._dict_items += 1
        if isinstance(key, TupleSymbol) and key.weight > LARGEST_KEY:
            self.unsafe("uses a huge tuple as a key")

    def _is_users(self, name: str) -> bool:
        # Of what is not torch's, torch's own list has but the few names with a rule. Anything else can only be called
        # if the user allowed it: torch sees to that.
        return name in self._users or not (name in _RULES or name.startswith("torch."))

    def _refuse_name(self, name: str) -> NoReturn:
        raise UnsafeCheckpointError(
            f"{self._path} calls {name}, which is not on the list of what is safe to load; nothing of the file was "
            f"run. If you trust the file, allow it by torch.serialization.add_safe_globals([{name}]) (for values of "
            "torch.distributed and torch.nested: import that module first) and load again.",
            path=self._path,
        )

    # One method a call. Each returns what the call makes, or None where torch.save writes no such arguments.

    def _view(self, storage: Any, offset: Any, size: Any, stride: Any, bits: int | None) -> TensorSymbol | None:
        if not (isinstance(storage, StorageSymbol) and isinstance(size, TupleSymbol) and bits is not None):
            return None
        if not (isinstance(stride, TupleSymbol) and len(size.items) == len(stride.items)):
            return None
        self._spend(_ITEM_COST * len(size.items))
        if not (is_count(offset) and all(map(is_count, size.items)) and all(map(is_count, stride.items))):
            return None
        numel = 0 if 0 in size.items else 1
        for length in size.items:
            numel *= length
            if numel >= 2**63:
                self.broken(f"a tensor of the shape {size.items}")
        if numel and (offset + element_span(size.items, stride.items)) * bits > 8 * storage.nbytes:
            self.broken(f"a tensor of the shape {size.items} on a storage of {storage.nbytes} bytes")
        return TensorSymbol(numel * bits // 8, wide=numel * bits > 8 * storage.nbytes)

    def _typed_tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
        bits = storage.element_bits if isinstance(storage, StorageSymbol) else None
        return self._view(storage, offset, size, stride, bits)

    def _untyped_tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
    ) -> Any:
        return self._view(storage, offset, size, stride, _element_bits(dtype))

    def _quantized_tensor(self, storage: Any, offset: Any, size: Any, stride: Any, quantizer: Any, *rest: Any) -> Any:
        tensor = self._typed_tensor(storage, offset, size, stride)
        # torch makes room for all elements before it looks at the storage.
        return self._copied(tensor)

    def _copied(self, tensor: Any, factor: int = 1) -> Any:
        if not isinstance(tensor, TensorSymbol) or tensor.wide:
            return None
        self._spend(factor * tensor.nbytes)
        return tensor

    def _sparse_tensor(self, layout: Any, data: Any) -> Any:
        parts = data.items if isinstance(data, TupleSymbol) else ()
        tensors = [part for part in parts if isinstance(part, TensorSymbol)]
        if len(tensors) not in (2, 3) or any(tensor.wide for tensor in tensors):
            return None
        return TensorSymbol(0, wide=True)

    def _nested_tensor(self, *parts: Any) -> Any:
        if any(not isinstance(part, TensorSymbol) or part.wide for part in parts):
            return None
        return TensorSymbol(0, wide=True)

    def _parameter(self, data: Any, *rest: Any) -> Any:
        return data if isinstance(data, TensorSymbol) or data is USERS else None

    def _tensor_without_data(self, *arguments: Any) -> Any:
        return TensorSymbol(0, wide=True)

    def _tensor_of_type(self, function: Any, cls: Any, arguments: Any, state: Any) -> Any:
        return self.call(function, arguments)

    def _device_tensor(self, data: Any, dtype: Any, device: Any, grad: Any) -> Any:
        if data is USERS:  # an array of numpy's
            return TensorSymbol(0, wide=True)
        return self._copied(data, 16)  # to any dtype

    def _bytes(self, text: Any, encoding: Any) -> Any:
        if type(text) is not str or encoding not in _LATIN:
            return None
        self._spend(len(text))
        return BytesSymbol(len(text))

    def _bytearray(self, content: Any = "", encoding: Any = "latin-1") -> Any:
        if isinstance(content, BytesSymbol):
            self._spend(content.size)
            return PLAIN
        return PLAIN if self._bytes(content, encoding) is not None else None

    def _set(self, items: Any) -> Any:
        if not isinstance(items, ListSymbol):
            return None
        self._spend(_ITEM_COST * len(items.items))
        for item in items.items:
            self.use_as_key(item)
        return PLAIN

    def _ordered_dict(self, pairs: Any = None) -> Any:
        if isinstance(pairs, ListSymbol):  # as Python 2 wrote it
            self._spend(_ITEM_COST * len(pairs.items))
            for pair in pairs.items:
                if not isinstance(pair, (ListSymbol, TupleSymbol)) or not pair.items:
                    return None
                self.use_as_key(pair.items[0])
        elif pairs is not None:
            return None
        return DictSymbol(has_state=True)

    def _counter(self, counts: Any = None) -> Any:
        if counts is not None and not isinstance(counts, DictSymbol):
            return None
        self._spend(_ITEM_COST * self._dict_items)
        return DictSymbol(has_state=True)

    def _size(self, lengths: Any) -> Any:
        # Its numbers may be negative; where it is a tensor's size, that is judged there.
        if not isinstance(lengths, TupleSymbol) or not all(type(length) is int for length in lengths.items):
            return None
        self._spend(_ITEM_COST * len(lengths.items))
        return lengths

    def _plain(self, *scalars: Any) -> Any:
        return PLAIN if all(type(scalar) in (int, float, str) for scalar in scalars) else None


def _element_bits(dtype: Any) -> int | None:
    if not isinstance(dtype, GlobalSymbol) or not dtype.name.startswith("torch."):
        return None
    # Not by getattr: torch imports some of its modules when they are asked for.
    found = vars(torch).get(dtype.name.removeprefix("torch."))
    return 8 * found.itemsize if isinstance(found, torch.dtype) else None


def _names_that_the_user_allowed() -> frozenset[str]:
    names = set()
    for allowed in torch.serialization.get_safe_globals():
        if isinstance(allowed, tuple):
            names.add(str(allowed[1]))
        else:
            names.add(f"{getattr(allowed, '__module__', '')}.{getattr(allowed, '__qualname__', '')}")
    return frozenset(names)


_RULES: dict[str, tuple[int, int, Callable[..., Any]]] = {
    # name: fewest arguments, most arguments, rule
    "torch._utils._rebuild_tensor": (4, 4, PickleRules._typed_tensor),
    "torch._utils._rebuild_tensor_v2": (6, 7, PickleRules._typed_tensor),
    "torch._utils._rebuild_tensor_v3": (7, 8, PickleRules._untyped_tensor),
    "torch._utils._rebuild_qtensor": (7, 7, PickleRules._quantized_tensor),
    "torch._utils._rebuild_sparse_tensor": (2, 2, PickleRules._sparse_tensor),
    "torch._utils._rebuild_nested_tensor": (4, 4, PickleRules._nested_tensor),
    "torch._utils._rebuild_parameter": (3, 3, PickleRules._parameter),
    "torch._utils._rebuild_parameter_with_state": (4, 4, PickleRules._parameter),
    "torch._utils._rebuild_meta_tensor_no_storage": (4, 4, PickleRules._tensor_without_data),
    "torch._utils._rebuild_wrapper_subclass": (7, 8, PickleRules._tensor_without_data),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": (4, 4, PickleRules._device_tensor),
    "torch._utils._rebuild_device_tensor_from_numpy": (4, 4, PickleRules._device_tensor),
    "torch._tensor._rebuild_from_type_v2": (4, 4, PickleRules._tensor_of_type),
    "torch.serialization._get_layout": (1, 1, PickleRules._plain),
    "torch.Size": (1, 1, PickleRules._size),
    "torch.device": (1, 2, PickleRules._plain),
    "collections.OrderedDict": (0, 1, PickleRules._ordered_dict),
    "collections.Counter": (0, 1, PickleRules._counter),
    "_codecs.encode": (2, 2, PickleRules._bytes),
    "builtins.bytearray": (0, 2, PickleRules._bytearray),
    "builtins.set": (1, 1, PickleRules._set),
    "builtins.complex": (2, 2, PickleRules._plain),
}
