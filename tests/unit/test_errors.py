"""The tree of errors: who catches what, and that nothing is lost on the way to another process."""

import copy
import inspect
import pickle
from typing import Any

import pytest

from lastgood import errors
from lastgood.errors import LastgoodError, MissingKeysError, StorageError, require_all

# What users of PyTorch catch today goes on working: the built-in class among the bases.
BASES: dict[str, tuple[type[BaseException], ...]] = {
    "LastgoodError": (Exception,),
    "ConfigError": (ValueError,),
    "UnsupportedStateError": (pickle.PicklingError, TypeError),
    "TargetMismatchError": (RuntimeError,),
    "MissingKeysError": (RuntimeError,),
    "RankMismatchError": (RuntimeError,),
    "CheckpointNotFoundError": (FileNotFoundError,),
    "CheckpointExistsError": (FileExistsError,),
    "UncommittedCheckpointError": (RuntimeError,),
    "SupersededError": (RuntimeError,),
    "CorruptCheckpointError": (RuntimeError,),
    "UnsafeCheckpointError": (pickle.UnpicklingError,),
    "StorageError": (OSError,),
    "StagingError": (RuntimeError,),
    "TornSnapshotError": (errors.StagingError,),
    "ArenaMemoryError": (errors.StagingError, MemoryError),
    "CheckpointProcessError": (RuntimeError,),
    "SaveTimeoutError": (TimeoutError,),
    "BarrierTimeoutError": (TimeoutError,),
}
EXTRA: dict[str, dict[str, Any]] = {
    "MissingKeysError": {"missing_keys": ("a.b", "c")},
    "CorruptCheckpointError": {"undefined_targets": ("model.w",)},
    "StorageError": {"errno": 28},
    "CheckpointProcessError": {"pid": 4711},
    "BarrierTimeoutError": {"missing_ranks": (1, 3)},
}
KNOWN: dict[str, Any] = {"path": "/run/step-7", "rank": 3, "tensor": "model.w", "phase": "write"}

classes = pytest.mark.parametrize("name", BASES)


def defined() -> dict[str, type[LastgoodError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__ and not issubclass(value, Warning)
    }


def make(name: str) -> LastgoodError:
    return defined()[name]("what happened, in a sentence", **KNOWN, **EXTRA.get(name, {}))


def test_this_list_is_complete() -> None:
    assert set(BASES) == set(defined())


@classes
def test_bases(name: str) -> None:
    assert issubclass(defined()[name], (LastgoodError,))
    for base in BASES[name]:
        assert issubclass(defined()[name], base)


@classes
def test_the_text_is_the_message_and_what_is_known_stands_in_attributes(name: str) -> None:
    error = make(name)
    assert str(error) == "what happened, in a sentence"
    for attribute, value in {**KNOWN, **EXTRA.get(name, {})}.items():
        assert getattr(error, attribute) == value


@classes
def test_what_is_not_known_is_none_or_empty(name: str) -> None:
    error = defined()[name]("what happened")
    assert (error.path, error.rank, error.tensor, error.phase) == (None, None, None, None)
    for attribute in EXTRA.get(name, {}):
        assert getattr(error, attribute) in ((), None)
    assert str(error) == "what happened"


@classes
@pytest.mark.parametrize("travel", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_nothing_is_lost_on_the_way_to_another_process(name: str, travel: Any) -> None:
    error = make(name)
    if isinstance(error, OSError):
        error.errno = 17
    error.add_note("seen by rank 3")
    arrived = travel(error)
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert arrived.args == error.args
    assert vars(arrived) == vars(error)
    assert arrived.__notes__ == ["seen by rank 3"]
    if isinstance(error, OSError):
        assert arrived.errno == 17


def test_an_errno_does_not_change_the_text() -> None:
    assert str(StorageError("the disk is full", errno=28)) == "the disk is full"


def test_unknown_knowledge_is_a_programming_error() -> None:
    with pytest.raises(TypeError, match="where"):
        LastgoodError("what happened", where="here")  # type: ignore[call-arg]


def test_the_picture_in_the_module_shows_every_class_with_its_bases() -> None:
    picture = (errors.__doc__ or "").splitlines()
    for name, bases in BASES.items():
        if name == "LastgoodError":
            continue
        [line] = [line for line in picture if f"-- {name} " in line]
        found = line[line.index("(") + 1 : line.index(")")].split(", ")
        assert [base.rpartition(".")[2] for base in found] == [base.__name__ for base in bases]


def test_missing_keys_only_raise_when_strict() -> None:
    state = {"a": 1}
    assert require_all(state, ["b"], "/run", strict=False) is state
    assert require_all(state, [], "/run", strict=True) is state
    with pytest.raises(MissingKeysError, match=r"missing keys: \['b', 'c\.d'\]") as caught:
        require_all(state, ["b", "c.d"], "/run", strict=True)
    assert caught.value.missing_keys == ("b", "c.d")
    assert caught.value.path == "/run"
