import gc
import subprocess
import sys
import weakref
from concurrent.futures import CancelledError, Future

import pytest

from lastgood.utils import wrap_future


def test_anything_but_a_future_is_resolved_at_once_to_none():
    for result in (None, {"weights": 1}, 0):
        wrapped = wrap_future(result)
        assert wrapped.done()
        assert wrapped.result() is None


def test_success_resolves_to_none_whatever_the_result_was():
    original: Future[str] = Future()
    wrapped = wrap_future(original)
    assert not wrapped.done()
    original.set_result("state dict")
    assert wrapped.result(timeout=0) is None


def test_a_future_that_is_done_already_is_passed_on_too():
    original: Future[str] = Future()
    original.set_exception(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        wrap_future(original).result(timeout=0)


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_every_kind_of_exception_arrives(error):
    original: Future[None] = Future()
    wrapped = wrap_future(original)
    original.set_exception(error)
    assert wrapped.exception(timeout=0) is error


def test_cancellation_arrives():
    original: Future[None] = Future()
    wrapped = wrap_future(original)
    assert original.cancel()
    with pytest.raises(CancelledError):
        wrapped.result(timeout=0)


def test_the_outcome_is_not_lost_to_somebody_who_cancels_the_wrapping_future():
    original: Future[None] = Future()
    wrapped = wrap_future(original)
    assert not wrapped.cancel()
    original.set_exception(ValueError("the save failed"))
    with pytest.raises(ValueError, match="the save failed"):
        wrapped.result(timeout=0)


def test_the_result_is_not_kept_alive():
    class StateDict(dict):
        pass

    original: Future[StateDict] = Future()
    wrapped = wrap_future(original)
    original.set_result(StateDict())
    state = weakref.ref(original.result())
    del original
    gc.collect()
    assert wrapped.done()
    assert state() is None


def test_torch_is_not_imported():
    script = "import sys, lastgood.utils; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
