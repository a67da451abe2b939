"""What a trainer trains: a state that is another one for every number, and goes from one number to the next in place.

Every element tells of which state it is, and where it belongs: none of another state, or of another place, goes
unnoticed.
"""

from typing import Any

import torch

SIZES = {"weights": 3 << 18, "others": 1 << 18, "bias": 100}
"""The tensors of a small state, 4 MiB in all, by their numbers of elements."""

_STRIDE = 7_919


class Training:
    """``number`` is that of the state now: below 250,000, as elements have 32 bits."""

    def __init__(self, number: int = 0, sizes: dict[str, int] = SIZES) -> None:
        self.tensors = {
            name: torch.arange(size, dtype=torch.int32) + _STRIDE * number + position
            for position, (name, size) in enumerate(sizes.items())
        }
        self.number = number

    def go_to(self, number: int) -> None:
        """Change all tensors where they stand."""
        for tensor in self.tensors.values():
            tensor.add_(_STRIDE * (number - self.number))
        self.number = number

    def state(self) -> dict[str, Any]:
        """The tensors themselves."""
        return {"model": dict(self.tensors), "number": self.number}

    def took_over(self, state: dict[str, Any]) -> None:
        """The state has been restored into the tensors."""
        self.number = state["number"]


def assert_whole(state: dict[str, Any], sizes: dict[str, int] = SIZES) -> int:
    """The number of the state, whose every bit is that of this number's."""
    number: int = state["number"]
    expected = Training(number, sizes).tensors
    assert state["model"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state["model"][name], tensor), f"{name} is not that of the state number {number}"
    return number
