"""Whether the files of several ranks are what their manifest says: the very files, and the parts that it promises."""

import math
from collections import Counter
from collections.abc import Sequence

import msgspec

from lastgood._contents.checking import Findings
from lastgood._contents.shown import box_text, placement_text
from lastgood.errors import CorruptCheckpointError, RankMismatchError, listed
from lastgood.format.archive import Archive
from lastgood.format.commit import is_named_by
from lastgood.format.manifest import Manifest, ShardedTensor
from lastgood.format.mesh import Box, Mesh
from lastgood.format.nodes import ShardedNode, parts_of, sharded_nodes
from lastgood.format.sharding import written_pieces
from lastgood.format.vote import Ballot, ballot_of, tally


class ManifestCheck:
    """Compares files with the manifest ``name``, one by one; :meth:`finish` says what only all of them show."""

    def __init__(self, manifest: Manifest, name: str, findings: Findings) -> None:
        self._manifest = manifest
        self._name = name
        self._findings = findings
        self._tensors = {tensor.name: tensor for tensor in manifest.tensors}
        self._elements_found: Counter[str] = Counter()
        self._ballots: list[Ballot] = []
        self._check_save_ids()

    def _check_save_ids(self) -> None:
        manifest = self._manifest
        others = [file.name for file in manifest.files if file.save_id != manifest.save_id]
        # Ranks that met at a barrier have a save id each, and no spread tensors; the manifest's is that of rank 0.
        if (manifest.tensors and others) or manifest.files[0].save_id != manifest.save_id:
            names = listed(others)
            self._findings.wrong(
                self._name, f"it is of the save {manifest.save_id}, and names files of others: {names}"
            )

    def add(self, archive: Archive) -> None:
        """Compare a file, which stands under the name of its rank."""
        index, name, manifest = archive.index, archive.file.path, self._manifest
        if index.rank >= manifest.world_size or index.world_size != manifest.world_size:
            self._findings.wrong(
                name, f"it is one of {index.world_size} ranks', its manifest names {manifest.world_size}"
            )
            return
        if not is_named_by(manifest, archive):
            self._findings.wrong(name, "it is not the file that its manifest names: it belongs to another save")
            return
        self._compare_parts(archive)
        if not index.independent:
            self._ballots.append(ballot_of(archive, index.save_id))

    def finish(self) -> None:
        """Say what is wrong with the manifest, or with all files together."""
        tensors = self._manifest.tensors
        torn = [tensor.name for tensor in tensors if self._elements_found[tensor.name] != math.prod(tensor.shape)]
        if torn:
            what = "1 tensor is" if len(torn) == 1 else f"{len(torn):,} tensors are"
            self._findings.wrong(self._name, f"{what} not there as a whole: {listed(torn)}", torn[0])
        if not self._findings.problems:
            self._compare_with_votes()

    def _compare_with_votes(self) -> None:
        """Make the manifest again, as the ranks of the save made it."""
        tables = {digest: table for ballot in self._ballots for digest, table in ballot.tables.items()}
        try:
            made = tally([ballot.vote for ballot in self._ballots], tables.__getitem__, None)
        except (RankMismatchError, CorruptCheckpointError) as error:
            self._findings.wrong(self._name, f"its files cannot have been committed together: {error}")
            return
        if made != self._manifest:
            fields = [
                field
                for field in msgspec.structs.asdict(made)
                if getattr(made, field) != getattr(self._manifest, field)
            ]
            self._findings.wrong(
                self._name, f"it is not the one that its files make together: it has other {', '.join(fields)}"
            )

    def _compare_parts(self, archive: Archive) -> None:
        index, name, rank = archive.index, archive.file.path, archive.index.rank
        nodes = dict(sorted(sharded_nodes(index.root), key=lambda found: found[0]))
        for path, node in nodes.items():
            difference = self._difference(node, path, index.meshes[node.mesh])
            if difference is not None:
                self._findings.wrong(name, difference, path)
                continue
            parts = [box for box, _ in parts_of(node)]
            self._compare_boxes(name, rank, self._tensors[path], parts)
        for tensor in self._manifest.tensors:
            if tensor.name not in nodes and rank in self._manifest.meshes[tensor.mesh].positions:
                self._findings.wrong(
                    name,
                    f"it holds no part of the tensor {tensor.name!r}, which its manifest spreads over it",
                    tensor.name,
                )

    def _difference(self, node: ShardedNode, path: str, mesh: Mesh) -> str | None:
        """How a file and the manifest describe one tensor otherwise; ``None`` if they do it alike."""
        tensor = self._tensors.get(path)
        if tensor is None:
            return f"it holds parts of the tensor {path!r}, which its manifest does not know"
        expected = self._manifest.meshes[tensor.mesh]
        if mesh != expected:
            return f"it has the tensor {path!r} on the mesh {_mesh_text(mesh)}, its manifest on {_mesh_text(expected)}"
        found = (node.dtype, node.shape, node.placements)
        if found != (tensor.dtype, tensor.shape, tensor.placements):
            here = f"{node.dtype} {list(node.shape)}, {placement_text(node.placements, mesh)}"
            there = f"{tensor.dtype} {list(tensor.shape)}, {placement_text(tensor.placements, expected)}"
            return f"it has the tensor {path!r} as {here}, its manifest as {there}"
        return None

    def _compare_boxes(self, file: str, rank: int, tensor: ShardedTensor, parts: Sequence[Box]) -> None:
        mesh = self._manifest.meshes[tensor.mesh]
        pieces = written_pieces(self._manifest.layout(tensor), rank) if rank in mesh.positions else []
        found, promised = Counter(parts), Counter(piece.box for piece in pieces)
        for box in promised - found:
            self._wrong_part(file, tensor, box, "which its manifest promises, is not there")
        for box in found - promised:
            self._wrong_part(file, tensor, box, "which is here, its manifest promises elsewhere")
        self._elements_found[tensor.name] += sum(box.element_count for box in found & promised)

    def _wrong_part(self, file: str, tensor: ShardedTensor, box: Box, what: str) -> None:
        self._findings.wrong(file, f"the part {box_text(box)} of the tensor {tensor.name!r}, {what}", tensor.name)


def _mesh_text(mesh: Mesh) -> str:
    ranks = ", ".join(map(str, mesh.ranks[:8])) + (", ..." if len(mesh.ranks) > 8 else "")
    names = f" ({', '.join(mesh.names)})" if mesh.names else ""
    return f"{list(mesh.shape)}{names} of the ranks {ranks}"
