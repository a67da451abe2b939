"""State dicts as hypothesis makes them up: every kind of value, and everything that values can share."""

import random
import struct
from collections import Counter, OrderedDict
from typing import Any

import torch
from hypothesis import strategies as st

TYPED = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex128 complex64 complex32 "
    "uint16 uint32 uint64 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
)
DTYPES: list[torch.dtype] = [getattr(torch, name) for name in TYPED.split() if hasattr(torch, name)]
FLOATING = [dtype for dtype in DTYPES if dtype.is_floating_point or dtype.is_complex]
COMPLEX = [torch.complex32, torch.complex64, torch.complex128]

_TEXT = st.text(st.sampled_from("a\x00\x7f\xe9\ud800\udfff\U0001f600") | st.characters(), max_size=6)
_INTEGERS = st.one_of(
    st.integers(-300, 70_000),
    st.integers(-(2**70), 2**70),
    st.sampled_from(
        [2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 255**99]
    ),
)
# From all bit patterns: NaNs with any payload, infinities, subnormal numbers and -0.0 among them.
_FLOATS = st.one_of(
    st.floats(), st.sampled_from([-0.0, 5e-324, 1e22]), st.binary(min_size=8, max_size=8).map(lambda b: unpack(b))
)
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    _INTEGERS,
    _FLOATS,
    _TEXT,
    st.binary(max_size=6),
    st.builds(complex, _FLOATS, _FLOATS),
)
_KEYS = st.one_of(
    _TEXT,
    _INTEGERS,
    st.booleans(),
    st.none(),
    st.binary(max_size=3),
    st.floats(allow_nan=False),
    st.tuples(st.integers(0, 3), st.booleans()),
)
_NAMES = st.text("abcdefgh_", min_size=1, max_size=4)
_TORCH_VALUES = st.one_of(
    st.lists(st.integers(-1, 2**40), max_size=5).map(torch.Size),
    st.sampled_from([*DTYPES, torch.quint8]),
    st.sampled_from([torch.device("cpu"), torch.device("cuda:3"), torch.device("meta")]),
)


def unpack(data: bytes) -> float:
    """The double of these eight bytes."""
    value: float = struct.unpack("<d", data)[0]
    return value


@st.composite
def states(draw: st.DrawFn) -> Any:
    """A state dict of a few values."""
    return _Maker(draw).mapping(draw(st.sampled_from([dict, dict, OrderedDict])), 0)


class _Maker:
    """Makes values, and remembers them so that later ones can share what they stand on."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw
        self._memory: list[tuple[torch.Tensor, torch.dtype]] = []
        self._tensors: list[torch.Tensor] = []
        self._containers: list[Any] = []

    def mapping(self, kind: type, depth: int) -> Any:
        """A dict or an OrderedDict of values."""
        keys = self._draw(st.lists(_NAMES if self._chance(2) else _KEYS, min_size=depth == 0, max_size=5, unique=True))
        value = kind((key, self._value(depth + 1)) for key in keys)
        if kind is OrderedDict and self._chance(2):
            # As torch.nn.Module.state_dict() does.
            value._metadata = OrderedDict([("", {"version": 1}), ("layer", {"version": self._draw(_SCALARS)})])
        return value

    def _value(self, depth: int) -> Any:
        kinds = [self._tensor, self._tensor, self._tensor, lambda: self._draw(_SCALARS), self._plain]
        if depth < 4:
            kinds += [lambda: self._container(depth), lambda: self._container(depth)]
        if self._containers:
            kinds.append(lambda: self._one_of(self._containers))
        return self._one_of(kinds)()

    def _container(self, depth: int) -> Any:
        kind = self._draw(st.sampled_from([dict, OrderedDict, list, tuple]))
        if kind in (dict, OrderedDict):
            value = self.mapping(kind, depth)
        else:
            value = kind(self._value(depth + 1) for _ in range(self._draw(st.integers(0, 5))))
        self._containers.append(value)
        if isinstance(value, list) and self._chance(6):
            value.append((self._one_of(self._containers), value))  # it contains itself
        return value

    def _plain(self) -> Any:
        kind = self._draw(st.sampled_from(["torch", "bytearray", "set", "set of tuples", "counter", "frozenset"]))
        if kind == "torch":
            return self._draw(_TORCH_VALUES)
        if kind == "bytearray":
            value: Any = bytearray(self._draw(st.binary(max_size=5)))
        elif kind == "set":
            value = self._draw(st.sets(_SCALARS, max_size=4))
        elif kind == "set of tuples":
            value = self._draw(st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3))
        elif kind == "counter":
            value = Counter(self._draw(st.lists(_NAMES, max_size=4)))
        else:
            # One of the values that no safe load takes; rare, as one spoils it for the whole state.
            value = frozenset({1, 2}) if self._chance(4) else {3}
        self._containers.append(value)
        return value

    def _chance(self, one_in: int) -> bool:
        return self._draw(st.integers(1, one_in)) == 1

    def _one_of(self, choices: list[Any]) -> Any:
        return choices[self._draw(st.integers(0, len(choices) - 1))]

    # Tensors

    def _tensor(self) -> Any:
        if self._tensors and self._chance(6):
            return self._one_of(self._tensors)
        kind = self._draw(
            st.sampled_from(["", "", "parameter", "grad", "conj", "neg", "attribute", "sparse", "storage"])
        )
        if kind in ("conj", "neg"):
            # The imaginary part of a conjugate is a real tensor with the negative bit.
            conjugate = self._view(COMPLEX[kind == "neg" :]).conj()
            tensor = conjugate.imag if kind == "neg" else conjugate
        elif kind == "sparse":
            tensor = self._sparse(self._view([torch.float32, torch.int64]))
        elif kind == "parameter":
            tensor = self._view(DTYPES)
            differentiable = tensor.is_floating_point() or tensor.is_complex()
            tensor = torch.nn.Parameter(tensor, requires_grad=differentiable and self._chance(2))
        elif kind == "grad":
            tensor = self._view(FLOATING).requires_grad_()
        else:
            tensor = self._view(DTYPES)
        if kind == "storage" and self._chance(4):
            return tensor.untyped_storage()
        if kind == "attribute":
            tensor.note = ["remember", self._draw(_SCALARS)]  # type: ignore[attr-defined]
        self._tensors.append(tensor)
        return tensor

    def _sparse(self, tensor: torch.Tensor) -> torch.Tensor:
        values = tensor.reshape(-1)[:3].contiguous()
        indices = torch.arange(len(values)).reshape(1, -1)
        return torch.sparse_coo_tensor(indices, values, (5,), is_coalesced=True, check_invariants=True)

    def _view(self, dtypes: list[torch.dtype]) -> torch.Tensor:
        """A tensor over memory of its own, or over part of what others stand on already."""
        if not self._memory or self._chance(2):
            size = self._draw(st.sampled_from([0, 16, 48, 64, 64, 160, 4096]))
            seed = self._draw(st.integers(0, 2**32))
            memory = torch.tensor(list(random.Random(seed).randbytes(size)), dtype=torch.uint8)
            dtype = self._one_of(dtypes)
            self._memory.append((memory, dtype))
        else:
            memory, dtype = self._one_of(self._memory)
            if dtype not in dtypes or self._chance(4):
                dtype = self._one_of(dtypes)
        return self._strided(memory.view(dtype))

    def _strided(self, memory: torch.Tensor) -> torch.Tensor:
        """A view of any shape and strides: transposed, expanded, overlapping, with gaps, empty, or a scalar."""
        dims = self._draw(st.integers(0, 3))
        shape = [self._draw(st.integers(0, 3)) for _ in range(dims)]
        if self._chance(2):
            stride = [self._draw(st.integers(0, 4)) for _ in range(dims)]
        else:
            stride = list(torch.empty(shape, device="meta").stride())
        span = 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if span > len(memory):
            return memory
        offset = self._draw(st.integers(0, len(memory) - span))
        return memory.as_strided(shape, stride, offset)
