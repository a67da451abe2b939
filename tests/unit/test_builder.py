"""Making checkpointers: signatures known from PyTorch, defaults, and that no part of a configuration is dropped."""

import dataclasses
import importlib
import inspect
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.barrier_ranks import reserved_port, store_arguments
from tests.helpers.saves import NotingBarrier, NotingHook, assert_state, contents, state_of
from tests.storage.recording import RecordingFileOps

from lastgood import barriers
from lastgood.barriers import BarrierConfig, TCPStoreBarrier, register_barrier
from lastgood.builder import make_async_checkpointer, make_sync_checkpointer
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from lastgood.config import CheckpointerConfig
from lastgood.errors import BarrierTimeoutError, CheckpointNotFoundError, ConfigError, StorageError
from lastgood.storage.file_ops import OsFileOps
from lastgood.types import RankInfo

# Signatures

KNOWN_FROM_PYTORCH = [
    "types.RankInfo",
    "utils.wrap_future",
    "barriers.BarrierConfig",
    "barriers.create_barrier_from_config",
    "barriers.register_barrier",
    "barriers.Barrier.execute_barrier",
    "barriers.DistBarrier",
    "barriers.DistBarrier.execute_barrier",
    "barriers.TCPStoreBarrier",
    "barriers.TCPStoreBarrier.execute_barrier",
    "checkpoint_writer.WriterHook.pre_commit",
    "checkpoint_writer.WriterHook.post_commit",
    "checkpoint_writer.CheckpointWriterConfig",
    "checkpoint_writer.CheckpointWriter",
    "checkpoint_writer.CheckpointWriter.write",
    "checkpoint_writer.CheckpointWriter.close",
    "checkpoint_reader.CheckpointReader",
    "checkpoint_reader.CheckpointReader.read",
    "checkpointer.Checkpointer.save",
    "checkpointer.Checkpointer.load",
    "checkpointer.Checkpointer.close",
    "checkpointer.SyncCheckpointer",
    "checkpointer.SyncCheckpointer.save",
    "checkpointer.SyncCheckpointer.load",
    "checkpointer.SyncCheckpointer.close",
    "checkpointer.AsyncCheckpointer",
    "checkpointer.AsyncCheckpointer.save",
    "checkpointer.AsyncCheckpointer.load",
    "checkpointer.AsyncCheckpointer.close",
    "staging.CheckpointStager.stage",
    "staging.CheckpointStager.close",
    "staging.CheckpointStagerConfig",
    "staging.DefaultStager",
    "staging.DefaultStager.stage",
    "staging.DefaultStager.close",
    "checkpoint_process.CheckpointProcess",
    "checkpoint_process.CheckpointProcess.write",
    "checkpoint_process.CheckpointProcess.close",
    "checkpoint_process.CheckpointProcessConfig",
    "checkpoint_process.WorkerRequest",
    "checkpoint_process.WorkerResponse",
    "config.CheckpointerConfig",
    "builder.make_sync_checkpointer",
    "builder.make_async_checkpointer",
]
# A default that all calls share would carry one caller's changes to the next.
NONE_FOR_A_SHARED_DEFAULT = {
    ("builder.make_sync_checkpointer", "config"),
    ("builder.make_async_checkpointer", "config"),
    ("staging.DefaultStager", "config"),
}
# Theirs are always on; ours follow the machine. Functions have names of their own.
OTHER_DEFAULTS = {
    "use_pinned_memory",
    "use_non_blocking_copy",
    "subprocess_init_fn",
    "checkpoint_writer_init_fn",
}
# Called with one argument, by position: its name is nobody's business.
ONE_ARGUMENT = {"barriers.register_barrier", "utils.wrap_future"}


def parameters_of(package: str, name: str) -> list[inspect.Parameter]:
    module, *path = name.split(".")
    found: Any = importlib.import_module(f"{package}.{module}")
    for part in path:
        found = getattr(found, part)
    return list(inspect.signature(found).parameters.values())


def default_of(parameter: inspect.Parameter) -> Any:
    """Factories of dataclasses count as what they make."""
    if type(parameter.default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return "made anew"
    return parameter.default


@pytest.mark.parametrize("name", KNOWN_FROM_PYTORCH)
def test_signatures_order_and_defaults_are_pytorchs(name: str) -> None:
    # Younger than the oldest torch that will do.
    pytest.importorskip("torch.distributed.checkpoint._experimental")
    theirs = parameters_of("torch.distributed.checkpoint._experimental", name)
    ours = parameters_of("lastgood", name)
    known = {each.name for each in theirs}
    if name in ONE_ARGUMENT:
        assert len(ours) == len(theirs) == 1
        return
    assert [each.name for each in ours if each.name in known] == [each.name for each in theirs]
    for their, our in zip(theirs, [each for each in ours if each.name in known], strict=True):
        assert our.kind == their.kind
        if (name, their.name) in NONE_FOR_A_SHARED_DEFAULT:
            assert our.default is None
        elif their.name in OTHER_DEFAULTS:
            assert (our.default is inspect.Parameter.empty) == (their.default is inspect.Parameter.empty)
        else:
            assert default_of(our) == default_of(their)
    for added in (each for each in ours if each.name not in known):
        assert added.kind is inspect.Parameter.KEYWORD_ONLY
        assert added.default is not inspect.Parameter.empty


def test_a_rank_info_may_be_given_by_position_or_name() -> None:
    assert RankInfo(1, 2) == RankInfo(global_rank=1, global_world_size=2)


# Defaults


def test_hazard_17_the_default_checkpointer_works_on_any_machine(tmp_path: Path) -> None:
    checkpointer = make_sync_checkpointer()
    assert checkpointer.save(str(tmp_path), state_of(1)) is None
    assert_state(checkpointer.load(str(tmp_path)), 1)
    checkpointer.close()


def test_default_configurations_are_not_shared() -> None:
    first, second = CheckpointerConfig(), CheckpointerConfig()
    first.barrier_config.barrier_args["global_rank"] = 1
    first.writer_config.write_barrier_timeout_secs = 1
    assert second.barrier_config.barrier_args == {}
    assert second.writer_config.write_barrier_timeout_secs == 600
    assert make_sync_checkpointer()._writer._config.write_barrier_timeout_secs == 600
    assert make_sync_checkpointer()._writer._config is not make_sync_checkpointer()._writer._config


def test_without_rank_info_the_process_group_says_who_we_are(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        make_sync_checkpointer().save(str(tmp_path / "checkpoint"), state_of(1))
    finally:
        dist.destroy_process_group()
    assert list(contents(tmp_path / "checkpoint")) == ["checkpoint_0.pt"]


# Hazard 16: every part of the configuration has its effect


@pytest.fixture
def over() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def own_barrier(monkeypatch: pytest.MonkeyPatch, over: threading.Event) -> list[Any]:
    """A registered barrier ``own`` that nobody passes; the arguments that each was made with."""
    monkeypatch.setattr(barriers, "BARRIER_REGISTRY", dict(barriers.BARRIER_REGISTRY))
    made: list[Any] = []

    @register_barrier
    class Own(NotingBarrier):
        barrier_type = "own"

        def __init__(self, name: str) -> None:
            super().__init__()
            made.append(name)

        def execute_barrier(self) -> None:
            over.wait()

    return made


def check_write_barrier_timeout(path: Path, monkeypatch: pytest.MonkeyPatch, over: threading.Event) -> None:
    config = CheckpointerConfig(
        CheckpointWriterConfig(write_barrier_timeout_secs=0.2),  # type: ignore[arg-type]
        BarrierConfig("own", {"name": "a"}),
    )
    with pytest.raises(BarrierTimeoutError, match=r"0\.2 s"):
        make_sync_checkpointer(config).save(str(path), state_of(1))


def check_no_progress_timeout(path: Path, monkeypatch: pytest.MonkeyPatch, over: threading.Event) -> None:
    monkeypatch.setattr(OsFileOps, "fsync", lambda *_: over.wait())
    config = CheckpointerConfig(CheckpointWriterConfig(no_progress_timeout_secs=0.2))
    with pytest.raises(StorageError, match=r"0\.2 s"):
        make_sync_checkpointer(config).save(str(path), state_of(1))


FIELDS = {
    "write_barrier_timeout_secs": check_write_barrier_timeout,
    "no_progress_timeout_secs": check_no_progress_timeout,
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CheckpointWriterConfig)])
def test_hazard_16_every_field_of_the_writers_configuration_arrives(
    tmp_path: Path, field: str, own_barrier: list[Any], monkeypatch: pytest.MonkeyPatch, over: threading.Event
) -> None:
    FIELDS[field](tmp_path, monkeypatch, over)


def test_hazard_16_the_barrier_is_made_with_its_arguments(own_barrier: list[Any]) -> None:
    make_sync_checkpointer(CheckpointerConfig(barrier_config=BarrierConfig("own", {"name": "main"})))
    assert own_barrier == ["main"]


def test_hazard_16_rank_and_hook_arrive(tmp_path: Path) -> None:
    ops = RecordingFileOps()
    checkpointer = make_sync_checkpointer(None, RankInfo(2, 3), NotingHook(ops))
    checkpointer.save(str(tmp_path), state_of(1), epoch=4)
    assert list(contents(tmp_path)) == ["checkpoint_2.pt"]
    assert [(call.name, call.arguments) for call in ops.calls] == [
        ("pre_commit", ({"epoch": 4},)),
        ("post_commit", ({"epoch": 4},)),
    ]
    assert_state(checkpointer.load(str(tmp_path)), 1)
    with pytest.raises(CheckpointNotFoundError, match="rank 0"):
        CheckpointReader(RankInfo(0, 3)).read(str(tmp_path))


def test_hazard_16_there_is_a_test_for_every_part_of_the_configuration() -> None:
    # tests/async has one for each field of the other two.
    assert {field.name for field in dataclasses.fields(CheckpointerConfig)} == {
        "writer_config",
        "barrier_config",
        "staging_config",
        "process_config",
        "replicated",
    }
    assert {field.name for field in dataclasses.fields(CheckpointWriterConfig)} == set(FIELDS)
    assert {field.name for field in dataclasses.fields(BarrierConfig)} == {"barrier_type", "barrier_args"}


@pytest.mark.parametrize("make", [make_sync_checkpointer, make_async_checkpointer])
def test_hazard_16_declared_replicas_reach_both_kinds_of_checkpointers(make: Any) -> None:
    """Where nothing would join the parts of all ranks, or compare replicas, they are refused: so they have arrived."""
    with pytest.raises(ConfigError, match="replicated needs ranks that commit together"):
        make(CheckpointerConfig(replicated=["model.*"]), RankInfo(1, 2))
    make(CheckpointerConfig(replicated=["model.*"]), RankInfo(0, 1)).close()


def test_parts_may_be_assigned_after_the_configuration_was_made(own_barrier: list[Any]) -> None:
    config = CheckpointerConfig()
    config.writer_config = CheckpointWriterConfig(write_barrier_timeout_secs=7)
    config.barrier_config = BarrierConfig("own", {"name": "later"})
    writer = make_sync_checkpointer(config)._writer
    assert writer._config.write_barrier_timeout_secs == 7
    assert own_barrier == ["later"]


def test_a_real_barrier_from_a_configuration(tmp_path: Path) -> None:
    with reserved_port() as port:
        config = CheckpointerConfig(barrier_config=BarrierConfig("tcp_store", store_arguments(0, 1, port)))
        checkpointer = make_sync_checkpointer(config, RankInfo(0, 1))
        assert isinstance(checkpointer._writer._barrier, TCPStoreBarrier)
        for number in (1, 2):
            checkpointer.save(str(tmp_path), state_of(number))
            assert_state(checkpointer.load(str(tmp_path)), number)


def test_an_unknown_barrier_type_is_a_value_error_that_lists_the_known() -> None:
    config = CheckpointerConfig(barrier_config=BarrierConfig("mpi"))
    with pytest.raises(ValueError, match=r"Unknown barrier type: mpi.*tcp_store") as caught:
        make_sync_checkpointer(config)
    assert isinstance(caught.value, ConfigError)


def test_the_writer_takes_no_default_from_elsewhere() -> None:
    with pytest.raises(TypeError):
        CheckpointWriter()  # type: ignore[call-arg]
    assert torch.distributed.is_initialized() is False
