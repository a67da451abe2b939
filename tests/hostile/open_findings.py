"""Damage that is not found yet: its test is expected to fail, and complains when it does not any more."""

import pytest

DISKS = pytest.mark.xfail(
    reason="not mended yet: 'lastgood verify' does not look at all the counts and sizes for which torch refuses a zip",
    strict=True,
)
