"""``python many_exits.py DIRECTORY COUNT``: as many ends of interpreters, each after a save that nobody waits for.

Each is that of a copy of this process, which has torch loaded: it goes on with the script as if it had been started
so. Several at a time, so that threads are held up where they seldom are. Prints the statuses that are not 0.
"""

import os
import sys

import script

AT_ONCE = 6


def fork_copies(directory: str, count: int) -> int | None:
    """The number of the copy, in each of them; ``None`` in the process that has waited for them all."""
    begun = running = 0
    while begun < count or running:
        if begun < count and running < AT_ONCE:
            if os.fork() == 0:
                os.mkdir(f"{directory}/{begun}")
                return begun
            begun += 1
            running += 1
            continue
        _, status = os.wait()
        running -= 1
        if status:
            print("status", status, flush=True)
    return None


if __name__ == "__main__":
    number = fork_copies(sys.argv[1], int(sys.argv[2]))
    if number is not None:
        script.main(f"{sys.argv[1]}/{number}", "end")
