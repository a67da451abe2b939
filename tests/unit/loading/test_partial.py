"""Partial and in-place loads: only what is asked for, where it is asked for, or nothing at all."""

import gc
import threading
import weakref
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.capture.comparing import assert_same
from tests.unit.loading.files import CountingFile, opened, raw

import lastgood
from lastgood._loading import pairs as pair_loading
from lastgood._loading import storages
from lastgood._loading.file import load_file
from lastgood.errors import ConfigError, MissingKeysError, TargetMismatchError
from lastgood.storage.local import LocalStorage


class CountingStorage(LocalStorage):
    """Local storage that keeps the files it opened."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[CountingFile] = []

    def open(self, path: str) -> Any:
        self.files.append(CountingFile(super().open(path)))
        return self.files[-1]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state.pt"


def saved(file: Path, state: Any) -> Any:
    lastgood.save(state, file)
    return state


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = int(torch.tensor(shape).prod())
    return torch.arange(1, count + 1).reshape(shape).to(dtype)


# Which keys


def test_only_the_keys_of_the_target_are_loaded_and_the_same_dict_comes_back(file: Path) -> None:
    saved(file, {"a": numbers(3), "b": numbers(4), "deep": {"c": numbers(2), "d": 5}, "list": [1, 2]})
    tensor = torch.zeros(3)
    inner: dict[str, Any] = {"d": None}
    target: dict[str, Any] = {"a": tensor, "deep": inner}

    assert lastgood.load(file, target) is target

    assert list(target) == ["a", "deep"]
    assert target["a"] is tensor
    assert target["deep"] is inner
    assert inner == {"d": 5}
    assert torch.equal(tensor, numbers(3))


def test_none_is_newly_made_whatever_was_saved_there(file: Path) -> None:
    state = saved(file, {"tensor": numbers(2, 3), "dict": {"x": numbers(2)}, "tuple": (1, numbers(1)), "none": None})
    target = dict.fromkeys(state)
    assert_same(lastgood.load(file, target), state)


def test_hazard_19_tuples_empty_tensors_ordered_dicts_and_other_numbers(file: Path) -> None:
    """All of these came back wrong, or raised, in partial loads of other libraries."""
    base = numbers(4, 6)
    state = saved(
        file,
        {
            "tuple": (numbers(2), (3, numbers(1)), "x"),
            "empty": torch.empty(0, 5),
            "ordered": OrderedDict(w=numbers(2)),
            "plain": {"w": numbers(2)},
            "int": 7,
            "float": 2.5,
            "transposed": base.t(),
            "strided": base[::2, ::3],
        },
    )
    target = {
        "tuple": (torch.zeros(2), (None, torch.zeros(1)), None),
        "empty": torch.ones(0, 5),
        "ordered": {"w": torch.zeros(2)},
        "plain": OrderedDict(w=torch.zeros(2)),
        "int": 1.5,
        "float": 3,
        "transposed": torch.zeros(6, 4),
        "strided": torch.zeros(2, 2),
    }
    given = {name: target[name] for name in ("empty", "ordered", "plain", "transposed", "strided")}
    first = target["tuple"][0]
    lastgood.load(file, target)

    assert type(target["tuple"]) is tuple
    assert type(target["tuple"][1]) is tuple
    assert target["tuple"][0] is first
    assert torch.equal(first, numbers(2))
    assert target["tuple"][1][0] == 3
    assert target["tuple"][2] == "x"
    for name, value in given.items():
        assert target[name] is value
    assert type(target["ordered"]) is dict
    assert type(target["plain"]) is OrderedDict
    assert torch.equal(target["ordered"]["w"], numbers(2))
    assert torch.equal(target["plain"]["w"], numbers(2))
    assert (target["int"], type(target["int"])) == (7, int)
    assert (target["float"], type(target["float"])) == (2.5, float)
    assert torch.equal(target["transposed"], base.t())
    assert torch.equal(target["strided"], base[::2, ::3])

    # Newly made, they have the strides that were saved.
    made = lastgood.load(file, {"transposed": None, "strided": None, "empty": None, "tuple": None})
    assert made["transposed"].stride() == state["transposed"].stride()
    assert made["strided"].stride() == state["strided"].stride()
    for name in ("transposed", "strided", "empty"):
        assert torch.equal(made[name], state[name])
    assert type(made["tuple"]) is tuple


def test_longer_lists_come_whole_and_shorter_ones_are_missing_the_rest(file: Path) -> None:
    saved(file, {"longer": [numbers(2), 5, {"x": 1}], "shorter": [numbers(2)]})
    kept = torch.zeros(2)
    longer: list[Any] = [kept]
    beyond = torch.zeros(9)
    shorter: list[Any] = [None, "stays", beyond]
    with opened(file) as stored:
        _, missing = load_file(stored, {"longer": longer, "shorter": shorter})
    assert missing == ["shorter[1]", "shorter[2]"]
    assert longer[0] is kept
    assert torch.equal(kept, numbers(2))
    assert longer[1:] == [5, {"x": 1}]
    assert torch.equal(shorter[0], numbers(2))
    assert shorter[1] == "stays"
    assert shorter[2] is beyond
    assert torch.equal(beyond, torch.zeros(9))


def test_keys_that_are_not_strings(file: Path) -> None:
    keys: list[Any] = [0, 1.5, True, None, (1, "a"), b"x", 2**80, torch.float32, torch.device("cpu")]
    keys.remove(True)  # equal to 1, but not to any other key here
    saved(file, {key: numbers(1) + number for number, key in enumerate(keys)})
    target: dict[Any, Any] = {key: torch.zeros(1) if number % 2 else None for number, key in enumerate(keys)}
    target[99] = None
    with opened(file) as stored:
        _, missing = load_file(stored, target)
    assert missing == ["99"]
    for number, key in enumerate(keys):
        assert target[key].item() == 1 + number


@pytest.mark.filterwarnings("ignore::lastgood.errors.UnsafeValueWarning")
def test_keys_that_only_a_pickle_describes_do_not_stop_the_others(file: Path) -> None:
    saved(file, {"w": numbers(2), frozenset([1]): 1, torch.quint8: 2, torch.ones(1): 3})
    assert torch.equal(lastgood.load(file, {"w": None})["w"], numbers(2))


def test_missing_keys_are_reported_once_by_dotted_path(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoint_0.pt", {"a": {"b": numbers(1)}, "list": [{"x": 1}]})
    target = {"a": {"b": None, "lost": {"child": None, "more": [1, 2]}}, "gone": {"x": {"y": None}}, "list": [{"z": 0}]}
    reader = lastgood.CheckpointReader(lastgood.RankInfo(0, 1))
    loaded, missing = reader.read(str(tmp_path), target)
    assert loaded is target
    assert missing == ["a.lost", "gone", "list[0].z"]
    # What is missing stays as it was.
    assert target["gone"] == {"x": {"y": None}}
    assert target["list"] == [{"z": 0}]


def test_strict_lists_the_missing_keys_and_leaves_the_rest_loaded(file: Path) -> None:
    saved(file, {"a": numbers(2)})
    target = {"a": torch.zeros(2), "b": {"c": None}, "d": None}
    with pytest.raises(RuntimeError, match=r"missing keys: \['b', 'd'\]") as caught:
        lastgood.load(file, target, strict=True)
    assert isinstance(caught.value, MissingKeysError)
    assert caught.value.missing_keys == ("b", "d")
    assert torch.equal(target["a"], numbers(2))


# In place


def targets_of_every_layout() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Targets of the shape (4, 6, 2, 2), each with the tensor whose whole storage shows what was touched."""
    plain = torch.zeros(4, 6, 2, 2)
    channels_last = torch.zeros(4, 6, 2, 2).contiguous(memory_format=torch.channels_last)
    transposed = torch.zeros(2, 2, 6, 4)
    strided = torch.zeros(8, 12, 2, 2)
    inside = torch.zeros(6, 8, 4, 4)
    flat = torch.zeros(4 * 6 * 4 + 20)
    parameter = torch.nn.Parameter(torch.zeros(4, 6, 2, 2))
    return {
        "plain": (plain, plain),
        "channels_last": (channels_last, channels_last),
        "transposed": (transposed.permute(3, 2, 1, 0), transposed),
        "strided": (strided[::2, ::2], strided),
        "sliced": (inside[1:5, 1:7, 1:3, 1:3], inside),
        "offset": (flat[7 : 7 + 96].view(4, 6, 2, 2), flat),
        "parameter": (parameter, parameter),
    }


@pytest.mark.parametrize("saved_as", ["plain", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("name", list(targets_of_every_layout()))
def test_targets_of_any_layout_get_the_values_and_their_neighbours_stay(file: Path, name: str, saved_as: str) -> None:
    values = targets_of_every_layout()[saved_as][0]
    values.copy_(numbers(4, 6, 2, 2))
    saved(file, {"w": values})
    target, base = targets_of_every_layout()[name]
    with torch.no_grad():
        base.fill_(-1.0)
    untouched = target.stride(), target.storage_offset(), target.requires_grad, target.data_ptr()
    holder = {"w": target}
    lastgood.load(file, holder)

    assert holder["w"] is target
    assert torch.equal(target.detach(), numbers(4, 6, 2, 2))
    assert (target.stride(), target.storage_offset(), target.requires_grad, target.data_ptr()) == untouched
    # Put back what the target covers: nothing else in its storage may have changed.
    with torch.no_grad():
        target.fill_(-1.0)
    assert raw(base) == raw(torch.full(base.shape, -1.0))


def test_parameters_buffers_and_non_leaf_views_move_their_version_counters(file: Path) -> None:
    saved(file, {"leaf": numbers(300_000), "view": numbers(10), "staged": numbers(4, 4).t(), "plain": numbers(3)})
    leaf = torch.nn.Parameter(torch.zeros(300_000))
    base = torch.zeros(20, requires_grad=True)
    non_leaf = (base * 2)[5:15]
    staged = torch.nn.Parameter(torch.zeros(4, 4))
    plain = torch.zeros(3)
    target = {"leaf": leaf, "view": non_leaf, "staged": staged, "plain": plain}
    product = (leaf * leaf).sum()
    versions = {name: tensor._version for name, tensor in target.items()}

    lastgood.load(file, target)

    for name, tensor in target.items():
        assert tensor._version > versions[name], name
    assert leaf.requires_grad
    assert leaf.is_leaf
    assert not non_leaf.is_leaf
    assert torch.equal(non_leaf.detach(), numbers(10))
    assert torch.equal(staged.detach(), numbers(4, 4).t())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_tensors_are_loaded_into_as_well(file: Path) -> None:
    saved(file, {"direct": numbers(5), "staged": numbers(3, 4).t()})
    with torch.inference_mode():
        target = {"direct": torch.zeros(5), "staged": torch.zeros(4, 3)}
    lastgood.load(file, target)
    assert torch.equal(target["direct"], numbers(5))
    assert torch.equal(target["staged"], numbers(3, 4).t())


def test_targets_that_share_memory_are_filled_one_after_the_other(file: Path) -> None:
    """As with assignments in the order of the keys, the last one wins; never a mixture of both."""
    first, second = torch.full((700_000,), 1.0), torch.full((700_000,), 2.0)
    saved(file, {"first": first, "second": second, "half": torch.full((100,), 3.0), "bystander": numbers(9)})
    shared = torch.zeros(700_000)
    target = {"first": shared, "second": shared[:], "half": shared[50:150], "bystander": torch.zeros(9)}
    lastgood.load(file, target)
    assert torch.equal(shared[:50], second[:50])
    assert torch.equal(shared[50:150], torch.full((100,), 3.0))
    assert torch.equal(shared[150:], second[150:])
    assert torch.equal(target["bystander"], numbers(9))


def test_tied_targets_of_tied_weights_are_read_once(file: Path) -> None:
    weight = numbers(600_000)
    saved(file, {"embed": weight, "head": weight.view(600, 1000)})
    shared = torch.zeros(600_000)
    with opened(file) as stored:
        counting = CountingFile(stored)
        load_file(counting, {"embed": shared, "head": shared.view(600, 1000)})
    assert torch.equal(shared, weight)
    assert counting.bytes_read < weight.nbytes + 300_000


def test_tied_weights_load_tied_when_newly_made(file: Path) -> None:
    weight = torch.nn.Parameter(numbers(10, 10))
    state = saved(file, {"embed": weight, "head": weight, "rows": weight.data[2:4], "other": numbers(5)})
    made = lastgood.load(file, dict.fromkeys(state))
    assert made["embed"] is made["head"]
    with torch.no_grad():
        made["head"][2, 0] = -5
    assert made["rows"][0, 0] == -5
    # One of them given, the other made: still one tensor.
    given = torch.zeros(10, 10)
    target = {"head": None, "embed": given}
    lastgood.load(file, target)
    assert target["head"] is given


def test_tensors_of_several_dtypes_on_one_storage(file: Path) -> None:
    """Each counts its offset in its own elements, from the first byte that any of them uses."""
    base = torch.arange(64, dtype=torch.uint8)
    state = saved(
        file, {"bytes": base[3:5], "floats": base[8:16].view(torch.float32), "ints": base[40:48].view(torch.int64)}
    )
    assert_same(lastgood.load(file), lastgood.load(file, dict.fromkeys(state)))
    for names in (["bytes", "floats"], ["ints"], ["floats"], ["bytes", "ints"]):
        made = lastgood.load(file, dict.fromkeys(names))
        for name in names:
            assert torch.equal(made[name].view(torch.uint8), state[name].view(torch.uint8)), names
    filled = {"bytes": torch.zeros(2, dtype=torch.uint8), "ints": torch.zeros(1, dtype=torch.int64)}
    lastgood.load(file, filled)
    assert torch.equal(filled["bytes"], state["bytes"])
    assert torch.equal(filled["ints"], state["ints"])


def test_conjugate_and_negative_views_in_both_places(file: Path) -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    saved(file, {"conj": values.conj(), "plain": values, "neg": values.conj().imag})
    memory = torch.zeros(2, dtype=torch.complex64)
    target = {"conj": torch.zeros(2, dtype=torch.complex64), "plain": memory.conj(), "neg": torch.zeros(2)}
    lastgood.load(file, target)
    assert torch.equal(target["conj"], values.conj().resolve_conj())
    assert torch.equal(memory.resolve_conj(), values.conj().resolve_conj())
    assert torch.equal(target["neg"], values.conj().imag.resolve_neg())


def test_a_module_and_its_optimizer_are_loaded_in_place(file: Path) -> None:
    def trained(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.BatchNorm1d(30), torch.nn.Linear(30, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1))
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 20)).square().sum().backward()
            optimizer.step()
        return model, optimizer

    model, optimizer = trained(0)
    state = saved(file, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other_model, other_optimizer = trained(1)
    target = {"model": other_model.state_dict(), "optimizer": other_optimizer.state_dict()}
    moments = target["optimizer"]["state"][0]["exp_avg"]
    lastgood.load(file, target, strict=True)

    assert target["optimizer"]["state"][0]["exp_avg"] is moments
    for name, tensor in state["model"].items():
        assert torch.equal(other_model.state_dict()[name], tensor), name  # the module's own memory
    assert target["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    for number, entry in state["optimizer"]["state"].items():
        for name, tensor in entry.items():
            assert torch.equal(other_optimizer.state_dict()["state"][number][name], tensor)


def test_the_target_may_be_a_list_or_a_single_tensor(tmp_path: Path) -> None:
    saved(tmp_path / "one", numbers(4))
    saved(tmp_path / "list", [numbers(4), 1])
    tensor = torch.zeros(4)
    assert lastgood.load(tmp_path / "one", tensor) is tensor
    assert torch.equal(tensor, numbers(4))
    target: list[Any] = [torch.zeros(4)]
    assert lastgood.load(tmp_path / "list", target) is target
    assert target[1] == 1


# Targets that do not fit


def mismatches() -> dict[str, torch.Tensor | Any]:
    return {
        "shape": torch.zeros(5),
        "dtype": torch.zeros(4, dtype=torch.float64),
        "meta": torch.zeros(4, device="meta"),
        "expanded": torch.zeros(1).expand(4),
        "sparse": torch.zeros(4).to_sparse(),
    }


@pytest.mark.parametrize("kind", list(mismatches()))
@pytest.mark.parametrize("position", ["first", "last"])
def test_a_target_that_does_not_fit_changes_nothing_at_all(file: Path, kind: str, position: str) -> None:
    saved(file, {"bad": numbers(4), "good": numbers(300_000), "nested": {"list": [numbers(3), 5]}, "number": 1})
    bad = {"bad": mismatches()[kind]}
    good: dict[str, Any] = {"good": torch.zeros(300_000), "nested": {"list": [torch.zeros(3)]}, "number": 2}
    target = {**bad, **good} if position == "first" else {**good, **bad}
    with pytest.raises(RuntimeError, match="'bad'") as caught:
        lastgood.load(file, target)
    assert isinstance(caught.value, TargetMismatchError)
    assert caught.value.tensor == "bad"
    assert raw(good["good"]) == bytes(4 * 300_000)
    assert raw(good["nested"]["list"][0]) == bytes(12)
    assert len(good["nested"]["list"]) == 1
    assert good["number"] == 2
    assert good["good"]._version == 0


def test_a_tensor_target_for_another_kind_of_value_names_the_key(file: Path) -> None:
    saved(file, {"deep": {"number": 3, "sparse": numbers(3).to_sparse()}})
    for name in ("number", "sparse"):
        with pytest.raises(TargetMismatchError, match=rf"deep\.{name}"):
            lastgood.load(file, {"deep": {name: torch.zeros(3)}})


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_values_that_only_the_pickle_describes_are_loaded_into_as_well(file: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    quantized = torch.quantize_per_tensor(numbers(4), 0.5, 3, torch.qint8)
    saved(file, {"sparse": sparse, "quantized": quantized, "plain": numbers(2)})
    target = {
        "sparse": torch.zeros(3, 3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.zeros(4), 0.5, 3, torch.qint8),
        "plain": torch.zeros(2),
    }
    given = dict(target)
    lastgood.load(file, target)
    for name, tensor in given.items():
        assert target[name] is tensor
    assert torch.equal(target["sparse"].to_dense(), torch.eye(3))
    assert torch.equal(target["quantized"].dequantize(), quantized.dequantize())
    assert torch.equal(target["plain"], numbers(2))


def test_mmap_does_not_go_with_a_target(file: Path) -> None:
    saved(file, {"a": numbers(2)})
    with pytest.raises(ConfigError, match="mmap"):
        lastgood.load(file, {"a": None}, mmap=True)


def test_large_targets_of_other_strides_are_filled_in_parts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_loading, "STAGED_BYTES", 1000)
    values = numbers(7, 50, 3, 11)
    state = saved(
        file,
        {
            "contiguous": values,
            "permuted": values.permute(2, 0, 3, 1),
            "gaps": values[:, ::7, :, 1::2],
            "expanded": values[:, :, :1, :1].expand(7, 50, 9, 2),
            "one": values[3, 4, :1, :1],
            "conjugate": torch.complex(values, values).conj(),
        },
    )
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        target = {}
        for name, tensor in state.items():
            dimensions = [number for number in order if number < tensor.dim()]
            base = torch.zeros([2 * tensor.shape[number] for number in dimensions], dtype=tensor.dtype)
            target[name] = base[tuple(slice(None, None, 2) for _ in dimensions)].permute(
                [dimensions.index(number) for number in range(tensor.dim())]
            )
            assert target[name].shape == tensor.shape
        lastgood.load(file, target)
        for name, tensor in state.items():
            assert torch.equal(target[name], tensor), (name, order)


@pytest.mark.parametrize("batch_size", [1 << 20, 3_000_001, pair_loading.STAGED_BYTES])
def test_large_views_that_begin_and_end_anywhere_are_read_in_whole_blocks_and_copied(
    file: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    monkeypatch.setattr(pair_loading, "STAGED_BYTES", batch_size)
    base = numbers(700, 1501)
    views = {"columns": base[:, 7:800], "rows": base[13:650, ::3], "end": base[300:, 1:], "few": base[5:9, 3:6]}
    half = numbers(1_300_000).to(torch.bfloat16)
    state = saved(file, {"base": base, **views, "half": half[3:1_281_003].view(-1, 61).t()})
    target = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}
    lastgood.load(file, target)
    for name, tensor in state.items():
        assert torch.equal(target[name], tensor), name


# What is read


def test_a_small_tensor_of_a_large_file_costs_a_few_blocks(file: Path, tmp_path: Path) -> None:
    state: dict[str, Any] = {f"large{number}": torch.zeros(5_000_000) for number in range(5)}
    state["small"] = numbers(1000)
    saved(tmp_path / "checkpoint_0.pt", state)
    storage = CountingStorage()
    reader = lastgood.CheckpointReader(lastgood.RankInfo(0, 1), storage=storage)
    target = {"small": torch.zeros(1000)}
    reader.read(str(tmp_path), target)
    assert torch.equal(target["small"], numbers(1000))
    [counted] = storage.files
    assert counted.size > 100_000_000
    assert counted.bytes_read < 3 * 1024 * 1024
    # A row of a large tensor that was saved as a view of its own: the block it lies in, not the tensor.
    assert all(size <= 1024 * 1024 for _, size in counted.reads)


def test_without_checksums_not_even_whole_blocks_are_read(file: Path) -> None:
    saved(file, {"large": torch.zeros(3_000_000), "small": numbers(100)})
    with opened(file) as stored:
        counting = CountingFile(stored)
        made, _ = load_file(counting, {"small": None}, verify=False)
    assert torch.equal(made["small"], numbers(100))
    assert counting.bytes_read < 100_000


def test_meta_reads_no_data(file: Path) -> None:
    saved(file, {"large": torch.zeros(3_000_000)})
    with opened(file) as stored:
        counting = CountingFile(stored)
        made, _ = load_file(counting, map_location="meta")
    assert made["large"].is_meta
    assert counting.bytes_read < 100_000


def test_an_interrupted_load_leaves_no_read_without_its_memory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that goes on in its thread after the load was given up still writes into memory that somebody owns."""
    saved(file, {"large": torch.zeros(3_000_000)})
    monkeypatch.setattr("lastgood._loading.records.NO_PROGRESS_TIMEOUT_SECS", 0.05)
    released, done = threading.Event(), threading.Event()
    written: list[int] = []

    class StuckFile(CountingFile):
        def read_into(self, offset: int, target: memoryview) -> None:
            if target.nbytes > 1_000_000:
                assert released.wait(60)
                target[:] = b"\x01" * target.nbytes
                written.append(target.nbytes)
                done.set()
                return
            super().read_into(offset, target)

    pools: list[Any] = []
    allocate = storages.StoragePool.allocate

    def noting(pool: storages.StoragePool) -> Any:
        pools.append(weakref.ref(pool))
        return allocate(pool)

    monkeypatch.setattr(storages.StoragePool, "allocate", noting)
    with opened(file) as stored:
        with pytest.raises(lastgood.StorageError, match="gave no data"):
            load_file(StuckFile(stored))
        gc.collect()
        assert pools[0]() is not None, "the memory was given back while a thread still writes to it"
        released.set()
        assert done.wait(60)
    assert written


def test_a_target_that_holds_itself_is_filled(tmp_path: Path) -> None:
    saved: dict[str, Any] = {"w": torch.ones(2), "inner": {}}
    saved["inner"]["outer"] = saved
    lastgood.save(saved, tmp_path / "state.pt")
    target: dict[str, Any] = {"w": torch.zeros(2), "inner": {}}
    target["inner"]["outer"] = target
    assert lastgood.load(tmp_path / "state.pt", target) is target
    assert torch.equal(target["w"], torch.ones(2))
    assert target["inner"]["outer"] is target


@pytest.mark.parametrize(
    "saved", [[torch.ones(2)], torch.ones(2), 3, Counter(a=1)], ids=lambda saved: type(saved).__name__
)
def test_a_dict_as_target_of_what_is_no_dict_is_refused_and_untouched(tmp_path: Path, saved: object) -> None:
    lastgood.save(saved, tmp_path / "state.pt")
    target = {"a": torch.zeros(2)}
    with pytest.raises(RuntimeError, match="the target is a dict, the saved state is not"):
        lastgood.load(tmp_path / "state.pt", target)
    assert torch.equal(target["a"], torch.zeros(2))
