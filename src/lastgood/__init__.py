"""PyTorch training checkpoints that are durable, atomic and verified, in files that ``torch.load`` reads.

The names below are imported when they are first used, so that ``import lastgood`` itself does not cost the
seconds that importing torch takes.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

__all__ = [
    "ArenaMemoryError",
    "AsyncCheckpointer",
    "BarrierConfig",
    "BarrierTimeoutError",
    "CheckpointExistsError",
    "CheckpointManager",
    "CheckpointNotFoundError",
    "CheckpointProcess",
    "CheckpointProcessConfig",
    "CheckpointProcessError",
    "CheckpointReader",
    "CheckpointStager",
    "CheckpointStagerConfig",
    "CheckpointWriter",
    "CheckpointWriterConfig",
    "Checkpointer",
    "CheckpointerConfig",
    "ConfigError",
    "CorruptCheckpointError",
    "DefaultStager",
    "Event",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "KeepPerTimeSpan",
    "KeepSteps",
    "LastgoodError",
    "MissingKeysError",
    "RankInfo",
    "RankMismatchError",
    "SaveRecord",
    "SaveTimeoutError",
    "StagingError",
    "StorageError",
    "SupersededError",
    "SyncCheckpointer",
    "TargetMismatchError",
    "TornSnapshotError",
    "UncommittedCheckpointError",
    "UnsafeCheckpointError",
    "UnsafeValueWarning",
    "UnsupportedStateError",
    "WriterHook",
    "__version__",
    "load",
    "make_async_checkpointer",
    "make_sync_checkpointer",
    "save",
    "subscribe",
]

# Where each public name lives. Type checkers read the imports below instead; a test holds the two together.
_HOMES = {
    "_events": (
        "Event",
        "subscribe",
    ),
    "_single_file": (
        "load",
        "save",
    ),
    "barriers": ("BarrierConfig",),
    "builder": (
        "make_async_checkpointer",
        "make_sync_checkpointer",
    ),
    "checkpoint_process": (
        "CheckpointProcess",
        "CheckpointProcessConfig",
    ),
    "checkpoint_reader": ("CheckpointReader",),
    "checkpoint_writer": (
        "CheckpointWriter",
        "CheckpointWriterConfig",
        "WriterHook",
    ),
    "checkpointer": (
        "AsyncCheckpointer",
        "Checkpointer",
        "SyncCheckpointer",
    ),
    "config": ("CheckpointerConfig",),
    "errors": (
        "ArenaMemoryError",
        "BarrierTimeoutError",
        "CheckpointExistsError",
        "CheckpointNotFoundError",
        "CheckpointProcessError",
        "ConfigError",
        "CorruptCheckpointError",
        "LastgoodError",
        "MissingKeysError",
        "RankMismatchError",
        "SaveTimeoutError",
        "StagingError",
        "StorageError",
        "SupersededError",
        "TargetMismatchError",
        "TornSnapshotError",
        "UncommittedCheckpointError",
        "UnsafeCheckpointError",
        "UnsafeValueWarning",
        "UnsupportedStateError",
    ),
    "manager.checkpoint_manager": ("CheckpointManager",),
    "manager.retention": (
        "KeepBest",
        "KeepEvery",
        "KeepLast",
        "KeepPerTimeSpan",
        "KeepSteps",
    ),
    "manager.run_log": ("SaveRecord",),
    "staging": (
        "CheckpointStager",
        "CheckpointStagerConfig",
        "DefaultStager",
    ),
    "types": ("RankInfo",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from lastgood._events import Event, subscribe
    from lastgood._single_file import load, save
    from lastgood.barriers import BarrierConfig
    from lastgood.builder import make_async_checkpointer, make_sync_checkpointer
    from lastgood.checkpoint_process import CheckpointProcess, CheckpointProcessConfig
    from lastgood.checkpoint_reader import CheckpointReader
    from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig, WriterHook
    from lastgood.checkpointer import AsyncCheckpointer, Checkpointer, SyncCheckpointer
    from lastgood.config import CheckpointerConfig
    from lastgood.errors import (
        ArenaMemoryError,
        BarrierTimeoutError,
        CheckpointExistsError,
        CheckpointNotFoundError,
        CheckpointProcessError,
        ConfigError,
        CorruptCheckpointError,
        LastgoodError,
        MissingKeysError,
        RankMismatchError,
        SaveTimeoutError,
        StagingError,
        StorageError,
        SupersededError,
        TargetMismatchError,
        TornSnapshotError,
        UncommittedCheckpointError,
        UnsafeCheckpointError,
        UnsafeValueWarning,
        UnsupportedStateError,
    )
    from lastgood.manager.checkpoint_manager import CheckpointManager
    from lastgood.manager.retention import KeepBest, KeepEvery, KeepLast, KeepPerTimeSpan, KeepSteps
    from lastgood.manager.run_log import SaveRecord
    from lastgood.staging import CheckpointStager, CheckpointStagerConfig, DefaultStager
    from lastgood.types import RankInfo
else:
    # Hidden from type checkers: with a module-level __getattr__ they would accept any misspelt name.
    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
