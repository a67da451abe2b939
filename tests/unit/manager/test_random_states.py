"""The generators of a process go on drawing where they were, and devices that are not there are no obstacle."""

import random
import types
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import lastgood
from lastgood.manager import random_states
from lastgood.manager.random_states import set_random_states, take_random_states


def draws() -> list[float]:
    return [
        *(random.random() for _ in range(700)),
        *(random.gauss(0, 1) for _ in range(3)),
        *numpy.random.random(700).tolist(),
        *numpy.random.standard_normal(3).tolist(),
        *torch.rand(700).tolist(),
        *torch.randn(3).tolist(),
    ]


@pytest.fixture(autouse=True)
def _states_of_others() -> Any:
    states = take_random_states()
    yield
    set_random_states(states)


def test_what_is_drawn_after_a_restore_is_what_was_drawn_after_the_save(tmp_path: Path) -> None:
    random.gauss(0, 1)  # Half of a pair is kept for the next call: that belongs to the state, too.
    numpy.random.standard_normal()
    lastgood.save({"states": take_random_states()}, tmp_path / "file.pt")
    expected = draws()
    assert draws() != expected
    set_random_states(lastgood.load(tmp_path / "file.pt")["states"])
    assert draws() == expected


def test_a_generator_of_numpys_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy.random, "get_state", lambda legacy: {"bit_generator": "PCG64"})
    with pytest.raises(NotImplementedError, match="MT19937"):
        take_random_states()


class FakeDevice:
    """Stands for a device's module, such as torch.cuda: there is no accelerator where these tests run."""

    def __init__(self, *, initialized: bool = True) -> None:
        self.state = torch.arange(8, dtype=torch.uint8)
        self.initialized = initialized

    def is_initialized(self) -> bool:
        return self.initialized

    def get_rng_state(self) -> torch.Tensor:
        return self.state.clone()

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.state = state


def with_device(monkeypatch: pytest.MonkeyPatch, device: FakeDevice, kind: str = "cuda") -> None:
    accelerator = types.SimpleNamespace(is_available=lambda: True, current_accelerator=lambda: torch.device(kind))
    monkeypatch.setattr(random_states.torch, "accelerator", accelerator)
    monkeypatch.setattr(random_states, "_device_module", lambda of: device)


def test_the_accelerators_state_comes_back_on_the_same_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    with_device(monkeypatch, device)
    states = take_random_states()
    device.state = torch.zeros(8, dtype=torch.uint8)
    set_random_states(states)
    assert device.state.tolist() == list(range(8))


def test_a_device_that_is_not_in_use_is_neither_asked_nor_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with_device(monkeypatch, FakeDevice(initialized=False))
    assert "accelerator" not in take_random_states()


def test_the_state_of_another_kind_of_device_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with_device(monkeypatch, FakeDevice())
    states = take_random_states()
    other = FakeDevice()
    other.state = torch.zeros(8, dtype=torch.uint8)
    with_device(monkeypatch, other, kind="xpu")
    set_random_states(states)
    assert other.state.tolist() == [0] * 8
