"""The states that the fixtures hold: small, and each of them the same whenever and wherever it is made."""

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from tests.unit.capture.states import DTYPES, unpack

QUIET_NAN, NAN_WITH_A_MESSAGE = unpack(bytes.fromhex("000000000000f87f")), unpack(bytes.fromhex("efbeaddeadbefdff"))


def ramp(*shape: int, dtype: torch.dtype = torch.float32, start: int = 0) -> torch.Tensor:
    """A tensor that counts upwards."""
    count = torch.Size(shape).numel()
    return torch.arange(start, start + count).to(dtype).reshape(shape)


def pattern(nbytes: int) -> torch.Tensor:
    """Bytes that are hardly ever the same in two blocks, and that pack well."""
    return (torch.arange(nbytes) % 251).to(torch.uint8)


def _plain_values() -> Any:
    """Plain values of every kind that the index knows, at their limits, and containers that are shared."""
    shared: list[Any] = [1, [2]]
    loop: list[Any] = ["holds itself"]
    loop.append((loop, {"deep": loop}))
    ordered = OrderedDict(b=1, a=2)
    ordered._metadata = OrderedDict([("", {"version": 1}), ("layer", {"version": 2})])  # type: ignore[attr-defined]
    edges = [2**8, 2**16, 2**31, 2**32, 2**63, 2**64, 10**40]
    return {
        "constants": [None, True, False],
        "integers": [0, 1, -1, *(sign * edge + step for edge in edges for sign in (1, -1) for step in (-1, 0))],
        "floats": [0.0, -0.0, 1.5, 5e-324, 1e22, 0.1, -1.7976931348623157e308],
        "not finite": [float("inf"), -float("inf"), QUIET_NAN, NAN_WITH_A_MESSAGE],
        "complex": [0j, complex(-0.0, 2.5), complex(float("inf"), QUIET_NAN)],
        "texts": ["", "plain", "a\x00b", "\xe9\u20ac", "\U0001f600", "lone \ud800", 'quo"te\\', "line\nbreak"],
        "bytes": [b"", bytes(range(256))],
        "bytearrays": [bytearray(), bytearray(b"\x00\xff\x80")],
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, (2, [3]), "four", 4.0)),
        "sets": [set(), {1, 2.5, "three", None, b"4", (5, (6, "seven"))}],
        "ordered": ordered,
        "sizes": [torch.Size([]), torch.Size([2, 3]), torch.Size([-1, 2**40])],
        "dtypes": list(DTYPES),
        "devices": [torch.device("cpu"), torch.device("cuda:3"), torch.device("meta")],
        "shared": shared,
        "again": {"the same list": shared, "part of it": shared[1]},
        "loop": loop,
        "keys": {1: "one", 2.5: 2, None: 3, "\xe9": 4, (1, "a"): 5, b"k": 6, False: 7, 2**70: 8, float("inf"): 9},
        "more keys": {torch.float32: 1, torch.device("cpu"): 2, torch.Size([1]): 3, "lone \ud800": 4, 1j: 5},
        "empty containers": [{}, [], OrderedDict()],
        "with.dots": {"": "an empty key", ".": 1},
    }


def _tensors() -> Any:
    """Tensors that are tied, views of each other, views of all kinds, parameters, and such without elements."""
    base, weight = ramp(4, 6), torch.nn.Parameter(ramp(3, 2, start=100))
    numbers = torch.complex(ramp(2, 3, start=1), ramp(2, 3, start=-4))
    memory = torch.arange(64, dtype=torch.uint8)
    needs_grad = ramp(5).requires_grad_()
    return {
        "base": base,
        "views": {
            "transposed": base.t(),
            "row": base[1],
            "every second": base[:, ::2],
            "diagonal": base.as_strided((4,), (7,)),
            "overlapping": base.as_strided((3, 3), (1, 1), 5),
            "one element": base[3, 5],
            "no element": base[2:2],
        },
        "tied": {"in": weight, "out": weight, "data": weight.detach(), "list": [weight, (weight,)]},
        "frozen": torch.nn.Parameter(ramp(3), requires_grad=False),
        "needs grad": needs_grad,
        "numbers": numbers,
        "conjugated": numbers.conj(),
        "negated": numbers.conj().imag,
        "scalars": [torch.tensor(3.5), torch.tensor(True), torch.tensor(2**40), torch.tensor(1 - 2j).conj()],
        "empty": [torch.empty(0), torch.empty(0, 3), torch.empty(2, 0, 5, dtype=torch.int16)],
        "expanded": torch.tensor([7.0]).expand(3, 4),
        "channels last": ramp(2, 3, 2, 2).to(memory_format=torch.channels_last),
        "a part of much": ramp(10_000)[5_000:5_007],
        "several dtypes on one memory": [memory[8:24].view(torch.float32), memory[24:].view(torch.int16), memory[3:5]],
        "on a page": ramp(16_384, dtype=torch.int32),
        "under keys": {3: {2.5: ramp(2), None: ramp(2, start=2)}, True: ramp(2, start=4)},
    }


def _dtypes() -> Any:
    """A tensor of every dtype that the index knows, with all patterns of bits in it, and what may be said of it."""
    bits = torch.tensor(list(range(256)), dtype=torch.uint8)
    state: dict[str, Any] = {}
    for dtype in DTYPES:
        tensor = bits % 2 == 1 if dtype == torch.bool else bits.clone().view(dtype)
        state[str(dtype)] = {"whole": tensor, "part": tensor[3:9], "parameter": torch.nn.Parameter(tensor[1:2], False)}
        if dtype.is_floating_point or dtype.is_complex:
            state[str(dtype)]["needs grad"] = tensor[2:4].detach().clone().requires_grad_()
    return state


def _opaque() -> Any:
    """What only a pickle describes, among plain values and tensors."""
    noted = ramp(3)
    noted.note = ["remember", 1]  # type: ignore[attr-defined]
    values = ramp(4, 5, start=-9)
    deep: Any = "the innermost"
    for _ in range(104):
        deep = [deep]
    scales, zeros = torch.tensor([0.1, 0.2, 0.5, 1.0]), torch.tensor([0, 1, 2, 3])
    return {
        "before": ramp(2),
        "counts": Counter("banana"),
        "with an attribute": noted,
        "coo": values.relu().to_sparse().coalesce(),
        "csr": values.relu().to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(values, 0.1, 3, torch.qint8),
        "quantised by channel": torch.quantize_per_channel(values, scales, zeros, 0, torch.quint8),
        "deep": deep,
        "after": ramp(2, start=2),
    }


FILES: dict[str, Callable[[], Any]] = {
    "values": _plain_values,
    "tensors": _tensors,
    "dtypes": _dtypes,
    "opaque": _opaque,
    "bare": lambda: ramp(3, 2, dtype=torch.int64),
    "blocks": lambda: {"large": (large := pattern(2 * 2**20 + 77)), "end": large[-80:], "small": ramp(2)},
}
"""Single files, by name."""


def state_of_rank(rank: int) -> dict[str, Any]:
    """What a rank saves that shares nothing with others: some of it is the same on all of them, some is not."""
    return {
        "model": {"weight": ramp(4, 3), "own": ramp(2 + rank, start=10 * rank)},
        "position": {"epoch": 3, "sample": 1000 + rank},
    }
