"""Values that are not the same on all ranks, for another number of ranks than saved them: which rank gets which.

A target is divided by the file that its values are to come from. Where all files hold the same, any will do; where they
do not, whoever loads has to say.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import msgspec

from lastgood._loading.targets import TensorsLike
from lastgood.errors import ConfigError, RankMismatchError, listed
from lastgood.format.archive import Archive
from lastgood.format.nodes import (
    DictNode,
    MapNode,
    Node,
    OrderedDictNode,
    ShardedNode,
    join_path,
    keyed_children,
    walk_values,
)
from lastgood.format.vote import content_of, group_of
from lastgood.types import RankInfo

PerRankRule = Literal["first", "modulo", "leave"] | Callable[[list[Any], RankInfo], Any]
"""Which of the values that several ranks have saved a rank gets.

``"first"``: that of rank 0. ``"modulo"``: that of its own rank modulo the number of ranks that saved. ``"leave"``:
none; what the target holds stays, and the key counts as missing. A function: what it returns for the values of all
ranks that saved and the rank that asks.
"""

PerRankRules = Mapping[str, PerRankRule]
"""Rules by the patterns (as of :mod:`fnmatch`) of key paths; a pattern covers all that is below what it matches."""

_NAMED_RULES = ("first", "modulo", "leave")


class Choice(msgspec.Struct, frozen=True):
    """A value of the target that does not come from the file that all others come from."""

    keys: tuple[Any, ...]
    path: str
    rule: PerRankRule


def check_rules(rules: PerRankRules) -> None:
    """Raise :class:`~lastgood.errors.ConfigError` for what are no rules."""
    if not isinstance(rules, Mapping):
        raise ConfigError(f"per_rank is {rules!r}; give a dict of rules under patterns of key paths")
    for pattern, rule in rules.items():
        if not isinstance(pattern, str) or not (callable(rule) or rule in _NAMED_RULES):
            raise ConfigError(
                f"per_rank says {rule!r} for {pattern!r}; a rule is one of {', '.join(_NAMED_RULES)} or a function of "
                "the values of all ranks and the RankInfo of the one that loads"
            )


def find_rule(rules: PerRankRules, path: str) -> PerRankRule | None:
    """The first rule whose pattern matches the key path or that of something it stands in."""
    for pattern, rule in rules.items():
        if any(fnmatchcase(each, pattern) for each in _outer_paths(path)):
            return rule
    return None


class Chooser:
    """Finds the values of a target that need a rule. ``archives`` opens the file of a rank that saved.

    ``peers`` are the ranks that have to have what the primary one has; others (of another pipeline stage) may have it.
    """

    def __init__(
        self,
        primary: Archive,
        differing: Sequence[int],
        rules: PerRankRules,
        archives: Callable[[int], Archive],
        path: str,
        peers: Collection[int],
    ) -> None:
        self._peers = peers
        self._primary = primary
        self._differing = frozenset(differing)
        self._rules = rules
        self._archives = archives
        self._path = path
        self._contents: dict[int, dict[str, Any]] = {}
        self._unruled: list[str] = []

    def choices(self, target: Any) -> list[Choice]:
        """The values of ``target`` (``None``: everything that was saved) that a rule decides.

        Raises :class:`~lastgood.errors.RankMismatchError` for values that differ and that no rule covers.
        """
        found = list(self._choices(target, self._primary.index.root, (), ""))
        self._unruled += self._only_of_peers(target)
        if self._unruled:
            raise self._no_rule()
        return found

    def _choices(self, target: Any, node: Node, keys: tuple[Any, ...], path: str) -> Iterator[Choice]:
        if isinstance(node, (DictNode, MapNode, OrderedDictNode)) and (
            target is None or isinstance(target, MutableMapping)
        ):
            for key, value in keyed_children(node):
                place = join_path(path, key)
                rule = find_rule(self._rules, place)
                if rule is not None:
                    if target is None or key in target:
                        yield Choice((*keys, key), place, rule)
                elif target is None or key in target:
                    yield from self._choices(None if target is None else target[key], value, (*keys, key), place)
            return
        if isinstance(target, TensorsLike):
            target = None
        differing = [leaf for leaf in self._leaves(node, path) if self._differs(leaf)]
        rules = [find_rule(self._rules, leaf) for leaf in differing]
        rule = rules[0] if rules else None
        if rule is not None and rules.count(rule) == len(rules):
            yield Choice(keys, path, rule)
        else:
            self._unruled += differing

    def _only_of_peers(self, target: Any) -> list[str]:
        """Wanted values that only other ranks have, which have to have what the primary one has, and no rule covers."""
        if not self._differing:
            return []
        present = {path for path, _ in walk_values(self._primary.index.root)}
        found = {path: None for rank in self._peers for path in self._contents_of(rank) if path not in present}
        return [path for path in found if _is_wanted(target, path) and find_rule(self._rules, path) is None]

    @property
    def _world_size(self) -> int:
        return self._primary.index.world_size

    def _leaves(self, node: Node, path: str) -> Iterator[str]:
        for leaf, inner in walk_values(node, path):
            if not isinstance(inner, ShardedNode):
                yield leaf

    def _differs(self, path: str) -> bool:
        """Whether the value at a key path is not the same in all files; looks into them only if it may not be."""
        if group_of(path) not in self._differing:
            return False
        contents = {rank: self._content(rank, path) for rank in range(self._world_size)}
        return len(set(contents.values()) - {None}) > 1 or any(contents[rank] is None for rank in self._peers)

    def _content(self, rank: int, path: str) -> Any:
        return self._contents_of(rank).get(path)

    def _contents_of(self, rank: int) -> dict[str, Any]:
        """Of the groups that differ: what the file of a rank holds, by key paths."""
        contents = self._contents.get(rank)
        if contents is None:
            archive = self._archives(rank)
            contents = self._contents[rank] = {
                leaf: content_of(node, archive)
                for leaf, node in walk_values(archive.index.root)
                if not isinstance(node, ShardedNode) and group_of(leaf) in self._differing
            }
        return contents

    def _no_rule(self) -> RankMismatchError:
        names = list(dict.fromkeys(self._unruled))
        top = names[0].partition(".")[0].partition("[")[0]
        return RankMismatchError(
            f"{self._path} was saved by {self._world_size} ranks, each with values of its own for {listed(names)}; "
            "for another number of ranks somebody has to say which rank gets which. Nothing has been changed. Name a "
            f"rule for them: per_rank={{{top!r}: 'first'}} gives all ranks that of rank 0, 'modulo' deals them out in "
            "turn, 'leave' keeps what is there, and a function makes one of all.",
            path=self._path,
            tensor=names[0],
            phase="read",
        )


def _is_wanted(target: Any, path: str, place: str = "") -> bool:
    """Whether a target asks for the value at a key path, or for something that it stands in."""
    if not isinstance(target, MutableMapping):
        return target is None or isinstance(target, TensorsLike)
    for key, value in target.items():
        inner = join_path(place, key)
        if path == inner or path.startswith((f"{inner}.", f"{inner}[")):
            return _is_wanted(value, path, inner)
    return False


def _outer_paths(path: str) -> Iterator[str]:
    yield path
    for position in range(len(path) - 1, 0, -1):
        if path[position] in ".[":
            yield path[:position]


def without(target: Any, node: Node, choices: Sequence[Choice]) -> Any:
    """The target without what is chosen: itself if that is nothing, else dicts that hold the same objects.

    Where all of ``node`` is wanted (``None``), all of it but that.
    """
    if not choices:
        return target
    children = dict(keyed_children(node))
    kept = dict.fromkeys(children) if target is None else dict(target)
    by_key: dict[Any, list[Choice]] = {}
    for choice in choices:
        by_key.setdefault(choice.keys[0], []).append(msgspec.structs.replace(choice, keys=choice.keys[1:]))
    for key, below in by_key.items():
        if all(choice.keys for choice in below):
            kept[key] = without(kept[key], children[key], below)
        else:
            del kept[key]
    return kept


def holds(root: Node, choice: Choice) -> bool:
    """Whether there is a value where the chosen one stands."""
    node = root
    for key in choice.keys:
        children = dict(keyed_children(node)) if isinstance(node, (DictNode, MapNode, OrderedDictNode)) else {}
        if key not in children:
            return False
        node = children[key]
    return True


def only(target: Any, choice: Choice) -> Any:
    """A target for one chosen value alone."""
    value = target
    for key in choice.keys:
        # Not there: in the place of all of a dict stands by now what has been loaded of it.
        value = value[key] if value is not None and key in value else None
    for key in reversed(choice.keys):
        value = {key: value}
    return value


def value_at(state: Any, choice: Choice) -> Any:
    """The chosen value in a state that was loaded."""
    for key in choice.keys:
        state = state[key]
    return state


def put(state: Any, choice: Choice, value: Any) -> None:
    """Set the chosen value in a state, in which the dicts around it are there or are made."""
    for key in choice.keys[:-1]:
        state = state.setdefault(key, {})
    take_over(state, {choice.keys[-1]: value})


def take_over(target: Any, loaded: Any) -> Any:
    """Give the dicts of ``target`` what stands in copies of them; returns it."""
    for key, value in loaded.items():
        present = target.get(key)
        if present is not value and isinstance(present, MutableMapping) and isinstance(value, dict):
            take_over(present, value)
        else:
            target[key] = value
    return target
