"""A process that writes one file in two halves and says where it stands: started by the tests of dead writers.

Arguments: path, then the byte to fill the file with, then its size. It prints the name of each phase and waits for a
line before it goes on to the next.
"""

import sys

from lastgood.storage._direct_io import aligned_buffer
from lastgood.storage.local import LocalStorage


def pause(phase: str) -> None:
    print(phase, flush=True)
    if not sys.stdin.readline():
        sys.exit("the test is gone")


def main() -> None:
    path, fill, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    data = aligned_buffer(size)
    data[:] = bytes([fill]) * size
    pause("started")
    write = LocalStorage().begin(path, size)
    pause("begun")
    write.write_at(0, data[: size // 2])
    pause("half written")
    write.write_at(size // 2, data[size // 2 :])
    write.make_durable()
    pause("durable")
    write.commit()
    pause("committed")


if __name__ == "__main__":
    main()
