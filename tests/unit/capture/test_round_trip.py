"""What comes back through torch.load is what torch.save would have brought back, for any state dict."""

import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tests.unit.capture.comparing import assert_same
from tests.unit.capture.files import is_safe, loaded_by_torch, loaded_by_us, save_and_listen
from tests.unit.capture.states import states

import lastgood
from lastgood.errors import UnsafeCheckpointError, UnsupportedStateError

TORCH_CANNOT = re.compile(
    # torch.save, for tensors that use the same memory as different dtypes.
    "as different types"
    # torch.load, for tensors of the newer dtypes that require grad.
    "|a leaf Variable that requires grad is being used in an in-place operation"
)


def torch_can(state: Any, path: Path) -> bool:
    """Save by torch; whether torch can do that, and load what it has saved."""
    try:
        torch.save(state, path)
        torch.load(path, weights_only=False)
    except RuntimeError as error:
        problem = str(error)
    else:
        return True
    assert TORCH_CANNOT.search(problem)
    return False


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
# Only a failure takes long: each step in looking for a smaller example writes files.
@pytest.mark.timeout(600)
# The folder is one for all examples: each replaces the files of the one before.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(state=states())
def test_torch_load_gives_what_torch_save_would_have_brought_back(tmp_path: Path, state: Any) -> None:
    ours, theirs = tmp_path / "ours.pt", tmp_path / "theirs.pt"
    refusal = ""
    try:
        warnings = save_and_listen(state, ours)
    except UnsupportedStateError as error:
        refusal = str(error)
    if refusal:
        assert "memory that another value uses as another dtype" in refusal
        assert not torch_can(state, theirs)
        return
    safe = is_safe(ours)
    assert safe == (not warnings)
    if torch_can(state, theirs):
        theirs_safe = is_safe(theirs)
        assert safe or not theirs_safe

        def expected() -> Any:
            return torch.load(theirs, weights_only=theirs_safe)
    else:

        def expected() -> Any:
            return state

    with zipfile.ZipFile(ours) as archive:
        assert archive.testzip() is None
    for loaded in loaded_by_torch(ours, safe=safe):
        assert_same(loaded, expected())
    if safe:
        for loaded in loaded_by_us(ours):
            assert_same(loaded, expected())
    else:
        with pytest.raises(UnsafeCheckpointError):
            lastgood.load(ours)
