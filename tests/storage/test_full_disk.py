"""A disk that is really full, and one that is really read-only: a small tmpfs that only the test's process sees."""

import errno
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MIB = 1 << 20
MOUNT_AND_RUN = 'mount -t tmpfs -o size=8m tmpfs "$0" && exec "$@"'


@functools.cache
def namespace_command() -> tuple[str, ...] | None:
    """What starts a command where it may mount things that nobody else sees; ``None`` if nothing does."""
    if shutil.which("unshare") is None:
        return None
    for command in (("unshare", "--mount"), ("unshare", "--mount", "--map-root-user")):
        probe = [*command, "sh", "-c", MOUNT_AND_RUN, "/mnt", "true"]
        if subprocess.run(probe, capture_output=True, timeout=60).returncode == 0:
            return command
    return None


def run(scenario: str, directory: Path) -> dict[str, Any]:
    """Run one scenario of ``small_file_system.py`` on 8 MiB of tmpfs."""
    namespace = namespace_command()
    if namespace is None:
        pytest.skip("this needs a mount namespace of its own (unshare --mount), which is not permitted here")
    script = [sys.executable, "-m", "tests.storage.small_file_system", scenario, str(directory)]
    result = subprocess.run(
        [*namespace, "sh", "-c", MOUNT_AND_RUN, str(directory), *script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    seen: dict[str, Any] = json.loads(result.stdout)
    assert seen["old_intact"]
    return seen


def test_hazard_15_full_disk_is_an_early_clear_error_and_leaves_no_debris(tmp_path: Path) -> None:
    seen = run("too_large", tmp_path)
    assert seen["failure"]["errno"] == errno.ENOSPC
    assert f"{20 * MIB} bytes (20.0 MiB) are needed, {seen['free']} bytes" in seen["failure"]["message"]
    assert "untouched" in seen["failure"]["message"]
    assert seen["failure"]["path"] == str(tmp_path / "new" / "file")
    assert seen["again"]["errno"] == errno.ENOSPC
    assert seen["names"] == ["file", "smaller"]  # not even the directory "new"; and the next save went well


def test_hazard_15_a_disk_that_fills_up_while_writing_leaves_no_debris_either(tmp_path: Path) -> None:
    seen = run("full_while_writing", tmp_path)
    assert seen["failure"]["errno"] == errno.ENOSPC
    assert f"{6 * MIB} bytes (6.0 MiB) are needed" in seen["failure"]["message"]
    assert seen["after"] == {"errno": None}
    assert seen["names"] == ["file", "next"]


def test_where_the_free_space_is_not_known_reserving_it_finds_out(tmp_path: Path) -> None:
    seen = run("reservation_fails", tmp_path)
    assert seen["failure"]["errno"] == errno.ENOSPC
    assert f"{20 * MIB} bytes (20.0 MiB) are needed" in seen["failure"]["message"]
    assert seen["names"] == ["file"]


def test_what_was_begun_keeps_its_space(tmp_path: Path) -> None:
    seen = run("reserved", tmp_path)
    assert seen["failure"]["errno"] == errno.ENOSPC
    assert seen["names"] == ["file", "first"]


def test_the_debris_of_a_dead_writer_does_not_fill_the_disk(tmp_path: Path) -> None:
    seen = run("debris_is_cleared_first", tmp_path)
    assert seen["failure"] == {"errno": None}
    assert seen["names"] == ["file", "next"]


def test_a_read_only_file_system_is_a_clear_error(tmp_path: Path) -> None:
    seen = run("read_only", tmp_path)
    for what in ("failure", "in_new_directory", "delete"):
        assert seen[what]["errno"] == errno.EROFS
        assert "mounted read-only" in seen[what]["message"]
    assert seen["names"] == ["file"]
