"""The future that knows whether its failure was seen."""

from concurrent.futures import TimeoutError as FutureTimeoutError

import pytest

from lastgood._futures import ObservedFuture


def test_a_failure_counts_as_fetched_once_somebody_has_got_it() -> None:
    for fetch in ("result", "exception"):
        future: ObservedFuture[None] = ObservedFuture()
        future.set_exception(KeyError("x"))
        assert future.unfetched_failure() is not None
        assert not future.failure_was_fetched
        if fetch == "result":
            with pytest.raises(KeyError):
                future.result()
        else:
            assert isinstance(future.exception(), KeyError)
        assert future.failure_was_fetched
        assert future.unfetched_failure() is None


def test_waiting_in_vain_or_a_success_fetches_nothing() -> None:
    future: ObservedFuture[int] = ObservedFuture()
    for wait in (future.result, future.exception):
        with pytest.raises(FutureTimeoutError):
            wait(0)
    assert future.unfetched_failure() is None
    future.set_result(3)
    assert future.result() == 3
    assert future.exception() is None
    assert not future.failure_was_fetched


def test_a_time_out_that_is_the_failure_itself_counts() -> None:
    future: ObservedFuture[None] = ObservedFuture()
    future.set_exception(TimeoutError("of the save"))
    with pytest.raises(TimeoutError, match="of the save"):
        future.result(5)
    assert future.failure_was_fetched


def test_nobody_can_cancel_what_is_under_way() -> None:
    future: ObservedFuture[None] = ObservedFuture()
    assert not future.cancel()
    future.set_result(None)
