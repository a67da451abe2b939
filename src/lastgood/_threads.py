"""Waiting without waiting for ever: foreign code runs on daemon threads, and the caller watches the clock."""

import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")
Task = TypeVar("Task")


def call_with_timeout(
    function: Callable[[], Result], timeout_secs: float, timed_out: Callable[[], Exception], *, name: str
) -> Result:
    """The result of ``function``, or its exception; after ``timeout_secs``, the exception that ``timed_out`` makes.

    A call that has timed out goes on in its daemon thread, whose outcome is dropped; it cannot keep the interpreter
    from exiting.
    """
    results: list[Result] = []
    run_all([lambda: results.append(function())], lambda task: task(), 1, timeout_secs, timed_out, name=name)
    return results[0]


def run_all(
    tasks: Sequence[Task],
    run: Callable[[Task], object],
    thread_count: int,
    no_progress_timeout_secs: float,
    timed_out: Callable[[], Exception],
    *,
    name: str,
) -> None:
    """Run every task, several at a time, in their order; raises the failure of the first task that failed.

    After a failure no further task is begun. When no task ends for ``no_progress_timeout_secs``, raises what
    ``timed_out`` makes, and the threads still running are left behind.
    """
    numbers = itertools.count()
    # Unlike queue.Queue, it lets a signal handler interrupt whoever waits, at any point.
    ended: queue.SimpleQueue[tuple[int, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        while (number := next(numbers)) < len(tasks) and not stopped.is_set():
            failure: BaseException | None = None
            try:
                run(tasks[number])
            except BaseException as error:
                failure = error
                stopped.set()
            ended.put((number, failure))
            # A failure's traceback leads to the frames it passed through: no variable of theirs may lead back to it, or
            # all that those frames know would stay in memory until the garbage collector runs.
            failure = None
        ended.put((-1, None))

    running = min(thread_count, len(tasks))
    failures: list[tuple[int, BaseException]] = []
    try:
        for number in range(running):
            start_or_do(work, name=f"lastgood-{name}-{number}")
        while running:
            number, failure = ended.get(timeout=no_progress_timeout_secs)
            if number < 0:
                running -= 1
            elif failure is not None:
                failures.append((number, failure))
                failure = None
    except queue.Empty:
        raise timed_out() from None
    finally:
        stopped.set()
    if failures:
        _, first = min(failures, key=lambda entry: entry[0])
        failures.clear()
        try:
            raise first
        finally:
            del first


def start_or_do(work: Callable[[], None], *, name: str) -> None:
    """Do ``work`` on a daemon thread of its own; or at once, where the interpreter is ending and starts none any more.

    Some of the last saves are finished at that time, and none of them may be lost for want of a thread.
    """
    if start_daemon(work, name=name) is None:
        work()


def start_daemon(work: Callable[[], None], *, name: str) -> threading.Thread | None:
    """A daemon thread that does ``work``; ``None`` where the interpreter is ending and starts none any more."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        start(thread)
    except RuntimeError as error:
        if "at interpreter shutdown" in str(error):
            return None
        raise  # for want of something, or what a signal handler raised
    return thread


def start(thread: threading.Thread) -> None:
    """``thread.start()``, but what a signal handler raises meanwhile is raised as what it is.

    The thread may be running then.
    """
    try:
        thread.start()
    except RuntimeError as error:
        interruption = _interruption_behind(error)
        if interruption is None:
            raise
        try:
            raise interruption from interruption.__cause__
        finally:
            del interruption  # its traceback leads to this frame


def _interruption_behind(error: RuntimeError) -> BaseException | None:
    """What a signal handler raised while the caller waited for a thread to start, such as ``KeyboardInterrupt``.

    A condition gives its lock up while it waits. If it is interrupted before it can wait, or before it has the lock
    again, the ``with`` around it releases a lock that is not held, and what is seen is the complaint about that.
    """
    return error.__context__ if str(error) == "release unlocked lock" else None
