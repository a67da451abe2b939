"""What lastgood relies on in torch without torch's promise: these tests fail when torch changes it."""

import gc
import inspect
import warnings

import pytest
import torch

from lastgood import _torch_internals
from lastgood._torch_internals import negative_view, untyped_storage_of


def typed(tensor: torch.Tensor) -> torch.storage.TypedStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return tensor.storage()


def test_a_typed_storage_gives_its_untyped_one_without_a_warning() -> None:
    tensor = torch.ones(3)
    storage = typed(tensor)
    assert isinstance(storage, torch.storage.TypedStorage)
    untyped = untyped_storage_of(storage)
    assert untyped is tensor.untyped_storage()
    assert storage.dtype is torch.float32


def test_an_untyped_storage_is_itself_and_all_else_is_none() -> None:
    storage = torch.ones(3).untyped_storage()
    assert untyped_storage_of(storage) is storage
    for other in (torch.ones(3), [1], None, torch.float32, torch.UntypedStorage):
        assert untyped_storage_of(other) is None


def test_a_negative_view_negates_without_a_copy() -> None:
    tensor = torch.tensor([1.0, -2.0])
    view = negative_view(tensor)
    assert view.is_neg()
    assert view.data_ptr() == tensor.data_ptr()
    assert view.tolist() == [-1.0, 2.0]
    assert negative_view(view).tolist() == [1.0, -2.0]


def test_no_other_private_name_of_torch_is_used() -> None:
    source = inspect.getsource(_torch_internals)
    private = {word for word in source.replace("(", " ").split() if "._" in word and "tests" not in word}
    assert private == {"torch._neg_view", "storage._untyped_storage", "tensor._version"}


# Storages are told apart by the identity of their Python objects.


def test_tensors_on_one_storage_give_the_very_same_storage_object() -> None:
    base = torch.arange(12.0)
    held = base.untyped_storage()
    parameter = torch.nn.Parameter(base)
    views = [
        base,
        base[3:],
        base.reshape(3, 4).t(),
        base.view(torch.int32),
        base.detach(),
        base.data,
        base[:0],
        parameter,
        parameter.data,
        base.expand(2, 12),
        torch.view_as_complex(base.reshape(6, 2)).conj(),
        torch.empty(0).set_(held),
    ]
    assert all(view.untyped_storage() is held for view in views)


def test_a_storage_object_stays_the_same_while_somebody_holds_it() -> None:
    base = torch.ones(5)
    first = id(base.untyped_storage())
    held = base.untyped_storage()
    gc.collect()
    for _ in range(3):
        assert base.untyped_storage() is held
    assert first  # the object before need not be the one that is held: nobody held it


def test_a_storage_object_outlives_its_tensors() -> None:
    base = torch.arange(5)
    held = base.untyped_storage()
    view = base[2:]
    del base
    gc.collect()
    assert view.untyped_storage() is held


def test_other_storages_are_other_objects() -> None:
    held = [torch.empty(0).untyped_storage() for _ in range(3)] + [torch.ones(2).untyped_storage() for _ in range(3)]
    assert len({id(storage) for storage in held}) == 6


# What data.pkl names.


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        ("_rebuild_tensor_v2", ["storage", "storage_offset", "size", "stride", "requires_grad", "backward_hooks"]),
        ("_rebuild_tensor_v3", ["storage", "storage_offset", "size", "stride", "requires_grad", "backward_hooks"]),
        ("_rebuild_parameter", ["data", "requires_grad", "backward_hooks"]),
    ],
)
def test_torch_s_functions_that_a_pickle_calls_take_what_they_took(function: str, parameters: list[str]) -> None:
    found = list(inspect.signature(getattr(torch._utils, function)).parameters)
    assert found[: len(parameters)] == parameters
    rest = {"_rebuild_tensor_v2": ["metadata"], "_rebuild_tensor_v3": ["dtype", "metadata"]}
    assert found[len(parameters) :] == rest.get(function, [])


def test_torch_s_function_that_sets_attributes_takes_what_it_took() -> None:
    assert list(inspect.signature(torch._tensor._rebuild_from_type_v2).parameters) == [
        "func",
        "new_type",
        "args",
        "state",
    ]
