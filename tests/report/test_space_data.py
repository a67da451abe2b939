"""The map's data: every byte of the files is somewhere, once, and large states fit into a page."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lastgood
from lastgood._contents import FileContents, open_contents
from lastgood.cli._report.data import Report, Space
from lastgood.cli._report.space import space_of
from lastgood.format.index import StorageEntry
from lastgood.format.nodes import DictNode, TensorNode


def _space(tmp_path: Path, state: dict[str, Any], most_nodes: int = 1000) -> Space:
    lastgood.save(state, tmp_path / "state.pt")
    return space_of(5, open_contents(str(tmp_path / "state.pt")).files, most_nodes)


def _by_path(space: Space) -> dict[str, int]:
    """The bytes of each node by its path."""
    paths: list[str] = []
    for parent, name in zip(space.nodes.parent, space.nodes.name, strict=True):
        paths.append(f"{paths[parent]}/{name}" if parent > 0 else name)
    return dict(zip(paths, space.nodes.nbytes, strict=True))


def _check_sums(space: Space) -> None:
    inside = [0] * len(space.nodes.parent)
    for parent, nbytes in zip(space.nodes.parent, space.nodes.nbytes, strict=True):
        if parent >= 0:
            inside[parent] += nbytes
    for place, kind in enumerate(space.nodes.kind):
        if kind == "g":
            assert space.nodes.nbytes[place] == inside[place]


def test_dotted_keys_and_nested_dicts_make_one_tree_whose_bytes_are_the_files(tmp_path: Path) -> None:
    space = _space(tmp_path, {"model": {"h.0.w": torch.zeros(10), "h.1.w": torch.zeros(20)}, "lists": [torch.ones(3)]})
    nodes = _by_path(space)
    assert (nodes["model.h/0/w"], nodes["model.h/1/w"], nodes["lists/[0]"]) == (40, 80, 12)
    assert space.nbytes == nodes["step 5"] == (tmp_path / "state.pt").stat().st_size
    assert space.tensors == 3
    assert sum(total.nbytes for total in space.dtypes) == 4 * 33
    _check_sums(space)


def test_a_group_with_one_group_in_it_is_one_with_both_names(tmp_path: Path) -> None:
    space = _space(tmp_path, {"a": {"b": {"x": torch.zeros(4), "y": torch.zeros(8)}}, "z": torch.zeros(2)})
    nodes = _by_path(space)
    assert nodes["a.b"] == 48
    assert (nodes["a.b/x"], nodes["a.b/y"], nodes["z"]) == (16, 32, 8)


def test_bytes_that_tensors_share_are_counted_once_and_the_others_say_so(tmp_path: Path) -> None:
    weight = torch.zeros(100)
    space = _space(tmp_path, {"first": weight, "tied": weight, "view": weight[:50]})
    nodes = _by_path(space)
    assert (nodes["first"], nodes["tied"], nodes["view"]) == (400, 0, 0)
    notes = dict(zip(space.nodes.name, space.nodes.note, strict=True))
    assert notes["tied"] == notes["view"] == "shares its bytes with first"
    assert notes["first"] == ""


def test_a_key_that_is_a_tensor_and_a_group_too_loses_nothing(tmp_path: Path) -> None:
    for order in (["a", "a.b"], ["a.b", "a"]):
        space = _space(tmp_path, {key: torch.zeros(len(key)) for key in order})
        nodes = _by_path(space)
        assert (nodes["a/(itself)"], nodes["a/b"], nodes["a"]) == (4, 12, 16)


def test_keys_that_print_alike_are_both_there(tmp_path: Path) -> None:
    space = _space(tmp_path, {1: torch.zeros(1), "1": torch.zeros(2)})
    assert sum(kind == "t" for kind in space.nodes.kind) == space.tensors == 2
    assert len(set(space.nodes.name)) == len(space.nodes.name)


def test_a_state_that_is_one_tensor_has_a_map(tmp_path: Path) -> None:
    lastgood.save(torch.zeros(7), tmp_path / "state.pt")
    space = space_of(1, open_contents(str(tmp_path / "state.pt")).files)
    assert _by_path(space)["(all)"] == 28


def test_small_tensors_are_taken_together_group_by_group_and_sums_still_hold(tmp_path: Path) -> None:
    state = {f"layer.{number}": {"w": torch.zeros(50 + number), "b": torch.zeros(1)} for number in range(200)}
    space = _space(tmp_path, state, most_nodes=50)
    assert len(space.nodes.parent) < 150
    assert space.tensors == 400
    assert space.joined == 400 - sum(kind == "t" for kind in space.nodes.kind) > 300
    assert space.nbytes == (tmp_path / "state.pt").stat().st_size
    _check_sums(space)


def test_files_of_several_ranks_stand_side_by_side(tmp_path: Path) -> None:
    files = [_file({f"w{rank}": 100 * (rank + 1)}, rank=rank) for rank in range(2)]
    space = space_of(1, files)
    nodes = _by_path(space)
    assert (space.files, nodes["rank 0/w0"], nodes["rank 1/w1"]) == (2, 100, 200)


@pytest.mark.parametrize("as_zip", [True, False])
def test_files_of_plain_torch_save_have_a_map_too(tmp_path: Path, as_zip: bool) -> None:
    path = tmp_path / "plain.pt"
    torch.save({"w": torch.zeros(5)}, path, _use_new_zipfile_serialization=as_zip)
    space = space_of(1, open_contents(str(path)).files)
    assert (_by_path(space)["w"], space.nbytes) == (20, path.stat().st_size)


def _file(tensors: dict[str, int], *, rank: int = 0) -> FileContents:
    nodes = {
        key: TensorNode(number, "uint8", 0, (nbytes,), (1,), "") for number, (key, nbytes) in enumerate(tensors.items())
    }
    storages = [StorageEntry(nbytes, "uint8", "cpu") for nbytes in tensors.values()]
    size = sum(tensors.values()) + 1000
    return FileContents("f", size, "lastgood", DictNode(nodes), storages, [], "little", rank=rank)  # type: ignore[arg-type]


_part = st.text(st.sampled_from("ab01[]."), max_size=3)
_key = st.lists(_part, min_size=1, max_size=5).map(".".join)


@given(st.dictionaries(_key, st.integers(0, 5000), max_size=40), st.integers(1, 60))
def test_whatever_the_keys_every_byte_and_tensor_is_in_the_tree_once(tensors: dict[str, int], most: int) -> None:
    space = space_of(1, [_file(tensors)], most)
    leaves = [place for place, kind in enumerate(space.nodes.kind) if kind != "g"]
    assert sum(space.nodes.nbytes[place] for place in leaves) == space.nbytes == sum(tensors.values()) + 1000
    assert sum(space.nodes.tensors[place] for place in leaves) == space.tensors == len(tensors)
    assert all(parent < place for place, parent in enumerate(space.nodes.parent))
    assert len(space.nodes.parent) <= 2 * most
    _check_sums(space)


def test_a_key_of_a_million_parts_makes_no_deep_tree() -> None:
    space = space_of(1, [_file({".".join("a" * 1_000_000): 8, "b": 9})])
    assert len(space.nodes.parent) < 210
    assert max(map(len, space.nodes.name)) < 250


def test_a_hundred_thousand_tensors_make_data_of_under_two_megabytes() -> None:
    count = 100_000
    file = _file({f"model.layers.{number // 20}.part.{number % 20}.weight": number % 977 for number in range(count)})
    space = space_of(1, [file])
    assert space.tensors == count
    assert len(msgspec.json.encode(space)) < 2_000_000


def test_the_sample_runs_newest_step_is_shown(report: Report) -> None:
    assert report.space is not None
    assert report.space.step == 3000
    assert report.space.joined == 0
