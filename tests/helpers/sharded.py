"""Checkpoints of several ranks with tensors that are spread over them, made in one process."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from tests.unit.sharding.ballots import count, files_of, rank_file, sharded

from lastgood.format.manifest import Manifest, ManifestFile, encode_manifest, manifest_file
from lastgood.format.mesh import Mesh
from lastgood.format.nodes import join_path, list_position
from lastgood.format.spec import crc32
from lastgood.storage.local import LocalStorage

Placements = Mapping[str, Sequence[str]]
"""How the tensors under some key paths are placed, such as ``{"model.w": ["S(0)"]}``; the others stay as they are."""


def row(world_size: int, *names: str) -> Mesh:
    """The mesh of all ranks in a row."""
    return Mesh((world_size,), names or None, tuple(range(world_size)))


def spread(state: Any, mesh: Mesh, placements: Placements, rank: int, path: str = "") -> Any:
    """What a rank holds of a state: its parts of the tensors that are placed, and the rest."""
    if isinstance(state, dict):
        return {key: spread(item, mesh, placements, rank, join_path(path, key)) for key, item in state.items()}
    if isinstance(state, list):
        inside = [(join_path(path, list_position(number)), item) for number, item in enumerate(state)]
        return [spread(item, mesh, placements, rank, place) for place, item in inside]
    return sharded(path, state, mesh, placements[path], rank) if path in placements else state


def commit(path: Path, states: Sequence[Any], replicated: Sequence[str] = ()) -> Manifest:
    """Write a file for each of the ranks, which hold these states, and the manifest that they vote for."""
    manifest = count(files_of(path, states, replicated))
    publish(path, manifest)
    return manifest


def replace_file(path: Path, manifest: Manifest, rank: int, state: Any) -> None:
    """Write another file for a rank, and a manifest with a right checksum that names it."""
    archive = rank_file(path, rank, manifest.world_size, state).archive
    found = ManifestFile(
        rank, manifest.files[rank].name, archive.file.size, crc32(archive.trailer_bytes), manifest.save_id
    )
    files = [found if file.rank == rank else file for file in manifest.files]
    publish(path, msgspec.structs.replace(manifest, files=files))


def publish(path: Path, manifest: Manifest) -> None:
    """Write this manifest, with a right checksum."""
    LocalStorage().put(manifest_file(str(path)), encode_manifest(manifest))


def save_spread(
    path: Path,
    state: dict[str, Any],
    mesh: Mesh,
    placements: Placements,
    own: Callable[[int], dict[str, Any]] = lambda rank: {},
) -> Manifest:
    """A checkpoint of as many ranks as the mesh has; ``own`` gives what each of them has beside its parts."""
    return commit(path, [spread(state, mesh, placements, rank) | own(rank) for rank in range(len(mesh.ranks))])


def model_state(seed: int = 1, *, rows: int = 30) -> dict[str, Any]:
    """Tensors of several shapes and dtypes, whole, and plain values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "w": torch.rand(rows, 7, generator=generator),
            "b": torch.rand(11, generator=generator).to(torch.bfloat16),
            "scale": torch.rand(3, generator=generator),
        },
        "epoch": 3,
    }


USUAL: Placements = {"model.w": ["S(0)"], "model.b": ["S(0)"]}
"""How :func:`model_state` is spread over a row of ranks; ``model.scale`` is on each of them."""
