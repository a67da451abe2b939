"""Figures in words, and texts from outside made harmless to show."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from lastgood.cli import _output

_LONGEST = 2000


def printable(text: str, longest: int = _LONGEST) -> str:
    """The text with characters that show nothing, or turn the order of others around, in the notation of Python.

    So a name cannot pose as another, and lone surrogates (of file names that are no UTF-8) can be written. A text that
    is longer than ``longest`` is cut.
    """
    return _output.printable(text if len(text) <= longest else text[:longest] + "...")


def seconds_in_words(seconds: float | None) -> str:
    """A length of time, or ``-``."""
    return "-" if seconds is None else _output.human_time(seconds)


def moment_in_words(seconds: float | None) -> str:
    """A time of day in UTC, such as ``2026-11-24 17:03:20``."""
    if seconds is None:
        return "-"
    try:
        return f"{datetime.fromtimestamp(int(seconds), UTC):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):  # no calendar has that day
        return f"{seconds:g} s since 1970"


def figure_in_words(value: float | None) -> str:
    """Four digits of a figure, such as ``0.001234``; ``not finite`` for what is no number."""
    return "not finite" if value is None else f"{value:.4g}"


def metrics_in_words(metrics: Mapping[str, float | None]) -> str:
    """Such as ``loss 0.12, accuracy 0.9``."""
    return ", ".join(f"{name} {figure_in_words(value)}" for name, value in metrics.items())


def count_in_words(count: int, one: str, several: str | None = None) -> str:
    """Such as ``1 save`` and ``3 saves``."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def rule_in_words(rule: Mapping[str, object]) -> str:
    """A rule of retention as its JSON tells it: ``keep last (count 3)``."""
    details = [
        f"{name} {_value_in_words(value)}" for name, value in rule.items() if name != "rule" and value is not None
    ]
    name = str(rule.get("rule", "a rule without a name"))
    return printable(f"{name} ({', '.join(details)})" if details else name)


def _value_in_words(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = ", ".join(map(str, value[:10]))
        return shown + (", ..." if len(value) > 10 else "")
    return str(value)
