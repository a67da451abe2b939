"""Loading the checkpoint of several ranks, by as many or another number of them.

The structure and the values that are in no spread tensor come from one file: that of the own rank, or, for another
number of ranks, one that all of them can do with. The parts of spread tensors come from wherever they are.
"""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import msgspec

from lastgood._loading.file import load_archive
from lastgood._loading.merge import CheckKeys, Merge
from lastgood._loading.per_rank import (
    Choice,
    Chooser,
    PerRankRules,
    check_rules,
    holds,
    only,
    put,
    take_over,
    value_at,
    without,
)
from lastgood._loading.records import read_whole
from lastgood._loading.spread import ManyFiles, check_targets
from lastgood._loading.storages import MapLocation
from lastgood._loading.values import ObjectTable
from lastgood.format.archive import Archive
from lastgood.format.manifest import Manifest
from lastgood.format.mesh import is_replica_mesh
from lastgood.format.nodes import DictNode, MapNode, Node, OrderedDictNode, ShardedNode, join_path, keyed_children
from lastgood.types import RankInfo

OpenRank = Callable[[int], Archive]
"""Opens the file of a rank that saved, and makes sure that the manifest names it; the same archive each time."""

_MAPPINGS = (DictNode, MapNode, OrderedDictNode)


class Options(msgspec.Struct, frozen=True):
    """How to load; see :meth:`~lastgood.checkpoint_reader.CheckpointReader.read`."""

    map_location: MapLocation
    mmap: bool
    verify: bool
    verify_first: bool
    verify_whole: bool
    check_keys: CheckKeys | None
    per_rank: PerRankRules


def load_checkpoint(
    path: str, manifest: Manifest, open_rank: OpenRank, rank_info: RankInfo, target: Any, options: Options
) -> tuple[Any, list[str]]:
    """The state for this rank, and the key paths of ``target`` that are in no file."""
    check_rules(options.per_rank)
    return _Load(path, manifest, open_rank, rank_info, options).into(target)


class _Part(NamedTuple):
    """What comes from one file: a target, in which it stands once loaded, and what rules decide instead.

    ``peers`` are the ranks that have to have what is in it; ``missing`` what the target asks for and the file has not,
    once that is known.
    """

    archive: Archive
    target: Any
    choices: list[Choice]
    peers: Sequence[int]
    missing: Sequence[str] = ()


class _Load:
    def __init__(
        self, path: str, manifest: Manifest, open_rank: OpenRank, rank_info: RankInfo, options: Options
    ) -> None:
        self._path = path
        self._manifest = manifest
        self._open_rank = open_rank
        self._rank_info = rank_info
        self._options = options
        saved, rank, world_size = manifest.world_size, rank_info.global_rank, rank_info.global_world_size
        self._is_same_world = saved == world_size
        self._primary_rank = rank % saved
        # Together, the ranks check every file.
        self._verified_ranks = [each for each in range(saved) if each % world_size == rank]

    def into(self, target: Any) -> tuple[Any, list[str]]:
        primary = self._part(self._primary_rank, target, chooses=not self._is_same_world)
        others = self._prepare(primary, self._others(primary.archive, target), target)
        parts = [primary, *others]
        loaded, missing = self._load(primary.archive, primary.target, self._check_keys(parts, target), whole=True)
        if primary.choices and target is not None:
            loaded = take_over(target, primary.target)
        missing = _missing_from_all(missing, others)
        for other in others:
            self._load(other.archive, other.target, None)
            take_over(loaded, other.target)
        for part in parts:
            for choice in part.choices:
                missing += self._choose(choice, part, loaded, target)
        return loaded, missing

    def _part(self, rank: int, target: Any, *, chooses: bool = True) -> _Part:
        """What of a target comes from a rank's file."""
        manifest, archive = self._manifest, self._open_rank(rank)
        meshes = [mesh for mesh in manifest.meshes if rank in mesh.positions and not is_replica_mesh(mesh)]
        peers = sorted({each for mesh in meshes for each in mesh.ranks}) or range(manifest.world_size)
        choices = []
        if chooses:
            rules = self._options.per_rank
            choices = Chooser(archive, manifest.differing, rules, self._open_rank, self._path, peers).choices(target)
        return _Part(archive, without(target, archive.index.root, choices), choices, peers)

    def _source(self, archive: Archive, verified: Sequence[int] = ()) -> ManyFiles:
        return ManyFiles(self._manifest, archive, self._open_rank, self._path, verified)

    def _load(
        self, archive: Archive, target: Any, check_keys: CheckKeys | None, *, whole: bool = False
    ) -> tuple[Any, list[str]]:
        options = self._options
        return load_archive(
            archive,
            target,
            map_location=options.map_location,
            mmap=options.mmap,
            verify=options.verify,
            verify_first=options.verify_first and whole,
            verify_whole=options.verify_whole and whole,
            check_keys=check_keys,
            source=self._source(archive, self._verified_ranks if whole else ()),
        )

    # Before anything is changed

    def _prepare(self, primary: _Part, others: list[_Part], target: Any) -> list[_Part]:
        """Compare what comes from other files than the primary one, and check those files where that is to be first.

        The other parts, with what is missing from them.
        """
        checked = {id(primary.archive)}  # the load from it does
        prepared = [part._replace(missing=self._compare(part.archive, part.target, checked)) for part in others]
        for part in (primary, *others):
            for choice in part.choices:
                wanted = only(None if callable(choice.rule) else target, choice)
                for rank in self._ranks_for(choice, part):
                    self._compare(self._open_rank(rank), wanted, checked)
        return prepared

    def _compare(self, archive: Archive, wanted: Any, checked: set[int]) -> list[str]:
        """Raise if a file does not hold what fits a target; the key paths that it has not."""
        merge = Merge(ObjectTable(archive.nodes), archive.file.path)
        merge.plan(wanted, archive.index.root)
        check_targets(merge.spread, archive.file.path)
        if self._options.verify_first:
            fresh = [node for node in merge.fresh if isinstance(node, ShardedNode)]
            for each in self._source(archive).archives_for(merge.spread, fresh):
                if id(each) not in checked:
                    checked.add(id(each))
                    read_whole(each, [])
        return merge.missing

    def _check_keys(self, parts: list[_Part], target: Any) -> CheckKeys | None:
        check, others = self._options.check_keys, parts[1:]
        if check is None:
            return None
        chosen = {choice.path for part in parts for choice in part.choices}

        def check_all(missing: list[str], unread: list[str]) -> None:
            elsewhere = _unwanted(target, [other.archive.index.root for other in others], "")
            check(
                _missing_from_all(missing, others),
                [path for path in dict.fromkeys([*unread, *elsewhere]) if path not in chosen],
            )

        return check_all

    # Keys that the primary file does not have: another stage of a pipeline saved them

    def _others(self, primary: Archive, target: Any) -> list[_Part]:
        """Files with keys that are wanted and not in the primary one, each with a target of just those keys."""
        seen = {self._primary_rank}
        found = []
        roots = [primary.index.root]
        for mesh in self._manifest.meshes:
            if not seen.isdisjoint(mesh.ranks):
                continue
            seen.add(mesh.ranks[0])
            other = self._open_rank(mesh.ranks[0])
            absent = _absent(target, roots, other.index.root)
            roots.append(other.index.root)
            if absent:
                found.append(self._part(mesh.ranks[0], absent))
        return found

    # Values that are not the same on all ranks

    def _choose(self, choice: Choice, part: _Part, loaded: Any, target: Any) -> list[str]:
        """Put the value of one choice into what has been loaded; the key paths that are missing."""
        rule, ranks = choice.rule, self._ranks_for(choice, part)
        if callable(rule):
            values = [self._value(choice, rank, None)[0] for rank in ranks]
            put(loaded, choice, rule(values, self._rank_info))
            return []
        if not ranks:
            return [choice.path]
        value, missing = self._value(choice, ranks[0], target)
        put(loaded, choice, value)
        return missing

    def _ranks_for(self, choice: Choice, part: _Part) -> Sequence[int]:
        """Whose values a rule is about."""
        rule, peers = choice.rule, part.peers
        if callable(rule):
            return range(self._manifest.world_size)
        if rule == "leave":
            return []
        number = 0 if rule == "first" else self._primary_rank
        # Where the rank that is meant is of another stage, which has no such key, one of this stage.
        is_there = holds(self._open_rank(number).index.root, choice)
        return [number if is_there else peers[number % len(peers)]]

    def _value(self, choice: Choice, rank: int, target: Any) -> tuple[Any, list[str]]:
        loaded, missing = self._load(self._open_rank(rank), only(target, choice), None)
        return value_at(loaded, choice), missing


def _absent(target: Any, roots: list[Node], other: Node) -> dict[Any, Any]:
    """The keys of ``other`` that are wanted and in none of ``roots``, as a target for just them."""
    if not isinstance(other, _MAPPINGS) or not (target is None or isinstance(target, MutableMapping)):
        return {}
    known = _by_key(roots)
    found: dict[Any, Any] = {}
    for key, node in keyed_children(other):
        if target is not None and key not in target:
            continue
        wanted = None if target is None else target[key]
        if key not in known:
            found[key] = wanted
        elif below := _absent(wanted, known[key], node):
            found[key] = below
    return found


def _by_key(roots: list[Node]) -> dict[Any, list[Node]]:
    """What stands under each key in those of ``roots`` that are mappings."""
    found: dict[Any, list[Node]] = {}
    for root in roots:
        if isinstance(root, _MAPPINGS):
            for key, node in keyed_children(root):
                found.setdefault(key, []).append(node)
    return found


def _missing_from_all(missing: list[str], others: list[_Part]) -> list[str]:
    """What is missing from the primary file, and from the others where they were to have it."""
    for other in others:
        found = _paths(other.target) | {choice.path for choice in other.choices}
        missing = [path for path in missing if path not in found]
        missing += other.missing
    return missing


def _paths(target: Any) -> set[str]:
    """The key paths of all values in a target, and of what they stand in."""
    paths: set[str] = set()
    waiting: list[tuple[str, Any]] = [("", target)]
    while waiting:
        path, value = waiting.pop()
        paths.add(path)
        if isinstance(value, MutableMapping):
            waiting += [(join_path(path, key), item) for key, item in value.items()]
    return paths


def _unwanted(target: Any, roots: list[Node], path: str) -> Iterator[str]:
    """The keys that any of ``roots`` has in mappings of the target's and the target has not."""
    if not isinstance(target, MutableMapping):
        return
    for key, nodes in _by_key(roots).items():
        if key in target:
            yield from _unwanted(target[key], nodes, join_path(path, key))
        else:
            yield join_path(path, key)
