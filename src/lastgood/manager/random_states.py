"""The states of the random number generators that a training draws from, as plain values and tensors."""

import random
import sys
from typing import Any

import torch

RANDOM_STATES_KEY = "random_states"
"""Where they stand in a checkpoint."""


def take_random_states() -> dict[str, Any]:
    """Those of Python, of NumPy if it is loaded, of torch, and of the accelerator's current device if it is in use.

    Generators that the training has made for itself are not among them: give them to the manager as tensors, by
    ``get_state()``, or as objects with ``state_dict``.
    """
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        states["numpy"] = _numpy_state()
    device = _accelerator()
    if device is not None:
        states["accelerator"] = {"type": device.type, "state": _device_module(device).get_rng_state()}
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Go on drawing where :func:`take_random_states` was called. What this process does not have is left out."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"].cpu())
    if "numpy" in states:
        _set_numpy_state(states["numpy"])
    # Also on a device that is not in use yet: torch keeps it until then.
    saved, device = states.get("accelerator"), _accelerator(in_use=False)
    if saved is not None and device is not None and saved["type"] == device.type:
        _device_module(device).set_rng_state(saved["state"].cpu())


def _numpy_state() -> dict[str, Any]:
    import numpy

    state = numpy.random.get_state(legacy=False)
    if not isinstance(state, dict) or state["bit_generator"] != "MT19937":
        raise NotImplementedError(
            "numpy.random draws from another generator than MT19937, whose state lastgood does not know"
        )
    return {
        "key": state["state"]["key"].tobytes(),
        "position": int(state["state"]["pos"]),
        "has_gauss": int(state["has_gauss"]),
        "gauss": float(state["gauss"]),
    }


def _set_numpy_state(saved: dict[str, Any]) -> None:
    try:
        import numpy
    except ImportError:
        return
    numpy.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": numpy.frombuffer(saved["key"], dtype=numpy.uint32), "pos": saved["position"]},
            "has_gauss": saved["has_gauss"],
            "gauss": saved["gauss"],
        }
    )


def _accelerator(*, in_use: bool = True) -> torch.device | None:
    """The device that this process draws on; with ``in_use``, if it has begun to."""
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    if device is None:
        return None
    is_initialized = getattr(_device_module(device), "is_initialized", None)
    return device if not in_use or is_initialized is None or is_initialized() else None


def _device_module(device: torch.device) -> Any:
    return torch.get_device_module(device)
