"""The files of several ranks seen as one state: each spread tensor once, and what each rank has of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lastgood._contents.model import Contents, FileContents
from lastgood.format.manifest import Manifest
from lastgood.format.nodes import (
    DictNode,
    MapNode,
    Node,
    OpaqueNode,
    OrderedDictNode,
    ReferenceNode,
    ShardedNode,
    TensorNode,
    encode_node,
    keyed_children,
    walk_leaves,
    walk_nodes,
)
from lastgood.format.references import References
from lastgood.format.vote import group_of

_MAPPINGS = (DictNode, MapNode, OrderedDictNode)
_OF_ONE_FILE = (TensorNode, ShardedNode, ReferenceNode, OpaqueNode)

_Described: TypeAlias = tuple[object, ...]


def is_joint(contents: Contents) -> bool:
    """Whether the files of several ranks are one checkpoint, all of them there."""
    manifest = contents.manifest
    return manifest is not None and 1 < manifest.world_size == len(contents.files)


def has_parts(file: FileContents) -> bool:
    """Whether a file holds parts of tensors that are spread over ranks."""
    return any(isinstance(node, ShardedNode) for node, _ in walk_nodes(file.root))


# Values that are not the same on all ranks


def own_paths(files: Sequence[FileContents], manifest: Manifest) -> set[str]:
    """The key paths of values that ranks do not have alike, or not all of those that share tensors have.

    Values that only a pickle describes are not looked into: they count as different.
    """
    if not manifest.differing:
        return set()
    suspects = frozenset(manifest.differing)
    first: dict[str, _Described] = {}
    holders: dict[str, set[int]] = {}
    own: set[str] = set()
    for file in files:
        references = References(file.root)
        for path, node in walk_leaves(file.root):
            if isinstance(node, ShardedNode) or group_of(path) not in suspects:
                continue
            described = _described(node, file, references)
            if first.setdefault(path, described) != described:
                own.add(path)
            holders.setdefault(path, set()).add(file.rank)
    together = _ranks_together(manifest)
    everyone = {file.rank for file in files}
    return own.union(
        path
        for path, ranks in holders.items()
        if ranks != everyone and any(not ranks.isdisjoint(group) and not ranks >= group for group in together)
    )


def _ranks_together(manifest: Manifest) -> list[set[int]]:
    """Ranks that share tensors, directly or through others: each set has to have the same keys.

    Without spread tensors nothing says that ranks belong to different stages of a pipeline: then all belong together.
    """
    if not manifest.meshes:
        return [set(range(manifest.world_size))]
    groups: list[set[int]] = []
    for mesh in manifest.meshes:
        joined = set(mesh.ranks)
        for group in [group for group in groups if not group.isdisjoint(joined)]:
            joined |= group
            groups.remove(group)
        groups.append(joined)
    return groups


def _described(node: Node, file: FileContents, references: References) -> _Described:
    """Equal for equal values of two files."""
    found = references.tensor(node)
    if isinstance(found, TensorNode):
        return found.dtype, found.offset, found.shape, found.stride, found.flags, file.places[found.storage].crc
    if isinstance(found, OpaqueNode):
        return "opaque", file.rank
    if isinstance(found, ReferenceNode):
        return "reference", references.first_path(found)
    return "plain", encode_node(found)


# One state


@dataclass(frozen=True)
class JointState:
    """All that the ranks hold as one value; ``owners`` says, by identity, of which rank's file a node is.

    What is in the file of rank 0 comes from there, what is not from the first that has it.
    """

    root: Node
    owners: dict[int, int]
    references: dict[int, References]

    def rank(self, node: Node) -> int:
        """The rank in whose file a node stands."""
        return self.owners.get(id(node), 0)

    def tensor(self, node: Node) -> Node:
        """The tensor that a reference leads to; any other node as it is."""
        found = self.references[self.rank(node)].tensor(node)
        if found is not node and self.rank(node):
            self.owners[id(found)] = self.rank(node)
        return found

    def first_path(self, node: ReferenceNode) -> str:
        """The key path under which the object that a reference leads to came first."""
        return self.references[self.rank(node)].first_path(node)


def join(files: Sequence[FileContents]) -> JointState:
    """The one state that the files of several ranks make together."""
    owners: dict[int, int] = {}
    root = _joined([(file.rank, file.root) for file in files], owners)
    return JointState(root, owners, {file.rank: References(file.root) for file in files})


def _joined(nodes: list[tuple[int, Node]], owners: dict[int, int]) -> Node:
    """The first of these nodes with what only others of them have, too."""
    first = nodes[0][1]
    nodes = [(rank, node) for rank, node in nodes if isinstance(node, _MAPPINGS)]
    if not isinstance(first, _MAPPINGS) or len(nodes) < 2:
        return first
    below: dict[Any, list[tuple[int, Node]]] = {}
    for rank, node in nodes:
        for key, child in keyed_children(node):
            below.setdefault(key, []).append((rank, child))
    known = dict(keyed_children(first))
    made: dict[Any, Node] = {}
    for key, found in below.items():
        made[key] = _joined(found, owners)
        if key not in known:
            _note_owner(made[key], found[0][0], owners)
    if all(made[key] is known.get(key) for key in made):
        return first
    return _with_children(nodes, made)


def _with_children(nodes: list[tuple[int, Node]], made: dict[Any, Node]) -> Node:
    if all(isinstance(node, DictNode) for _, node in nodes):
        return DictNode(made)
    keys: dict[Any, Node] = {}
    for _, node in nodes:
        pairs = node.items if isinstance(node, (MapNode, OrderedDictNode)) else []
        named = zip(pairs, keyed_children(node), strict=False) if pairs else ()
        keys |= {shown: key for (key, _), (shown, _) in named if shown not in keys}
    items = [(keys.get(shown, shown), node) for shown, node in made.items()]
    first = nodes[0][1]
    return OrderedDictNode(items, first.attributes) if isinstance(first, OrderedDictNode) else MapNode(items)


def _note_owner(root: Node, rank: int, owners: dict[int, int]) -> None:
    if rank == 0:
        return
    for node, _ in walk_nodes(root):
        if isinstance(node, _OF_ONE_FILE):
            owners.setdefault(id(node), rank)
