"""What hostile pickles of these tests ask for: a function that leaves a trace."""

from pathlib import Path

sung: list[object] = []


def sing(*words: object) -> None:
    """Leave a trace in this process, and a file for everybody else to see."""
    sung.append(words)
    for word in words:
        if isinstance(word, str) and word.startswith("/"):
            Path(word).touch()


class Singer:
    """The same by being made, or by being given a state."""

    def __init__(self, *words: object) -> None:
        sing(*words)

    def __setstate__(self, state: object) -> None:
        sing(state)
