"""The plan of a snapshot: where everything goes, worked out once and used again while the structure stays the same."""

import array
import bisect
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from lastgood._memory import paused_garbage_collection
from lastgood._snapshot import ImageDescription, replica_checks_at
from lastgood._staging.structure import Leaves, Structure, plain_bytes, structure_of
from lastgood._staging.tensor_facts import TensorFacts, facts_of, pointers_of
from lastgood._storage_uses import bytes_of
from lastgood.capture import CapturedState, capture
from lastgood.format.image import FIRST_STORAGE, DataLayout, lay_out_data, lay_out_ending
from lastgood.format.index import Index
from lastgood.format.index_head import LARGEST_HEAD, encode_body
from lastgood.format.nodes import scalar_node
from lastgood.format.pickle_writer import PickleTemplate, encode_template
from lastgood.format.spec import PAGE, PAGE_ALIGNED_FROM
from lastgood.sharding.local_shards import replicas_by_name, sources_of
from lastgood.storage._direct_io import round_up

_CHECKED_AT_ONCE = 20_000
"""With more tensors than this, their properties are compared with the plan's while the snapshot is being staged:
reading a property of 100,000 tensors takes some 20 ms."""

_numbers = itertools.count(1)


EARLY_BYTES = 32 << 20
EARLY_STORAGES = 200_000
"""How much of the small storages is copied before a save returns. Those of 64 KiB and more never are."""


_LOWEST_ADDRESS = 1 << 44
"""An address below this may be an offset from nowhere: no tensor is that large. One above it is a place in memory."""


class Selection:
    """Some of the storages, and what belongs to them picked out of lists about all storages."""

    def __init__(self, numbers: list[int], sizes: list[int]) -> None:
        self.numbers = numbers
        self.sizes = [sizes[number] for number in numbers]
        self._is_all = numbers == list(range(len(sizes)))

    def of(self, values: list[int]) -> list[int]:
        """The values that belong to the chosen storages."""
        return values if self._is_all else list(map(values.__getitem__, self.numbers))


NOTHING = Selection([], [])


def _within_budget(sizes: list[int]) -> int:
    """How many storages, from the first on, may be copied early."""
    count = bisect.bisect_right(list(itertools.accumulate(sizes)), EARLY_BYTES)
    return min(count, EARLY_STORAGES)


class Span(msgspec.Struct, gc=False):
    """The bytes of one storage that are saved, and the tensor by which they are found: number ``tensor`` of the walk.

    The bytes begin ``before`` bytes before that tensor's own first byte.
    """

    size: int
    tensor: int
    before: int


class Plan:
    """How one structure of a state becomes an image. Plain values are exchanged in it from save to save."""

    def __init__(self, captured: CapturedState) -> None:
        self.index: Index = captured.index
        self.sizes = [entry.nbytes for entry in self.index.storages]
        self.on_devices = [use.number for use in captured.extents if not use.on_cpu and use.nbytes]
        small = [number for number, size in enumerate(self.sizes) if 0 < size < PAGE_ALIGNED_FROM]
        count = _within_budget([self.sizes[number] for number in small])
        self.early = Selection(small[:count], self.sizes)
        self.late_small = Selection(small[count:], self.sizes)
        self.large = [number for number, size in enumerate(self.sizes) if size >= PAGE_ALIGNED_FROM]
        self._has_opaque_values = captured.has_opaque_values
        self._replica_count = len(captured.replicas)
        self._template: PickleTemplate | None = None
        self._pickle_bytes: bytes | None = captured.pickle_bytes
        self._body: bytes | None = None
        self._description: ImageDescription | None = None
        self.number = 0
        self.revision = 0
        self.pickle_size = 0
        self.offsets: list[int]
        """Where each storage's bytes stand in the image."""
        self.data_end: int
        """Where the last storage's record ends."""
        self._set_pickle_size(len(captured.pickle_bytes))

    def _set_pickle_size(self, size: int) -> None:
        if size != self.pickle_size:
            self.pickle_size = self.index.pickle_size = size
            self.number = next(_numbers)
            layout = self.layout()
            self.offsets = [record.data_offset for record in layout.records[FIRST_STORAGE:]]
            self.data_end = layout.end

    @property
    def content(self) -> tuple[int, int]:
        """Stands for all bytes of the image but the storages': the number of the layout, and what is written in it."""
        return self.number, self.revision

    def exchange(self, structure: Structure, values: dict[int, Any]) -> None:
        """Take over plain values that have changed, by their number in the structure's walk.

        Another length of the pickle moves everything behind it: the plan then has a new number.
        """
        template = self._known_template()
        for number, value in values.items():
            node = scalar_node(value)
            structure.set_plain(number, node)
            template.exchange(structure.pickle_number(number), node)
        self._pickle_bytes = self._body = self._description = None
        self.revision += 1
        self._set_pickle_size(template.size)

    def _known_template(self) -> PickleTemplate:
        if self._template is None:
            self._template = encode_template(self.index)
        return self._template

    # What follows is as large as the state has tensors, so it is made when it is wanted and not kept.

    def layout(self) -> DataLayout:
        """The records of the image."""
        return lay_out_data(self.pickle_size, len(self.index.byteorder), self.sizes)

    def pickle_bytes(self) -> bytes:
        """The bytes of data.pkl with the plain values of the save at hand."""
        return self._known_template().render() if self._pickle_bytes is None else self._pickle_bytes

    def index_body(self) -> bytes:
        """The index without its head, with the plain values of the save at hand."""
        if self._body is None:
            self._body = encode_body(self.index)
        return self._body

    def storage_sizes(self) -> bytes:
        """The storages' sizes as they stand in the arena."""
        return array.array("Q", self.sizes).tobytes()

    def forget_contents(self) -> None:
        """They stand in an arena now."""
        self._body = None
        if not self._has_opaque_values:
            self._pickle_bytes = None  # the template can be rendered again

    def describe(self) -> ImageDescription:
        """What the writer of the image has to know; the arena has to have ``arena_size`` of it."""
        if self._description is None:
            body_size = len(self.index_body())
            capacity = lay_out_ending(self.layout(), body_size + LARGEST_HEAD).file_size
            # A shorter head can move what follows by less than this.
            capacity = round_up(capacity + 2 * PAGE)
            self._description = ImageDescription(
                plan=self.number,
                pickle_size=self.pickle_size,
                byteorder=self.index.byteorder,
                storage_count=len(self.sizes),
                storage_sizes_offset=capacity,
                index_body_offset=capacity + 8 * len(self.sizes),
                index_body_size=body_size,
                replica_count=self._replica_count,
                image_capacity=capacity,
            )
        return self._description


def arena_size(description: ImageDescription) -> int:
    """How large an arena the image needs with what stands beside it."""
    return replica_checks_at(description)[1]


class Taken(msgspec.Struct):
    """One state as it was when it was asked for: its plan, and where its bytes are.

    ``addresses`` has an entry for each storage; that of a storage on a device is 0, and ``device_parts`` has its
    bytes as a tensor. ``tensors`` are those that stand on each large storage. ``owners`` keep the memory alive.
    ``storages`` are those that are copied late. ``unchecked`` is what remains to be compared with the plan before the
    snapshot may be published. ``replicas`` are tensors of which only the checksum is wanted, by name; ``sources``
    DTensors of which some are parts.
    """

    plan: Plan
    addresses: list[int]
    device_parts: dict[int, torch.Tensor]
    tensors: dict[int, list[torch.Tensor]]
    storages: dict[int, torch.UntypedStorage]
    owners: Any
    unchecked: "Sequence[torch.Tensor] | None" = None
    replicas: Sequence[tuple[str, torch.Tensor]] = ()
    sources: Sequence[tuple[str, torch.Tensor]] = ()


class Planner:
    """Takes states, remembering the plan of the last one. One thread at a time."""

    def __init__(self) -> None:
        self._known: _Matchable | None = None

    def take(self, state: Any) -> Taken:
        """Freeze the structure and the plain values of ``state``, and find its tensors' bytes.

        Raises what :func:`~lastgood.capture.capture` raises.
        """
        known, self._known = self._known, None  # a take that is interrupted half-way leaves nothing behind
        if known is not None:
            with paused_garbage_collection():
                taken = known.take(state)
            if taken is not None:
                self._known = known
                return taken
        return self.take_anew(state)

    def take_anew(self, state: Any) -> Taken:
        """The same, without what is remembered."""
        self._known = None
        captured = capture(state)
        plan = Plan(captured)
        with paused_garbage_collection():
            found = None if captured.has_opaque_values else structure_of(state, captured.index.root)
            if found is not None:
                self._known = _Matchable.of(plan, captured, *found)
        return _taken_from(plan, captured)

    def forget(self) -> None:
        """Let go of the plan."""
        self._known = None

    def holds(self, taken: Taken) -> bool:
        """Compare what was left unchecked; False if the state does not have the plan's structure after all."""
        return self._known is None or taken.unchecked is None or self._known.facts == facts_of(taken.unchecked)


def _taken_from(plan: Plan, captured: CapturedState) -> Taken:
    large = frozenset([*plan.large, *plan.late_small.numbers])
    tensors: dict[int, list[torch.Tensor]] = {}
    for tensor, node in captured.tensors:
        if node.storage in large:
            tensors.setdefault(node.storage, []).append(tensor)
    addresses = [use.storage.data_ptr() + use.start if use.on_cpu and use.nbytes else 0 for use in captured.extents]
    parts = {use.number: use.device_bytes() for use in captured.extents if not use.on_cpu and use.nbytes}
    storages = {use.number: use.storage for use in captured.extents if use.number in large}
    return Taken(plan, addresses, parts, tensors, storages, captured, None, captured.replicas, captured.sources)


class _Matchable:
    """A plan, and how to tell that another state has the same structure."""

    def __init__(
        self,
        plan: Plan,
        structure: Structure,
        plain: list[Any],
        fixed: list[Any],
        facts: TensorFacts,
        spans: list[Span],
    ) -> None:
        self._plan = plan
        self._structure = structure
        self._plain = plain
        self._plain_bytes = plain_bytes(plain)
        self._fixed = fixed
        self.facts = facts
        self._spans = spans
        self._span_tensors = Selection([span.tensor for span in spans], [0] * len(structure.tensor_nodes))
        self._span_starts = [span.before for span in spans]
        self._wide_spans = [span for span in spans if span.size > facts.nbytes[span.tensor]]
        large = frozenset([*plan.large, *plan.late_small.numbers])
        self._tensors_on_large: list[tuple[int, int]] = [
            (position, node.storage) for position, node in enumerate(structure.tensor_nodes) if node.storage in large
        ]

    @classmethod
    def of(cls, plan: Plan, captured: CapturedState, structure: Structure, leaves: Leaves) -> "_Matchable | None":
        """``None`` for a state whose tensors cannot be found again by their addresses."""
        facts = facts_of(leaves.tensors)
        first: dict[int, int] = {}
        if facts is None:
            return None
        for position, node in enumerate(structure.tensor_nodes):
            if facts.nbytes[position] or not plan.sizes[node.storage]:  # an empty tensor does not show where it is
                first.setdefault(node.storage, position)
        spans = []
        for use in captured.extents:
            position = first[use.number]
            spans.append(Span(use.nbytes, position, facts.offsets[position] - use.start))
        return cls(plan, structure, leaves.plain, leaves.fixed, facts, spans)

    def _device_part(self, tensor: torch.Tensor, span: Span) -> torch.Tensor:
        start = self.facts.offsets[span.tensor] - span.before
        return bytes_of(tensor.untyped_storage(), start, start + span.size)

    def take(self, state: Any) -> Taken | None:
        leaves = self._structure.match(state)
        if leaves is None or leaves.fixed != self._fixed:
            return None
        tensors = leaves.tensors
        unchecked = None
        if len(tensors) <= _CHECKED_AT_ONCE:
            if facts_of(tensors) != self.facts:
                return None
        else:
            if not self.facts.quick_matches(tensors):
                return None
            unchecked = tensors
        starts = pointers_of(tensors)
        if starts is None or (unchecked is not None and not self._can_be_read(tensors, starts)):
            return None
        # Addresses of empty storages mean nothing, and are not looked at.
        addresses = list(map(operator.sub, self._span_tensors.of(starts), self._span_starts))
        parts = {}
        for number in self._plan.on_devices:
            addresses[number] = 0
            parts[number] = self._device_part(tensors[self._spans[number].tensor], self._spans[number])
        watched: dict[int, list[torch.Tensor]] = {}
        for position, storage in self._tensors_on_large:
            watched.setdefault(storage, []).append(tensors[position])
        self._exchange(leaves.plain)
        # A tensor may let go of its storage while that is read: `x.data = y` does.
        storages = {number: tensors[self._spans[number].tensor].untyped_storage() for number in watched}
        replicas, sources = replicas_by_name(leaves.shards), sources_of(leaves.shards)
        return Taken(self._plan, addresses, parts, watched, storages, tensors, unchecked, replicas, sources)

    def _can_be_read(self, tensors: list[torch.Tensor], starts: list[int]) -> bool:
        """Whether there is memory wherever tensors are read that are compared with the plan only later."""
        for position in [position for position, start in enumerate(starts) if start < _LOWEST_ADDRESS]:
            # Of a freed storage it begins nowhere, and a tensor on it as far behind that as its offset says.
            if self.facts.nbytes[position] and not tensors[position].untyped_storage().nbytes():
                return False
        for span in self._wide_spans:
            storage = tensors[span.tensor].untyped_storage()
            begin = starts[span.tensor] - span.before - storage.data_ptr()
            if not 0 <= begin <= storage.nbytes() - span.size:
                return False
        return True

    def _exchange(self, plain: list[Any]) -> None:
        encoded = plain_bytes(plain)
        if encoded == self._plain_bytes:
            return
        changed = {
            number: value
            for number, (value, before) in enumerate(zip(plain, self._plain, strict=True))
            if value is not before and plain_bytes([value]) != plain_bytes([before])
        }
        self._plain, self._plain_bytes = plain, encoded
        if changed:
            self._plan.exchange(self._structure, changed)
