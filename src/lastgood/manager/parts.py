"""What a manager is made of, put together from its arguments."""

import os
import socket
import time
from collections.abc import Sequence

import lastgood
from lastgood._coordination.address import find_address
from lastgood._coordination.calls import Coordination
from lastgood.builder import make_async_checkpointer, make_sync_checkpointer
from lastgood.checkpointer import AsyncCheckpointer, SyncCheckpointer
from lastgood.config import CheckpointerConfig
from lastgood.errors import ConfigError
from lastgood.manager.ranks import Ranks
from lastgood.manager.retention import RetentionRule, rules_to_json
from lastgood.manager.run_log import RunRecord
from lastgood.storage.base import StorageBackend


def find_coordination(config: CheckpointerConfig, ranks: Ranks) -> Coordination | None:
    """Where several ranks vote; called by all of them. ``None`` for one alone."""
    if ranks.info.global_world_size == 1:
        return None
    if config.barrier_config.barrier_type is not None:
        raise ConfigError(
            "the ranks of a manager commit together by voting, and have no use for the barrier in its configuration: "
            "leave barrier_config out (a rank that fails before a barrier would keep the others waiting)"
        )
    return find_address(ranks.info, ranks.from_first)


def make_checkpointer(
    config: CheckpointerConfig,
    ranks: Ranks,
    storage: StorageBackend | None,
    coordination: Coordination | None,
    *,
    asynchronous: bool,
) -> AsyncCheckpointer | SyncCheckpointer:
    """A checkpointer for this rank, whose failures are told by its futures alone."""
    if not asynchronous:
        return make_sync_checkpointer(config, ranks.info, storage=storage, coordination=coordination)
    if storage is not None:
        raise ConfigError("a checkpoint process writes to local files; for another storage, pass asynchronous=False")
    checkpointer = make_async_checkpointer(config, ranks.info, coordination=coordination)
    checkpointer.leave_failures_to_futures()
    return checkpointer


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
