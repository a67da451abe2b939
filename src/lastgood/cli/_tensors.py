"""Reading single tensors of a checkpoint file, checked, a bounded amount at a time. Needs torch."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from lastgood._contents.model import FileContents
from lastgood._contents.reading import describe_archive, local_storage, open_file
from lastgood._contents.torch_files import describe_torch_file
from lastgood._loading.records import NO_PROGRESS_TIMEOUT_SECS, no_data, open_in_time, read_parts
from lastgood._memory import bytes_at, memory_at, paused_garbage_collection
from lastgood._threads import run_all
from lastgood.errors import ConfigError, corrupt
from lastgood.format.archive import Archive
from lastgood.format.image import FIRST_STORAGE
from lastgood.format.index import InvalidIndexError
from lastgood.format.mesh import Box
from lastgood.format.nodes import Node, OpaqueNode, ShardedNode, TensorNode, keyed_children, walk_nodes
from lastgood.format.read_plan import PIECE_SIZE, RUN_GAP, RUN_SIZE, Request
from lastgood.format.references import References
from lastgood.format.spec import BLOCK_SIZE, DTYPES, crc32
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


SavedTensor: TypeAlias = TensorNode | ShardedNode
"""A tensor of one file, or one that is spread over the files of several ranks."""


class Source(Protocol):
    """Where tensors are read from, checked, on the CPU and without autograd."""

    def read_part(self, node: SavedTensor, box: Box) -> "torch.Tensor":
        """A part of a tensor."""

    def read_bytes(self, nodes: Sequence[SavedTensor]) -> list[bytes]:
        """The elements of each of these tensors in a row, as bytes."""


class TensorSource:
    """A checkpoint file held open to read tensors from it. A context manager.

    What is read is compared with its checksums: the blocks that it lies in for a file of ours, the whole record for
    a zip of torch's; the older format has none.
    """

    def __init__(self, path: str, file: "StoredFile | None" = None) -> None:
        self._file = open_file(local_storage(), path) if file is None else file
        try:
            with paused_garbage_collection():
                self._archive = open_in_time(self._file)
                self.contents: FileContents = (
                    describe_torch_file(self._file) if self._archive is None else describe_archive(self._archive)
                )
            if self.contents.byteorder != native_byteorder():
                raise ConfigError(f"{path} was written on a {self.contents.byteorder}-endian machine", path=path)
        except BaseException:
            self._file.close()
            raise
        self._entries = list(self.contents.storages)
        self._checked: set[int] = set()
        self._opaque: OpaqueValues | None = None

    @property
    def archive(self) -> Archive | None:
        """The open file, if lastgood wrote it."""
        return self._archive

    @cached_property
    def references(self) -> References:
        """The objects that references in the file lead to."""
        return References(self.contents.root)

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
        from lastgood._loading.storages import StoragePool

        pool = StoragePool(self._entries, "cpu")
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

    def read_part(self, node: SavedTensor, box: Box) -> "torch.Tensor":
        """A part of a tensor of this file."""
        return self.read([_part(_of_one_file(node), box)])[0]

    def read_bytes(self, nodes: Sequence[SavedTensor]) -> list[bytes]:
        """The elements of each of these tensors in a row, as bytes: what :meth:`read` gives, without its tensors.

        For very many small tensors this is several times as fast: those that lie near each other are read together.
        """
        return self._read_bytes([_of_one_file(node) for node in nodes])

    def _read_bytes(self, nodes: list[TensorNode]) -> list[bytes]:
        from lastgood._loading.storages import contiguous_stride

        found = [b""] * len(nodes)
        stored, others = list[_Stored](), list[int]()
        for number, node in enumerate(nodes):
            nbytes = self._entries[node.storage].nbytes
            in_a_row = node.stride == contiguous_stride(node.shape) and "c" not in node.flags and "n" not in node.flags
            if in_a_row and 0 < nbytes <= BLOCK_SIZE:  # no more than one checksum
                start = self.contents.places[node.storage].offset
                stored.append((start, start + nbytes, number))
            elif 0 not in node.shape:
                others.append(number)
        run_all(
            list(_runs(stored)),
            lambda run: others.extend(self._read_run(nodes, run, found)),
            1,
            NO_PROGRESS_TIMEOUT_SECS,
            lambda: no_data(self.contents.path),
            name="read",
        )
        tensors = self.read([nodes[number] for number in others]) if others else []
        for number, tensor in zip(others, tensors, strict=True):
            values = tensor.resolve_conj().resolve_neg().contiguous()
            found[number] = bytes_at(values.data_ptr(), values.nbytes)
        return found

    def _read_run(self, nodes: Sequence[TensorNode], run: "list[_Stored]", found: list[bytes]) -> list[int]:
        """Read storages near each other in one go; returns what is damaged: reading that alone tells what it is."""
        begin = run[0][0]
        scratch = aligned_buffer(max(end for _, end, _ in run) - begin)
        self._file.read_into(begin, scratch)
        checked, is_good, damaged = -1, False, []
        for start, end, number in run:
            node = nodes[number]
            if node.storage != checked:
                checked, crc = node.storage, self._crc(node.storage)
                is_good = crc is None or crc32(scratch[start - begin : end - begin]) == crc
            if not is_good:
                self._checked.discard(node.storage)
                damaged.append(number)
            itemsize = DTYPES[node.dtype].itemsize
            first = start - begin + node.offset * itemsize
            found[number] = bytes(scratch[first : first + math.prod(node.shape) * itemsize])
        return damaged

    def _crc(self, storage: int) -> int | None:
        """The checksum of a storage that is one block; the format of torch before 1.6 has none."""
        if self._archive is None:
            return self.contents.places[storage].crc
        return self._archive.block_crcs[self._archive.first_blocks[FIRST_STORAGE + storage]]

    def _read_foreign(self, request: Request) -> None:
        number = request.record - FIRST_STORAGE
        place, nbytes = self.contents.places[number], self._entries[number].nbytes
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


_Stored: TypeAlias = tuple[int, int, int]
"""Where in the file the storage of a tensor begins and ends, and the tensor's number."""


def _runs(stored: list[_Stored]) -> Iterator[list[_Stored]]:
    """What is to be read together, in the order of the file."""
    run, last = list[_Stored](), 0
    for one in sorted(stored):
        start, end, _ = one
        if run and (start > last + RUN_GAP or end > run[0][0] + RUN_SIZE):
            yield run
            run = []
        run.append(one)
        last = end if len(run) == 1 else max(last, end)
    if run:
        yield run


def _of_one_file(node: SavedTensor) -> TensorNode:
    if isinstance(node, TensorNode):
        return node
    raise TypeError("a tensor that is spread over the files of several ranks")


def _part(node: TensorNode, box: Box) -> TensorNode:
    start = node.offset + sum(offset * step for offset, step in zip(box.offsets, node.stride, strict=True))
    return TensorNode(node.storage, node.dtype, start, box.sizes, node.stride, node.flags)


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


def boxes(box: Box, most_elements: int) -> Iterator[Box]:
    """The parts of a tensor, in order, of at most so many elements each; how it is cut follows from its shape alone."""
    offsets, sizes = box
    if box.element_count <= most_elements:
        yield box
        return
    dimension = max(range(len(sizes)), key=lambda number: sizes[number])
    length = sizes[dimension]
    count = min(max(1, most_elements * length // box.element_count), length - 1)
    for first in range(0, length, count):
        start = (*offsets[:dimension], offsets[dimension] + first, *offsets[dimension + 1 :])
        shape = (*sizes[:dimension], min(count, length - first), *sizes[dimension + 1 :])
        yield from boxes(Box(start, shape), most_elements)


BATCH_ELEMENTS = 32 * 1024
"""Tensors with so many elements together are looked at together: few enough for torch to need no threads, whose start
costs more than the work, most of all where other processes keep the cores busy."""


def batches(counts: Sequence[int], most_elements: int) -> Iterator[range]:
    """The numbers of tensors, whose elements ``counts`` counts, with so many elements together; a larger one alone."""
    first = elements = 0
    for number, count in enumerate(counts):
        if number > first and elements + count > most_elements:
            yield range(first, number)
            first, elements = number, 0
        elements += count
    if first < len(counts):
        yield range(first, len(counts))


def by_dtype(nodes: Sequence[SavedTensor]) -> dict[str, list[int]]:
    """The positions of the tensors that have any elements, by dtype."""
    found: dict[str, list[int]] = {}
    for position, node in enumerate(nodes):
        if 0 not in node.shape:
            found.setdefault(node.dtype, []).append(position)
    return found
