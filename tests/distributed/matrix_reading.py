"""Which files a load opens and what it reads of them; what ranks load when told to."""

import os
from typing import Any

import torch
import torch.distributed as dist
from tests.distributed.matrix_layouts import Training, bits, local, tensors_of
from tests.distributed.matrix_ranks import OTHER_SEED, SEED, checkpointer_of, rank, training
from tests.unit.loading.files import CountingFile
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lastgood.checkpoint_reader import CheckpointReader
from lastgood.errors import LastgoodError
from lastgood.storage.base import StoredFile
from lastgood.storage.local import LocalStorage
from lastgood.types import RankInfo

ROWS, COLUMNS = 16384, 256  # 16 MiB


class CountingStorage(LocalStorage):
    """Notes which files are opened, and what is read of them."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, list[CountingFile]] = {}

    def open(self, path: str) -> StoredFile:
        file = CountingFile(super().open(path))
        self.files.setdefault(path.rpartition("/")[2], []).append(file)
        return file

    def bytes_read(self) -> dict[str, int]:
        """By file, how many bytes of it were read, each as often as it was."""
        return {name: sum(file.bytes_read for file in files) for name, files in self.files.items()}


def _reader(storage: LocalStorage) -> CheckpointReader:
    return CheckpointReader(RankInfo(rank(), dist.get_world_size()), storage=storage)


def files_opened(path: str, layout: str) -> list[str]:
    """By a load into the own layout, in which no rank holds what another one does."""
    storage, state = CountingStorage(), training(layout, OTHER_SEED).state()
    del state["extra"]
    _reader(storage).read(path, state)
    return sorted(name for name in storage.files if name.endswith(".pt"))


def save_large(path: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(float(ROWS * COLUMNS)).view(ROWS, COLUMNS)
    checkpointer_of().save(path, {"w": distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)})


def bytes_read_of_large(path: str, dimension: int) -> dict[str, int]:
    """By a load of :func:`save_large` by other ranks, into rows or columns."""
    return {name: count for name, count in _load_large(path, dimension).bytes_read().items() if name.endswith(".pt")}


def files_shared_on_a_machine_of(ranks_here: int, path: str, dimension: int) -> list[str]:
    """Those that such a load leaves in the page cache for other ranks, where so many are on the machine."""
    before = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_here)
    try:
        storage = _load_large(path, dimension)
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]
        if before is not None:
            os.environ["LOCAL_WORLD_SIZE"] = before
    return sorted(name for name, files in storage.files.items() if any(file.expects_other_readers for file in files))


def _load_large(path: str, dimension: int) -> CountingStorage:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(float(ROWS * COLUMNS)).view(ROWS, COLUMNS)
    target = distribute_tensor(torch.zeros(ROWS, COLUMNS), mesh, [Shard(dimension)], src_data_rank=None)
    storage = CountingStorage()
    _reader(storage).read(path, {"w": target})
    expected = distribute_tensor(whole, mesh, [Shard(dimension)], src_data_rank=None)
    assert torch.equal(local(target), local(expected))
    return storage


def load_damaged(path: str, layout: str, options: dict[str, Any]) -> tuple[Exception | None, list[str]]:
    """What came of a load into a layout of this rank's, and which tensors were changed."""
    target: Training = training(layout, OTHER_SEED)
    target.scribble()
    state = {"model": target.net.state_dict()}
    before = {name: bits(local(tensor)) for name, tensor in tensors_of(state)}
    error = None
    try:
        _reader(LocalStorage()).read(path, state, **options)
    except LastgoodError as raised:
        error = raised
    changed = [name for name, tensor in tensors_of(state) if bits(local(tensor)) != before[name]]
    return error, changed


def holds_the_saved(layout: str, names: list[str]) -> bool:
    """Whether these parameters of this rank are those that were saved, after :func:`load_damaged`."""
    found = training(layout, OTHER_SEED).net.state_dict()
    wanted = training(layout, SEED).net.state_dict()
    return all(bits(local(found[name])) == bits(local(wanted[name])) for name in names)
