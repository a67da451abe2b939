"""What a manager is made of, put together from its arguments."""

import copy
import os
import socket
import time
from collections.abc import Sequence

import lastgood
from lastgood._events import logger
from lastgood.barriers import BarrierConfig
from lastgood.builder import make_async_checkpointer, make_sync_checkpointer
from lastgood.checkpointer import AsyncCheckpointer, SyncCheckpointer
from lastgood.config import CheckpointerConfig
from lastgood.errors import ConfigError, LastgoodError
from lastgood.manager.ranks import Ranks
from lastgood.manager.retention import RetentionRule, rules_to_json
from lastgood.manager.run_log import RunRecord
from lastgood.storage.base import StorageBackend

_BARRIER_SET_UP_SECS = 300
_MARGIN_SECS = 10


def make_checkpointer(
    config: CheckpointerConfig, ranks: Ranks, storage: StorageBackend | None, *, asynchronous: bool
) -> AsyncCheckpointer | SyncCheckpointer:
    """A checkpointer for this rank. Several ranks commit together: without a barrier of the user's they get one."""
    if ranks.info.global_world_size > 1 and config.barrier_config.barrier_type is None:
        config = copy.copy(config)
        config.barrier_config = _barrier_of_all(config, ranks)
    if not asynchronous:
        return make_sync_checkpointer(config, ranks.info, storage=storage)
    if storage is not None:
        raise ConfigError("a checkpoint process writes to local files; for another storage, pass asynchronous=False")
    return make_async_checkpointer(config, ranks.info)


def end_saves(checkpointer: AsyncCheckpointer | SyncCheckpointer) -> None:
    """Let those under way fail at once: they wait for a rank that will not come."""
    if isinstance(checkpointer, AsyncCheckpointer):
        handle = checkpointer._checkpoint_process.process
        if handle is not None:
            handle.processes[0].kill()


def discard_checkpointer(checkpointer: AsyncCheckpointer | SyncCheckpointer) -> None:
    """Close one that may be out of step with those of other ranks; what was under way fails."""
    end_saves(checkpointer)
    try:
        checkpointer.close()
    except LastgoodError as error:
        logger.info("the former checkpointer was closed with an error: %s", error)


def _barrier_of_all(config: CheckpointerConfig, ranks: Ranks) -> BarrierConfig:
    host, port = ranks.from_first(_free_address)
    return BarrierConfig(
        "tcp_store",
        {
            "global_rank": ranks.info.global_rank,
            "global_world_size": ranks.info.global_world_size,
            "barrier_prefix": "lastgood-manager",
            "timeout_barrier_init_secs": _BARRIER_SET_UP_SECS,
            "use_checkpoint_barrier_tcpstore_libuv": True,
            "tcpstore_port": port,
            "master_address": host,
            # Before the writer gives up by itself, which does not know who is missing.
            "timeout_secs": max(1, config.writer_config.write_barrier_timeout_secs - _MARGIN_SECS),
        },
    )


def _free_address() -> tuple[str, int]:
    """Where rank 0 can be reached, and a port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    # The name that the ranks of torchrun meet under is one that all of them know.
    return os.environ.get("MASTER_ADDR") or socket.gethostname(), port


def opening_record(ranks: Ranks, rules: Sequence[RetentionRule]) -> RunRecord:
    """That this process has begun to manage the run."""
    return RunRecord(
        time=time.time(),
        pid=os.getpid(),
        host=socket.gethostname(),
        world_size=ranks.info.global_world_size,
        rules=rules_to_json(rules),
        lastgood=lastgood.__version__,
    )
