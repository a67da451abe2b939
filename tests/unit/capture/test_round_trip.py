"""What comes back through torch.load is what torch.save would have brought back, for any state dict."""

import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import lastgood
from lastgood._opaque import UnsafeValueWarning
from lastgood.errors import UnsafeCheckpointError
from tests.unit.capture.comparing import assert_same
from tests.unit.capture.states import states

EXAMPLES = int(os.environ.get("LASTGOOD_TEST_EXAMPLES", "150"))


def torch_refuses(state: Any, path: Path) -> bool:
    """Save by torch; whether torch itself cannot, as some tensors use the same memory as different dtypes."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        assert "as different types" in str(error)
        return True
    return False


def is_safe(path: Path) -> bool:
    """Whether torch loads its own file without running code from it."""
    try:
        torch.load(path, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


def save_and_listen(state: Any, path: Path) -> bool:
    """Save by lastgood; whether it warned that a safe load will refuse a value."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lastgood.save(state, path)
    assert all(warning.category is UnsafeValueWarning for warning in caught)
    return bool(caught)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
# The folder is one for all examples: each replaces the files of the one before.
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(state=states())
def test_torch_load_gives_what_torch_save_would_have_brought_back(tmp_path: Path, state: Any) -> None:
    ours, theirs = tmp_path / "ours.pt", tmp_path / "theirs.pt"
    warned = save_and_listen(state, ours)
    safe = is_safe(ours)
    assert safe == (not warned)
    if torch_refuses(state, theirs):

        def expected() -> Any:
            return state
    else:
        theirs_safe = is_safe(theirs)
        assert safe or not theirs_safe

        def expected() -> Any:
            return torch.load(theirs, weights_only=theirs_safe)

    with zipfile.ZipFile(ours) as archive:
        assert archive.testzip() is None
    for mmap in (False, True):
        for calculated in (False, True):
            with torch.utils.serialization.config.patch({"load.calculate_storage_offsets": calculated}):
                assert_same(torch.load(ours, weights_only=safe, mmap=mmap), expected())
    if safe:
        assert_same(lastgood.load(ours), expected())
        assert_same(lastgood.load(ours, mmap=True), expected())
    else:
        with pytest.raises(UnsafeCheckpointError):
            lastgood.load(ours)
