"""Several processes of one machine read the same bytes, cold: each past the page cache, or all through it.

    python benchmarks/shared_reads.py [DIRECTORY] [MIB]

Prints the seconds until the last of 1, 2 and 4 processes has read and checked everything, in alternation. From where
the page cache wins, ranks that want the same parts read through it (``_SHARED_FROM`` in ``_loading/spread.py``).
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from typing import Any

from lastgood._threads import run_all
from lastgood.format.spec import BLOCK_SIZE, crc32
from lastgood.storage._direct_io import aligned_buffer
from lastgood.storage.local import LocalStorage

ROUNDS = 5
PIECE = 8 << 20
READER_THREADS = 4


def drop_from_cache(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def read(path: str, through_cache: bool, start: Any, results: Any) -> None:
    size = os.path.getsize(path)
    memory = aligned_buffer(size)
    start.wait()
    began = time.perf_counter()
    file = LocalStorage().open(path)
    if through_cache:
        file.expect_other_readers()

    def read_piece(offset: int) -> None:
        piece = memory[offset : offset + PIECE]
        file.read_into(offset, piece)
        for block in range(0, len(piece), BLOCK_SIZE):
            crc32(piece[block : block + BLOCK_SIZE])

    run_all(range(0, size, PIECE), read_piece, READER_THREADS, 600, lambda: TimeoutError(path), name="read")
    results.put(time.perf_counter() - began)


def measure(path: str, processes: int, through_cache: bool) -> float:
    drop_from_cache(path)
    start, results = multiprocessing.Barrier(processes), multiprocessing.Queue()
    readers = [
        multiprocessing.Process(target=read, args=(path, through_cache, start, results)) for _ in range(processes)
    ]
    for reader in readers:
        reader.start()
    seconds = [results.get() for _ in readers]
    for reader in readers:
        reader.join()
    return max(seconds)


def main() -> None:
    directory = sys.argv[1] if len(sys.argv) > 1 else "."
    size = (int(sys.argv[2]) if len(sys.argv) > 2 else 400) << 20
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        for _ in range(0, size, 1 << 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        print("processes   past the cache   through it")
        for processes in (1, 2, 4):
            rounds = [[measure(file.name, processes, way) for way in (False, True)] for _ in range(ROUNDS)]
            past, through = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(f"{processes:9}   {past:12.2f} s   {through:8.2f} s")


if __name__ == "__main__":
    main()
