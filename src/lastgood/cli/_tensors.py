"""Reading single tensors of a checkpoint file, checked, a bounded amount at a time. Needs torch."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lastgood._contents.model import FileContents
from lastgood._contents.reading import describe_archive, local_storage, open_file
from lastgood._contents.torch_files import describe_torch_file
from lastgood._loading.records import read_parts
from lastgood._memory import memory_at, paused_garbage_collection
from lastgood.errors import ConfigError, corrupt
from lastgood.format.archive import open_archive
from lastgood.format.image import FIRST_STORAGE
from lastgood.format.index import InvalidIndexError, Node, OpaqueNode, TensorNode, keyed_children, walk_nodes
from lastgood.format.read_plan import PIECE_SIZE, Request
from lastgood.format.spec import crc32
from lastgood.format.stream import native_byteorder
from lastgood.storage._direct_io import aligned_buffer

if TYPE_CHECKING:
    import torch

    from lastgood._loading.opaque_values import OpaqueValues
    from lastgood.storage.base import StoredFile


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Without the warnings that torch gives of kinds of tensors that it may change or drop one day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


class TensorSource:
    """A checkpoint file held open to read tensors from it. A context manager.

    What is read is compared with its checksums: the blocks that it lies in for a file of ours, the whole record for
    a zip of torch's; the older format has none.
    """

    def __init__(self, path: str, file: "StoredFile | None" = None) -> None:
        self._file = open_file(local_storage(), path) if file is None else file
        try:
            with paused_garbage_collection():
                self._archive = open_archive(self._file)
                self.contents: FileContents = (
                    describe_torch_file(self._file) if self._archive is None else describe_archive(self._archive)
                )
            if self.contents.byteorder != native_byteorder():
                raise ConfigError(f"{path} was written on a {self.contents.byteorder}-endian machine", path=path)
        except BaseException:
            self._file.close()
            raise
        self._checked: set[int] = set()
        self._opaque: OpaqueValues | None = None

    def __enter__(self) -> "TensorSource":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def value(self, node: Node) -> Any:
        """The value of a node, with everything in it: tensors as they were saved, but on the CPU."""
        from lastgood._loading.values import ObjectTable, ValueBuilder, tensors_in

        table = ObjectTable([inner for inner, _ in walk_nodes(self.contents.root)])
        wanted = {id(found): found for found in tensors_in(node, table, set()) if isinstance(found, TensorNode)}
        made = dict(zip(wanted, self.read(list(wanted.values()), as_saved=True), strict=True))
        try:
            return ValueBuilder(table, lambda tensor: made[id(tensor)], self.opaque).build(node)
        except InvalidIndexError as error:
            raise corrupt(self.contents.path, f"it describes what cannot be: {error}") from error

    def read(self, nodes: Sequence[TensorNode], *, as_saved: bool = False) -> "list[torch.Tensor]":
        """The tensors of these nodes, all in memory together, on the CPU.

        With ``as_saved``, parameters are parameters, and what required grad does; otherwise nothing does.
        """
        from lastgood._loading.values import StoragePool

        pool = StoragePool(list(self.contents.storages), "cpu")
        for node in nodes:
            pool.ask(node)
        requests = pool.allocate()
        if self._archive is not None:
            read_parts(self._archive, requests, check=True, owner=pool)
        else:
            for request in requests:
                self._read_foreign(request)
        tensors = [pool.tensor(node) for node in nodes]
        return (
            tensors
            if as_saved
            else [tensor.detach() if node.flags else tensor for node, tensor in zip(nodes, tensors, strict=True)]
        )

    def _read_foreign(self, request: Request) -> None:
        number = request.record - FIRST_STORAGE
        place, nbytes = self.contents.places[number], self.contents.storages[number].nbytes
        target = memory_at(request.address, request.end - request.start)
        self._file.read_into(place.offset + request.start, target)
        if place.crc is None or number in self._checked:
            return
        found = 0
        if len(target) == nbytes:
            found = crc32(target)
        else:
            for start in range(0, nbytes, PIECE_SIZE):
                buffer = aligned_buffer(min(PIECE_SIZE, nbytes - start))
                self._file.read_into(place.offset + start, buffer)
                found = crc32(buffer, found)
        if found != place.crc:
            raise corrupt(self.contents.path, f"the record of its storage {number} does not match the zip's CRC-32")
        self._checked.add(number)

    def opaque(self, node: OpaqueNode) -> Any:
        """A value that only a pickle describes, through torch's safe loader.

        Raises :class:`~lastgood.errors.UnsafeCheckpointError` for one that this refuses. Of a file of torch's,
        everything is loaded (a zip is mapped).
        """
        from lastgood._loading.foreign import load_foreign
        from lastgood._loading.opaque_values import load_opaque_values

        if self._archive is not None:
            if self._opaque is None:
                self._opaque = load_opaque_values(self._archive, "cpu", check=True)
            return self._opaque.value(node)
        is_zip = self.contents.kind == "torch zip"
        loaded = load_foreign(self._file, map_location="cpu", mmap=is_zip, check=True)
        return _find(self.contents.root, loaded, node)


def _find(root: Node, value: Any, wanted: Node) -> Any:
    """What stands in ``value``, which ``root`` describes, where ``wanted`` stands in ``root``."""
    waiting = [(root, value)]
    while waiting:
        node, here = waiting.pop()
        if node is wanted:
            return here
        inside = [child for _, child in keyed_children(node)]
        if inside:
            waiting += zip(inside, here.values() if isinstance(here, dict) else here, strict=True)
    raise LookupError("a value that the file does not describe")


def pieces(node: TensorNode, most_elements: int) -> Iterator[TensorNode]:
    """The parts of a tensor, in order, of at most so many elements each; how it is cut follows from its shape alone."""
    if math.prod(node.shape) <= most_elements:
        yield node
        return
    dimension = max(range(len(node.shape)), key=lambda number: node.shape[number])
    length = node.shape[dimension]
    count = min(max(1, most_elements * length // math.prod(node.shape)), length - 1)
    for first in range(0, length, count):
        shape = (*node.shape[:dimension], min(count, length - first), *node.shape[dimension + 1 :])
        offset = node.offset + first * node.stride[dimension]
        yield from pieces(TensorNode(node.storage, node.dtype, offset, shape, node.stride, node.flags), most_elements)
