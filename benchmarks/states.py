"""The states that are saved and loaded, and how two of them are compared."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LAYERS = 9
WIDTH_STEP = 16
VOCABULARY_PER_WIDTH = 42
POSITIONS = 1024


@dataclass(frozen=True)
class State:
    """A state dict, and its tensors alone under one flat level of names, for formats that know nothing else."""

    tree: dict[str, Any]
    flat: dict[str, torch.Tensor]

    @classmethod
    def of(cls, tree: dict[str, Any]) -> "State":
        """The state with this tree."""
        return cls(tree, {name: value for name, value in leaves(tree) if isinstance(value, torch.Tensor)})

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.flat.values())


def training_state(nbytes: int) -> State:
    """A GPT-like module and its AdamW state in float32, of about ``nbytes`` bytes in a few hundred tensors."""
    torch.manual_seed(0)
    width = WIDTH_STEP
    while _training_bytes(width + WIDTH_STEP) <= nbytes:
        width += WIDTH_STEP
    with torch.device("meta"):
        model = _Gpt(width)
    model.to_empty(device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
            optimizer.state[parameter] = {
                "step": torch.tensor(1000.0),
                "exp_avg": torch.randn_like(parameter).mul_(1e-3),
                "exp_avg_sq": torch.rand_like(parameter).mul_(1e-6),
            }
    return State.of(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "step": 1000,
            "loss": 2.75,
            "arguments": {"learning_rate": 3e-4, "text": "the standard library", "resumed": False},
        }
    )


def small_tensors_state(count: int) -> State:
    """``count`` tensors of 64 to 256 bytes, each with a storage of its own."""
    torch.manual_seed(0)
    sizes = torch.randint(16, 65, (count,)).tolist()
    return State.of({f"module.{number}.weight": torch.randn(size) for number, size in enumerate(sizes)})


def one_tensor_state(nbytes: int) -> State:
    """A single tensor of float32."""
    torch.manual_seed(0)
    return State.of({"weight": torch.randn(nbytes // 4)})


def make_state(description: str) -> State:
    """The state that a kind and a number describe: ``training:1073741824``, ``small:100000``, ``tensor:2147483648``."""
    kind, _, number = description.partition(":")
    makers = {"training": training_state, "small": small_tensors_state, "tensor": one_tensor_state}
    return makers[kind](int(number))


def empty_copy(state: State) -> State:
    """The same structure with zeroed tensors of its own: something to load into."""
    return State.of(_copied(state.tree))


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return type(value)((key, _copied(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested dicts, lists and tuples, under its dotted name."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from leaves(item, f"{name}.{number}")
    else:
        yield name, value


def require_same(found: Any, expected: Any, who: str) -> None:
    """Raise ``ValueError`` unless both hold the same names, values and tensor bits."""
    found_leaves, expected_leaves = dict(leaves(found)), dict(leaves(expected))
    if found_leaves.keys() != expected_leaves.keys():
        raise ValueError(f"{who} brought back other names than were saved")
    for name, value in expected_leaves.items():
        if not _same(found_leaves[name], value):
            raise ValueError(f"{who} brought back another value of {name} than was saved")


def _same(found: Any, expected: Any) -> bool:
    if not isinstance(expected, torch.Tensor):
        return type(found) is type(expected) and bool(found == expected)
    if not isinstance(found, torch.Tensor) or found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


class _Gpt(nn.Module):
    """The parameters of a GPT; it is never run."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY_PER_WIDTH * width, width)
        self.position_embedding = nn.Embedding(POSITIONS, width)
        self.blocks = nn.ModuleList(_block(width) for _ in range(LAYERS))
        self.final_norm = nn.LayerNorm(width)


def _block(width: int) -> nn.Module:
    parts: list[tuple[str, nn.Module]] = [
        ("attention_norm", nn.LayerNorm(width)),
        ("attention", nn.Linear(width, 3 * width)),
        ("projection", nn.Linear(width, width)),
        ("mlp_norm", nn.LayerNorm(width)),
        ("expand", nn.Linear(width, 4 * width)),
        ("contract", nn.Linear(4 * width, width)),
    ]
    return nn.Sequential(OrderedDict(parts))


def _training_bytes(width: int) -> int:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in _Gpt(width).parameters())
    return 3 * 4 * parameters
