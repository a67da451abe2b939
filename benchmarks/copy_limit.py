"""What the memory itself gives: the bytes of a state copied into shared memory that has been touched before."""

import contextlib
import ctypes
import itertools
import mmap
import os
import threading
from collections.abc import Iterable

import torch

_PIECE = 16 << 20


class WarmCopy:
    """Copies tensors into a memfd that is warm already, in large pieces by several threads.

    It has huge pages where the kernel gives some.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], threads: int) -> None:
        self._tensors = [tensor for tensor in tensors if tensor.nbytes]
        self._threads = threads
        self._pieces: list[tuple[int, int, int]] = []
        """Where in memory, where in the target, how many bytes."""
        end = 0
        for tensor in self._tensors:
            for offset in range(0, tensor.nbytes, _PIECE):
                self._pieces.append((tensor.data_ptr() + offset, end + offset, min(_PIECE, tensor.nbytes - offset)))
            end += tensor.nbytes
        descriptor = os.memfd_create("copy-limit")
        try:
            os.ftruncate(descriptor, end)
            self._memory = mmap.mmap(descriptor, end)
        finally:
            os.close(descriptor)
        with contextlib.suppress(OSError):  # not every kernel has huge pages for shared memory
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.run()  # touches all of it

    def run(self) -> None:
        """Copy everything once."""
        anchor = ctypes.c_char.from_buffer(self._memory)
        target = ctypes.addressof(anchor)
        numbers = itertools.count()

        def work() -> None:
            while (number := next(numbers)) < len(self._pieces):
                source, offset, nbytes = self._pieces[number]
                ctypes.memmove(target + offset, source, nbytes)  # without Python's lock

        workers = [threading.Thread(target=work) for _ in range(self._threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        del anchor  # the mapping cannot be closed while something points into it

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
