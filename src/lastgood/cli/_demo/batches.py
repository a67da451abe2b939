"""Cutting the text into batches, in an order that one number is enough to resume."""

from typing import Any

import torch
from torch import Tensor


class Batches:
    """An endless sequence of ``(inputs, targets)``, both of shape ``(size, length)``; a token is a byte.

    Every pass over the text shuffles its windows anew, from the seed and the number of the pass alone: the
    position says everything about where the training stands in its data.
    """

    def __init__(self, text: bytes, *, size: int, length: int, seed: int) -> None:
        self._tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self._size = size
        self._length = length
        self._seed = seed
        self._position = 0
        # A window's last target is the byte after its last input.
        windows = (len(text) - 1) // length
        self._batches_a_pass = windows // size
        if self._batches_a_pass == 0:
            raise ValueError(f"a text of {len(text)} bytes does not fill one batch of {size} windows of {length} bytes")
        self._windows = windows
        self._pass_number = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next batch; the position moves on by one."""
        pass_number, batch = divmod(self._position, self._batches_a_pass)
        if pass_number != self._pass_number:
            generator = torch.Generator().manual_seed(self._seed + pass_number)
            self._order = torch.randperm(self._windows, generator=generator)
            self._pass_number = pass_number
        starts = self._order[batch * self._size : (batch + 1) * self._size] * self._length
        places = starts[:, None] + torch.arange(self._length)
        self._position += 1
        return self._tokens[places], self._tokens[places + 1]

    def state_dict(self) -> dict[str, Any]:
        """The position, and nothing else."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the position of ``state``."""
        self._position = state["position"]
