"""What a failed save means: one is made good by the next, three in a row are not, and none is raised twice."""

import logging

import pytest

from lastgood.errors import ConfigError, StorageError
from lastgood.manager.failures import Failures


def failure(step: int) -> StorageError:
    return StorageError(f"step {step}")


def test_a_warning_is_all_until_three_have_failed_in_a_row(caplog: pytest.LogCaptureFixture) -> None:
    failures = Failures("warn")
    with caplog.at_level(logging.WARNING, "lastgood"):
        assert failures.failed(1, failure(1)) == 1
        failures.raise_if_too_many()
        assert failures.failed(2, failure(2)) == 2
        failures.raise_if_too_many()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "step 2" in caplog.records[1].getMessage()
    failures.failed(3, failure(3))
    with pytest.raises(StorageError, match="step 3") as caught:
        failures.raise_if_too_many()
    assert "3 saves in a row" in caught.value.__notes__[0]
    failures.raise_if_too_many()  # once
    failures.raise_any()


def test_a_save_that_goes_well_makes_good_what_failed_before() -> None:
    failures = Failures("warn")
    for step in (1, 2):
        failures.failed(step, failure(step))
    failures.saved()
    assert failures.in_a_row == 0
    failures.raise_any()
    failures.failed(3, failure(3))
    failures.raise_if_too_many()
    with pytest.raises(StorageError, match="step 3"):
        failures.raise_any()


def test_asked_to_raise_each_is_raised_once_even_if_later_saves_go_well() -> None:
    failures = Failures("raise")
    failures.failed(1, failure(1))
    failures.saved()
    with pytest.raises(StorageError, match="step 1"):
        failures.raise_if_too_many()
    failures.raise_if_too_many()


def test_another_word_than_the_two_is_refused() -> None:
    with pytest.raises(ConfigError, match="ignore"):
        Failures("ignore")  # type: ignore[arg-type]
