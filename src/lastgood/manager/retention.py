"""Which checkpoints of a run stay, which may go, and why. Pure: the catalog goes in, a decision comes out.

The union of what the rules keep stays, and so does the newest committed checkpoint, whatever the rules say.
Checkpoints that are not committed are none of retention's business: they are not removed, and none is removed
because of them. :func:`decide` has the last word; a rule is any object with the one method of
:class:`RetentionRule`.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import msgspec

from lastgood.errors import ConfigError
from lastgood.manager.catalog import Entry

_SPAN_FORMATS = {"hour": "%Y-%m-%d %H:00", "day": "%Y-%m-%d", "week": "%G-W%V", "month": "%Y-%m"}
_YEAR_10000 = 253_402_300_800  # seconds since 1970; no calendar date is later
_RULE_FORMS = "last=3, every=1000, best=2:loss:min, per=day, per=day:7, per=3600s:5 or step=5000"


@runtime_checkable
class RetentionRule(Protocol):
    """One reason to keep checkpoints."""

    def keeps(self, entries: Sequence[Entry]) -> Mapping[int, str]:
        """The steps to keep, each with the reason in words.

        ``entries`` are the committed ones in rising order of steps. The answer must depend on nothing else, and must
        not change when entries go that no rule keeps.
        """
        ...


class KeepLast(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="rule", tag="keep last"):
    """Keep the ``count`` highest steps."""

    count: int

    def __post_init__(self) -> None:
        _require_whole(self.count, "KeepLast", "count", at_least=1)

    def keeps(self, entries: Sequence[Entry]) -> dict[int, str]:
        reason = "the last one" if self.count == 1 else f"one of the last {self.count}"
        return {entry.step: reason for entry in entries[-self.count :]}


class KeepEvery(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="rule", tag="keep every"):
    """Keep each step that is a multiple of ``steps``; 0 is one."""

    steps: int

    def __post_init__(self) -> None:
        _require_whole(self.steps, "KeepEvery", "steps", at_least=1)

    def keeps(self, entries: Sequence[Entry]) -> dict[int, str]:
        return {entry.step: f"every {self.steps} steps" for entry in entries if entry.step % self.steps == 0}


class KeepBest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="rule", tag="keep best"):
    """Keep the ``count`` best by one of the metrics given to ``save``; of equals, the later step.

    A checkpoint without that metric, or whose value was not a finite number, is never among the best.
    """

    count: int
    metric: str
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        _require_whole(self.count, "KeepBest", "count", at_least=1)
        if not isinstance(self.metric, str) or not self.metric:
            raise ConfigError(f"KeepBest needs the name of a metric, not {self.metric!r}.")
        if self.mode not in ("min", "max"):
            raise ConfigError(f'The mode of KeepBest is "min" or "max", not {self.mode!r}.')

    def keeps(self, entries: Sequence[Entry]) -> dict[int, str]:
        ranked = []
        for entry in entries:
            value = (entry.metrics or {}).get(self.metric)
            if value is not None and math.isfinite(value):
                ranked.append((value if self.mode == "min" else -value, -entry.step, value))
        best = "best" if self.count == 1 else f"best {self.count}"
        return {
            -minus_step: f"{best} by {self.metric} ({self.mode}): {value:g}"
            for _, minus_step, value in sorted(ranked)[: self.count]
        }


class KeepPerTimeSpan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="rule", tag="keep per span"):
    """Keep the last checkpoint saved in each hour, day, week (ISO) or month, or in each ``span`` seconds since 1970.

    Spans are those of UTC, by the time of the save. ``count`` limits it to the newest spans in which something was
    saved. Checkpoints without a time (or with one outside the years 1970 to 9999) are left to the other rules.
    """

    span: str | float
    count: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.span, str):
            known = self.span in _SPAN_FORMATS
        else:
            known = _is_number(self.span) and math.isfinite(self.span) and self.span >= 1
        if not known:
            raise ConfigError(
                f"The span of KeepPerTimeSpan is one of {', '.join(_SPAN_FORMATS)}, or a number of seconds from 1 "
                f"upwards, not {self.span!r}."
            )
        if self.count is not None:
            _require_whole(self.count, "KeepPerTimeSpan", "count", at_least=1)

    def keeps(self, entries: Sequence[Entry]) -> dict[int, str]:
        timed = [
            (entry.saved_at, entry.step)
            for entry in entries
            if entry.saved_at is not None and 0 <= entry.saved_at < _YEAR_10000
        ]
        # In rising order of time: the last of a span overwrites those before it, and the spans come in their order.
        last_of_span = {self._name_of_span(saved_at): step for saved_at, step in sorted(timed)}
        newest = list(last_of_span.items())[-self.count if self.count else 0 :]
        return {step: f"last of the {name} (UTC)" for name, step in newest}

    def _name_of_span(self, saved_at: float) -> str:
        # Whole seconds do: spans with a name begin at them, and no two spans of a second or more begin in the same one.
        if isinstance(self.span, str):
            return f"{self.span} {datetime.fromtimestamp(int(saved_at), UTC):{_SPAN_FORMATS[self.span]}}"
        begin = datetime.fromtimestamp(int(saved_at // self.span * self.span), UTC)
        return f"{self.span:.15g} s from {begin:%Y-%m-%d %H:%M:%S}"


class KeepSteps(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="rule", tag="keep steps"):
    """Keep these very steps: pinned ones."""

    steps: Collection[int]

    def __post_init__(self) -> None:
        if not isinstance(self.steps, Collection) or not self.steps:
            raise ConfigError(f"KeepSteps needs a list of at least one step, not {self.steps!r}.")
        for step in self.steps:
            _require_whole(step, "KeepSteps", "step", at_least=0)
        msgspec.structs.force_setattr(self, "steps", tuple(sorted(set(self.steps))))

    def keeps(self, entries: Sequence[Entry]) -> dict[int, str]:
        return {entry.step: "pinned" for entry in entries if entry.step in self.steps}


class Verdict(msgspec.Struct, frozen=True):
    """What is to become of one checkpoint, and all the reasons for it."""

    entry: Entry
    reasons: tuple[str, ...]


class Decision(msgspec.Struct, frozen=True):
    """Every committed checkpoint is in one of the two, each in rising order of steps."""

    keep: tuple[Verdict, ...]
    remove: tuple[Verdict, ...]


def decide(
    entries: Sequence[Entry], rules: Sequence[RetentionRule], *, protected: Mapping[int, str] | None = None
) -> Decision:
    """Judge the committed ones among ``entries``; the others appear nowhere.

    Kept is what any rule keeps, what is ``protected`` (step to reason), and always the highest committed step. With
    no rules at all, everything is. So whatever is removed has a newer committed checkpoint above it. Rules that are
    none, and two entries of one step, raise :class:`ConfigError`.
    """
    for rule in rules:
        if not isinstance(rule, RetentionRule):
            raise ConfigError(f"{rule!r} is not a retention rule: it has no method keeps(entries).")
    if len({entry.step for entry in entries}) < len(entries):
        raise ConfigError("Two entries are of the same step: a catalog has one a step. Nothing was decided.")
    committed = sorted((entry for entry in entries if entry.is_committed), key=lambda entry: entry.step)
    if not committed:
        return Decision((), ())
    newest = committed[-1].step
    answers = [rule.keeps(committed) for rule in rules]
    answers += [{newest: "the newest"}, protected or {}]
    if not rules:
        answers.append({entry.step: "no rule says what may go" for entry in committed})
    keep, remove = [], []
    for entry in committed:
        reasons = dict.fromkeys(answer[entry.step] for answer in answers if entry.step in answer)
        if reasons:
            keep.append(Verdict(entry, tuple(reasons)))
        else:
            remove.append(Verdict(entry, (f"none of the rules keeps it; step {newest} is newer and committed",)))
    return Decision(tuple(keep), tuple(remove))


_OurRule = KeepLast | KeepEvery | KeepBest | KeepPerTimeSpan | KeepSteps


def rules_to_json(rules: Sequence[RetentionRule]) -> list[dict[str, Any]]:
    """The rules as plain values, such as ``{"rule": "keep last", "count": 3}``.

    Of a rule that is not one of this module's, only a description is noted.
    """
    ours = get_args(_OurRule)
    return [
        msgspec.to_builtins(rule) if type(rule) in ours else {"rule": type(rule).__name__, "is": repr(rule)}
        for rule in rules
    ]


def rules_from_json(values: Sequence[Mapping[str, Any]]) -> list[RetentionRule]:
    """The rules that :func:`rules_to_json` noted; :class:`ConfigError` for one that is not one of this module's.

    Leaving a rule out would remove what it keeps, so an unknown one is never passed over.
    """
    try:
        return list(msgspec.convert(values, list[_OurRule]))
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"These retention rules cannot be read: {error}. They may be those of another version, or of a program "
            "with rules of its own: name the rules yourself."
        ) from error


def parse_rule(text: str) -> RetentionRule:
    """The rule that somebody wrote on a command line, such as ``last=3`` or ``best=2:loss:min``."""
    kind, _, value = text.partition("=")
    try:
        match kind, value.split(":"):
            case "last", [count]:
                return KeepLast(int(count))
            case "every", [steps]:
                return KeepEvery(int(steps))
            case "best", [count, metric] if metric not in ("min", "max"):
                return KeepBest(int(count), metric)
            # A metric's name may hold colons; then the mode must be there, lest a mistyped one becomes part of a name.
            case "best", [count, *metric, ("min" | "max") as mode] if metric:
                return KeepBest(int(count), ":".join(metric), mode)
            case "per", [span]:
                return KeepPerTimeSpan(_parse_span(span))
            case "per", [span, count]:
                return KeepPerTimeSpan(_parse_span(span), int(count))
            case "step", [step]:
                return KeepSteps((int(step),))
    except ConfigError as error:
        raise ConfigError(f"{text!r} is not a rule: {error}") from error
    except ValueError:  # what should be a number is none
        pass
    raise ConfigError(f"{text!r} is not a rule. Write {_RULE_FORMS}.")


def _parse_span(text: str) -> str | float:
    return float(text[:-1]) if text.endswith("s") else text


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_whole(value: object, rule: str, name: str, *, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ConfigError(f"The {name} of {rule} is a whole number from {at_least} upwards, not {value!r}.")
