"""Small files that claim much: ranks, elements, parts, repetitions, depth. None of them costs what it claims."""

from collections.abc import Callable
from typing import Any
from zlib import crc32

import pytest
from tests.hostile.archives import TRAILER, contents_of, stored_in
from tests.hostile.json_edits import nested
from tests.hostile.pickles import FOUR_FLOATS, call, name, text, tuple_of
from tests.hostile.samples import Reader, Sample, write
from tests.hostile.test_indexes import index_of, with_index
from tests.hostile.test_manifests import manifest_of, sealed
from tests.hostile.test_pickles import FORMS, put
from tests.unit.loading.files import opcodes

GetSample = Callable[[str], Sample]
CountCases = Callable[[str, int], None]

CLAIMED = "small files that claim much"
NO_HOOKS = call("collections OrderedDict")


def put_index(sample: Sample, document: Any, file: str = "checkpoint_0.pt") -> bytes:
    data = with_index(sample.whole[file], document, agreeing=True)
    write(sample, file, data)
    return data


# Ranks


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("claimed", [10_000, 10**12])
def test_a_file_may_claim_to_be_one_of_any_number(
    reader: Reader, sample: GetSample, count_cases: CountCases, claimed: int, independent: bool
) -> None:
    found = sample("single")
    put_index(found, index_of(found) | {"world_size": claimed, "independent": independent})
    seen = reader.read(found)
    assert seen.of("verify").error
    assert seen.of("entry").error
    count_cases(CLAIMED, 1)


@pytest.mark.parametrize("claimed", [10_000, 10**12])
def test_a_manifest_may_claim_any_number_of_ranks(
    reader: Reader, sample: GetSample, count_cases: CountCases, claimed: int
) -> None:
    found = sample("spread")
    write(found, "manifest.json", sealed(manifest_of(found) | {"world_size": claimed}))
    seen = reader.read(found)
    assert {outcome.error for outcome in seen.outcomes} == {"CorruptCheckpointError"}
    count_cases(CLAIMED, 1)


# Elements and parts


SHAPES = {
    "more_than_63_bits": [2**62, 2],
    "more_than_a_float": [2**62] * 20,
    "more_than_can_be_printed": [2**62] * 300,
    "very_many_and_large_dimensions": [2**62] * 3000,
    "very_many_of_nothing": [0] + [2**62] * 3000,
    "very_many_of_one": [1] * 3000,
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_tensor_may_claim_any_shape(
    reader: Reader, sample: GetSample, count_cases: CountCases, shape: list[int]
) -> None:
    found = sample("values")
    document = index_of(found)
    document["root"][1]["t"] = ["tensor", 0, "float32", 0, shape, [0] * len(shape), ""]
    put_index(found, document)
    reader.read(found)
    tensor = call(
        "torch._utils _rebuild_tensor_v2",
        FOUR_FLOATS,
        opcodes(0),
        _sizes(shape),
        _sizes([0] * len(shape)),
        b"\x89",
        NO_HOOKS,
    )
    put(found, "torch zip", b"}(" + text("t") + tensor + b"u")
    reader.read(found)
    count_cases(CLAIMED, 2)


def _sizes(values: list[int]) -> bytes:
    return tuple_of([opcodes(value) for value in values])


PLACED: dict[str, tuple[list[int], list[int], list[str]]] = {
    # Shape of the tensor, of the mesh, and placements.
    "cut_along_four_dimensions": ([4096] * 4, [2, 2, 2, 2], [f"_S({number}, 64)" for number in range(4)]),
    "cut_four_times": ([2**40], [2, 2, 2, 2], ["_S(0, 64)"] * 4),
    "replicas_of_very_many_dimensions": ([1] * 3000 + [2**22], [16], ["R"]),
    "more_than_a_float_on_a_mesh": ([2**62] * 20, [16], ["S(0)"]),
    "more_than_63_bits_on_a_mesh": ([2**62, 2**62], [16], ["S(0)"]),
    "very_many_dimensions_of_the_mesh": ([64], [16] + [1] * 3000, ["S(0)"] + ["R"] * 3000),
}


@pytest.mark.parametrize("placed", PLACED.values(), ids=PLACED)
def test_a_tensor_may_claim_to_be_spread_in_any_way(
    reader: Reader, sample: GetSample, count_cases: CountCases, placed: Any
) -> None:
    """Index and manifest agree on it, and no part of it is there."""
    shape, mesh_shape, placements = placed
    found = sample("spread")
    mesh = [mesh_shape, None, list(range(16))]
    document = index_of(found) | {"world_size": 16, "meshes": [mesh]}
    document["root"][1]["w"] = ["sharded", 0, placements, "float32", shape, "", [], []]
    data = put_index(found, document)
    manifest = manifest_of(found)
    own = manifest["files"][0] | {"size": len(data), "trailer_crc": crc32(contents_of(stored_in(data), TRAILER))}
    others = [own | {"rank": rank, "name": f"checkpoint_{rank}.pt"} for rank in range(1, 16)]
    tensors = [["both", "float32", [3], 0, ["R"] * len(mesh_shape)], ["w", "float32", shape, 0, placements]]
    changes = {"world_size": 16, "files": [own, *others], "meshes": [mesh], "tensors": tensors[1:]}
    write(found, "manifest.json", sealed(manifest | changes))
    seen = reader.read(found, ways=["load", "load elsewhere", "verify", "inspect", "entry", "command inspect"])
    for way in ("load", "load elsewhere", "verify"):
        assert seen.of(way).error
    count_cases(CLAIMED, 1)


# Repetition and depth


def test_an_index_may_be_nested_beyond_all_measure(reader: Reader, sample: GetSample, count_cases: CountCases) -> None:
    found = sample("single")
    for form in ("nodes", "arrays"):
        for member in ("root", "step", "storages", "save_id"):
            put_index(found, index_of(found) | {member: nested(50_000, form)})
            seen = reader.read(found)
            assert seen.of("load").error == seen.of("verify").error == "CorruptCheckpointError"
            count_cases(CLAIMED, 1)


def repeated(kind: str) -> bytes:
    """The opcodes of a value that comes again and again."""
    if kind == "the list below twice":
        return b"](K\x01eq\x00" + b"".join(b"](h\0h\0eq\0" for _ in range(60))
    if kind == "the dict below twice":
        return b"}q\x00" + b"".join(b"}(K\x01h\0K\x02h\0uq\0" for _ in range(60))
    if kind == "the tuple below twice":
        return b"K\x01q\x00" + b"".join(b"h\0\x86q\0" for _ in range(60))
    if kind == "the same storage":
        return b"](" + (FOUR_FLOATS + b"q\x00" + b"h\0" * 5000) + b"e"
    if kind == "lists in lists":
        return b"](" * 5000 + b"K\x01" + b"e" * 5000
    if kind == "dicts in dicts":
        return b"}(K\x01" * 5000 + b"K\x01" + b"u" * 5000
    if kind == "a tensor from a type from a type":
        arguments = tuple_of([FOUR_FLOATS, opcodes(0), opcodes((1,)), opcodes((1,)), b"\x89", NO_HOOKS])
        function = name("torch._utils _rebuild_tensor_v2")
        for _ in range(190):
            arguments = tuple_of([function, name("torch Tensor"), arguments, b"}"])
            function = name("torch._tensor _rebuild_from_type_v2")
        return function + arguments + b"R"
    if kind == "states of states":
        return NO_HOOKS + NO_HOOKS * 2000 + b"b" * 2000
    assert kind == "very many empty lists"
    return b"](" + b"]" * 10_000 + b"e"


REPEATED = [
    "the list below twice",
    "the dict below twice",
    "the tuple below twice",
    "the same storage",
    "lists in lists",
    "dicts in dicts",
    "a tensor from a type from a type",
    "states of states",
    "very many empty lists",
]


@pytest.mark.parametrize("kind", REPEATED)
@pytest.mark.parametrize("form", FORMS)
def test_values_that_come_again_and_again(
    reader: Reader, sample: GetSample, count_cases: CountCases, form: str, kind: str
) -> None:
    found = sample("values")
    put(found, form, b"}(" + text("a") + repeated(kind) + b"u")
    reader.read(found, ways=["load", "load keys", "load in place", "verify", "inspect", "command inspect"])
    count_cases(CLAIMED, 1)


@pytest.mark.parametrize("form", ["torch zip", "torch legacy"])
def test_a_large_tuple_that_comes_again_and_again_is_as_much_for_a_load_of_keys_as_for_inspect(
    reader: Reader, sample: GetSample, count_cases: CountCases, form: str
) -> None:
    """Twenty million items, had it ten thousand references instead of two hundred: that took minutes."""
    found = sample("values")
    put(found, form, b"}(" + text("a") + b"](" + b"(" + b"K\x01" * 1000 + b"tq\x05" + b"h\x05" * 200 + b"eu")
    seen = reader.read(found, ways=["load keys", "load in place", "inspect"])
    assert {outcome.error for outcome in seen.outcomes} == {"UnsafeCheckpointError"}
    count_cases(CLAIMED, 1)


# What torch is asked for on the way


@pytest.mark.parametrize("asked", ["_inductor", "onnx", "has_mps", "nothing", "load", "nn.Module", "__name__"])
def test_looking_for_a_dtype_imports_nothing(
    reader: Reader, sample: GetSample, count_cases: CountCases, asked: str
) -> None:
    found = sample("values")
    rest = (opcodes(0), opcodes((1,)), opcodes((1,)), b"\x89", NO_HOOKS, name(f"torch {asked}"))
    for form in FORMS:
        put(found, form, b"}(" + text("a") + call("torch._utils _rebuild_tensor_v3", FOUR_FLOATS, *rest) + b"u")
        assert "with arguments that it never gets" in reader.read(found).of("load").message
        count_cases(CLAIMED, 1)
