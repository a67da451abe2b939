"""States that are no model's, and what ranks do with them when told to."""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from tests.distributed.matrix_layouts import assert_same, local, random_tensor
from tests.distributed.matrix_ranks import checkpointer_of, rank
from tests.helpers.workers import PATIENCE_SECS
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from lastgood.builder import make_sync_checkpointer
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.errors import LastgoodError
from lastgood.types import RankInfo

# A pipeline of two stages, of two ranks each


def _stage_values(stage: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(stage)
    return {"weight": torch.rand(17, 3, generator=generator), "bias": torch.rand(5, generator=generator)}


def _stage(number: int) -> dict[str, Any]:
    """The tensors of a stage on this rank's row of the mesh, and a value of its own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))["dp"]
    values = _stage_values(number)
    spread = {name: distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None) for name, value in values.items()}
    return {**spread, "steps": torch.tensor(float(number))}


def save_stages(path: str) -> None:
    number = rank() // 2
    checkpointer_of().save(path, {f"stage{number}": _stage(number), "epoch": 4})


def load_stages(path: str, swapped: bool) -> None:
    """Into tensors of the own stage, or of the other one."""
    number = 1 - rank() // 2 if swapped else rank() // 2
    expected = _stage(number)
    state = _stage(number)
    for tensor in (state["weight"], state["bias"]):
        tensor.to_local().fill_(-1)
    state["steps"].fill_(-1)
    target = {f"stage{number}": state, "epoch": None}
    assert checkpointer_of().load(path, target, strict=True) is target
    assert target["epoch"] == 4
    assert_same(state, expected)


def load_all_stages(path: str) -> None:
    """Everything, as whole tensors."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    found, missing = CheckpointReader(RankInfo(rank(), world_size)).read(path)
    assert missing == []
    assert found.pop("epoch") == 4
    expected = {f"stage{n}": {**_stage_values(n), "steps": torch.tensor(float(n))} for n in range(2)}
    assert_same(found, expected)


def load_strictly(path: str, key: str) -> None:
    checkpointer_of().load(path, {"stage0": None, "stage1": None, key: {"weight": None}, "epoch": None}, strict=True)


# Tensors on meshes of up to three dimensions

SHAPES = [(7, 5), (3,), (), (0, 4), (1, 9, 2), (16,), (11, 3), (2, 2, 13)]
KINDS = [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.bool, torch.complex64, torch.int64, torch.uint8]


def _whole_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kinds = [(shape, dtype) for shape in SHAPES for dtype in KINDS]
    return {f"t{n}": random_tensor(shape, dtype, generator) for n, (shape, dtype) in enumerate(kinds)}


def _on_mesh(tensors: dict[str, torch.Tensor], mesh_shape: tuple[int, ...], seed: int) -> dict[str, torch.Tensor]:
    """Each placed by chance; the ranks stand in the mesh in an order by chance, too."""
    chance = random.Random(seed)
    count = math.prod(mesh_shape)
    mesh = DeviceMesh("cpu", torch.tensor(chance.sample(range(count), count)).view(mesh_shape))

    def placement(dimensions: int) -> Any:
        choices: list[Any] = [Replicate(), *map(Shard, range(dimensions))]
        # Not a number of ranks: then it would stand for what FSDP2 makes of tensor parallelism, of which
        # distribute_tensor makes something else where sizes do not divide evenly.
        choices += [_StridedShard(dimension, split_factor=chance.choice([5, 7])) for dimension in range(dimensions)]
        return chance.choice(choices)

    return {
        name: distribute_tensor(tensor, mesh, [placement(tensor.dim()) for _ in mesh_shape], src_data_rank=None)
        for name, tensor in tensors.items()
    }


def save_on_mesh(path: str, mesh_shape: tuple[int, ...], seed: int) -> None:
    checkpointer_of().save(path, {"t": _on_mesh(_whole_tensors(seed), mesh_shape, seed)})


def load_on_mesh(path: str, mesh_shape: tuple[int, ...], seed: int, other_seed: int) -> None:
    """Into tensors that are spread in another way."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in _whole_tensors(seed).items()}
    target = {"t": _on_mesh(zeros, mesh_shape, other_seed)}
    checkpointer_of().load(path, target, strict=True)
    assert_same(target["t"], _on_mesh(_whole_tensors(seed), mesh_shape, other_seed))


def load_as_whole(path: str, seed: int) -> None:
    """Newly made, and into plain tensors."""
    expected = _whole_tensors(seed)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    reader = CheckpointReader(RankInfo(rank(), world_size))
    assert_same(reader.read(path)[0], {"t": expected})
    target = {"t": {name: torch.zeros_like(tensor) for name, tensor in expected.items()}}
    assert reader.read(path, target) == (target, [])
    assert_same(target, {"t": expected})


# Replicas


def save_replicas(path: str, elements: int) -> None:
    """The same plain tensors on all ranks, declared to be so."""
    state = {"model": {f"w{number}": torch.full((elements, 3), float(number)) for number in range(4)}}
    checkpointer_of(replicated=True).save(path, state)


def save_small_replicas(path: str, count: int) -> None:
    """Many, each too small to be divided."""
    checkpointer_of(replicated=True).save(path, {"model": {f"w{number}": torch.ones(3) for number in range(count)}})


# What is refused


def _row() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _sharded(value: float = 1.0, length: int = 9) -> torch.Tensor:
    return distribute_tensor(torch.full((length,), value), _row(), [Shard(0)], src_data_rank=None)


def partial_sum() -> Any:
    return {"model": {"sum": DTensor.from_local(torch.ones(4), _row(), [Partial()], run_check=False)}}


def one_dotted_path() -> Any:
    return {"model": {"a": {"b": _sharded()}, "a.b": _sharded()}}


def shards_of_ones_own() -> Any:
    """Of sizes that no rule gives: 1, 2, 3, ..."""
    sizes = range(1, dist.get_world_size() + 1)
    shape = torch.Size([sum(sizes)])
    own = torch.ones(sizes[rank()])
    return {
        "model": {
            "own": DTensor.from_local(own, _row(), [Shard(0)], run_check=False, shape=shape, stride=(1,)),
        }
    }


def replicas_that_differ() -> Any:
    value = 2.0 if rank() == 1 else 1.0
    return {"model": {"same": torch.ones(3), "drifted": torch.tensor([1.0, 1.0, value])}}


def replicas_of_other_names() -> Any:
    return {"model": {"same": torch.ones(3), **({"only here": torch.ones(2)} if rank() == 1 else {})}}


def other_keys_on_one_rank() -> Any:
    return {"model": {"weight": _sharded(), **({"extra": _sharded()} if rank() == 1 else {})}}


def other_shapes_on_one_rank() -> Any:
    return {"model": {"weight": _sharded(length=10 if rank() == 1 else 9)}}


def good() -> Any:
    return {"model": {"weight": _sharded(3.0)}, "step": 5}


def attempt(path: str, make_state: Callable[[], Any], asynchronous: bool = False) -> Exception | None:
    """Save; what that raised."""
    checkpointer = checkpointer_of(asynchronous=asynchronous, replicated=True)
    try:
        outcome = checkpointer.save(path, make_state())
        if isinstance(checkpointer, AsyncCheckpointer):
            for future in outcome:
                future.result(PATIENCE_SECS)
    except LastgoodError as error:
        return error
    return None


def attempt_alone(path: str, rank_info: RankInfo | None) -> Exception | None:
    """Save what is spread over all ranks with a checkpointer of this rank alone, or of fewer ranks than that."""
    try:
        make_sync_checkpointer(rank_info=rank_info).save(path, good())
    except LastgoodError as error:
        return error
    return None


def load_good(path: str) -> None:
    found = checkpointer_of(replicated=True).load(path)
    assert found["step"] == 5
    assert torch.equal(found["model"]["weight"], torch.full((9,), 3.0))


def attempt_load(path: str, change: str) -> Exception | None:
    """Load :func:`good` into a target that does not fit; what that raised. Nothing may change."""
    mesh = _row()
    if change == "shape":
        weight = distribute_tensor(torch.zeros(10), mesh, [Shard(0)], src_data_rank=None)
    elif change == "dtype":
        weight = distribute_tensor(torch.zeros(9, dtype=torch.float64), mesh, [Shard(0)], src_data_rank=None)
    elif change == "partial":
        weight = DTensor.from_local(torch.zeros(9), mesh, [Partial()], run_check=False)
    else:
        weight = distribute_tensor(torch.zeros(9, device="meta"), mesh, [Shard(0)], src_data_rank=None)
    target = {"step": -1, "model": {"weight": weight}}
    try:
        checkpointer_of(replicated=True).load(path, target)
    except LastgoodError as error:
        assert target["step"] == -1
        assert weight.device.type == "meta" or not local(weight).any()
        return error
    return None


# Views, and tensors that stand at two keys


def _views(fill: float | None = None) -> dict[str, torch.Tensor]:
    """Sharded tensors whose local memory is in another order than their elements, has gaps, or is seen conjugated."""
    generator = torch.Generator().manual_seed(3)
    mesh = _row()

    def spread(shape: tuple[int, ...], dtype: torch.dtype, dimension: int) -> torch.Tensor:
        tensor = random_tensor(shape, dtype, generator)
        tensor = tensor if fill is None else torch.full_like(tensor, fill)
        return distribute_tensor(tensor, mesh, [Shard(dimension)], src_data_rank=None)

    every_second = torch.full((4, 6), 2.0 if fill is None else fill)[:, ::2]
    return {
        "transposed": spread((11, 5), torch.float32, 0).t(),
        "permuted": spread((4, 7, 3), torch.float32, 1).permute(2, 0, 1),
        "with gaps": DTensor.from_local(every_second, mesh, [Shard(0)], run_check=False),
        "conjugated": DTensor.from_local(
            torch.view_as_complex(torch.full((3, 2), 1.5 if fill is None else fill)).conj(), mesh, [Shard(0)]
        ),
    }


def save_views(path: str) -> None:
    checkpointer_of().save(path, _views())


def load_views(path: str) -> None:
    target, expected = _views(0.0), _views()
    checkpointer_of().load(path, target, strict=True)
    for name, tensor in target.items():
        assert torch.equal(local(tensor).resolve_conj(), local(expected[name]).resolve_conj()), name


def views_as_saved() -> dict[str, torch.Tensor]:
    """Whole, on every rank."""
    return {name: tensor.full_tensor().resolve_conj().contiguous() for name, tensor in _views().items()}


def load_whole_views(path: str, expected: dict[str, torch.Tensor]) -> None:
    found = checkpointer_of().load(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].resolve_conj(), tensor), name


def save_tied(path: str) -> None:
    """One sharded tensor at two keys, and a declared one at two."""
    weight = _sharded(2.0, length=30_001)
    same = torch.ones(30_001)
    state = {"model": {"in": weight, "out": weight, "same": same, "again": same}}
    checkpointer_of(replicated=True).save(path, state)
