"""States of ranks that do not exist: layouts, indexes, ballots and manifests as real ranks would have them."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec

from lastgood.format.index import Index
from lastgood.format.manifest import Manifest
from lastgood.format.mesh import Layout, Mesh, Placement
from lastgood.format.nodes import DictNode, ShardedNode, TensorNode
from lastgood.format.sharding import Piece, held_pieces, pieces_within, written_pieces
from lastgood.format.spec import crc32
from lastgood.format.vote import GROUPS, Ballot, Vote, ballot_of, tally

SAVE_ID = "5a" * 16
TENSOR_PARALLEL = 8
SHARDS_OF_HSDP = 8

# As many names a layer as a GPT block has, each with two moments of AdamW.
_PARTS = ("attention.qkv.weight", "attention.out.weight", "mlp.up.weight", "mlp.down.weight", "norm.weight")
_GROUPS = ("model", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Parallelism:
    """A way of spreading a model over any number of ranks."""

    name: str
    mesh: Callable[[int], Mesh]
    placements: Callable[[Mesh], tuple[Placement, ...]]


def _row(ranks: int) -> Mesh:
    return Mesh((ranks,), ("data",), tuple(range(ranks)))


def _grid(inner: int, names: tuple[str, str]) -> Callable[[int], Mesh]:
    def mesh(ranks: int) -> Mesh:
        width = math.gcd(ranks, inner)
        return Mesh((ranks // width, width), names, tuple(range(ranks)))

    return mesh


FSDP = Parallelism("FSDP", _row, lambda mesh: (Placement(0),))
FSDP_TP = Parallelism(
    "FSDP x TP",
    _grid(TENSOR_PARALLEL, ("data", "tensor")),
    lambda mesh: (Placement(0, mesh.shape[1]), Placement(0)),
)
HSDP = Parallelism("HSDP", _grid(SHARDS_OF_HSDP, ("replica", "data")), lambda mesh: (Placement(None), Placement(0)))
KINDS = (FSDP, FSDP_TP, HSDP)


def tensor_names(count: int) -> list[str]:
    """Names like those of a training state."""
    names = (f"{group}.layers.{number}.{part}" for number in range(count) for part in _PARTS for group in _GROUPS)
    return [next(names) for _ in range(count)]


def shapes(count: int, ranks: int) -> list[tuple[int, int]]:
    """Shapes of which a rank holds about as much whatever the number of ranks; in a hundred sizes, some uneven."""
    return [(ranks * (4 + number % 100) - number % 3, 64 + number % 5) for number in range(count)]


def layouts(kind: Parallelism, mesh: Mesh, names: Iterable[str], sizes: Iterable[tuple[int, int]]) -> list[Layout]:
    """How tensors of these names and shapes are spread; of float32."""
    placements = kind.placements(mesh)
    return [Layout(name, 4, shape, mesh, placements) for name, shape in zip(names, sizes, strict=True)]


def plan_save(kind: Parallelism, mesh: Mesh, names: list[str], sizes: list[tuple[int, int]], rank: int) -> list[Any]:
    """What a rank works out before it writes."""
    return [(layout, written_pieces(layout, rank)) for layout in layouts(kind, mesh, names, sizes)]


def plan_load(manifest: Manifest, kind: Parallelism, mesh: Mesh, rank: int) -> tuple[int, set[int]]:
    """What a rank of another mesh works out before it reads: how many pieces, of which ranks' files."""
    count, ranks = 0, set()
    for tensor in manifest.tensors:
        saved = manifest.layout(tensor)
        wanted = Layout(tensor.name, 4, tensor.shape, mesh, kind.placements(mesh))
        for piece in held_pieces(wanted, rank):
            for held in pieces_within(saved, piece.box):
                count += 1
                ranks.add(held.rank)
    return count, ranks


# Ballots


def index_of(plan: list[tuple[Layout, list[Piece]]], mesh: Mesh, rank: int, ranks: int) -> Index:
    """The index of a file with these pieces, a step for each third tensor, and a few plain values."""
    spread: dict[str, Any] = {}
    for layout, pieces in plan:
        items: list[Any] = [
            TensorNode(0, "float32", 0, piece.box.sizes, _row_major(piece.box.sizes), "") for piece in pieces
        ]
        placements = tuple(map(str, layout.placements))
        offsets = [piece.box.offsets for piece in pieces]
        spread[layout.name] = ShardedNode(0, placements, "float32", layout.shape, "", offsets, items)
    steps: dict[str, Any] = {f"{number}": TensorNode(1, "float32", 0, (), (), "") for number in range(len(plan) // 3)}
    root = DictNode(
        {"state": DictNode(spread), "steps": DictNode(steps), "epoch": 3, "seed": rank, "position": rank * 7}
    )
    return Index(
        format_version=1, save_id=SAVE_ID, rank=rank, world_size=ranks, step=7, independent=False, saved_at=None,
        metrics=None, byteorder="little", pickle_size=100, storages=[], meshes=[mesh], root=root,
    )  # fmt: skip


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[number + 1 :]) for number in range(len(shape)))


def ballot(index: Index) -> Ballot:
    """The ballot for a file with this index, which nobody has written."""
    path = f"checkpoint_{index.rank}.pt"
    archive: Any = SimpleNamespace(
        index=index,
        file=SimpleNamespace(path=path, size=10**9 + index.rank),
        trailer_bytes=path.encode(),
        record_crcs=[crc32(b"record")] * 8,
    )
    return ballot_of(archive, SAVE_ID)


def votes_of_all(first: Ballot, ranks: int, *, each_differs: bool) -> list[bytes]:
    """The encoded votes of all ranks, of which one is known; ``each_differs``: in a value that no two have alike."""
    vote = msgspec.json.decode(first.vote, type=Vote)
    found = []
    for rank in range(ranks):
        values = vote.values
        if each_differs:
            place = 4 * (crc32(b"seed") % GROUPS)
            values = values[:place] + crc32(b"%d" % rank).to_bytes(4, "little") + values[place + 4 :]
        changed = msgspec.structs.replace(
            vote, rank=rank, size=10**9 + rank, trailer_crc=crc32(b"%d" % rank), values=values
        )
        found.append(msgspec.json.encode(changed))
    return found


def count(votes: list[bytes], first: Ballot) -> Manifest:
    """What rank 0 does with them."""
    return tally(votes, first.tables.__getitem__, SAVE_ID)
