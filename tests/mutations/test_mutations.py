"""The mutation gate fits the source: what it takes out stands there, once."""

from pathlib import Path

import pytest
from tests.mutations.gate import PROJECT, chosen, mutated, try_one
from tests.mutations.mutation import Mutation
from tests.mutations.mutations import MUTATIONS


@pytest.mark.parametrize("kind", MUTATIONS)
def test_every_step_that_the_gate_takes_out_is_in_the_source_and_its_tests_are_there(kind: str) -> None:
    for mutation in MUTATIONS[kind]:
        compile(mutated(mutation), mutation.file, "exec")
        for path in mutation.tests:
            assert (PROJECT / path).exists(), f"{mutation.what}: there is no {path}"


def test_a_step_that_no_test_misses_is_reported(tmp_path: Path) -> None:
    """And one that some test misses is not."""
    comment = Mutation("a comment", "format/epoch.py", "# what msgspec raises, too", "# so does msgspec", ())
    tests = ("tests/unit/coordination/test_epoch.py",)
    assert try_one(comment._replace(tests=tests)).noticed_by is None
    [looks] = chosen(["CRC of the epoch"])
    noticed = try_one(looks._replace(tests=tests)).noticed_by
    assert noticed is not None
    assert "test_a_damaged_record" in noticed
