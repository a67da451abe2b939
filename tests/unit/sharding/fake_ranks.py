"""DTensors of all ranks in one process, over torch's fake process group: cases on stdin, answers on stdout."""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lastgood.sharding.dtensors import placements_of


def distributed(case: dict[str, Any], rank: int) -> dict[str, Any] | None:
    """The local tensor of a tensor of numbers, as ``distribute_tensor`` makes it."""
    shape, ranks = case["mesh"]
    if rank not in ranks:
        return None
    mesh = DeviceMesh("cpu", torch.tensor(ranks).view(shape))
    placements = [_placement(*each) for each in case["placements"]]
    numbers = torch.arange(torch.Size(case["shape"]).numel()).view(case["shape"])
    # None: nothing is sent, each rank cuts its own part out.
    tensor = distribute_tensor(numbers, mesh, placements, src_data_rank=None)
    return {"shape": list(tensor.to_local().shape), "values": tensor.to_local().flatten().tolist()}


def _placement(dimension: int | None, factor: int) -> Any:
    if dimension is None:
        return Replicate()
    return Shard(dimension) if factor == 1 else _StridedShard(dimension, split_factor=factor)


def fully_sharded(case: list[int], rank: int) -> dict[str, Any] | None:
    """The local part of a column of numbers, divided by tensor parallelism and then by FSDP2."""
    size, data_parallel, tensor_parallel = case
    mesh = init_device_mesh("cpu", (data_parallel, tensor_parallel), mesh_dim_names=("data", "tensor"))
    module = torch.nn.Module()
    column = torch.arange(float(size)).view(size, 1)
    divided = distribute_tensor(column, mesh["tensor"], [Shard(0)], src_data_rank=None)
    module.weight = torch.nn.Parameter(divided)
    fully_shard(module, mesh=mesh["data"])
    weight: Any = module.weight
    assert isinstance(weight, DTensor)
    values = weight.to_local().detach().flatten().to(torch.int64).tolist()
    return {"values": values, "placements": list(map(str, placements_of(weight, "weight")))}


ANSWERS: dict[str, Callable[[Any, int], dict[str, Any] | None]] = {
    "distribute": distributed,
    "fully_shard": fully_sharded,
}


def main(what: str, world_size: int) -> None:
    cases = json.load(sys.stdin)
    found: list[dict[int, Any]] = [{} for _ in cases]
    for rank in range(world_size):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        for case, answers in zip(cases, found, strict=True):
            answer = ANSWERS[what](case, rank)
            if answer is not None:
                answers[rank] = answer
        dist.destroy_process_group()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
