"""What the ranks of the matrix do when told to."""

import os

import torch
import torch.distributed as dist
from tests.distributed.matrix_layouts import Training, assert_same, local, tensors_of
from tests.helpers.workers import PATIENCE_SECS
from torch.distributed.checkpoint.state_dict import set_state_dict

from lastgood.builder import make_async_checkpointer, make_sync_checkpointer
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.checkpointer import AsyncCheckpointer, Checkpointer
from lastgood.config import CheckpointerConfig
from lastgood.format import sharding
from lastgood.types import RankInfo

REPLICATED = ("model.*", "optim.*", "extra.*")
SEED, OTHER_SEED = 11, 5000

_checkpointers: dict[tuple[bool, bool], Checkpointer] = {}
_trainings: dict[tuple[str, int], Training] = {}


def join(rank: int, world_size: int, rendezvous: str) -> None:
    """Become a rank."""
    prepare()
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # as torchrun would; the name of this machine may not resolve
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)


def prepare() -> None:
    """What each process does before anything else."""
    sharding.SMALLEST_SHARE = 256  # so that replicas of small tensors are divided, too
    torch.set_num_threads(1)


def leave() -> None:
    """Be a rank no longer."""
    for checkpointer in _checkpointers.values():
        checkpointer.close()
    _checkpointers.clear()
    _trainings.clear()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def checkpointer_of(*, asynchronous: bool = False, replicated: bool = False) -> Checkpointer:
    """That of this rank, made when all ranks first ask for it."""
    key = asynchronous, replicated
    if key not in _checkpointers:
        config = CheckpointerConfig(replicated=REPLICATED if replicated else ())
        config.process_config.subprocess_init_timeout_secs = PATIENCE_SECS  # it imports torch, on a busy machine
        _checkpointers[key] = (make_async_checkpointer if asynchronous else make_sync_checkpointer)(config)
    return _checkpointers[key]


def training(layout: str, seed: int) -> Training:
    """Made once in each process group."""
    key = layout, seed
    if key not in _trainings:
        _trainings[key] = Training(layout, seed)
    return _trainings[key]


def save(path: str, layout: str, asynchronous: bool) -> None:
    """The state of ``SEED``. Declared replicas are saved by DDP, and by whatever else saves asynchronously."""
    checkpointer = checkpointer_of(asynchronous=asynchronous, replicated=asynchronous or layout == "ddp")
    source = training(layout, SEED)
    state = {**source.state(), "rng": torch.tensor([rank()]), "epoch": 3}
    outcome = checkpointer.save(path, state)
    if isinstance(checkpointer, AsyncCheckpointer):
        for future in outcome:
            future.result(PATIENCE_SECS)


def save_with(path: str, layout: str, replicated: bool) -> None:
    """Save synchronously, with or without the replicas being declared."""
    state = {**training(layout, SEED).state(), "rng": torch.tensor([rank()])}
    checkpointer_of(replicated=replicated).save(path, state)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def load_into_state_dicts(path: str, layout: str, saved_ranks: int) -> None:
    """Into what ``get_state_dict`` gives, in place, and from there into a model and an optimizer."""
    target = training(layout, OTHER_SEED)
    target.scribble()
    state = {**target.state(), "rng": None, "epoch": None}
    before = {key: local(tensor).data_ptr() for key, tensor in tensors_of(state)}
    reader = checkpointer_of(replicated=layout == "ddp")
    assert reader.load(path, state, strict=True, per_rank={"rng": "modulo"}) is state
    assert state.pop("epoch") == 3
    assert state.pop("rng").item() == rank() % saved_ranks
    assert {key: local(tensor).data_ptr() for key, tensor in tensors_of(state)} == before
    expected = training(layout, SEED)
    assert_same(state, expected.state())
    set_state_dict(target.net, target.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    assert_same(target.state(), expected.state())


def load_into_module(path: str, layout: str) -> None:
    """Straight into the tensors of ``module.state_dict()``."""
    target = training(layout, OTHER_SEED)
    target.scribble()
    checkpointer_of(replicated=layout == "ddp").load(path, {"model": target.net.state_dict()}, strict=True)
    assert_same(target.net.state_dict(), training(layout, SEED).net.state_dict())


def load_whole(path: str) -> None:
    """By one process that knows of no distribution."""
    found, missing = CheckpointReader(RankInfo(0, 1)).read(path, per_rank={"rng": "first"})
    assert missing == []
    assert (found.pop("epoch"), found.pop("rng").item()) == (3, 0)
    assert_same(found, training("plain", SEED).state())
