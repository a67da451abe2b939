"""Reading a local file: from the page cache what is there, past it what is not."""

import contextlib
import errno

from lastgood._events import logger
from lastgood._memory import address_of, copy_memory
from lastgood.errors import ConfigError, CorruptCheckpointError, StorageError
from lastgood.storage._descriptors import SharedDescriptors
from lastgood.storage._direct_io import ALIGNMENT, aligned_buffer, round_down, round_up
from lastgood.storage._local_errors import UNCHANGED, not_found, translated
from lastgood.storage.file_ops import NOT_SUPPORTED, FileOps

_LARGEST_READ = 16 << 20
_SMALLEST_DIRECT_READ = 256 << 10
_BOUNCE_SIZE = 4 << 20


class LocalFile:
    """A :class:`~lastgood.storage.base.StoredFile` on a local file system; made by :func:`open_local_file`."""

    def __init__(self, ops: FileOps, path: str, size: int, descriptor: int, direct: int | None) -> None:
        self.path = path
        self.size = size
        self._ops = ops
        self._descriptor = descriptor
        self._direct = direct
        self._descriptors = SharedDescriptors(ops, path, descriptor, *([] if direct is None else [direct]))
        # Going past the page cache pays only where one can ask first whether the bytes are in it.
        self._direct_allowed = direct is not None
        self._bounce_buffers: list[memoryview] = []

    def read_into(self, offset: int, target: memoryview) -> None:
        length = target.nbytes
        if offset < 0:
            raise ConfigError(f"cannot read {self.path} from offset {offset}", path=self.path)
        if offset + length > self.size:
            raise self._too_short(offset, length, self.size)
        if not length:
            return
        view = target.cast("B")
        address = address_of(view)
        done = 0
        with self._descriptors.in_use(), translated("reading", self.path, phase="read", safe=UNCHANGED):
            while done < length:
                piece = view[done : done + _LARGEST_READ]
                try:
                    count = self._read_piece(offset + done, piece, address + done)
                except InterruptedError:
                    continue
                if count <= 0:
                    raise self._too_short(offset, length, offset + done)
                done += count

    def expect_other_readers(self) -> None:
        self._direct_allowed = False

    def _read_piece(self, offset: int, piece: memoryview, address: int) -> int:
        """Read some of ``piece``, whichever way is fastest for its first bytes; returns how many, 0 at the end."""
        if self._direct is not None and self._direct_allowed and len(piece) >= _SMALLEST_DIRECT_READ:
            cached = self._cached_bytes(offset, len(piece))
            try:
                if not cached:
                    return self._read_direct(self._direct, offset, piece, address)
            except OSError as error:
                if error.errno not in NOT_SUPPORTED:
                    raise
                self._give_up_direct(error)
            else:
                piece = piece[:cached]
        return self._ops.pread_into(self._descriptor, piece, offset)

    def _cached_bytes(self, offset: int, length: int) -> int:
        try:
            return self._ops.cached_bytes(self._descriptor, offset, length)
        except OSError as error:
            self._give_up_direct(error)
            return length

    def _read_direct(self, descriptor: int, offset: int, piece: memoryview, address: int) -> int:
        if offset % ALIGNMENT == 0 and address % ALIGNMENT == 0:
            # Whole pages only: nothing else may lie on a page that the device writes to.
            return self._ops.pread_into(descriptor, piece[: round_down(len(piece))], offset)
        start = round_down(offset)
        before = offset - start
        bounce = self._take_bounce_buffer()
        try:
            wanted = min(round_up(before + len(piece)), _BOUNCE_SIZE)
            count = self._ops.pread_into(descriptor, bounce[:wanted], start)
            useful = max(0, min(count - before, len(piece)))
            copy_memory(address, address_of(bounce) + before, useful)
        finally:
            self._bounce_buffers.append(bounce)
        return useful

    def _take_bounce_buffer(self) -> memoryview:
        try:
            return self._bounce_buffers.pop()
        except IndexError:
            return aligned_buffer(_BOUNCE_SIZE)

    def _give_up_direct(self, error: OSError) -> None:
        self._direct_allowed = False
        logger.debug("no direct I/O for %s (%s): reading through the page cache", self.path, error)

    def _too_short(self, offset: int, length: int, end: int) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{self.path} is too short: {length} bytes were expected at {offset}, but the file ends at {end}. It was "
            "cut off or is not the file it is taken for: use an earlier checkpoint.",
            path=self.path,
            phase="read",
        )

    def close(self) -> None:
        self._descriptors.close()
        self._bounce_buffers.clear()


def open_local_file(ops: FileOps, path: str) -> LocalFile:
    """Open a regular file for reading; see ``StorageBackend.open``."""
    with translated("opening", path, phase="open", safe=UNCHANGED):
        try:
            status = ops.status(path)
            if status.is_directory:
                raise IsADirectoryError(errno.EISDIR, "the name belongs to a directory", path)
            if not status.is_file:  # opening a pipe would wait for somebody to write to it
                raise StorageError(f"{path} is not a regular file", errno=errno.EINVAL, path=path, phase="open")
            descriptor = ops.open_read(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise not_found(path) from error
        try:
            status = ops.status(descriptor)
            direct = _open_direct(ops, path, status.identity) if status.size >= _SMALLEST_DIRECT_READ else None
        except BaseException:
            ops.close(descriptor)
            raise
        return LocalFile(ops, path, status.size, descriptor, direct)


def _open_direct(ops: FileOps, path: str, identity: tuple[int, int]) -> int | None:
    """A second descriptor of the same file for direct reads, if there is such a thing and the file is still there."""
    try:
        direct = ops.open_direct(path, write=False)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        if ops.status(direct).identity == identity:
            return direct
    # Another save took the name in between, or nobody can say.
    with contextlib.suppress(OSError):
        ops.close(direct)
    return None
