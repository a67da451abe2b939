"""What tests of loading share: opened and counted files, forged files of ours and of torch's, damage."""

import contextlib
import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lastgood._loading.file import verify_file
from lastgood._memory import bytes_at
from lastgood.format.archive import Archive, open_archive
from lastgood.format.image import plan_layout
from lastgood.format.index import Index, StorageEntry, encode_index
from lastgood.format.nodes import OpaqueNode, TensorNode, walk_nodes
from lastgood.format.pickle_writer import place_opaque_values
from lastgood.format.stream import FileImage, stream_image
from lastgood.storage.base import StoredFile
from lastgood.storage.local import LocalStorage

SAVE_ID = "0123456789abcdef" * 2


@contextlib.contextmanager
def opened(path: Path | str) -> Iterator[StoredFile]:
    file = LocalStorage().open(str(path))
    try:
        yield file
    finally:
        file.close()


@contextlib.contextmanager
def archive_of(path: Path | str) -> Iterator[Archive]:
    """The file of ours at ``path``, opened as loading opens it."""
    with opened(path) as file:
        archive = open_archive(file)
        assert archive is not None
        yield archive


def verify(path: Path | str) -> None:
    with opened(path) as file:
        verify_file(file)


class CountingFile:
    """A stored file that notes which of its bytes were read."""

    def __init__(self, file: StoredFile) -> None:
        self._file = file
        self.path = file.path
        self.size = file.size
        self.reads: list[tuple[int, int]] = []
        self.expects_other_readers = False

    @property
    def bytes_read(self) -> int:
        return sum(size for _, size in self.reads)

    def read_into(self, offset: int, target: memoryview) -> None:
        self.reads.append((offset, target.nbytes))
        self._file.read_into(offset, target)

    def expect_other_readers(self) -> None:
        self.expects_other_readers = True
        self._file.expect_other_readers()

    def close(self) -> None:
        self._file.close()


class _Sink:
    """Collects a streamed image in memory."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self._position = 0

    def append(self, data: bytes) -> None:
        self.data[self._position : self._position + len(data)] = data
        self._position += len(data)

    def window(self, limit: int) -> memoryview:
        return memoryview(self.data)[self._position : self._position + limit]

    def advance(self, count: int) -> None:
        self._position += count


class _BytesExtent:
    """The data of one storage record."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def nbytes(self) -> int:
        return len(self._data)

    def copy_into(self, offset: int, target: memoryview) -> None:
        target[:] = self._data[offset : offset + len(target)]

    def to_bytes(self) -> bytes:
        return self._data


def forge(
    path: Path | str,
    root: Any,
    storages: Sequence[tuple[StorageEntry, bytes]] = (),
    *,
    bodies: bytes = b"",
    pickled: bytes | None = None,
    edit_json: Callable[[bytes], bytes] = lambda data: data,
    **header: Any,
) -> Path:
    """Write a file of ours with valid checksums around any index, also one that no writer would write.

    The pickle is the one that follows from the index, if there is one and no other is given.
    """
    fields: dict[str, Any] = {
        "format_version": 1,
        "save_id": SAVE_ID,
        "rank": 0,
        "world_size": 1,
        "step": None,
        "independent": False,
        "saved_at": None,
        "metrics": None,
        "byteorder": sys.byteorder,
        "pickle_size": 0,
        **header,
    }
    index = Index(**{"meshes": []} | fields, storages=[entry for entry, _ in storages], root=root)
    if pickled is None:
        opaque = [node for node, _ in walk_nodes(root) if isinstance(node, OpaqueNode)]
        try:
            pickled = place_opaque_values(index, bodies, opaque)
        except Exception:  # there is none: anything will do
            pickled = b"\x80\x02}."
    index.pickle_size = header.get("pickle_size", len(pickled))
    encoded = edit_json(encode_index(index))
    extents = [_BytesExtent(data) for _, data in storages]
    layout = plan_layout(len(pickled), len(index.byteorder), [extent.nbytes for extent in extents], len(encoded))
    sink = _Sink(layout.file_size)
    stream_image(FileImage(layout, index, encoded, pickled, extents), sink)
    Path(path).write_bytes(sink.data)
    return Path(path)


def edit_pickle(path: Path, edit: Callable[[bytes], bytes]) -> None:
    """Rewrite a zip of torch's with another data.pkl, every checksum valid."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            archive.writestr(name, edit(data) if name.endswith("/data.pkl") else data)


def zip_of(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """A zip such as torch.save writes, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for name, data in (storages or {}).items():
            archive.writestr(f"archive/data/{name}", data)
    return path


def call_pickle(function: str, arguments: bytes) -> bytes:
    """A pickle that calls ``module name`` with the pickled arguments (opcodes that leave a tuple)."""
    return b"\x80\x02c" + function.replace(" ", "\n").encode() + b"\n" + arguments + b"R."


def opcodes(value: Any) -> bytes:
    """The opcodes that push a plain value, without frame or end."""
    output = io.BytesIO()
    pickler = pickle.Pickler(output, 2)
    pickler.fast = True
    pickler.dump(value)
    return output.getvalue()[2:-1]


def flip(path: Path, offset: int, mask: int = 0xFF) -> None:
    """Change one byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def raw(tensor: torch.Tensor) -> bytes:
    """All bytes of the storage that a tensor stands on, its neighbours' included."""
    storage = tensor.untyped_storage()
    return bytes_at(storage.data_ptr(), storage.nbytes())


FORGED_TENSOR = (
    TensorNode(0, "float32", 0, (4,), (1,), ""),
    [(StorageEntry(16, "float32", "cpu"), struct.pack("<4f", 1, 2, 3, 4))],
)
"""A tensor for a forged index, and the storages that it needs."""
