"""A step that a promise rests on, with the edit that takes it out of the source; and which tests look at it."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """In ``file`` of the package, ``old`` becomes ``new``. ``tests`` are those that have to notice, in this order."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


POWER = "tests/crash/power_cuts"
LOCAL = (
    "tests/storage/test_durable_write.py",
    "tests/storage/test_local.py",
    "tests/storage/test_directories.py",
    "tests/storage/test_names.py",
)
WRITE = "storage/_durable_write.py"
DAMAGE = ("tests/unit/loading/test_corruption.py", "tests/unit/loading/test_whole_verification.py")
VOTES = ("tests/unit/coordination/test_votes.py", "tests/unit/sharding/test_votes.py")
MANIFEST = ("tests/unit/test_manifest.py", "tests/unit/contents/test_manifest_check.py", *VOTES)
BARRIER = (
    "tests/unit/test_checkpoint_writer.py",
    "tests/unit/test_manifest.py",
    "tests/distributed/test_saves_processes.py",
)
REMOVAL = ("tests/manager/test_removal.py", "tests/manager/test_deaths.py", POWER)
