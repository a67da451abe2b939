"""Very many small tensors are read and measured together: what comes out is what each gives alone."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.contents.samples import save_in_each_form
from tests.unit.loading.files import CountingFile, flip, opened, raw

import lastgood
from lastgood.cli import _compare
from lastgood.cli._compare import compare_states
from lastgood.cli._measure import flat
from lastgood.cli._stats import Stats, stats_of
from lastgood.cli._tensors import TensorSource
from lastgood.errors import CorruptCheckpointError
from lastgood.format.nodes import TensorNode, walk_nodes
from lastgood.format.spec import BLOCK_SIZE

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e5m2, torch.complex64, torch.int64, torch.uint8, torch.bool)
SHAPES = ((), (0,), (3, 0, 2), (1,), (7,), (4, 5), (1, 6), (2, 3, 4))
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0)
FORMS = ("whole", "view of the middle", "transposed", "every other", "expanded", "conjugate", "negative", "parameter")

choices = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.sampled_from(FORMS)), min_size=1, max_size=25
)


def make(dtype: torch.dtype, shape: tuple[int, ...], form: str, generator: torch.Generator) -> torch.Tensor:
    """A tensor with some elements that are no finite numbers, where the dtype has such."""
    count = 3 * math.prod(shape) + 2
    values = torch.randn(count, generator=generator, dtype=torch.float64) * 50
    if dtype.is_floating_point:
        chosen = torch.randint(0, 40, (count,), generator=generator).tolist()
        for place, number in enumerate(chosen):
            if number < len(SPECIAL):
                values[place] = SPECIAL[number]
    if dtype == torch.uint8:
        values = values.abs()
    base = torch.complex(values, values.flip(0)).to(dtype) if dtype.is_complex else values.to(dtype)
    whole = base[: math.prod(shape)].clone().view(shape)
    if form == "view of the middle":
        return base[1 : 1 + math.prod(shape)].view(shape)
    if form == "transposed":
        return whole.transpose(0, -1) if whole.dim() else whole
    if form == "every other":
        return base[: 2 * math.prod(shape) : 2].view(shape) if shape else base[1]
    if form == "expanded":
        return whole.unsqueeze(0).expand(3, *shape)
    if form == "conjugate":
        return whole.conj()
    if form == "negative" and dtype.is_complex:
        return whole.conj().imag
    if form == "parameter" and (dtype.is_floating_point or dtype.is_complex):
        return torch.nn.Parameter(whole)
    return whole


def make_state(chosen: list[tuple[Any, Any, str]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {f"w{number}": make(*choice, generator) for number, choice in enumerate(chosen)}
    state["shared"] = next(iter(state.values())).detach()  # another tensor on the same storage
    return state


def nodes_of(source: TensorSource) -> list[TensorNode]:
    return [node for node, _ in walk_nodes(source.contents.root) if isinstance(node, TensorNode)]


def elements_of(tensor: torch.Tensor) -> bytes:
    shown = tensor.detach().resolve_conj().resolve_neg()
    return raw(shown.clone(memory_format=torch.contiguous_format))


@settings(max_examples=20)
@given(chosen=choices, seed=st.integers(0, 2**31))
def test_bytes_read_together_are_those_of_each_tensor(
    tmp_path_factory: pytest.TempPathFactory, chosen: list[tuple[Any, Any, str]], seed: int
) -> None:
    state = make_state(chosen, seed)
    for path in save_in_each_form(tmp_path_factory.mktemp("state"), state).values():
        with TensorSource(str(path)) as source:
            nodes = nodes_of(source)
            assert source.read_bytes(nodes) == [elements_of(tensor) for tensor in state.values()]
            assert source.read_bytes(nodes[::-1]) == [elements_of(tensor) for tensor in source.read(nodes)][::-1]


@settings(max_examples=20)
@given(chosen=choices, seed=st.integers(0, 2**31))
def test_a_comparison_of_many_is_that_of_each(
    tmp_path_factory: pytest.TempPathFactory, chosen: list[tuple[Any, Any, str]], seed: int
) -> None:
    a, b = make_state(chosen, seed), make_state(chosen, seed + 1)
    b |= {name: a[name] for name in list(a)[::3]}
    directory = tmp_path_factory.mktemp("states")
    lastgood.save(a, directory / "a")
    lastgood.save(b, directory / "b")
    together = compare_states(str(directory / "a"), str(directory / "b"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compare, "BATCH_ELEMENTS", 0)
        alone = compare_states(str(directory / "a"), str(directory / "b"))
    assert len(together.tensors) == len(a)
    for one, other in zip(together.tensors, alone.tensors, strict=True):
        for name in one.__struct_fields__:
            found, expected = getattr(one, name), getattr(other, name)
            is_sum = name in ("norm_a", "norm_change", "rms_change") and math.isfinite(expected)
            assert found == (pytest.approx(expected, rel=1e-12) if is_sum else pytest.approx(expected, nan_ok=True))
        assert one.equal == (one.path in list(a)[::3]) or one.equal == _looks_equal(a[one.path], b[one.path])


def _looks_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (flat(tensor.detach()).to(torch.complex128) for tensor in (a, b))
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@settings(max_examples=20)
@given(chosen=choices, seed=st.integers(0, 2**31))
def test_statistics_of_many_are_those_of_each(
    tmp_path_factory: pytest.TempPathFactory, chosen: list[tuple[Any, Any, str]], seed: int
) -> None:
    state = make_state(chosen, seed)
    path = tmp_path_factory.mktemp("state") / "a"
    lastgood.save(state, path)
    with TensorSource(str(path)) as source:
        found = stats_of(source, nodes_of(source))
    for tensor, stats in zip(state.values(), found, strict=True):
        assert_close(stats, plain_stats(tensor.detach()))


def plain_stats(tensor: torch.Tensor) -> Stats:
    """The definition, for one tensor."""
    tensor = tensor.resolve_conj().resolve_neg()
    values = tensor.to(torch.complex128).abs() if tensor.is_complex() else tensor.float().double()
    if tensor.dtype == torch.int64:
        values = tensor.double()
    nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
    finite = values[values.isfinite()]
    if not finite.numel():
        return Stats(nan=nan, inf=inf)
    spread = float(finite.std(correction=0))
    return Stats(float(finite.min()), float(finite.max()), float(finite.mean()), spread, nan, inf)


def assert_close(found: Stats, expected: Stats) -> None:
    for name in found.__struct_fields__:
        value = getattr(expected, name)
        assert getattr(found, name) == (value if value is None else pytest.approx(value, rel=1e-9, abs=1e-9)), name


def test_large_and_small_tensors_stand_side_by_side(tmp_path: Path, rng_seed: int) -> None:
    generator = torch.Generator().manual_seed(rng_seed)
    sizes = (3, BLOCK_SIZE // 4, BLOCK_SIZE // 4 + 1, 0, 5, 600_000, 2)
    a = {f"w{number}": torch.randn(size, generator=generator) for number, size in enumerate(sizes)}
    b = {name: tensor + 1 for name, tensor in a.items()}
    lastgood.save(a, tmp_path / "a")
    lastgood.save(b, tmp_path / "b")
    found = compare_states(str(tmp_path / "a"), str(tmp_path / "b"))
    assert [tensor.changed for tensor in found.tensors] == list(sizes)
    for tensor in found.tensors:
        difference = b[tensor.path].double() - a[tensor.path].double()
        assert tensor.norm_change == pytest.approx(float(difference.norm()))
    with TensorSource(str(tmp_path / "a")) as source:
        for tensor_a, stats in zip(a.values(), stats_of(source, nodes_of(source)), strict=True):
            assert_close(stats, plain_stats(tensor_a))


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    state = {f"w{number}": torch.full((10_000,), float(number)) for number in range(5)}
    forms = save_in_each_form(tmp_path, state)
    for form in ("lastgood", "torch zip"):
        content = forms[form].read_bytes()
        flip(forms[form], content.index(state["w3"].numpy().tobytes()[:4000]) + 1000)
        with TensorSource(str(forms[form])) as source:
            nodes = nodes_of(source)
            assert len(source.read_bytes(nodes[:3])) == 3
            with pytest.raises(CorruptCheckpointError, match="'w3'" if form == "lastgood" else "storage 3"):
                source.read_bytes(nodes)


def test_many_small_tensors_take_few_reads(tmp_path: Path) -> None:
    lastgood.save({f"w{number}": torch.ones(10) for number in range(2000)}, tmp_path / "a")
    with opened(tmp_path / "a") as file, TensorSource(str(tmp_path / "a"), counting := CountingFile(file)) as source:
        nodes = nodes_of(source)
        counting.reads.clear()
        assert len(source.read_bytes(nodes)) == 2000
    assert len(counting.reads) == 1


def test_what_lies_far_apart_is_read_without_what_lies_between(tmp_path: Path) -> None:
    state = {"a": torch.arange(5.0), "between": torch.zeros(100_000), "b": torch.arange(7), "c": torch.ones(3)}
    lastgood.save(state, tmp_path / "a")
    with opened(tmp_path / "a") as file, TensorSource(str(tmp_path / "a"), counting := CountingFile(file)) as source:
        a, _, b, c = nodes_of(source)
        counting.reads.clear()
        assert source.read_bytes([c, a, b]) == [elements_of(state[name]) for name in "cab"]
    assert len(counting.reads) == 2
    assert counting.bytes_read < 10_000


def test_pieces_without_a_finite_element_count_for_nothing_else(tmp_path: Path) -> None:
    tensor = torch.full((3_000_000,), math.nan, dtype=torch.bfloat16)
    tensor[-1_000_000:] = 4.0
    tensor[-1] = 1.0
    lastgood.save({"w": tensor}, tmp_path / "a")
    with TensorSource(str(tmp_path / "a")) as source:
        (found,) = stats_of(source, nodes_of(source))
    assert_close(found, plain_stats(tensor))
