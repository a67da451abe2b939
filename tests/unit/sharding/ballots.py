"""Files of ranks that were never started, and their ballots."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lastgood._image_writer import write_durably
from lastgood.capture import capture
from lastgood.format.archive import Archive, open_archive
from lastgood.format.index_head import IndexHead
from lastgood.format.manifest import Manifest, checkpoint_file
from lastgood.format.mesh import Layout, Mesh, parse_placement
from lastgood.format.sharding import written_pieces
from lastgood.format.vote import Ballot, ballot_of, tally
from lastgood.sharding.checksums import checksum
from lastgood.sharding.divide import Divider
from lastgood.sharding.local_shards import LocalShards, ShardDescription
from lastgood.storage.local import LocalStorage
from lastgood.types import RankInfo

SAVE_ID = "5a" * 16


@dataclass(frozen=True)
class RankFile:
    """One rank's file, its ballot, and what is to be known of the file."""

    ballot: Ballot
    archive: Archive


def rank_file(
    directory: Path,
    rank: int,
    world_size: int,
    state: Any,
    replicated: Sequence[str] = (),
    *,
    save_id: str = SAVE_ID,
    independent: bool = False,
    voted_save: str = SAVE_ID,
) -> RankFile:
    """Write ``state`` as this rank would, and read the ballot from what stands there."""
    captured = capture(Divider(RankInfo(rank, world_size), replicated).divide(state))
    head = IndexHead(save_id=save_id, rank=rank, world_size=world_size, step=None, independent=independent)
    path = checkpoint_file(str(directory), rank)
    storage = LocalStorage()
    write_durably(captured.image(head), storage, path, rank=rank, no_progress_timeout_secs=60).commit()
    with closing(storage.open(path)) as file:
        archive = open_archive(file)
        assert archive is not None
        return RankFile(ballot_of(archive, voted_save, [checksum(tensor) for _, tensor in captured.replicas]), archive)


def files_of(directory: Path, states: Sequence[Any], replicated: Sequence[str] = ()) -> list[RankFile]:
    """A file for each of the ranks, which hold these states."""
    return [rank_file(directory, rank, len(states), state, replicated) for rank, state in enumerate(states)]


class Tables:
    """Where ballots leave their tables; counts what is fetched."""

    def __init__(self, files: Sequence[RankFile]) -> None:
        self.all: dict[str, bytes] = {}
        for file in files:
            self.all |= file.ballot.tables
        self.fetched: list[str] = []

    def fetch(self, digest: str) -> bytes:
        self.fetched.append(digest)
        return self.all[digest]


def count(files: Sequence[RankFile], save_id: str = SAVE_ID) -> Manifest:
    """The manifest of these, in the order of the ranks."""
    return tally([file.ballot.vote for file in files], Tables(files).fetch, save_id)


def sharded(name: str, tensor: torch.Tensor, mesh: Mesh, placements: Sequence[str], rank: int) -> LocalShards:
    """A rank's part of ``tensor`` on a mesh of ranks that nobody has started."""
    placed = tuple(map(parse_placement, placements))
    layout = Layout(name, tensor.element_size(), tuple(tensor.shape), mesh, placed)
    pieces = tuple(written_pieces(layout, rank))
    description = ShardDescription(name, mesh, tuple(placements), tensor.dtype, layout.shape, "", pieces)
    parts = []
    for piece in pieces:
        part = tensor
        for dimension, (offset, size) in enumerate(zip(*piece.box, strict=True)):
            part = part.narrow(dimension, offset, size)
        parts.append(part.contiguous())
    return LocalShards(description, parts)
