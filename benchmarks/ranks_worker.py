"""The program of one rank: it does what comes through its pipe, until nothing comes any more.

Run by :class:`ranks_pool.RankPool`. It imports little at the top: processes that it starts may import it once more.
"""

import sys
from multiprocessing.connection import Connection


def main() -> None:
    descriptor, rank, world_size = map(int, sys.argv[1:4])
    connection = Connection(descriptor)
    import ranks_work

    ranks_work.join(rank, world_size, sys.argv[4])
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            break
        if asked is None:
            break
        function, arguments = asked
        try:
            answer = True, function(*arguments)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"
        connection.send(answer)
    ranks_work.leave()


if __name__ == "__main__":
    main()
