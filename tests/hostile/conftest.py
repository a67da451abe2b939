"""The samples and the worker that reads them, shared by the tests of one module."""

from collections.abc import Callable, Iterator

import pytest
import torch
from tests.hostile.samples import Reader, Sample, exotic_state, single, small_state, spread, theirs


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    started = Reader()
    yield started
    started.close()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sample]:
    """The sample of a name, made when it is first asked for, and whole again each time."""
    made: dict[str, Sample] = {}
    makers: dict[str, Callable[..., Sample]] = {
        "single": lambda root: single(root, small_state()),
        "exotic": lambda root: single(root, exotic_state()),
        "values": lambda root: single(root, {"a": [1, 2], "t": torch.arange(4.0)}),
        "spread": spread,
        "torch zip": lambda root: theirs(root, small_state()),
        "torch legacy": lambda root: theirs(root, small_state(), _use_new_zipfile_serialization=False),
    }

    def get(name: str) -> Sample:
        if name not in made:
            made[name] = makers[name](tmp_path_factory.mktemp(name.replace(" ", "_")))
        made[name].restore()
        return made[name]

    return get
