"""Opaque values: what the index cannot describe is pickled as Python and torch would, but with our storages."""

import copyreg
import io
import pickle
import pickletools
import sys
import types
import warnings
import zipfile
from typing import Any

import torch

from lastgood._storage_uses import StorageUse, StorageUses, UnsavableStorageError, location_of, without_bytes
from lastgood._torch_internals import untyped_storage_of
from lastgood.errors import UnsupportedStateError
from lastgood.format.index import element_span
from lastgood.format.spec import (
    DTYPES,
    PICKLE_RECORD,
    QUANTIZED_STORAGE_CLASSES,
    TORCH_FORMAT_VERSION,
    UNTYPED,
    VERSION_RECORD,
)

_PROTOCOL = 2
_ITERATORS = (3, 4)
_SUB_BYTE = ("quint4x2", "quint2x4")
_NOT_REDUCED = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)


class UnsafeValueWarning(UserWarning):
    """A value is being saved that a safe load will refuse."""


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
        self._empty: dict[int, torch.UntypedStorage] = {}

    def rehearse(self, value: Any, path: str) -> bytes:
        """Find the storages that ``value`` uses; returns its pickle with offsets that are not yet final."""
        output = io.BytesIO()
        self._dump(_Pickler(output, self, final=False), value, path)
        return output.getvalue()

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
        if isinstance(value, torch.Tensor):
            parts[1] = self._with_places(parts[1], final=final)
        return tuple(parts)

    def _reduce(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.device.type == "meta":
            # torch would write its shape and bring back a tensor without data: found out on the day of the restore.
            raise UnsavableStorageError(without_bytes(value.device))
        reducer = copyreg.dispatch_table.get(type(value))
        reduction = reducer(value) if reducer is not None else value.__reduce_ex__(_PROTOCOL)
        if isinstance(reduction, tuple):
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


def warn_if_refused(pickled: bytes, value: Any, path: str) -> None:
    """Warn, naming ``path``, if a safe load would refuse this pickle."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(PICKLE_RECORD, pickled)
        file.writestr(VERSION_RECORD, TORCH_FORMAT_VERSION)
    archive.seek(0)
    try:
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(archive)
    except pickle.UnpicklingError as error:
        refused = [str(error)]
    if not refused:
        return
    place = f"the value at key {path!r}" if path else "the object"
    warnings.warn(
        f"{place} ({type_name(value)}) is saved, but a safe load will refuse it unless these are allowed first by "
        f"torch.serialization.add_safe_globals: {', '.join(sorted(refused))}",
        UnsafeValueWarning,
        stacklevel=_stack_level(),
    )


def _stack_level() -> int:
    """The stack level of the first caller outside this package, whose line the warning should name."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("lastgood."):
        frame, level = frame.f_back, level + 1
    return level
