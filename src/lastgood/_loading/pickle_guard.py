"""Judging a pickle before torch's restricted unpickler sees it, by following its opcodes without doing what they say.

The unpickler runs nothing that is not on its list, but a few bytes can make what is on the list take any amount of
memory or time: ``bytearray(10**11)``, a tensor far larger than its storage, a tuple that holds itself twice at each of
fifty levels. So a pickle may build values only in the ways in which ``torch.save`` writes them, out of storages that
the file really holds, and may not multiply what it holds. Calls of what the user has allowed by
``torch.serialization.add_safe_globals`` are the user's choice and are not judged.
"""

import struct
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from lastgood._loading.pickle_symbols import (
    BYTES,
    OBJECT,
    ORDERED_DICT,
    TENSOR,
    WIDE_TENSOR,
    DictSymbol,
    GlobalSymbol,
    ListSymbol,
    StorageSymbol,
    TupleSymbol,
    is_count,
    symbols_weight,
)
from lastgood.errors import UnsafeCheckpointError
from lastgood.format.archive import corrupt
from lastgood.format.index import element_span
from lastgood.format.spec import DTYPES, QUANTIZED_STORAGE_CLASSES

ClaimStorage = Callable[[TupleSymbol, Callable[[str], NoReturn]], StorageSymbol]
"""The storage behind a persistent id, or a call of the given function with what is wrong with it."""

LARGEST_KEY = 1000
"""Values that a dict or set would hash may hold at most this many others."""

_SPARE_WORK = 1024 * 1024
_ITEM_COST = 8
_LATIN = ("latin1", "latin-1")

_ITEMSIZES: dict[str, int] = {info.storage_class: info.itemsize for info in DTYPES.values() if info.storage_class}
_ITEMSIZES |= {
    name: getattr(torch, dtype).itemsize for dtype, name in QUANTIZED_STORAGE_CLASSES.items() if hasattr(torch, dtype)
}
_ITEMSIZES["UntypedStorage"] = 1


def storage_itemsize(storage_class: Any) -> int | None:
    """Bytes an element of the storage class that a persistent id names; ``None`` if it names none."""
    if not isinstance(storage_class, GlobalSymbol) or storage_class.name.partition(".")[0] != "torch":
        return None
    return _ITEMSIZES.get(storage_class.name.rpartition(".")[2])


class Judge:
    """Decides on the calls of one file's pickles: each must be one that ``torch.save`` writes.

    ``size`` is that of the file in bytes: what calls copy or hash may not add up to much more.
    """

    def __init__(self, path: str, size: int, claim_storage: ClaimStorage) -> None:
        self._path = path
        self._claim_storage = claim_storage
        self._work_left = 4 * size + _SPARE_WORK
        self._allowed = _user_allowed()
        self._dict_items = 0

    def unsafe(self, what: str) -> NoReturn:
        """Refuse the file for what it would do."""
        raise UnsafeCheckpointError(
            f"{self._path} is not safe to load: {what}. torch.save writes nothing like it; nothing of the file was "
            "run or loaded.",
            path=self._path,
        )

    def broken(self, what: str) -> NoReturn:
        """Refuse the file for what it is not."""
        raise corrupt(self._path, f"its pickle cannot be right: {what}")

    def persistent(self, identity: Any) -> Any:
        """The storage that a persistent id stands for."""
        if not isinstance(identity, TupleSymbol):
            self.unsafe("its pickle refers to something that is not a storage")
        return self._claim_storage(identity, self.broken)

    def call(self, function: Any, arguments: Any) -> Any:
        """What a call makes."""
        if not isinstance(function, GlobalSymbol):
            self.unsafe("its pickle calls a value that is not a plain name")
        if self._is_users(function.name):
            return OBJECT
        if not isinstance(arguments, TupleSymbol):
            self.unsafe(f"it calls {function.name} with something that is not a tuple of arguments")
        rule = _RULES.get(function.name)
        if rule is None:
            self._unknown_call(function.name)
        items = arguments.items
        try:
            made = rule(self, *items)
        except TypeError:  # another number of arguments
            made = None
        if made is None:
            self.unsafe(f"it calls {function.name} with arguments ({', '.join(map(_shown, items))})")
        return made

    def create(self, cls: Any, arguments: Any) -> Any:
        """What the creation of a class's object makes."""
        if isinstance(cls, GlobalSymbol) and self._is_users(cls.name):
            return OBJECT
        if not isinstance(cls, GlobalSymbol) or not isinstance(arguments, TupleSymbol):
            self.unsafe("its pickle makes an object of a class that is not a plain name")
        items = arguments.items
        if cls.name == "torch.nn.parameter.Parameter" and items and _is_tensor(items[0]):
            return items[0]
        if cls.name in ("collections.OrderedDict", "collections.Counter") and not items:
            return DictSymbol(ORDERED_DICT)
        self._unknown_call(cls.name)

    def build(self, instance: Any, state: Any) -> None:
        """Refuse setting the state of anything that torch.save does not set the state of."""
        if instance is OBJECT:
            return
        if not isinstance(instance, DictSymbol) or instance.kind is not ORDERED_DICT or type(state) is not DictSymbol:
            self.unsafe("its pickle sets the state of a value that has none")

    def hashed(self, key: Any) -> None:
        """Refuse a key whose hash takes long."""
        self._dict_items += 1
        if isinstance(key, TupleSymbol) and key.weight > LARGEST_KEY:
            self.unsafe("its pickle uses a huge tuple as a key")

    def spend(self, cost: int) -> bool:
        """Count work that is not bounded by the number of opcodes; refuse the file when it is out of proportion."""
        self._work_left -= cost
        if self._work_left < 0:
            self.unsafe("its pickle makes the same large value again and again")
        return True

    def _is_users(self, name: str) -> bool:
        # What is neither torch's nor Python's own can only be called if the user allowed it: torch sees to that.
        return name in self._allowed or name.partition(".")[0] not in _JUDGED_PACKAGES

    def _unknown_call(self, name: str) -> NoReturn:
        raise UnsafeCheckpointError(
            f"{self._path} calls {name}, which is not on the list of what is safe to load; nothing of the file was run. "
            f"If you trust the file, allow it by torch.serialization.add_safe_globals([{name}]) (for values of "
            "torch.distributed or torch.nested: import that module first) and load again.",
            path=self._path,
        )

    # What each call may look like: every rule returns what the call makes, or None for arguments it does not take.

    def _view(self, storage: Any, offset: Any, size: Any, stride: Any, itemsize: int | None) -> Any:
        if not isinstance(storage, StorageSymbol) or itemsize is None:
            return None
        if not (isinstance(size, TupleSymbol) and isinstance(stride, TupleSymbol) and is_count(offset)):
            return None
        shape, steps = size.items, stride.items
        if len(shape) != len(steps) or len(shape) > 64 or not all(map(is_count, (*shape, *steps))):
            return None
        numel = 1
        for length in shape:
            numel *= length
        if numel and (offset + element_span(shape, steps)) * itemsize > storage.nbytes:
            self.broken(f"a tensor of shape {shape} reaches beyond its storage of {storage.nbytes} bytes")
        if numel >= 2**63:
            self.broken(f"a tensor has the impossible shape {shape}")
        return TENSOR if numel * itemsize <= storage.nbytes else WIDE_TENSOR

    def _typed_tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
        itemsize = storage.itemsize if isinstance(storage, StorageSymbol) else None
        return self._view(storage, offset, size, stride, itemsize) if len(rest) in (0, 2, 3) else None

    def _untyped_tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
    ) -> Any:
        return self._view(storage, offset, size, stride, _dtype_itemsize(dtype))

    def _quantized_tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, quantizer: Any, grad: Any, hooks: Any
    ) -> Any:
        itemsize = storage.itemsize if isinstance(storage, StorageSymbol) else None
        tensor = self._view(storage, offset, size, stride, itemsize)
        # torch makes room for all its elements before it looks at the storage.
        return tensor if tensor is TENSOR and self.spend(storage.nbytes) else None

    def _sparse_tensor(self, layout: Any, data: Any) -> Any:
        if not isinstance(data, TupleSymbol):
            return None
        parts = [part for part in data.items if _is_tensor(part)]
        return TENSOR if len(parts) in (2, 3) and WIDE_TENSOR not in parts else None

    def _nested_tensor(self, *parts: Any) -> Any:
        return TENSOR if len(parts) == 4 and all(part is TENSOR or part is OBJECT for part in parts) else None

    def _parameter(self, data: Any, *rest: Any) -> Any:
        return data if _is_tensor(data) and len(rest) in (2, 3) else None

    def _meta_tensor(self, dtype: Any, size: Any, stride: Any, grad: Any) -> Any:
        return WIDE_TENSOR if isinstance(size, TupleSymbol) and isinstance(stride, TupleSymbol) else None

    def _wrapper(self, *arguments: Any) -> Any:
        return OBJECT

    def _from_type(self, function: Any, cls: Any, arguments: Any, state: Any) -> Any:
        return self.call(function, arguments)

    def _device_tensor(self, data: Any, dtype: Any, device: Any, grad: Any) -> Any:
        # Copies, and to another dtype at that.
        if data is OBJECT:
            return WIDE_TENSOR
        return TENSOR if data is TENSOR and self.spend(self._largest_copy) else None

    @property
    def _largest_copy(self) -> int:
        return 0

    def _bytes(self, text: Any, encoding: Any) -> Any:
        return BYTES if type(text) is str and encoding in _LATIN and self.spend(len(text)) else None

    def _bytearray(self, content: Any = "", encoding: Any = "latin-1") -> Any:
        if content is BYTES and self.spend(_SPARE_WORK // 16):
            return OBJECT
        return OBJECT if type(content) is str and encoding in _LATIN and self.spend(len(content)) else None

    def _set(self, items: Any) -> Any:
        if not isinstance(items, (ListSymbol, TupleSymbol)):
            return None
        self.spend(_ITEM_COST * symbols_weight(items.items))
        for item in items.items:
            self.hashed(item)
        return OBJECT

    def _ordered_dict(self, pairs: Any = None) -> Any:
        if isinstance(pairs, ListSymbol):  # as Python 2 wrote it
            for pair in pairs.items:
                if not isinstance(pair, (ListSymbol, TupleSymbol)) or len(pair.items) != 2:
                    return None
                self.hashed(pair.items[0])
            self.spend(_ITEM_COST * len(pairs.items))
        elif pairs is not None:
            return None
        return DictSymbol(ORDERED_DICT)

    def _counter(self, counts: Any = None) -> Any:
        if counts is not None and not (isinstance(counts, DictSymbol) and self.spend(_ITEM_COST * self._dict_items)):
            return None
        return DictSymbol(ORDERED_DICT)

    def _size(self, lengths: Any) -> Any:
        if not isinstance(lengths, TupleSymbol) or not all(map(is_count, lengths.items)):
            return None
        return lengths if self.spend(_ITEM_COST * len(lengths.items)) else None

    def _device(self, kind: Any, number: Any = 0) -> Any:
        return OBJECT if type(kind) is str and type(number) is int else None

    def _complex(self, real: Any, imaginary: Any) -> Any:
        return OBJECT if type(real) in (int, float) and type(imaginary) in (int, float) else None

    def _layout(self, name: Any) -> Any:
        return OBJECT if type(name) is str else None
