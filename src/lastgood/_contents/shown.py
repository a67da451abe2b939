"""Values for people and for scripts, from their nodes and without torch."""

from collections.abc import Sequence
from typing import Any

from lastgood.format.mesh import Box, Mesh, is_replica_mesh
from lastgood.format.nodes import (
    BytearrayNode,
    BytesNode,
    ComplexNode,
    DeviceNode,
    DictNode,
    DtypeNode,
    FloatNode,
    IntNode,
    ListNode,
    MapNode,
    Node,
    OpaqueNode,
    OrderedDictNode,
    ReferenceNode,
    SetNode,
    ShardedNode,
    SizeNode,
    TensorNode,
    TextNode,
    TupleNode,
    unpack_floats,
)

_LONGEST = 72
_LONGEST_INT_BYTES = 32
_CONTAINER_NAMES: dict[type, str] = {
    DictNode: "dict",
    MapNode: "dict",
    OrderedDictNode: "OrderedDict",
    ListNode: "list",
    TupleNode: "tuple",
    SetNode: "set",
}


def kind_name(node: Node) -> str:
    """What kind of value this is, as Python names it: ``dict``, ``int``, ``tensor``."""
    if type(node) in _CONTAINER_NAMES:
        return _CONTAINER_NAMES[type(node)]
    if isinstance(node, (TensorNode, ShardedNode)):
        return "Parameter" if "p" in node.flags else "tensor"
    if isinstance(node, OpaqueNode):
        return node.type_name
    if isinstance(node, ReferenceNode):
        return "reference"
    if isinstance(node, DtypeNode):
        return "torch.dtype"
    if isinstance(node, DeviceNode):
        return "torch.device"
    return "torch.Size" if isinstance(node, SizeNode) else type(plain_value(node)).__name__


def plain_value(node: Node) -> Any:
    """The value of a node that is no container, tensor, reference or opaque value.

    What only torch has a type for is given as Python has it: a Size as a tuple, a dtype or a device by its name.
    """
    if isinstance(node, IntNode):
        return int.from_bytes(node.value, "little", signed=True)
    if isinstance(node, FloatNode):
        return unpack_floats(node.value)[0]
    if isinstance(node, ComplexNode):
        return complex(*unpack_floats(node.value))
    if isinstance(node, TextNode):
        return node.value.decode("utf-8", "surrogatepass")
    if isinstance(node, (BytesNode, BytearrayNode)):
        return node.value if isinstance(node, BytesNode) else bytearray(node.value)
    if isinstance(node, SizeNode):
        return node.items
    if isinstance(node, DtypeNode):
        return f"torch.{node.name}"
    if isinstance(node, DeviceNode):
        return node.device_type if node.index is None else f"{node.device_type}:{node.index}"
    return node


def show_value(node: Node, longest: int = _LONGEST) -> str:
    """One line, of about ``longest`` characters at most, that shows a value to a person."""
    if isinstance(node, (TensorNode, ShardedNode)):
        return f"{node.dtype} {shape_text(node.shape)}"
    if isinstance(node, (DictNode, MapNode, OrderedDictNode, ListNode, TupleNode, SetNode)):
        return _show_container(node, longest)
    if isinstance(node, OpaqueNode):
        return f"<{node.type_name}>"
    if isinstance(node, ReferenceNode):
        return "<the same object as before>"
    if isinstance(node, IntNode) and len(node.value) > _LONGEST_INT_BYTES:
        return f"an int of {8 * len(node.value)} bits"
    if isinstance(node, (BytesNode, BytearrayNode)):
        return f"{kind_name(node)} of length {len(node.value):,}"
    if isinstance(node, DtypeNode):
        return f"torch.{node.name}"
    if isinstance(node, (SizeNode, DeviceNode)):
        return f"{kind_name(node)}({plain_value(node)!r})"
    value = plain_value(node)
    if isinstance(value, str) and len(value) > longest:
        return f"{value[: longest - 20]!r}... (length {len(value):,})"
    return _printable(repr(value))


def _show_container(node: Node, longest: int) -> str:
    assert isinstance(node, (DictNode, MapNode, OrderedDictNode, ListNode, TupleNode, SetNode))
    name, count = kind_name(node), len(node.items)
    if isinstance(node, (ListNode, TupleNode, SetNode)) and 0 < count <= longest // 4:
        items = [item for item in node.items if item is None or isinstance(item, (bool, int, float, str))]
        if len(items) == count:
            left, right = {"list": ("[", "]"), "tuple": ("(", ")"), "set": ("{", "}")}[name]
            inside = ", ".join(show_value(item, longest) for item in items)
            shown = f"{left}{inside}{',' if name == 'tuple' and count == 1 else ''}{right}"
            if len(shown) <= longest:
                return shown
    return f"{name} of {count:,}" if count else f"{name} (empty)"


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def shape_text(shape: tuple[int, ...]) -> str:
    """A tensor's shape as ``[2, 3]``; ``[]`` for a single number."""
    return f"[{', '.join(map(str, shape))}]"


def placement_text(placements: Sequence[str], mesh: Mesh) -> str:
    """How a tensor is spread over ranks: ``S(0) over mesh [4] (dp)``."""
    if is_replica_mesh(mesh):
        return f"the same on all {mesh.shape[0]} ranks"
    names = f" ({', '.join(mesh.names)})" if mesh.names else ""
    return f"{', '.join(placements)} over mesh {shape_text(mesh.shape)}{names}"


def box_text(box: Box) -> str:
    """Which part of a tensor this is, as a slice of it: ``[0:250, 0:7]``."""
    return f"[{', '.join(f'{start}:{start + size}' for start, size in zip(*box, strict=True))}]"


def json_value(node: Node) -> Any:
    """A plain value as JSON has it; what JSON has no form for, as :func:`show_value` shows it."""
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if isinstance(node, (IntNode, FloatNode)) and not (
        isinstance(node, IntNode) and len(node.value) > _LONGEST_INT_BYTES
    ):
        return plain_value(node)
    if isinstance(node, (SizeNode, DeviceNode, DtypeNode)):
        return plain_value(node)
    return show_value(node)
