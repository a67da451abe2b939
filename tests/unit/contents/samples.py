"""What tests of looking into checkpoints share: a state with a value of every kind, and storage that counts."""

import collections
import warnings
from pathlib import Path
from typing import Any

import torch
from tests.unit.loading.files import CountingFile

import lastgood
from lastgood.storage.base import StoredFile
from lastgood.storage.local import LocalStorage


def every_kind() -> dict[Any, Any]:
    """Tensors that share memory, plain values of every kind, and values that only a pickle describes."""
    shared = torch.arange(12.0).reshape(3, 4)
    twice = [1, 2]
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    return {
        "model": model.state_dict(),
        "parameters": dict(model.named_parameters()),
        "tied": {"a": shared, "again": shared, "transposed": shared.t(), "part": shared[1]},
        "plain": [1, 2.5, float("nan"), float("inf"), "text", "lone \ud800", b"bytes", bytearray(b"x"), None, True],
        "more": (10**30, -(2**70), 1 + 2j, {3}, torch.Size([2, 3]), torch.bfloat16, torch.device("cuda", 1), ()),
        "ordered": collections.OrderedDict(b=2, a=1),
        "list": twice,
        "same list": twice,
        5: "an int as key",
        ("a", 1): "a tuple as key",
        "with.dots": {"w": torch.ones(2, dtype=torch.int8)},
        "conj": torch.ones(3, dtype=torch.complex64).conj(),
        "empty": torch.empty(0, 3),
        "sparse": torch.eye(3).to_sparse(),
    }


def save_in_each_form(directory: Path, state: Any) -> dict[str, Path]:
    """The state as a file of ours, as a zip of torch's, and in torch's old format."""
    paths = {kind: directory / f"{kind}.pt" for kind in ("lastgood", "torch zip", "torch legacy")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lastgood.save(state, paths["lastgood"])
        torch.save(state, paths["torch zip"])
        torch.save(state, paths["torch legacy"], _use_new_zipfile_serialization=False)
    return paths


class CountingStorage(LocalStorage):
    """Local storage that notes what is read of the files that it opens."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[CountingFile] = []

    def open(self, path: str) -> StoredFile:  # type: ignore[override]
        self.files.append(CountingFile(super().open(path)))
        return self.files[-1]

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self.files)
