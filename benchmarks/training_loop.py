"""A small GPT that is trained on the CPU, with or without checkpoints: what the loop loses by them."""

import os
import shutil
import time

import torch
from async_savers import AsyncSaver, Pending
from states import State
from torch import nn

THREADS = 2
STEPS_A_SAVE = 10

_WIDTH = 512
_LAYERS = 7
_HEADS = 8
_VOCABULARY = 4096
_TOKENS = 88
_BATCH = 2


class TrainingLoop:
    """A model, its optimizer, and steps of the two."""

    def __init__(self, directory: str) -> None:
        torch.manual_seed(0)
        self._directory = directory
        self._model = _Gpt()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=3e-4)
        self._tokens = torch.randint(_VOCABULARY, (_BATCH, _TOKENS + 1))
        self._count = 0
        self.run(None, 0)  # the optimizer's state comes to be

    def state(self) -> State:
        """What is saved."""
        return State.of(
            {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict(), "step": self._count}
        )

    def run(self, saver: AsyncSaver | None, timeout: float) -> float:
        """Train ten steps, with a save before the first of them; return the seconds until both are over.

        As a training loop has to, it waits for staging before the optimizer's step, unless the saver sees to that.
        """
        path = os.path.join(self._directory, f"loop-{self._count}")
        self._count += 1
        pending: Pending | None = None
        start = time.perf_counter()
        if saver is not None:
            pending = saver.save(path, self.state().tree)
        for number in range(STEPS_A_SAVE):
            self._backward()
            if number == 0 and saver is not None and pending is not None and not saver.holds_steps:
                pending.wait_staged(timeout)
            self._optimizer.step()
        if pending is not None:
            pending.wait_written(timeout)  # the next save would have to
        seconds = time.perf_counter() - start
        shutil.rmtree(path, ignore_errors=True)
        return seconds

    def _backward(self) -> None:
        self._optimizer.zero_grad()
        scores = self._model(self._tokens[:, :-1])
        nn.functional.cross_entropy(scores.flatten(0, 1), self._tokens[:, 1:].flatten()).backward()


class _Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(_VOCABULARY, _WIDTH)
        self.position_embedding = nn.Embedding(_TOKENS, _WIDTH)
        layer = nn.TransformerEncoderLayer(
            _WIDTH, _HEADS, 4 * _WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, _LAYERS, nn.LayerNorm(_WIDTH), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(_TOKENS), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1])
        hidden = self.token_embedding(tokens) + self.position_embedding(positions)
        hidden = self.blocks(hidden, mask=self.mask, is_causal=True)
        return hidden @ self.token_embedding.weight.T
