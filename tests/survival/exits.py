"""``python exits.py DIRECTORY AT_ONCE ENDING...``: scripts that end, each in an interpreter of its own.

Each is that of a copy of this process, which has torch loaded, and goes on with ``script.py`` as if it had been started
so; importing torch takes longer than all the rest. What it says and complains of goes into files of its directory,
which is named by its position among the endings. Prints the statuses.
"""

import json
import os
import sys

import script


def fork_copies(directory: str, at_once: int, endings: list[str]) -> str | None:
    """The directory of the copy, in each of them; ``None`` in the process that has waited for them all."""
    statuses: dict[int, int] = {}
    running: dict[int, int] = {}
    while len(statuses) < len(endings):
        number = len(statuses) + len(running)
        if number < len(endings) and len(running) < at_once:
            own = f"{directory}/{number}"
            os.mkdir(own)
            copy = os.fork()
            if copy == 0:
                _redirect(own)
                return own
            running[copy] = number
            continue
        copy, status = os.wait()
        statuses[running.pop(copy)] = os.waitstatus_to_exitcode(status)
    print(json.dumps([statuses[number] for number in range(len(endings))]), flush=True)
    return None


def _redirect(directory: str) -> None:
    for descriptor, name in ((1, "said"), (2, "complained")):
        os.dup2(os.open(f"{directory}/{name}", os.O_CREAT | os.O_WRONLY), descriptor)


if __name__ == "__main__":
    own = fork_copies(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
    if own is not None:
        script.main(own, sys.argv[3:][int(os.path.basename(own))])
