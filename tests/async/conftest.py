"""Fixtures of the tests of asynchronous saves."""

from collections.abc import Iterator

import pytest
from tests.helpers.asynchronous import Calls, Gate, gate_before_copies, watched_calls

from lastgood.builder import make_async_checkpointer
from lastgood.checkpointer import AsyncCheckpointer


@pytest.fixture
def gate() -> Iterator[Gate]:
    """All copies in the background pass it; open until a test shuts it."""
    with gate_before_copies() as gate:
        yield gate


@pytest.fixture
def calls() -> Iterator[Calls]:
    with watched_calls() as calls:
        yield calls


@pytest.fixture(scope="module")
def checkpointer() -> Iterator[AsyncCheckpointer]:
    """One of the default configuration, shared by the tests of a module."""
    checkpointer = make_async_checkpointer()
    yield checkpointer
    checkpointer.close()
