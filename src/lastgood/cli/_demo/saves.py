"""Watching saves in the background, and telling how each gets on."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lastgood
from lastgood.cli._demo.protocol import Event, SaveDone, SaveReturned, Staged
from lastgood.manager.catalog import step_of


@contextmanager
def reported_saves(report: Callable[[Event], None]) -> Iterator[None]:
    """Report how the saves of steps get on, the moment they do: ``report`` is called by several threads."""

    def note(event: lastgood.Event) -> None:
        step = step_of(os.path.basename(event.path))
        if step is None or event.error is not None:
            return
        if event.phase == "stall":
            report(SaveReturned(step, event.seconds))
        elif event.phase == "staged":
            report(Staged(step, event.seconds))
        elif event.phase == "durable":
            report(SaveDone(step, event.seconds, event.nbytes or 0))

    unsubscribe = lastgood.subscribe(note)
    try:
        yield
    finally:
        unsubscribe()


@contextmanager
def held_back() -> Iterator[list[float]]:
    """How many seconds each optimizer step in the block had to wait until a snapshot was staged."""
    seconds: list[float] = []

    def note(event: lastgood.Event) -> None:
        if event.phase == "hold":
            seconds.append(event.seconds)

    unsubscribe = lastgood.subscribe(note)
    try:
        yield seconds
    finally:
        unsubscribe()
