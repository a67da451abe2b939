"""What takes the space in a checkpoint: a tree of keys with bytes, small enough for a page."""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lastgood._contents import FileContents, SpreadTensor, TensorInfo, tensors
from lastgood.cli._report.data import DtypeTotal, Space, SpaceNodes
from lastgood.cli._report.words import count_in_words, printable

MOST_NODES = 12_000
"""So many groups and tensors go into a page, the largest ones; the small ones of a group are taken together."""

_DEEPEST = 100
_LONGEST_NAME = 200
_ITSELF = "(itself)"
_OTHER = "(no tensors)"
_OTHER_NOTE = "plain values, structure, checksums and the padding between tensors"


@dataclass(slots=True)
class _Branch:
    """A group of keys, or one tensor: then ``tensor`` says which, and there are no children."""

    name: str
    nbytes: int = 0
    tensors: int = 0
    tensor: TensorInfo | None = None
    note: str = ""
    children: "dict[str, _Branch]" = field(default_factory=dict)

    @property
    def kind(self) -> str:
        if self.children:
            return "g"
        return "t" if self.tensor is not None else "s" if self.tensors else "o"


def space_of(step: int, files: Sequence[FileContents], most_nodes: int = MOST_NODES) -> Space:
    """The space in the files of one checkpoint. Bytes that tensors share are counted for the first one.

    Tensors that are spread over ranks stand once, beside what each rank has.
    """
    root = _Branch(f"step {step}")
    totals: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    spread: dict[str, tuple[SpreadTensor, int]] = {}
    for file in files:
        name = f"rank {file.rank}"
        top = root if len(files) == 1 else root.children.setdefault(name, _Branch(name))
        other = file.nbytes
        for info, nbytes, note in _shares(file):
            totals[info.dtype] += nbytes
            other -= nbytes
            if info.part_of is not None and len(files) > 1:
                known = spread.get(info.part_of.path, (info.part_of, 0))
                spread[info.part_of.path] = (known[0], known[1] + nbytes)
                continue
            _put(top, info, nbytes, note)
            counts[info.dtype] += 1
        if other > 0:
            top.children[_OTHER] = _Branch(_OTHER, nbytes=other, note=_OTHER_NOTE)
    for tensor, nbytes in spread.values():
        counts[tensor.dtype] += 1
        note = printable(tensor.placement, _LONGEST_NAME)
        _put(root, TensorInfo(tensor.path, tensor.dtype, tensor.shape, nbytes, 0, ""), nbytes, note)
    _add_up(root)
    _shorten_chains(root)
    joined = _join_small(root, most_nodes)
    return Space(
        step=step,
        files=len(files),
        nbytes=root.nbytes,
        tensors=root.tensors,
        joined=joined,
        dtypes=[
            DtypeTotal(dtype=dtype, tensors=counts[dtype], nbytes=nbytes) for dtype, nbytes in totals.most_common()
        ],
        nodes=_columns(root),
    )


def _shares(file: FileContents) -> Iterator[tuple[TensorInfo, int, str]]:
    """Each tensor with the bytes that are its own, and a note where others have the rest."""
    left = [storage.nbytes for storage in file.storages]
    first_on: dict[int, str] = {}
    for info in tensors(file):
        nbytes = min(info.nbytes, left[info.storage])
        left[info.storage] -= nbytes
        first = first_on.setdefault(info.storage, info.path)
        note = "" if nbytes == info.nbytes else printable(f"shares its bytes with {first}", _LONGEST_NAME)
        yield info, nbytes, note


def _put(top: _Branch, info: TensorInfo, nbytes: int, note: str) -> None:
    *groups, last = [part for part in info.path.replace("[", ".[").split(".", _DEEPEST) if part] or ["(all)"]
    branch = top
    for name in groups:
        branch = branch.children.setdefault(name, _Branch(name))
        if branch.tensor is not None:  # there is a tensor under "a", and now one under "a.b"
            branch.children[_ITSELF] = _Branch(_ITSELF, branch.nbytes, 1, branch.tensor, branch.note)
            branch.nbytes, branch.tensors, branch.tensor, branch.note = 0, 0, None, ""
    existing = branch.children.get(last)
    if existing is not None and existing.tensor is None:
        branch, last = existing, _ITSELF
    while last in branch.children:  # keys that print alike, such as 1 and "1"
        last = f"{last} ({len(branch.children) + 1})"
    branch.children[last] = _Branch(last, nbytes, 1, info, note)


def _add_up(root: _Branch) -> None:
    for branch in reversed(_in_order(root)):
        for child in branch.children.values():
            branch.nbytes += child.nbytes
            branch.tensors += child.tensors


def _in_order(root: _Branch) -> list[_Branch]:
    """All branches, each before what is in it."""
    found, stack = [], [root]
    while stack:
        branch = stack.pop()
        found.append(branch)
        stack.extend(reversed(branch.children.values()))
    return found


def _shorten_chains(root: _Branch) -> None:
    """A group with nothing but one group in it becomes one: a click on it would show the same again."""
    for branch in reversed(_in_order(root)):
        if branch is root or len(branch.children) != 1:
            continue
        (child,) = branch.children.values()
        if child.children:
            joint = "" if child.name.startswith("[") else "."
            branch.name = f"{branch.name}{joint}{child.name}"
            branch.children = child.children


def _join_small(root: _Branch, most_nodes: int) -> int:
    """Leave the largest branches and take the rest of each group together; returns how many tensors that hid."""
    ranked = _in_order(root)
    if len(ranked) <= most_nodes:
        return 0
    # A group is at least as large as what is in it and comes before it: so what is kept is a tree.
    order = {id(branch): place for place, branch in enumerate(ranked)}
    kept = set(map(id, heapq.nsmallest(most_nodes, ranked, key=lambda branch: (-branch.nbytes, order[id(branch)]))))
    joined = 0
    for branch in ranked:
        if id(branch) not in kept:
            continue
        small = [child for child in branch.children.values() if id(child) not in kept]
        if not small:
            continue
        count = sum(child.tensors for child in small)
        name = f"({count_in_words(count, 'small tensor')})"
        rest = _Branch(name, sum(child.nbytes for child in small), count)
        joined += count
        branch.children = {key: child for key, child in branch.children.items() if id(child) in kept}
        branch.children[name] = rest
    return joined


def _columns(root: _Branch) -> SpaceNodes:
    branches = _in_order(root)
    position = {id(branch): place for place, branch in enumerate(branches)}
    parent = [-1] * len(branches)
    for branch in branches:
        for child in branch.children.values():
            parent[position[id(child)]] = position[id(branch)]
    return SpaceNodes(
        parent=parent,
        name=[printable(branch.name, _LONGEST_NAME) for branch in branches],
        kind="".join(branch.kind for branch in branches),
        nbytes=[branch.nbytes for branch in branches],
        tensors=[branch.tensors for branch in branches],
        dtype=[branch.tensor.dtype if branch.tensor else "" for branch in branches],
        shape=[shape_in_words(branch.tensor) for branch in branches],
        note=[branch.note for branch in branches],
    )


def shape_in_words(tensor: TensorInfo | None) -> str:
    """Such as ``[1024, 64]``; empty for what is no tensor."""
    return "" if tensor is None else printable(str(list(tensor.shape)), _LONGEST_NAME)
