"""Promise 4: what is saved is the state of the moment of the call, though training goes straight on; or nothing is."""

import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.asynchronous import (
    ELEMENTS,
    LARGE,
    Calls,
    Gate,
    Training,
    assert_equal,
    noted_events,
    state_of_large_tensors,
)
from tests.helpers.saves import contents
from tests.helpers.workers import PATIENCE_SECS
from torch.optim import optimizer as torch_optimizer

from lastgood._staging import plan as plan_module
from lastgood._staging.job import PIECE_SIZE, StagingJob
from lastgood.builder import make_async_checkpointer
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.config import CheckpointerConfig
from lastgood.errors import StagingError, TornSnapshotError
from lastgood.staging import CheckpointStagerConfig, DefaultStager

Parameters = list[torch.nn.Parameter]


def new_checkpointer(**staging: Any) -> AsyncCheckpointer:
    return make_async_checkpointer(CheckpointerConfig(staging_config=CheckpointStagerConfig(**staging)))


def adamw(parameters: Parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, foreach=False)


def adamw_foreach(parameters: Parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, foreach=True)


def adamw_fused(parameters: Parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True)


def sgd(parameters: Parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


class UserOptimizer(torch.optim.Optimizer):
    """One of the user's own, which writes past autograd."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] * parameter.grad


OPTIMIZERS = [adamw, adamw_foreach, adamw_fused, sgd, UserOptimizer]


# Training goes straight on


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
def test_hazard_11_training_goes_on_and_the_state_of_the_call_is_saved(
    tmp_path: Path,
    checkpointer: AsyncCheckpointer,
    gate: Gate,
    calls: Calls,
    rng_seed: int,
    make_optimizer: Callable[[Parameters], torch.optim.Optimizer],
) -> None:
    training = Training(make_optimizer, rng_seed)
    training.forward_and_backward()
    training.step()
    for _ in range(3):  # into an arena made for it, then into one that is laid out already
        gate.shut()
        expected = training.state_now()
        _, written = checkpointer.save(str(tmp_path), training.state())
        # Changes the running statistics and the count of batches, past autograd.
        training.forward_and_backward()
        gate.wait_until_reached()
        with noted_events() as events:
            calls.start(training.step)
            assert calls.next() == "waits"
            gate.open()
            assert calls.next() == "done"
        assert [event.path for event in events if event.phase == "hold"] == [type(training.optimizer).__name__]
        written.result(PATIENCE_SECS)
        found = checkpointer.load(str(tmp_path))
        assert_equal(found, expected)
        for name, value in training.state()["model"].items():
            assert not torch.equal(value, found["model"][name]), f"training has not changed {name}"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's compiler about itself
def test_a_compiled_step_waits_too(
    tmp_path: Path, checkpointer: AsyncCheckpointer, gate: Gate, calls: Calls, rng_seed: int
) -> None:
    training = Training(adamw, rng_seed)
    training.forward_and_backward()
    training.step()

    def whole_step() -> None:
        training.step()

    for step in (torch.compile(training.optimizer.step, backend="eager"), torch.compile(whole_step, backend="eager")):
        step()  # compiles
        gate.shut()
        expected = training.state_now()
        _, written = checkpointer.save(str(tmp_path), training.state())
        gate.wait_until_reached()
        calls.start(step)
        assert calls.next() == "waits"
        gate.open()
        assert calls.next() == "done"
        written.result(PATIENCE_SECS)
        assert_equal(checkpointer.load(str(tmp_path)), expected)


def test_other_updates_wait_inside_hold(
    tmp_path: Path, checkpointer: AsyncCheckpointer, gate: Gate, calls: Calls, rng_seed: int
) -> None:
    training = Training(adamw_fused, rng_seed)
    gate.shut()
    expected = training.state_now()
    _, written = checkpointer.save(str(tmp_path), training.state())

    def average() -> None:
        with checkpointer.hold():
            training.average()

    gate.wait_until_reached()
    with torch.no_grad():
        for parameter in training.model.parameters():
            if parameter.nbytes < LARGE:
                parameter.add_(1)  # small: it is saved already
    calls.start(average)
    assert calls.next() == "waits"
    assert_equal(training.averages, expected["averages"])
    gate.open()
    assert calls.next() == "done"
    written.result(PATIENCE_SECS)
    assert_equal(checkpointer.load(str(tmp_path)), expected)
    with pytest.raises(AssertionError):
        assert_equal(training.averages, expected["averages"])


def test_hold_waits_for_nothing_when_nothing_is_staged(checkpointer: AsyncCheckpointer, calls: Calls) -> None:
    def hold() -> None:
        with checkpointer.hold():
            pass

    calls.start(hold)
    assert calls.next() == "done"


def in_place(tensor: torch.Tensor) -> None:
    tensor.fill_(7)


def past_autograd(tensor: torch.Tensor) -> None:
    tensor.data.fill_(7)


def through_numpy(tensor: torch.Tensor) -> None:
    tensor.numpy()[...] = 7


def one_element(tensor: torch.Tensor) -> None:
    tensor.reshape(-1)[3].add_(1)


def by_out_argument(tensor: torch.Tensor) -> None:
    torch.mul(tensor, 2, out=tensor)


CHANGES = [in_place, past_autograd, through_numpy, one_element, by_out_argument]


@pytest.mark.parametrize("change", CHANGES)
def test_small_tensors_and_plain_values_are_frozen_before_save_returns(
    tmp_path: Path, checkpointer: AsyncCheckpointer, gate: Gate, rng_seed: int, change: Callable[[torch.Tensor], None]
) -> None:
    def state_of(number: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(rng_seed + number)
        sizes = (0, 1, 5, 4000, LARGE // 4 - 1)
        tensors = [torch.rand(size, generator=generator) for size in sizes]
        listed = [torch.ones((), dtype=torch.int64) * number, {"rate": 0.1 * number, "betas": (1, 2.5, None)}]
        large = torch.full((ELEMENTS,), float(number))
        return {"tensors": tensors, "view": tensors[-1][10:20], "large": large, "list": listed, "step": number}

    for number in (1, 2, 3):
        state, expected = state_of(number), state_of(number)
        gate.shut()
        _, written = checkpointer.save(str(tmp_path), state)
        for tensor in state["tensors"]:
            if tensor.numel() > 3:
                change(tensor)
        state["list"][0].add_(1)
        state["list"][1]["rate"] = -1
        state["list"].append(torch.ones(3))
        state["step"] = -1
        state["tensors"].clear()
        del state["large"], state["view"]
        gc.collect()
        gate.open()
        written.result(PATIENCE_SECS)
        assert_equal(checkpointer.load(str(tmp_path)), expected)


# Who waits, and who does not


def test_an_optimizer_of_tensors_that_are_not_saved_does_not_wait(
    tmp_path: Path, checkpointer: AsyncCheckpointer, gate: Gate, calls: Calls, rng_seed: int
) -> None:
    saved, other = Training(adamw, rng_seed), Training(adamw_fused, rng_seed)
    other.forward_and_backward()
    gate.shut()
    _, written = checkpointer.save(str(tmp_path), saved.state())
    gate.wait_until_reached()
    calls.start(other.step)
    assert calls.next() == "done"
    assert not written.done()
    gate.open()
    written.result(PATIENCE_SECS)


def test_an_optimizer_of_small_tensors_does_not_wait(
    tmp_path: Path, checkpointer: AsyncCheckpointer, gate: Gate, calls: Calls
) -> None:
    parameter = torch.nn.Parameter(torch.ones(100))
    parameter.grad = torch.ones(100)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    gate.shut()
    _, written = checkpointer.save(str(tmp_path), {"small": parameter, "large": torch.ones(ELEMENTS)})
    gate.wait_until_reached()
    calls.start(optimizer.step)
    assert calls.next() == "done"
    gate.open()
    written.result(PATIENCE_SECS)
    assert torch.equal(checkpointer.load(str(tmp_path))["small"], torch.ones(100))
    assert torch.equal(parameter, torch.zeros(100))


@pytest.mark.parametrize("what", ["state", "parameter"])
def test_an_optimizer_waits_for_its_own_state_and_for_its_parameters(
    tmp_path: Path, checkpointer: AsyncCheckpointer, gate: Gate, calls: Calls, what: str
) -> None:
    parameter = torch.nn.Parameter(torch.ones(ELEMENTS))
    parameter.grad = torch.ones(ELEMENTS)
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.5)
    optimizer.step()
    momentum = optimizer.state[parameter]["momentum_buffer"]
    gate.shut()
    # A view of one of the tensors is enough.
    saved = (momentum if what == "state" else parameter.detach())[5:]
    expected = saved.clone()
    _, written = checkpointer.save(str(tmp_path), {"only": saved})
    gate.wait_until_reached()
    calls.start(optimizer.step)
    assert calls.next() == "waits"
    gate.open()
    assert calls.next() == "done"
    written.result(PATIENCE_SECS)
    assert torch.equal(checkpointer.load(str(tmp_path))["only"], expected)


def test_optimizers_wait_for_opaque_tensors(
    tmp_path: Path, checkpointer: AsyncCheckpointer, gate: Gate, calls: Calls
) -> None:
    # Which tensors' memory a value of another kind stands on is not known: everybody waits.
    parameter = torch.nn.Parameter(torch.ones(ELEMENTS))
    parameter.grad = torch.ones(ELEMENTS)
    values = parameter.data
    values.note = "kept"  # type: ignore[attr-defined]
    gate.shut()
    _, written = checkpointer.save(str(tmp_path), {"noted": values})
    gate.wait_until_reached()
    calls.start(torch.optim.SGD([parameter], lr=1.0).step)
    assert calls.next() == "waits"
    gate.open()
    assert calls.next() == "done"
    written.result(PATIENCE_SECS)
    assert torch.equal(checkpointer.load(str(tmp_path))["noted"], torch.ones(ELEMENTS))


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, as distributed ones are: it holds another."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Wrapped":
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made  # type: ignore[return-value]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(value: Any) -> Any:
            return value.inner if isinstance(value, Wrapped) else value

        out = function(*map(unwrap, args), **(kwargs or {}))
        if function is torch.ops.aten.detach.default:
            return Wrapped(out)
        return args[0] if function is torch.ops.aten.add_.Tensor else out


def test_optimizers_of_tensors_without_memory_that_can_be_asked_for_wait_and_step(
    tmp_path: Path, checkpointer: AsyncCheckpointer, gate: Gate, calls: Calls
) -> None:
    inner = torch.ones(ELEMENTS)
    wrapped = torch.nn.Parameter(Wrapped(inner))
    wrapped.grad = torch.ones(ELEMENTS)
    sparse = torch.nn.Parameter(torch.eye(3).to_sparse())
    for optimizer in (torch.optim.SGD([wrapped], lr=1.0, foreach=False), torch.optim.SGD([sparse], lr=1.0)):
        gate.shut()
        expected = inner.clone()
        _, written = checkpointer.save(str(tmp_path), {"inner": inner})
        gate.wait_until_reached()
        calls.start(optimizer.step)
        assert calls.next() == "waits"
        gate.open()
        assert calls.next() == "done"
        written.result(PATIENCE_SECS)
        assert torch.equal(checkpointer.load(str(tmp_path))["inner"], expected)
    assert torch.equal(inner, torch.zeros(ELEMENTS))


def test_optimizers_do_not_wait_when_that_is_turned_off(
    tmp_path: Path, gate: Gate, calls: Calls, rng_seed: int
) -> None:
    training = Training(adamw_fused, rng_seed)
    training.forward_and_backward()
    checkpointer = new_checkpointer(hold_optimizers=False)
    try:
        gate.shut()
        staged, written = checkpointer.save(str(tmp_path), training.state())
        gate.wait_until_reached()
        calls.start(training.step)
        assert calls.next() == "done"
        gate.open()
        # Nobody waited, but nothing wrong is published.
        for future in (staged, written):
            assert isinstance(future.exception(PATIENCE_SECS), TornSnapshotError)
    finally:
        checkpointer.close()


def test_a_step_goes_on_when_staging_has_failed(
    tmp_path: Path, checkpointer: AsyncCheckpointer, gate: Gate, calls: Calls, rng_seed: int
) -> None:
    training = Training(sgd, rng_seed)
    training.forward_and_backward()
    before = training.state_now()
    gate.shut()
    staged, written = checkpointer.save(str(tmp_path / "a"), training.state())
    gate.wait_until_reached()
    calls.start(training.step)
    assert calls.next() == "waits"
    gate.open(OSError("the memory is full of bees"))
    assert calls.next() == "done"
    for future in (staged, written):
        with pytest.raises(OSError, match="bees"):
            future.result(PATIENCE_SECS)
    assert not any(map(torch.equal, training.model.parameters(), before["model"].values()))
    assert not contents(tmp_path)
    expected = training.state_now()
    checkpointer.save(str(tmp_path / "a"), training.state())[1].result(PATIENCE_SECS)
    assert_equal(checkpointer.load(str(tmp_path / "a")), expected)


def test_promise_8_a_step_goes_on_when_staging_takes_too_long(
    tmp_path: Path, gate: Gate, calls: Calls, rng_seed: int
) -> None:
    training = Training(adamw, rng_seed)
    training.forward_and_backward()
    checkpointer = new_checkpointer(staging_timeout_secs=0.2)
    try:
        gate.shut()
        staged, written = checkpointer.save(str(tmp_path), training.state())
        gate.wait_until_reached()
        calls.start(training.step)
        assert calls.next() == "waits"
        assert calls.next() == "done"  # although nobody has opened the gate
        for future in (staged, written):
            error = future.exception(PATIENCE_SECS)
            assert isinstance(error, (StagingError, TimeoutError))
            assert "0.2 s" in str(error)
        assert not contents(tmp_path)
    finally:
        gate.open()
        checkpointer.close()


def test_close_lets_optimizers_go_for_good(tmp_path: Path) -> None:
    hooks = torch_optimizer._global_optimizer_pre_hooks
    before = dict(hooks)
    checkpointer = new_checkpointer()
    assert hooks == before, "nothing is staged yet: nobody is asked to wait"
    checkpointer.save(str(tmp_path), {"a": torch.ones(ELEMENTS)})[1].result(PATIENCE_SECS)
    assert len(hooks) == len(before) + 1
    checkpointer.save(str(tmp_path), {"a": torch.ones(ELEMENTS)})[1].result(PATIENCE_SECS)
    assert len(hooks) == len(before) + 1
    checkpointer.close()
    assert hooks == before


def test_a_stager_that_nobody_closed_leaves_no_hook_behind() -> None:
    hooks = torch_optimizer._global_optimizer_pre_hooks
    before = dict(hooks)
    stager = DefaultStager()
    stager.stage({"a": torch.ones(ELEMENTS)}).result(PATIENCE_SECS)  # type: ignore[union-attr]
    assert len(hooks) == len(before) + 1
    gone = weakref.ref(stager)
    del stager
    gc.collect()
    assert gone() is None
    assert hooks == before


# What changed all the same


@pytest.mark.parametrize("change", CHANGES)
def test_hazard_11_a_tensor_changed_too_early_fails_the_save_by_name(
    tmp_path: Path, checkpointer: AsyncCheckpointer, gate: Gate, rng_seed: int, change: Callable[[torch.Tensor], None]
) -> None:
    path, state = tmp_path / "a", state_of_large_tensors(rng_seed)
    checkpointer.save(str(path), state)[1].result(PATIENCE_SECS)
    before = contents(tmp_path)
    state = state_of_large_tensors(rng_seed + 1)
    gate.shut()
    staged, written = checkpointer.save(str(path), state)
    gate.wait_until_reached()
    change(state["model"]["others"])
    gate.open()
    for future in (staged, written):
        with pytest.raises(TornSnapshotError, match=r"'model\.others' changed") as caught:
            future.result(PATIENCE_SECS)
        assert caught.value.tensor == "model.others"
    assert contents(tmp_path) == before, "the checkpoint before is untouched, and no temporary is left"
    expected = {**state, "model": dict(state["model"])}
    checkpointer.save(str(path), state)[1].result(PATIENCE_SECS)
    assert_equal(checkpointer.load(str(path)), expected)


def test_a_first_save_that_was_torn_leaves_nothing(
    tmp_path: Path, checkpointer: AsyncCheckpointer, gate: Gate, rng_seed: int
) -> None:
    state = state_of_large_tensors(rng_seed)
    gate.shut()
    _, written = checkpointer.save(str(tmp_path / "a" / "b"), state)
    gate.wait_until_reached()
    state["model"]["weights"].zero_()
    gate.open()
    assert isinstance(written.exception(PATIENCE_SECS), TornSnapshotError)
    assert not contents(tmp_path)


def test_moving_averages_that_were_not_held_back_are_found_torn(
    tmp_path: Path, checkpointer: AsyncCheckpointer, gate: Gate, rng_seed: int
) -> None:
    training = Training(adamw_fused, rng_seed)
    training.forward_and_backward()
    training.step()
    gate.shut()
    staged, written = checkpointer.save(str(tmp_path), training.state())
    gate.wait_until_reached()
    training.average()
    gate.open()
    for future in (staged, written):
        error = future.exception(PATIENCE_SECS)
        assert isinstance(error, TornSnapshotError)
        assert error.tensor == "averages.0.weight"


def test_a_tensor_that_is_half_copied_is_found_torn(
    tmp_path: Path, checkpointer: AsyncCheckpointer, gate: Gate, rng_seed: int
) -> None:
    generator = torch.Generator().manual_seed(rng_seed)
    weights = torch.rand(5 * PIECE_SIZE // 4, generator=generator)
    for after in (0, 1, 3):
        gate.shut(after)
        staged, _ = checkpointer.save(str(tmp_path), {"weights": weights})
        gate.wait_until_reached()
        weights.numpy()[...] *= 0.5
        gate.open()
        assert isinstance(staged.exception(PATIENCE_SECS), TornSnapshotError)


def test_tied_and_overlapping_tensors_are_watched_through_each_of_them(
    tmp_path: Path, checkpointer: AsyncCheckpointer, gate: Gate
) -> None:
    base = torch.zeros(4 * ELEMENTS)
    state = {"head": base[:ELEMENTS], "tail": base[-ELEMENTS:], "bits": base.view(torch.int32)[10:20]}
    for tensor in (*state.values(), base):
        gate.shut()
        staged, _ = checkpointer.save(str(tmp_path), state)
        gate.wait_until_reached()
        tensor.add_(0)  # not a byte changes, but nobody can know that
        gate.open()
        error = staged.exception(PATIENCE_SECS)
        assert isinstance(error, TornSnapshotError)
        assert error.tensor == "head", "the first one on that memory"


def test_full_check_finds_a_changed_byte_anywhere(tmp_path: Path, gate: Gate, rng_seed: int) -> None:
    size = 4 * ELEMENTS
    generator = torch.Generator().manual_seed(rng_seed)
    places = [0, size - 1, *torch.randint(size, (6,), generator=generator).tolist()]
    checkpointer = new_checkpointer(full_check=True)
    try:
        weights = torch.randint(256, (size,), generator=generator, dtype=torch.uint8)
        for place in places:
            gate.shut()
            staged, written = checkpointer.save(str(tmp_path), {"weights": weights})
            gate.wait_until_reached()
            weights.numpy()[place] ^= 1 << int(torch.randint(8, (), generator=generator))
            gate.open()
            for future in (staged, written):
                error = future.exception(PATIENCE_SECS)
                assert isinstance(error, TornSnapshotError), f"byte {place}"
                assert error.tensor == "weights"
        checkpointer.save(str(tmp_path), {"weights": weights})[1].result(PATIENCE_SECS)
        assert torch.equal(checkpointer.load(str(tmp_path))["weights"], weights)
    finally:
        checkpointer.close()


@pytest.mark.parametrize("change", [in_place, past_autograd, through_numpy])
@pytest.mark.parametrize("elements", [1, 17, 300, LARGE // 4 - 1])
def test_small_tensors_beyond_the_budget_are_held_back_and_watched(
    tmp_path: Path,
    gate: Gate,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[torch.Tensor], None],
    elements: int,
) -> None:
    monkeypatch.setattr(plan_module, "EARLY_BYTES", 10)
    holds = Gate()
    real = StagingJob.run

    def run(self: StagingJob) -> None:
        holds.pass_by()
        real(self)

    monkeypatch.setattr(StagingJob, "run", run)
    parameter = torch.nn.Parameter(torch.ones(elements))
    parameter.grad = torch.ones(elements)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    state = {"early": torch.ones(2), "late": parameter.detach()}
    checkpointer = new_checkpointer()
    try:
        holds.shut()
        _, written = checkpointer.save(str(tmp_path), state)
        holds.wait_until_reached()
        state["early"].zero_()
        calls.start(optimizer.step)
        assert calls.next() == "waits"
        holds.open()
        assert calls.next() == "done"
        written.result(PATIENCE_SECS)
        assert_equal(checkpointer.load(str(tmp_path)), {"early": torch.ones(2), "late": torch.ones(elements)})
        holds.shut()
        staged, _ = checkpointer.save(str(tmp_path), state)
        holds.wait_until_reached()
        change(state["late"])
        holds.open()
        error = staged.exception(PATIENCE_SECS)
        assert isinstance(error, TornSnapshotError)
        assert error.tensor == "late"
    finally:
        holds.open()
        checkpointer.close()


def test_nothing_is_found_torn_that_was_not(
    tmp_path: Path, checkpointer: AsyncCheckpointer, gate: Gate, rng_seed: int
) -> None:
    """Every bit pattern is equal to itself, tensors that require grad and those of inference mode among them."""
    with torch.inference_mode():
        inferred = torch.rand(ELEMENTS)
    state = {
        "nan": torch.full((ELEMENTS,), math.nan),
        "parameter": torch.nn.Parameter(torch.rand(ELEMENTS)),
        "inferred": inferred,
        "odd": torch.rand(ELEMENTS)[1:].view(torch.uint8)[3:],
    }
    for _ in range(2):
        gate.shut()
        _, written = checkpointer.save(str(tmp_path), state)
        gate.wait_until_reached()
        with torch.no_grad():
            state["parameter"].sum()
        state["parameter"].square().sum().backward()
        gate.open()
        written.result(PATIENCE_SECS)
