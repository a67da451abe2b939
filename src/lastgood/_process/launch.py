"""What a checkpoint process needs to know before anything else: put together by the trainer, applied in the child."""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import platform
import signal
import sys
from dataclasses import KW_ONLY, dataclass

from lastgood._process.parcels import Parcel
from lastgood.errors import ConfigError
from lastgood.types import RankInfo

_LONGEST_TIMEOUT_SECS = 365 * 86400.0
SIGNALS_TO_THE_TRAINER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Often sent to all processes of a job at once; what they mean is for the trainer to say."""

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_BEST_EFFORT_LOWEST = (2 << 13) | 7


@dataclass
class CheckpointProcessConfig:
    """How long things of the checkpoint process may take, in seconds, and how much it holds itself back.

    ``subprocess_init_timeout_secs``: until it is ready. ``subprocess_shutdown_timeout_secs``: until it has left, once
    it has nothing to do and was told to. ``no_progress_timeout_secs``: without a sign of life while it has work; it
    is killed then, and its saves fail. (A writer of the user's own has to show progress: processor time or file I/O of
    its process; a program that it waits for does not count.) ``close_timeout_secs``: how long ``close()`` waits for
    the saves that are queued.

    ``nice`` is added to the trainer's nice value; ``low_io_priority`` lets the trainer's reads and writes go first,
    where the kernel's scheduler knows priorities.
    """

    subprocess_init_timeout_secs: float = 30
    subprocess_shutdown_timeout_secs: float = 60
    _: KW_ONLY
    no_progress_timeout_secs: float = 600.0
    close_timeout_secs: float = 3600.0
    nice: int = 10
    low_io_priority: bool = True

    def check(self) -> None:
        """Raises :class:`~lastgood.errors.ConfigError` for what cannot work."""
        for name in (
            "subprocess_init_timeout_secs",
            "subprocess_shutdown_timeout_secs",
            "no_progress_timeout_secs",
            "close_timeout_secs",
        ):
            if not 0 < getattr(self, name) <= _LONGEST_TIMEOUT_SECS:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it has to be above 0 s and at most a year")
        if type(self.nice) is not int or not 0 <= self.nice <= 19:
            raise ConfigError(f"nice is {self.nice!r}; it has to be a whole number from 0 to 19")

    @property
    def heartbeat_secs(self) -> float:
        """How often a process with work says so: several times within the time after which it is given up."""
        return min(1.0, self.no_progress_timeout_secs / 4)


@dataclass(frozen=True)
class Launch:
    """The payload of the first request. ``functions`` holds the user's two functions, each with its arguments."""

    trainer_pid: int
    sys_path: list[str]
    python_path: str | None
    authkey: bytes
    config: CheckpointProcessConfig
    rank_info: RankInfo
    functions: Parcel


def new_launch(config: CheckpointProcessConfig, rank_info: RankInfo, functions: Parcel) -> Launch:
    """Of the trainer as it is now."""
    return Launch(
        trainer_pid=os.getpid(),
        sys_path=_absolute_sys_path(),
        python_path=os.environ.get("PYTHONPATH"),
        authkey=bytes(multiprocessing.current_process().authkey),
        config=config,
        rank_info=rank_info,
        functions=functions,
    )


def environment_of_child() -> dict[str, str]:
    """The trainer's environment, but modules are found where the trainer finds them, lastgood itself among them."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(_absolute_sys_path())}


def _absolute_sys_path() -> list[str]:
    # The child changes its working directory.
    return [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]


def ignore_signals_to_the_trainer() -> None:
    """The process leaves when the trainer is gone or says so, not when somebody ends the whole job: it finishes."""
    for number in SIGNALS_TO_THE_TRAINER:
        signal.signal(number, signal.SIG_IGN)
    # They were held back until now: one that came while the interpreter was starting would have ended it.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS_TO_THE_TRAINER)


def apply(launch: Launch) -> None:
    """For the child, before anything of the user's is unpickled."""
    faulthandler.enable()
    sys.path[:] = launch.sys_path
    if launch.python_path is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = launch.python_path
    multiprocessing.current_process().authkey = launch.authkey
    _hold_back(launch.config.nice, launch.config.low_io_priority)


def _hold_back(nice: int, low_io_priority: bool) -> None:
    """Threads started later inherit both. That the system refuses is no reason not to write checkpoints."""
    with contextlib.suppress(OSError):
        os.nice(nice)
    # A session of its own is a scheduling group of its own (autogroup), within which alone nice values count.
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as group:
        group.write(str(nice))
    number = _IOPRIO_SET.get(platform.machine())
    if low_io_priority and sys.platform == "linux" and number is not None:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_BEST_EFFORT_LOWEST)
