"""Dividing a state: each place under its own name, by nothing but the state at hand, and only where votes join it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.sharding.ballots import count, files_of

from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from lastgood.errors import ConfigError
from lastgood.format.index import InvalidIndexError, decode_index, encode_index
from lastgood.format.mesh import Layout, Placement, replica_mesh
from lastgood.format.nodes import ShardedNode, TensorNode
from lastgood.sharding.divide import Divider
from lastgood.types import RankInfo


def test_a_tuple_that_stands_under_two_keys_is_described_under_both(tmp_path: Path) -> None:
    shared = (torch.arange(5.0), torch.arange(3.0))
    files = files_of(tmp_path, [{"one": shared, "two": shared}] * 3, ["*"])
    assert [tensor.name for tensor in count(files).tensors] == ["one[0]", "one[1]", "two[0]", "two[1]"]


def test_who_writes_what_does_not_depend_on_the_states_before() -> None:
    def pieces(divided: Any) -> Any:
        return divided["small"].description

    state = {"small": torch.ones(3)}
    before = Divider(RankInfo(1, 3), ["*"])
    before.divide({"small": torch.ones(3), "other": torch.ones(700_000)})
    assert pieces(before.divide(state)) == pieces(Divider(RankInfo(1, 3), ["*"]).divide(state))
    assert list(before._known) == ["small"]


def test_replicas_are_divided_only_where_votes_join_and_compare_them() -> None:
    with pytest.raises(ConfigError, match="replicated needs ranks that commit together"):
        CheckpointWriter(CheckpointWriterConfig(), RankInfo(0, 2), replicated=["model.*"])
    alone = CheckpointWriter(CheckpointWriterConfig(), RankInfo(0, 1), replicated=["model.*"])
    state = {"model": {"weights": torch.ones(3)}}
    assert alone._own_divider().divide(state) is state


def test_a_placement_that_would_take_for_ever_to_follow_is_refused() -> None:
    with pytest.raises(ValueError, match="the placement _S"):
        Layout("w", 4, (8,), replica_mesh(4), (Placement(0, 1_000_000),))


def test_parts_that_overlap_do_not_pass_for_the_whole(tmp_path: Path) -> None:
    files = files_of(tmp_path, [{"w": torch.ones(2, 1024, 1024)}] * 2, ["*"])
    index = files[0].archive.index
    decode_index(encode_index(index))
    node: Any = index.root.items["w"]  # type: ignore[union-attr]
    assert isinstance(node, ShardedNode)
    assert isinstance(node.items[0], TensorNode)
    node.items *= 2
    node.offsets *= 2
    with pytest.raises(InvalidIndexError, match="overlap"):
        decode_index(encode_index(index))
