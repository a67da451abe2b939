"""What cannot be saved: a clear error that names the key, no file left behind, an earlier file as it was."""

import argparse
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lastgood
from lastgood.errors import UnsupportedStateError


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with an earlier checkpoint in it, which must be there and unchanged afterwards, and nothing else."""
    path = tmp_path / "checkpoint.pt"
    lastgood.save({"weight": torch.arange(3)}, path)
    earlier = path.read_bytes()
    yield tmp_path
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == earlier


def refused(state: Any, folder: Path) -> UnsupportedStateError:
    """Try to save over the earlier checkpoint, and under a new name; the error."""
    with pytest.raises(UnsupportedStateError):
        lastgood.save(state, folder / "new.pt")
    with pytest.raises(UnsupportedStateError) as caught:
        lastgood.save(state, folder / "checkpoint.pt")
    return caught.value


def a_local_class() -> Any:
    class Local:
        pass

    return Local()


class Stubborn:
    """An object whose own code fails when it is pickled."""

    def __reduce__(self) -> Any:
        raise ZeroDivisionError("no")


UNPICKLABLE: dict[str, Callable[[], Any]] = {
    "lambda": lambda: lambda: 1,
    "lock": threading.Lock,
    "generator": lambda: (number for number in range(3)),
    "local class": a_local_class,
    "module": lambda: torch,
    "raises": Stubborn,
}


@pytest.mark.parametrize("name", UNPICKLABLE)
def test_an_unpicklable_value_is_named_by_its_key(name: str, folder: Path) -> None:
    state = {"model": torch.ones(2), "config": {"hooks": [0, ("a", UNPICKLABLE[name]())]}}
    error = refused(state, folder)
    assert error.tensor == "config.hooks[1][1]"
    assert "'config.hooks[1][1]'" in str(error)
    assert "cannot be pickled" in str(error)
    assert "nothing was written" in str(error)
    assert error.__cause__ is not None


def test_an_open_file_is_named_by_its_key(folder: Path) -> None:
    with (folder / "checkpoint.pt").open("rb") as file:
        assert refused({"log": file}, folder).tensor == "log"


def test_an_unpicklable_value_inside_an_object_is_named_by_the_object_s_key(folder: Path) -> None:
    error = refused({"config": {"run": argparse.Namespace(callback=lambda: 1)}}, folder)
    assert error.tensor == "config.run"
    assert "argparse.Namespace" in str(error)


def test_an_unpicklable_key_is_named_by_its_path(folder: Path) -> None:
    key = threading.Lock()
    assert str(refused({"table": {key: 1}}, folder).tensor).startswith("table.<unlocked _thread.lock")


def test_the_whole_state_may_be_what_cannot_be_pickled(folder: Path) -> None:
    assert "the object to save" in str(refused(lambda: 1, folder))


def test_an_unpicklable_value_in_a_state_that_contains_itself(folder: Path) -> None:
    state: dict[str, Any] = {}
    state["self"] = state
    state["lock"] = threading.Lock()
    assert refused(state, folder).tensor == "lock"


def meta(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, device="meta")


ON_META: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: meta(2, 3),
    "an empty tensor": lambda: meta(0),
    "a Parameter": lambda: torch.nn.Parameter(meta(2)),
    "a view": lambda: meta(4)[1:],
    "a sparse tensor": lambda: torch.eye(2).to_sparse().to("meta"),
    "a raw storage": lambda: meta(2).untyped_storage(),
    "inside an object": lambda: argparse.Namespace(weight=meta(2)),
    "inside an object's list": lambda: argparse.Namespace(weights=[{"w": meta(2)}]),
    "beside data in an object": lambda: argparse.Namespace(real=torch.ones(2), weight=meta(2)),
}


@pytest.mark.parametrize("name", ON_META)
@pytest.mark.filterwarnings("ignore::lastgood.errors.UnsafeValueWarning")
def test_a_tensor_on_meta_is_named_by_its_key(name: str, folder: Path) -> None:
    error = refused({"model": {"layer.weight": ON_META[name]()}}, folder)
    assert error.tensor == "model.layer.weight"
    assert "'model.layer.weight'" in str(error)
    assert "meta" in str(error)


def resized(nbytes: int) -> torch.Tensor:
    tensor = torch.ones(10)
    tensor.untyped_storage().resize_(nbytes)
    return tensor


@pytest.mark.parametrize("nbytes", [0, 39])
@pytest.mark.parametrize("wrap", [lambda tensor: tensor, lambda tensor: argparse.Namespace(shard=tensor)])
@pytest.mark.filterwarnings("ignore::lastgood.errors.UnsafeValueWarning")
def test_a_tensor_whose_storage_was_resized_is_named_by_its_key(nbytes: int, wrap: Any, folder: Path) -> None:
    error = refused({"module": {"flat": wrap(resized(nbytes))}}, folder)
    assert error.tensor == "module.flat"
    assert f"needs 40 bytes of a storage that was resized to {nbytes}" in str(error)


@pytest.mark.parametrize("dtype", [torch.int4, torch.uint3])
def test_dtypes_that_torch_cannot_save_are_named_by_their_key(dtype: torch.dtype, folder: Path) -> None:
    error = refused({"packed": torch.empty(3, dtype=dtype)}, folder)
    assert error.tensor == "packed"
    assert str(dtype).removeprefix("torch.") in str(error)


def test_a_tensor_without_accessible_memory_is_named_by_its_key(folder: Path) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no mkldnn, whose tensors are opaque blocks of memory")
    assert refused({"fused": torch.ones(3).to_mkldnn()}, folder).tensor == "fused"


def test_memory_of_two_dtypes_inside_an_object_is_named_by_its_key(folder: Path) -> None:
    memory = torch.ones(4)
    special = memory.view(torch.int32).as_subclass(torch.Tensor)
    special.note = "opaque"  # type: ignore[attr-defined]
    assert refused({"floats": memory, "integers": special}, folder).tensor == "integers"


def test_a_float8_tensor_with_attributes_that_requires_grad_is_refused(folder: Path) -> None:
    # torch.save writes it, but no torch.load brings it back.
    tensor = torch.zeros(3, dtype=torch.float8_e5m2).requires_grad_()
    tensor.note = "scaled"  # type: ignore[attr-defined]
    assert refused({"scaled": tensor}, folder).tensor == "scaled"


def test_tuples_that_each_hold_the_one_before_twice_are_refused_in_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Written out in full, as tuples are, there would be 2 to the power of 60 of them.
    monkeypatch.setattr("lastgood.capture._MAX_REPEATS", 10_000)  # a second instead of many
    doubled: Any = (1,)
    for _ in range(60):
        doubled = (doubled, doubled)
    with pytest.raises(UnsupportedStateError, match="over and over") as caught:
        lastgood.save({"weight": torch.ones(2), "doubled": doubled}, folder / "new.pt")
    assert str(caught.value.tensor).startswith("doubled[0][0]")
