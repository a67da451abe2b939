"""The data of the page: what stands in its JSON block, and what ``--json`` prints.

Times of day are in seconds since 1970, durations in seconds. Every text that comes from outside is already
:func:`~lastgood.cli._report.words.printable`. Long lists are columns of equal length, which keeps the page small.
"""

import msgspec


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """What is there, and whether it can be trusted. ``nbytes`` counts the committed checkpoints."""

    sentences: list[str]
    is_good: bool
    committed: int
    unfinished: int
    damaged: int
    foreign: int
    unreadable: int
    set_aside: int
    latest_step: int | None
    latest_saved_at: float | None
    nbytes: int


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One measure over all saves. ``unit`` is ``secs`` or ``bytes``."""

    name: str
    unit: str
    count: int
    median: float
    p95: float
    largest: float


class SaveColumns(msgspec.Struct, frozen=True, kw_only=True):
    """Saves in the order of the log. ``failed`` holds the positions of those that did, ``errors`` the reasons."""

    time: list[float]
    step: list[int]
    stall: list[float]
    staged: list[float | None]
    durable: list[float | None]
    nbytes: list[int | None]
    failed: list[int]
    errors: list[str]


class RunEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A start, a resume or a checkpoint set aside. ``step`` is where it stands on an axis of steps."""

    kind: str
    time: float
    step: int
    words: str


class Saves(msgspec.Struct, frozen=True, kw_only=True):
    """The run's log. ``count`` is of all saves; ``columns`` may leave out the most ordinary ones."""

    count: int
    failures: int
    restarts: int
    columns: SaveColumns
    events: list[RunEvent]
    figures: list[Figure]


class CheckpointRow(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint that is there. ``fate`` is ``stays``, ``goes`` (at the next removal) or ``not counted``."""

    step: int
    condition: str
    saved_at: float | None
    nbytes: int
    ranks: int | None
    metrics: dict[str, float | None]
    fate: str
    reasons: list[str]


class RemovedRow(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint that retention removed."""

    step: int
    time: float
    reasons: list[str]


class SetAsideRow(msgspec.Struct, frozen=True, kw_only=True):
    """A damaged checkpoint that a resume has passed over; ``time`` and ``problem`` as far as the log tells."""

    name: str
    time: float | None
    problem: str


class Lane(msgspec.Struct, frozen=True, kw_only=True):
    """The steps for which one thing holds. ``kind`` is ``there``, ``rule``, ``removed`` or ``failed``."""

    label: str
    kind: str
    steps: list[int]


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """Which checkpoints are there and why; ``problem`` says why the rules cannot be told, where they cannot."""

    rules: list[str]
    problem: str | None
    checkpoints: list[CheckpointRow]
    lanes: list[Lane]
    removed: list[RemovedRow]
    removed_count: int
    set_aside: list[SetAsideRow]


class DtypeTotal(msgspec.Struct, frozen=True, kw_only=True):
    """What all tensors of one dtype take together."""

    dtype: str
    tensors: int
    nbytes: int


class SpaceNodes(msgspec.Struct, frozen=True, kw_only=True):
    """The tree of keys, a group before what is in it; node 0 is the whole. ``parent`` is a position in these columns.

    ``tensors`` is 1 for a single tensor. ``kind`` is a letter: ``g`` group, ``t`` tensor, ``s`` many small keys
    taken together, ``o`` what is no tensor.
    """

    parent: list[int]
    name: list[str]
    kind: str
    nbytes: list[int]
    tensors: list[int]
    dtype: list[str]
    shape: list[str]
    note: list[str]


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """What takes the space in the files of one checkpoint. ``nbytes`` is the size of its files."""

    step: int
    files: int
    nbytes: int
    tensors: int
    joined: int
    dtypes: list[DtypeTotal]
    nodes: SpaceNodes


class LayerMove(msgspec.Struct, frozen=True, kw_only=True):
    """How far the tensors of one layer moved together, as a share of their size; ``None``: by no finite number."""

    path: str
    relative: float | None
    tensors: int


class TensorMove(msgspec.Struct, frozen=True, kw_only=True):
    """How far one tensor moved; ``norm`` is that before. A figure that is no finite number is ``None``.

    ``nan_in_one`` counts the elements that are NaN at one of the two steps only.
    """

    path: str
    equal: bool
    nan_in_one: int
    relative: float | None
    max_abs: float | None
    norm: float | None


class Movement(msgspec.Struct, frozen=True, kw_only=True):
    """What moved between two steps. ``tensors`` are the ``count`` common ones, or those that moved most."""

    step_a: int
    step_b: int
    count: int
    equal: int
    layers: list[LayerMove]
    layers_count: int
    tensors: list[TensorMove]
    only_in_a: list[str]
    only_in_b: list[str]
    changed_kind: list[str]
    changed_values: list[str]
    not_compared: list[str]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. A section that could not be made is ``None`` and its problem says why."""

    lastgood: str
    made_at: float
    name: str
    root: str
    health: Health
    saves: Saves
    retention: Retention
    space: Space | None
    space_problem: str | None
    movement: Movement | None
    movement_problem: str | None
