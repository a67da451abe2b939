"""``lastgood cat``: one value of a checkpoint, without reading the rest."""

import io
import os
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from lastgood._contents import Contents, FileContents, open_contents
from lastgood._contents.joint import is_joint, join
from lastgood._contents.shown import box_text, json_value, kind_name, placement_text, plain_value, show_value
from lastgood.cli._keys import find_key, ways
from lastgood.cli._output import AsJson, Output
from lastgood.cli._target import CheckpointPath, Step, find_checkpoint
from lastgood.errors import CheckpointNotFoundError, ConfigError
from lastgood.format.nodes import (
    CONTAINERS,
    Node,
    OpaqueNode,
    ReferenceNode,
    ShardedNode,
    TensorNode,
    join_path,
    keyed_children,
    parts_of,
    walk_nodes,
    walk_paths,
)

_MOST_ELEMENTS = 1000


@dataclass(frozen=True)
class Value:
    """One value for scripts. ``value`` is ``null`` where ``complete`` is false: --all gives it.

    ``rank`` is that of the file that it stands in; ``null`` for what is spread over the files of several ranks.
    """

    path: str
    key: str
    rank: int | None
    kind: str
    dtype: str | None
    shape: tuple[int, ...] | None
    complete: bool
    value: Any


@dataclass(frozen=True)
class _Found:
    """A value: in one file, or, if ``is_whole``, in all files of the checkpoint ``path`` together."""

    path: str
    file: FileContents
    node: Node
    is_whole: bool = False

    @property
    def rank(self) -> int | None:
        return None if self.is_whole else self.file.rank

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.node, TensorNode) or (self.is_whole and isinstance(self.node, ShardedNode))


def cat(
    path: CheckpointPath,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The key, as 'lastgood inspect' prints it.")],
    step: Step = None,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="Of several ranks: take this one's file.")] = None,
    out: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Save the value: as .pt, or a tensor as .npy.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Print every element of a tensor.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print one value of a checkpoint, or save it; nothing else of the file is read, and what is read is verified.

    A tensor that is spread over ranks is put together, from just the files that it lies in. Of values that each rank
    has for itself, that of the first rank that has the key is taken, unless --rank names another.

    \b
    Example:
      lastgood cat runs/gpt model.norm.weight
      lastgood cat runs/gpt/step-1000 model.embedding.weight -o embedding.npy
    """
    output = Output(as_json)
    found, note = find_checkpoint(path, step)
    value = _find(open_contents(found), key, rank)
    if note:
        output.print(f"note: {note}", style="yellow")
    if out is not None:
        _save(value, key, out)
        output.print(f"{key}: {show_value(value.node)} saved to {out}")
        output.json({"path": value.path, "key": key, "rank": value.rank, "output": out})
    elif value.is_tensor or isinstance(value.node, OpaqueNode | ReferenceNode):
        _show_loaded(output, value, key, everything=everything)
    elif isinstance(value.node, CONTAINERS):
        _show_container(output, value, key)
    else:
        plain = plain_value(value.node)
        output.print(plain if isinstance(plain, str) else repr(plain))
        output.json(_value(value, key, json_value(value.node)))


def _find(contents: Contents, key: str, rank: int | None) -> _Found:
    files = contents.files
    if rank is not None:
        files = tuple(file for file in files if file.rank == rank)
        if not files:
            raise CheckpointNotFoundError(f"{contents.path} has no file of rank {rank}.", path=contents.path, rank=rank)
    file, node = find_key(files, key)
    if rank is None and is_joint(contents) and isinstance(node, CONTAINERS):
        # Other ranks may have more in it.
        node = next(each for path, each in walk_paths(join(files).root) if path == key)
        return _Found(contents.path, file, node, is_whole=True)
    return _Found(file.path, file, node)


def _value(found: _Found, key: str, value: Any, *, complete: bool = True) -> Value:
    node = found.node
    dtype, shape = (node.dtype, node.shape) if isinstance(node, TensorNode | ShardedNode) else (None, None)
    return Value(found.path, key, found.rank, kind_name(node), dtype, shape, complete, value)


def _show_container(output: Output, found: _Found, key: str) -> None:
    node = found.node
    inside = {join_path(key, name): child for name, child in keyed_children(node)}
    shown = {name: show_value(child) for name, child in inside.items()}
    what = show_value(node)
    if isinstance(node, ShardedNode):
        mesh = found.file.meshes[node.mesh]
        what = f"{what}, {placement_text(node.placements, mesh)}, of which rank {found.file.rank} has"
        shown = {name: f"the part {box_text(box)}" for name, (box, _) in zip(inside, parts_of(node), strict=True)}
    output.print(f"{key}: {what}")
    output.table(("key", "kind", "value"), [(name, kind_name(item), shown[name]) for name, item in inside.items()])
    values = [
        {"path": name, "value": shown[name] if isinstance(node, ShardedNode) else json_value(item)}
        for name, item in inside.items()
    ]
    output.json(_value(found, key, values))


def _load(found: _Found, key: str) -> Any:
    from lastgood.cli._tensors import TensorSource, quiet_torch

    if found.is_whole:
        return _load_whole(found.path, key)
    if any(isinstance(node, ShardedNode) for node, _ in walk_nodes(found.node)):
        raise ConfigError(
            f"{found.path} has only a part of the tensor at {key!r}: name the checkpoint's directory, without --rank, "
            f"or one part, such as {key}[0] ('lastgood inspect {found.path}' lists them).",
            path=found.path,
        )
    with quiet_torch(), TensorSource(found.path) as source:
        return source.value(find_key((source.contents,), key)[1])


def _load_whole(path: str, key: str) -> Any:
    from lastgood.cli._tensors import quiet_torch
    from lastgood.cli._whole import WholeSource

    with quiet_torch(), WholeSource(path) as source:
        way = next(way for path, _, way in ways(source.root) if path == key)
        return way.follow(source.load(way.target(), source.first_of_own()))


def _show_loaded(output: Output, found: _Found, key: str, *, everything: bool) -> None:
    import torch

    value = _load(found, key)
    if not output.as_json:
        torch.set_printoptions(threshold=2**62 if everything else _MOST_ELEMENTS)  # type: ignore[no-untyped-call]
        try:
            output.print(f"{key}: {show_value(found.node)}")
            output.print(repr(value))
        finally:
            torch.set_printoptions(profile="default")  # type: ignore[no-untyped-call]
        return
    if not isinstance(value, torch.Tensor):
        output.json(_value(found, key, repr(value)))
        return
    complete = everything or value.numel() <= _MOST_ELEMENTS
    output.json(_value(found, key, _as_list(value) if complete else None, complete=complete))


def _as_list(tensor: Any) -> Any:
    """The elements as nested lists; a complex number as a list of two."""
    import torch

    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).tolist()


def _save(found: _Found, key: str, out: str) -> None:
    kind = os.path.splitext(out)[1].lower()
    if kind not in (".pt", ".npy"):
        raise ConfigError(f"the name {out} ends neither in .pt nor in .npy: it says what to save as.")
    if kind == ".npy":
        _save_array(found, key, out)
        return
    import lastgood

    lastgood.save(_load(found, key), out)


def _save_array(found: _Found, key: str, out: str) -> None:
    from lastgood.storage.local import LocalStorage

    if not found.is_tensor:
        raise ConfigError(f"a {kind_name(found.node)} cannot be saved as {out}: only a tensor can. Save it as .pt.")
    try:
        import numpy
    except ImportError as error:
        raise ConfigError(f"NumPy is needed to write {out}, and it is not installed. Save as .pt.") from error
    tensor = _load(found, key).detach().resolve_conj().resolve_neg().contiguous()
    try:
        array = tensor.numpy()
    except TypeError as error:
        raise ConfigError(f"NumPy has no dtype for {tensor.dtype}: save as .pt.") from error
    buffer = io.BytesIO()
    numpy.save(buffer, array, allow_pickle=False)
    LocalStorage().put(out, buffer.getbuffer())
