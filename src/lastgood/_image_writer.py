"""Moving a file image to storage: one thread fills bounce buffers, others write them.

Memory is bounded by the buffers, whatever the size of the state. The pieces are large and aligned, so that local
storage can write them without the page cache.
"""

import queue
import secrets
import threading
from collections.abc import Callable

from lastgood import _events
from lastgood._threads import start
from lastgood.errors import StorageError
from lastgood.format.stream import FileImage, stream_image
from lastgood.storage._direct_io import aligned_buffer
from lastgood.storage._in_time import StorageInTime
from lastgood.storage.base import StorageBackend, StreamedWrite

PIECE_SIZE = 8 * 1024 * 1024
WRITER_THREADS = 2
BUFFER_COUNT = WRITER_THREADS + 2
"""One for each writer, one being filled, one in between: more cost memory and gain no speed that can be measured."""

_Piece = tuple[int, memoryview, int]
"""Offset in the file, buffer, and how many of its bytes."""


def new_save_id() -> str:
    """An id that no other save has: 128 random bits as 32 hexadecimal digits."""
    return secrets.token_hex(16)


def write_durably(
    image: FileImage, storage: StorageBackend, path: str, *, rank: int | None, no_progress_timeout_secs: float
) -> StreamedWrite:
    """Bring the image to storage; what comes back is durable and waits to be committed or aborted.

    When this raises, nothing is left behind. Storage that does nothing for ``no_progress_timeout_secs`` is given up
    with :class:`~lastgood.errors.StorageError`, here and in the calls on what comes back; and a call of ``abort``
    there, after one of ``commit`` that went well, does nothing.
    """

    def write(upload: StreamedWrite) -> None:
        write_image(image, upload, path, no_progress_timeout_secs=no_progress_timeout_secs)

    return write_file(image.size, write, storage, path, rank=rank, no_progress_timeout_secs=no_progress_timeout_secs)


def write_file(
    size: int,
    write: Callable[[StreamedWrite], None],
    storage: StorageBackend,
    path: str,
    *,
    rank: int | None,
    no_progress_timeout_secs: float,
) -> StreamedWrite:
    """:func:`write_durably` for a file of ``size`` bytes that ``write`` fills."""
    upload = StorageInTime(storage, no_progress_timeout_secs).begin_unwatched(path, size)
    try:
        with _events.phase("write", path, rank=rank, nbytes=size):
            write(upload)
        with _events.phase("fsync", path, rank=rank):
            upload.make_durable()
    except BaseException:
        upload.abort()
        raise
    return upload


def write_image(image: FileImage, upload: StreamedWrite, path: str, *, no_progress_timeout_secs: float) -> None:
    """Hand the whole image to ``upload``; what was handed over is not yet durable when this returns.

    Raises :class:`~lastgood.errors.StorageError` when storage takes no piece for ``no_progress_timeout_secs``, and
    whatever ``upload.write_at`` raises.
    """
    transfer = _Transfer(upload, path, image.size, no_progress_timeout_secs)
    try:
        stream_image(image, transfer)
        transfer.finish()
    finally:
        transfer.stop()


class PieceWriters:
    """Threads that write pieces of one file, and give each piece's buffer back when it is written."""

    def __init__(self, upload: StreamedWrite, path: str, size: int, thread_count: int, timeout_secs: float) -> None:
        self._upload = upload
        self._meter = _events.ByteMeter("write", path, size)
        self._path = path
        self._timeout_secs = timeout_secs
        self._full: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._written: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._write_pieces, name=f"lastgood-write-{number}", daemon=True)
            for number in range(thread_count)
        ]
        try:
            for thread in self._threads:
                start(thread)
        except BaseException:
            self.stop()
            raise

    def write(self, offset: int, buffer: memoryview, count: int) -> None:
        """Queue the first ``count`` bytes of ``buffer``; each call is answered by one :meth:`take_back`."""
        self._full.put((offset, buffer, count))

    def take_back(self) -> memoryview:
        """The buffer of the next piece to be done. Raises what a write raised, or when storage takes no data."""
        try:
            buffer = self._written.get(timeout=self._timeout_secs)
        except queue.Empty:
            raise StorageError(
                f"storage took no data for {self._timeout_secs:g} s while {self._path} was being written; the "
                "write was given up. Nothing was published; earlier checkpoints are untouched.",
                path=self._path,
                phase="write",
            ) from None
        self.raise_failure()
        return buffer

    def raise_failure(self) -> None:
        """Raise what a write raised, if one did."""
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Let the threads end; does not wait for them, as one may hang in the operating system."""
        for _ in self._threads:
            self._full.put(None)

    def _write_pieces(self) -> None:
        while (piece := self._full.get()) is not None:
            offset, buffer, count = piece
            try:
                if self._failure is None:
                    self._upload.write_at(offset, buffer[:count])
                    self._meter.add(count)
            except BaseException as error:
                self._failure = error
            self._written.put(buffer)


class _Transfer:
    """The window that moves through the file, over bounce buffers that are written as they fill up."""

    def __init__(self, upload: StreamedWrite, path: str, size: int, timeout_secs: float) -> None:
        piece_count = -(-size // PIECE_SIZE)
        self._writers = PieceWriters(upload, path, size, min(WRITER_THREADS, piece_count), timeout_secs)
        self._unused = [aligned_buffer(min(PIECE_SIZE, size)) for _ in range(min(BUFFER_COUNT, piece_count))]
        self._queued = 0
        self._offset = 0
        self._filled = 0
        self._buffer = self._unused.pop()

    def append(self, data: bytes) -> None:
        """Take over bytes that are at hand."""
        end = self._filled + len(data)
        if end <= len(self._buffer):
            self._buffer[self._filled : end] = data
            self._filled = end
            return
        view = memoryview(data)
        while view:
            window = self.window(len(view))
            window[:] = view[: len(window)]
            self.advance(len(window))
            view = view[len(window) :]

    def window(self, limit: int) -> memoryview:
        """Between 1 and ``limit`` bytes of writable memory at the current position."""
        if self._filled == len(self._buffer):
            self._hand_over()
            self._buffer = self._unused.pop() if self._unused else self._take_back()
        return self._buffer[self._filled : self._filled + limit]

    def advance(self, count: int) -> None:
        """The first ``count`` bytes of the window are filled."""
        self._filled += count

    def finish(self) -> None:
        """Return once all pieces have been written."""
        self._hand_over()
        while self._queued:
            self._take_back()

    def stop(self) -> None:
        """Let the threads end."""
        self._writers.stop()

    def _hand_over(self) -> None:
        self._writers.write(self._offset, self._buffer, self._filled)
        self._queued += 1
        self._offset += self._filled
        self._filled = 0

    def _take_back(self) -> memoryview:
        buffer = self._writers.take_back()
        self._queued -= 1
        return buffer
