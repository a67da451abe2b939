"""The other end of a snapshot: an image in shared memory that its trainer is still filling, on its way to storage."""

import array
import threading
import time

from lastgood._image_writer import PIECE_SIZE, WRITER_THREADS, PieceWriters, write_file
from lastgood._snapshot import ImageDescription, read_layout, replica_checks_at
from lastgood.errors import StagingError
from lastgood.format.image import DataLayout, Layout, lay_out_ending
from lastgood.format.in_memory import finish
from lastgood.format.index_head import IndexHead, join_index
from lastgood.storage.base import StorageBackend, StreamedWrite
from lastgood.types import STATE_DICT

LONGEST_STAGING_SECS = 3600.0

_known_layout: tuple[int, DataLayout] | None = None
"""The layout of the plan that was written last: the next snapshot is most often of the same. A checkpoint process
serves one trainer, so that one number of a plan means one plan."""


class StagedImage:
    """An image in an arena, as the process sees it that writes it. ``memory`` is the arena.

    One thread reports how staging goes (:meth:`advance`, then :meth:`complete` or :meth:`fail`, which never wait);
    another waits for it.
    """

    def __init__(self, memory: memoryview, description: ImageDescription) -> None:
        self._memory = memory
        self.description = description
        self._changed = threading.Condition()
        self._staged = 0
        self._is_complete = False
        self._failure: BaseException | None = None

    def advance(self, staged: int) -> None:
        """The first ``staged`` bytes are there."""
        with self._changed:
            self._staged = staged
            self._changed.notify_all()

    def complete(self) -> None:
        """All bytes are there, and they are those of one moment."""
        with self._changed:
            self._is_complete = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """The snapshot must not be published."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def wait_for(self, end: int, timeout_secs: float) -> None:
        """Return once the bytes up to ``end`` are there; raises what staging failed with.

        Raises :class:`~lastgood.errors.StagingError` when staging does not move for ``timeout_secs``.
        """
        with self._changed:
            while self._staged < end and not self._is_complete:
                self._wait_for_change(timeout_secs)
            if self._failure is not None:
                raise self._failure

    def wait_until_complete(self, timeout_secs: float) -> None:
        """Return once the snapshot is known to be whole and of one moment; raises as :meth:`wait_for` does."""
        with self._changed:
            while not self._is_complete:
                self._wait_for_change(timeout_secs)

    def _wait_for_change(self, timeout_secs: float) -> None:
        deadline, staged = time.monotonic() + timeout_secs, self._staged
        while not self._is_complete and self._staged == staged:
            if self._failure is not None:
                raise self._failure
            if not self._changed.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                raise StagingError(
                    f"the trainer staged nothing for {timeout_secs:g} s while its snapshot was being written; the save "
                    "was given up. Nothing was published; earlier checkpoints are untouched. Is the trainer stopped?",
                    phase="stage",
                )

    @property
    def index_body(self) -> memoryview:
        """The index without the members that name the save."""
        start = self.description.index_body_offset
        return self._memory[start : start + self.description.index_body_size]

    @property
    def replica_checksums(self) -> "array.array[int]":
        """The CRC-32s of what has to be the same on all ranks, by name; there once the snapshot is complete."""
        start, end = replica_checks_at(self.description)
        checksums = array.array("I")
        checksums.frombytes(self._memory[start:end])
        return checksums

    def layout(self, head: IndexHead) -> Layout:
        """Where everything stands in the file that this image becomes under ``head``."""
        layout = lay_out_ending(self._data_layout(), len(join_index(head, self.index_body)))
        if layout.file_size > self.description.image_capacity:
            raise StagingError(
                f"an image of {layout.file_size} bytes does not fit the {self.description.image_capacity} bytes made "
                "for it; nothing was written. This is a fault of lastgood: please report it.",
                phase="write",
            )
        return layout

    def _data_layout(self) -> DataLayout:
        global _known_layout
        description, known = self.description, _known_layout
        if known is None or known[0] != description.plan:
            known = description.plan, read_layout(self._memory, description)
            _known_layout = known
        return known[1]

    def write_durably(
        self, head: IndexHead, storage: StorageBackend, path: str, *, rank: int | None, no_progress_timeout_secs: float
    ) -> StreamedWrite:
        """Bring the image to storage under ``head``, beginning before it is all there.

        Like :func:`~lastgood._image_writer.write_durably`: what comes back waits to be committed or aborted, and
        nothing is left behind when this raises. It does not return before the snapshot is known to be whole.
        """
        layout = self.layout(head)

        def write(upload: StreamedWrite) -> None:
            self._write(head, layout, upload, path, no_progress_timeout_secs)

        return write_file(
            layout.file_size, write, storage, path, rank=rank, no_progress_timeout_secs=no_progress_timeout_secs
        )

    def _write(self, head: IndexHead, layout: Layout, upload: StreamedWrite, path: str, timeout_secs: float) -> None:
        writers = PieceWriters(upload, path, layout.file_size, WRITER_THREADS, timeout_secs)
        handed_over = pieces = 0
        try:
            steps = finish(self._memory, layout, head, self.index_body, lambda end: self.wait_for(end, timeout_secs))
            for final in steps:
                while final - handed_over >= PIECE_SIZE or handed_over < final == layout.file_size:
                    count = min(PIECE_SIZE, final - handed_over)
                    writers.raise_failure()
                    writers.write(handed_over, self._memory[handed_over : handed_over + count], count)
                    handed_over += count
                    pieces += 1
            for _ in range(pieces):
                writers.take_back()
        finally:
            writers.stop()
        self.wait_until_complete(timeout_secs)

    def load(self, timeout_secs: float = LONGEST_STAGING_SECS) -> STATE_DICT:
        """The state dict that was staged; its tensors stand in the arena, and are gone with it.

        Waits until the snapshot is whole. The image comes from this process's own trainer, so that values of any
        class are brought back; this imports torch.
        """
        from lastgood._staging.state import rebuild_state  # only a writer of the user's own comes here

        self.wait_until_complete(timeout_secs)
        state: STATE_DICT = rebuild_state(self._memory, self._data_layout())
        return state
