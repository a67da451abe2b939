"""What a reference in an index leads to: the object of that number, and where it came first."""

from lastgood.format.nodes import NUMBERED, Node, ReferenceNode, TensorNode, walk_nodes, walk_paths


class References:
    """The objects that references of one file lead to."""

    def __init__(self, root: Node) -> None:
        self._numbered: list[tuple[str, Node]] = []
        if any(isinstance(node, ReferenceNode) for node, _ in walk_nodes(root)):
            paths = {id(node): path for path, node in walk_paths(root) if isinstance(node, NUMBERED)}
            # Numbers count what stands in keys too, which has no path.
            self._numbered = [
                (paths.get(id(node), ""), node) for node, _ in walk_nodes(root) if isinstance(node, NUMBERED)
            ]

    def tensor(self, node: Node) -> Node:
        """The tensor that a reference leads to; any other node, references to other things too, as it is."""
        if isinstance(node, ReferenceNode) and node.number < len(self._numbered):
            found = self._numbered[node.number][1]
            return found if isinstance(found, TensorNode) else node
        return node

    def first_path(self, node: ReferenceNode) -> str:
        """The key path under which the object that a reference leads to came first."""
        return self._numbered[node.number][0] if node.number < len(self._numbered) else ""
