"""Making sure of a checkpoint before others are removed on the strength of it."""

from lastgood._contents import verify_checkpoint
from lastgood.errors import CorruptCheckpointError
from lastgood.manager.catalog import Entry
from lastgood.manager.progress import shown_progress
from lastgood.storage.base import StorageBackend


def require_good(storage: StorageBackend, entry: Entry) -> None:
    """Read every byte of it; raise :class:`~lastgood.errors.CorruptCheckpointError` if one is not what was written."""
    with shown_progress(f"verifying step {entry.step}"):
        report = verify_checkpoint(entry.path, storage)
    if report.problems:
        raise CorruptCheckpointError(
            f"nothing was removed: the newest checkpoint that would stay, that of step {entry.step}, is damaged "
            f"({report.problems[0].message}). Let a run resume, which sets it aside, or remove it yourself.",
            path=entry.path,
            phase="retention",
        )
