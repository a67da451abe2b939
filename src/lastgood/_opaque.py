"""Opaque values: what the index cannot describe is pickled as Python and torch would, but with our storages."""

import copyreg
import io
import pickle
import pickletools
import sys
import types
import warnings
import zipfile
from collections import Counter, OrderedDict
from typing import Any

import torch

from lastgood._storage_uses import StorageUse, StorageUses, UnsavableStorageError, location_of, without_bytes
from lastgood._torch_internals import untyped_storage_of
from lastgood.errors import UnsafeValueWarning, UnsupportedStateError
from lastgood.format.nodes import element_span
from lastgood.format.spec import (
    DTYPES,
    PICKLE_RECORD,
    QUANTIZED_STORAGE_CLASSES,
    TORCH_FORMAT_VERSION,
    UNTYPED,
    VERSION_RECORD,
)

_PROTOCOL = 2
_LIST_ITEMS, _DICT_ITEMS = _ITERATORS = (3, 4)
_FILLED: dict[int, tuple[type, ...]] = {_LIST_ITEMS: (list,), _DICT_ITEMS: (dict, OrderedDict, Counter)}
"""The classes that torch's safe loader puts list items or dict items into; for any other it refuses the file."""

_SUB_BYTE = ("quint4x2", "quint2x4")
_NOT_REDUCED = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)


def type_name(value: Any) -> str:
    """The full name of a value's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


class _StoragePlace:
    """Stands in a reduction for a storage whose first saved byte is not its first byte."""

    def __init__(self, storage: torch.UntypedStorage, dtype: str) -> None:
        self.storage = storage
        self.dtype = dtype


class OpaquePickler:
    """Pickles values in two steps: a rehearsal that finds the storages they use, and the pickle itself.

    An object is reduced once; both steps see the same parts, so that temporary tensors made by a reduction are
    the same ones. One memo spans all pickles: objects that two values share stay shared.
    """

    def __init__(self, uses: StorageUses) -> None:
        self._uses = uses
        self._reductions: dict[int, tuple[Any, Any]] = {}
        self._output = io.BytesIO()
        self._pickler: _Pickler | None = None
        self._path = ""
        self._named: set[int] = set()
        self._unfillable: set[str] = set()
        self._empty: dict[int, torch.UntypedStorage] = {}

    def rehearse(self, value: Any, path: str) -> None:
        """Find the storages that ``value`` uses. Warns, naming ``path``, if a safe load will refuse the value."""
        output = io.BytesIO()
        self._unfillable.clear()
        self._dump(_Pickler(output, self, final=False), value, path)
        # The offsets in this pickle are not yet final; what it names is.
        _warn_if_refused(output.getvalue(), sorted(self._unfillable), value, path)

    def pickle(self, value: Any, path: str) -> tuple[bytes, int, tuple[int, ...]]:
        """The final body (no protocol header, no stop), how many memo entries it fills, and its storages' numbers."""
        if self._pickler is None:
            self._pickler = _Pickler(self._output, self, final=True)
        self._output.seek(0)
        self._output.truncate()
        self._named.clear()
        self._dump(self._pickler, value, path)
        whole = self._output.getvalue()
        memo_size = sum(opcode.name in ("BINPUT", "LONG_BINPUT") for opcode, _, _ in pickletools.genops(whole))
        return whole[2:-1], memo_size, tuple(sorted(self._named))

    def _dump(self, pickler: "_Pickler", value: Any, path: str) -> None:
        self._path = path
        try:
            pickler.dump(value)
        except UnsupportedStateError:
            raise
        except UnsavableStorageError as error:
            raise UnsupportedStateError(f"a tensor in the value at key {path!r} {error}", tensor=path) from None
        except Exception as error:
            place = f"the value at key {path!r}" if path else "the object to save"
            raise UnsupportedStateError(
                f"{place} ({type_name(value)}) cannot be pickled: {error}; nothing was written. "
                "Remove it from the state, or save what it is made of.",
                tensor=path,
            ) from error

    def reduction_of(self, value: Any, *, final: bool) -> Any:
        """What pickle's reducer_override should answer for ``value``."""
        if isinstance(value, _NOT_REDUCED) or untyped_storage_of(value) is not None:
            return NotImplemented
        known = self._reductions.get(id(value))
        if known is None:
            known = self._reductions[id(value)] = (value, self._reduce(value))
        reduction = known[1]
        if not isinstance(reduction, tuple):
            return reduction
        parts = [
            iter(part) if number in _ITERATORS and part is not None else part for number, part in enumerate(reduction)
        ]
        self._unfillable.update(_unfillable_classes(value, reduction))
        if isinstance(value, torch.Tensor):
            parts[1] = self._with_places(parts[1], final=final)
        return tuple(parts)

    def _reduce(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.device.type == "meta":
            # torch would write its shape and bring back a tensor without data: found out on the day of the restore.
            raise UnsavableStorageError(without_bytes(value.device))
        if isinstance(value, torch.Tensor) and value.is_quantized and not isinstance(value, torch.nn.Parameter):
            # A parameter pickles its data as a tensor of its own, which comes by here in its turn.
            attributes = value.__dict__
            value = _without_repeats(value)
            value.__dict__.update(attributes)
        reducer = copyreg.dispatch_table.get(type(value))
        reduction = reducer(value) if reducer is not None else value.__reduce_ex__(_PROTOCOL)
        if isinstance(reduction, tuple):
            if isinstance(value, torch.Tensor) and (value.is_nested or value.layout is not torch.strided):
                reduction = (reduction[0], _without_repeats(reduction[1]), *reduction[2:])
            # List items and dict items come as iterators, which can be run through only once.
            return tuple(
                list(part) if number in _ITERATORS and part is not None else part
                for number, part in enumerate(reduction)
            )
        return reduction

    def _with_places(self, arguments: Any, *, final: bool) -> Any:
        """Replace (storage, offset, size, stride) in a tensor's reduction by the place where the data will stand."""
        if not isinstance(arguments, tuple):
            return arguments
        is_place = len(arguments) >= 4 and isinstance(arguments[1], int)
        storage = untyped_storage_of(arguments[0]) if is_place else None
        if storage is None:
            return tuple(
                self._with_places(part, final=final) if type(part) is tuple and part else part for part in arguments
            )
        offset, size, stride = arguments[1:4]
        if storage.nbytes() == 0:
            # Without a byte there is nothing to share, and no reason to ask for one dtype.
            storage = self._empty.setdefault(id(arguments), torch.empty(0, device=storage.device).untyped_storage())
        dtype = next((part for part in arguments[4:] if isinstance(part, torch.dtype)), None)
        dtype_name = UNTYPED if dtype is not None else _dtype_name(arguments[0].dtype)
        itemsize = (dtype or arguments[0].dtype).itemsize
        if dtype is not None and arguments[4] is True:
            raise UnsupportedStateError(
                f"the value at key {self._path!r} is or holds a tensor of {dtype} that requires grad, with attributes "
                "or a class of its own, which torch cannot load again; nothing was written. Save its detach().",
                tensor=self._path,
            )
        if final:
            use = self._uses.find(storage)
            offset = 0 if 0 in size else offset - use.start // itemsize
        elif dtype_name in _SUB_BYTE:
            self._uses.add_whole(storage, dtype_name)
        else:
            span = element_span(tuple(size), tuple(stride))
            self._uses.add_span(storage, dtype_name, itemsize, offset, span)
        return (_StoragePlace(storage, dtype_name), offset, *arguments[2:])

    def persistent_id(self, value: Any) -> Any:
        """torch's persistent id of a storage; ``None`` for anything else."""
        if isinstance(value, _StoragePlace):
            return self._storage_id(self._uses.find(value.storage), value.dtype)
        storage = untyped_storage_of(value)
        if storage is None:
            return None
        dtype = UNTYPED if isinstance(value, torch.UntypedStorage) else _dtype_name(value.dtype)
        return self._storage_id(self._uses.add_whole(storage, dtype), dtype)

    def _storage_id(self, use: StorageUse, dtype: str) -> tuple[Any, ...]:
        # torch takes a storage without a dtype for one of uint8.
        if dtype not in (UNTYPED, use.dtype) and (dtype, use.dtype) != ("uint8", UNTYPED):
            raise UnsupportedStateError(
                f"the value at key {self._path!r} uses, as {dtype}, memory that another value uses as another dtype; "
                "nothing was written. Save a clone of one of them.",
                tensor=self._path,
            )
        name = QUANTIZED_STORAGE_CLASSES.get(dtype) or (DTYPES[dtype].storage_class if dtype in DTYPES else None)
        itemsize = getattr(torch, dtype).itemsize if name else 1
        if (name is None and dtype != UNTYPED) or use.nbytes % itemsize:
            raise UnsupportedStateError(
                f"the value at key {self._path!r} keeps {use.nbytes} bytes as {dtype}, which torch cannot load again; "
                "nothing was written. Save them as a tensor of another dtype, such as uint8.",
                tensor=self._path,
            )
        self._named.add(use.number)
        storage_class = getattr(torch, name or "UntypedStorage")
        return ("storage", storage_class, str(use.number), location_of(use.storage), use.nbytes // itemsize)


class _Pickler(pickle.Pickler):
    """Asks its owner about storages and reductions."""

    def __init__(self, output: io.BytesIO, owner: OpaquePickler, *, final: bool) -> None:
        super().__init__(output, _PROTOCOL)
        self._owner = owner
        self._final = final

    def persistent_id(self, value: Any) -> Any:
        return self._owner.persistent_id(value)

    def reducer_override(self, value: Any) -> Any:
        return self._owner.reduction_of(value, final=self._final)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _without_repeats(value: Any) -> Any:
    """A tensor, or the tensors in a tuple, with memory for every element.

    A load refuses a quantised tensor, or a part of a sparse or nested one, that has more elements than memory: making
    the whole of it could take any amount.
    """
    if type(value) is tuple:
        return tuple(map(_without_repeats, value))
    if not isinstance(value, torch.Tensor) or value.is_nested or value.layout is not torch.strided:
        return value
    try:
        repeats = value.numel() > element_span(tuple(value.shape), value.stride())
    except RuntimeError:  # has no strides
        return value
    return value.contiguous() if repeats else value


def _unfillable_classes(value: Any, reduction: tuple[Any, ...]) -> set[str]:
    """The class of what a reduction makes, if it then has items put into it that torch's safe loader refuses."""
    made, arguments = reduction[:2]
    if made is copyreg.__newobj__:  # type: ignore[attr-defined]
        made = arguments[0]
    if not isinstance(made, type):
        made = type(value)
    items = dict(enumerate(reduction))
    refused = any(items.get(number) and made not in filled for number, filled in _FILLED.items())
    return {f"{made.__module__}.{made.__qualname__}"} if refused else set()


def _warn_if_refused(pickled: bytes, unfillable: list[str], value: Any, path: str) -> None:
    """Warn, naming ``path``, if a safe load would refuse this pickle, or the items of the ``unfillable`` classes."""
    why = _never_loaded(unfillable) if unfillable else _not_yet_allowed(pickled)
    if why:
        place = f"the value at key {path!r}" if path else "the object"
        message = f"{place} ({type_name(value)}) is saved, but a safe load will refuse it {why}"
        warnings.warn(message, UnsafeValueWarning, stacklevel=_stack_level())


def _never_loaded(unfillable: list[str]) -> str:
    return (
        "whatever is allowed by torch.serialization.add_safe_globals: torch puts no items into "
        f"{', '.join(unfillable)}. Save a plain copy in its place: dict(value) or list(value)"
    )


def _not_yet_allowed(pickled: bytes) -> str | None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(PICKLE_RECORD, pickled)
        file.writestr(VERSION_RECORD, TORCH_FORMAT_VERSION)
    archive.seek(0)
    try:
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(archive)
    except pickle.UnpicklingError as error:
        return f"whatever is allowed by torch.serialization.add_safe_globals: {error}"
    if not refused:
        return None
    return f"unless these are allowed first by torch.serialization.add_safe_globals: {', '.join(sorted(refused))}"


def _stack_level() -> int:
    """The stack level of the first caller outside this package, whose line the warning should name."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("lastgood."):
        frame, level = frame.f_back, level + 1
    return level
