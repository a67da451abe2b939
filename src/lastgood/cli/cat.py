"""``lastgood cat``: one value of a checkpoint, without reading the rest."""

import io
import os
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from lastgood._contents import FileContents, open_contents
from lastgood._contents.shown import json_value, kind_name, plain_value, show_value
from lastgood.cli._keys import find_key
from lastgood.cli._output import AsJson, Output
from lastgood.cli._target import CheckpointPath, Step, find_checkpoint
from lastgood.errors import CheckpointNotFoundError, ConfigError
from lastgood.format.index import CONTAINERS, Node, OpaqueNode, ReferenceNode, TensorNode, join_path, keyed_children

_MOST_ELEMENTS = 1000


@dataclass(frozen=True)
class Value:
    """One value for scripts. ``value`` is ``null`` where ``complete`` is false: --all gives it."""

    path: str
    key: str
    rank: int
    kind: str
    dtype: str | None
    shape: tuple[int, ...] | None
    complete: bool
    value: Any


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

    Of several ranks, the first that has the key is taken.

    \b
    Example:
      lastgood cat runs/gpt model.norm.weight
      lastgood cat runs/gpt/step-1000 model.embedding.weight -o embedding.npy
    """
    output = Output(as_json)
    found, note = find_checkpoint(path, step)
    files = open_contents(found).files
    if rank is not None:
        files = tuple(file for file in files if file.rank == rank)
        if not files:
            raise CheckpointNotFoundError(f"{found} has no file of rank {rank}.", path=found, rank=rank)
    file, node = find_key(files, key)
    if note:
        output.print(f"note: {note}", style="yellow")
    if out is not None:
        _save(file, key, node, out)
        output.print(f"{key}: {show_value(node)} saved to {out}")
        output.json({"path": file.path, "key": key, "rank": file.rank, "output": out})
    elif isinstance(node, TensorNode | OpaqueNode | ReferenceNode):
        _show_loaded(output, file, key, node, everything=everything)
    elif isinstance(node, CONTAINERS):
        _show_container(output, file, key, node)
    else:
        value = plain_value(node)
        output.print(value if isinstance(value, str) else repr(value))
        output.json(_value(file, key, node, json_value(node)))


def _value(file: FileContents, key: str, node: Node, value: Any, *, complete: bool = True) -> Value:
    dtype, shape = (node.dtype, node.shape) if isinstance(node, TensorNode) else (None, None)
    return Value(file.path, key, file.rank, kind_name(node), dtype, shape, complete, value)


def _show_container(output: Output, file: FileContents, key: str, node: Node) -> None:
    inside = {join_path(key, name): child for name, child in keyed_children(node)}
    output.print(f"{key}: {show_value(node)}")
    output.table(("key", "kind", "value"), [(name, kind_name(item), show_value(item)) for name, item in inside.items()])
    output.json(_value(file, key, node, [{"path": name, "value": json_value(item)} for name, item in inside.items()]))


def _load(file: FileContents, key: str) -> Any:
    from lastgood.cli._tensors import TensorSource, quiet_torch

    with quiet_torch(), TensorSource(file.path) as source:
        return source.value(find_key((source.contents,), key)[1])


def _show_loaded(output: Output, file: FileContents, key: str, node: Node, *, everything: bool) -> None:
    import torch

    value = _load(file, key)
    if not output.as_json:
        torch.set_printoptions(threshold=2**62 if everything else _MOST_ELEMENTS)  # type: ignore[no-untyped-call]
        try:
            output.print(f"{key}: {show_value(node)}")
            output.print(repr(value))
        finally:
            torch.set_printoptions(profile="default")  # type: ignore[no-untyped-call]
        return
    if not isinstance(value, torch.Tensor):
        output.json(_value(file, key, node, repr(value)))
        return
    complete = everything or value.numel() <= _MOST_ELEMENTS
    output.json(_value(file, key, node, _as_list(value) if complete else None, complete=complete))


def _as_list(tensor: Any) -> Any:
    """The elements as nested lists; a complex number as a list of two."""
    import torch

    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).tolist()


def _save(file: FileContents, key: str, node: Node, out: str) -> None:
    kind = os.path.splitext(out)[1].lower()
    if kind not in (".pt", ".npy"):
        raise ConfigError(f"the name {out} ends neither in .pt nor in .npy: it says what to save as.")
    if kind == ".npy":
        _save_array(file, key, node, out)
        return
    import lastgood

    lastgood.save(_load(file, key), out)


def _save_array(file: FileContents, key: str, node: Node, out: str) -> None:
    from lastgood.storage.local import LocalStorage

    if not isinstance(node, TensorNode):
        raise ConfigError(f"a {kind_name(node)} cannot be saved as {out}: only a tensor can. Save it as .pt.")
    try:
        import numpy
    except ImportError as error:
        raise ConfigError(f"NumPy is needed to write {out}, and it is not installed. Save as .pt.") from error
    tensor = _load(file, key).detach().resolve_conj().resolve_neg().contiguous()
    try:
        array = tensor.numpy()
    except TypeError as error:
        raise ConfigError(f"NumPy has no dtype for {node.dtype}: save as .pt.") from error
    buffer = io.BytesIO()
    numpy.save(buffer, array, allow_pickle=False)
    LocalStorage().put(out, buffer.getbuffer())
