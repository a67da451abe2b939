"""Where the parts are put together."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed

from lastgood._coordination.address import is_of_process_group, meet_over_process_group
from lastgood._coordination.calls import Coordination
from lastgood._coordination.trainer import TrainerVotes
from lastgood.barriers import DistBarrier, create_barrier_from_config, find_barrier_class
from lastgood.checkpoint_process import CheckpointProcess, default_subprocess_init_fn
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.checkpoint_writer import CheckpointWriter, WriterHook, make_standard_writer
from lastgood.checkpointer import AsyncCheckpointer, SyncCheckpointer
from lastgood.config import CheckpointerConfig
from lastgood.errors import ConfigError
from lastgood.format.commit import refuse_committed
from lastgood.sharding.divide import Divider
from lastgood.staging import DefaultStager
from lastgood.storage._in_time import StorageInTime
from lastgood.storage.base import StorageBackend
from lastgood.storage.local import LocalStorage
from lastgood.types import RankInfo


def make_sync_checkpointer(
    config: CheckpointerConfig | None = None,
    rank_info: RankInfo | None = None,
    commit_hook: WriterHook | None = None,
    *,
    storage: StorageBackend | None = None,
    coordination: Coordination | None = None,
) -> SyncCheckpointer:
    """A checkpointer that saves before it returns, to local files or another ``storage``.

    Without ``rank_info``, the rank and world size of the default process group, or a single rank if there is none.

    Several ranks without a configured barrier commit together, by voting, if they are those of the default process
    group: all of them have to make their checkpointers at the same time, as they then find out where they meet.
    (``coordination``, if that has been found out already.) Others write independent files: each is atomic by itself.
    """
    config = CheckpointerConfig() if config is None else config
    rank_info = _current_rank_info() if rank_info is None else rank_info
    barrier = create_barrier_from_config(config.barrier_config)
    if coordination is None and barrier is None:
        coordination = _find_coordination(rank_info)
    try:
        writer = CheckpointWriter(
            config.writer_config,
            rank_info,
            barrier,
            commit_hook,
            storage=storage,
            coordination=coordination,
            replicated=config.replicated,
        )
    except BaseException:
        if coordination is not None:
            coordination.close()
        raise
    return SyncCheckpointer(writer, CheckpointReader(rank_info, storage=storage))


def make_async_checkpointer(
    config: CheckpointerConfig | None = None,
    rank_info: RankInfo | None = None,
    subprocess_init_fn: Callable[..., None] = default_subprocess_init_fn,
    subprocess_init_args: tuple[Any, ...] = (),
    checkpoint_writer_init_fn: Callable[..., CheckpointWriter] = make_standard_writer,
    checkpoint_writer_init_args: dict[str, Any] | None = None,
    *,
    coordination: Coordination | None = None,
) -> AsyncCheckpointer:
    """A checkpointer that saves in the background, through a process of its own.

    Rank and world size as for :func:`make_sync_checkpointer`, and so is what several ranks do (if they vote, the
    checkpoint processes import torch). ``subprocess_init_fn(*subprocess_init_args)`` runs first
    in the checkpoint process; then ``checkpoint_writer_init_fn(**checkpoint_writer_init_args)`` makes the writer there.
    Of ``config`` (the writer's configuration), ``rank_info``, ``barrier_class``, ``barrier_args`` and ``coordination``
    it gets those that its signature names (the first two, if it takes any) and that are not among its arguments; ranks
    vote only if it names the last one. Functions and arguments have to be picklable.

    The configured barrier is made in the checkpoint process (``"tcp_store"`` costs an import of torch there);
    ``"dist_barrier"`` cannot work there: :class:`~lastgood.errors.ConfigError`.
    """
    config = CheckpointerConfig() if config is None else config
    rank_info = _current_rank_info() if rank_info is None else rank_info
    barrier_class = find_barrier_class(config.barrier_config)
    if barrier_class is DistBarrier:
        raise ConfigError(
            "dist_barrier meets the training's process group, which the checkpoint process is no part of; use the "
            "barrier type tcp_store for asynchronous checkpoints"
        )
    is_standard = checkpoint_writer_init_fn is make_standard_writer
    if config.replicated and not is_standard:
        raise ConfigError("replicated is for the standard writer: one of your own gets what it is given, undivided")
    offered: dict[str, Any] = {
        "config": config.writer_config,
        "rank_info": rank_info,
        "barrier_class": barrier_class,
        "barrier_args": config.barrier_config.barrier_args,
        "coordination": None,
    }
    stager = DefaultStager(config.staging_config)
    wanted = _wanted(checkpoint_writer_init_fn, offered)
    if coordination is None and barrier_class is None and "coordination" in wanted:
        coordination = _find_coordination(rank_info)
    if "coordination" in wanted:
        wanted["coordination"] = coordination
    divider = None
    try:
        if is_standard:
            divider = Divider(rank_info, config.replicated, commits_together=coordination is not None)
        process = CheckpointProcess(
            rank_info,
            config.process_config,
            subprocess_init_fn,
            subprocess_init_args,
            checkpoint_writer_init_fn,
            wanted | (checkpoint_writer_init_args or {}),
        )
    finally:
        if coordination is not None:
            coordination.close()  # the process, and those that may take its place, have copies
    storage = StorageInTime(LocalStorage(), config.writer_config.no_progress_timeout_secs)
    votes = None
    if coordination is not None:
        votes = TrainerVotes(
            coordination,
            storage,
            no_progress_timeout_secs=config.writer_config.no_progress_timeout_secs,
            write_barrier_timeout_secs=config.writer_config.write_barrier_timeout_secs,
        )
    may_write = partial(
        refuse_committed,
        storage,
        rank=rank_info.global_rank,
        world_size=rank_info.global_world_size,
        independent=rank_info.global_world_size > 1 and barrier_class is None and coordination is None,
    )
    return AsyncCheckpointer(
        stager,
        process,
        CheckpointReader(rank_info),
        may_write=may_write if is_standard else None,
        votes=votes,
        divider=divider,
    )


def _find_coordination(rank_info: RankInfo) -> Coordination | None:
    """Where the ranks of the default process group vote; ``None`` for those that are of none, and for one alone."""
    if rank_info.global_world_size == 1 or not is_of_process_group(rank_info):
        return None
    return meet_over_process_group(rank_info)


def _wanted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered arguments that the function's signature names; of one that takes any, the first two."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # built in, without a signature
        return {}
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    named = [*offered][:2] if takes_any else []
    return {name: value for name, value in offered.items() if name in parameters or name in named}


def _current_rank_info() -> RankInfo:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return RankInfo(torch.distributed.get_rank(), torch.distributed.get_world_size())
    return RankInfo(0, 1)
