"""A process with a preemption notice, that tells what it sees: ``python -m tests.unit.manager.signals SCENARIO``.

It writes a line when it is ready for a signal and when it has seen one. Its standard input ends a wait.
"""

import os
import signal
import sys
from types import FrameType

from lastgood.manager.preemption import PREEMPTION_SIGNALS, PreemptionNotice


def say(*words: object) -> None:
    # By one system call: a handler may interrupt the main thread in a print, and printing is not reentrant.
    os.write(1, f"{' '.join(map(str, words))}\n".encode())


def former_handler(number: int, frame: FrameType | None) -> None:
    say("former handler", signal.Signals(number).name)


def main(scenario: str) -> None:
    # A measurement of coverage has a handler of its own, which ends the process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if scenario == "former handler":
        signal.signal(signal.SIGTERM, former_handler)
    if scenario == "ignored before":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    notice = PreemptionNotice(PREEMPTION_SIGNALS)
    if scenario == "removed":
        notice.remove()
        say(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
    if scenario == "forked":
        child = os.fork()
        if child == 0:
            say("ready", os.getpid())
            while sys.stdin.readline():
                pass
            os._exit(0)
        _, status = os.waitpid(child, 0)
        say("child ended by", os.WTERMSIG(status) if os.WIFSIGNALED(status) else "itself", notice.came_at is None)
        return
    say("ready", os.getpid())
    while sys.stdin.readline():
        number = notice.signal_number
        say("noticed", None if number is None else signal.Signals(number).name)


if __name__ == "__main__":
    main(sys.argv[1])
