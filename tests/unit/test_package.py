"""The package itself: what importing it costs, and which names it offers."""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lastgood
from lastgood import errors

# What users know from PyTorch's experimental checkpointer: these modules under these names.
FLAT_MODULES = {
    "types": ["RankInfo", "STATE_DICT"],
    "utils": ["wrap_future"],
    "barriers": [
        "Barrier",
        "BarrierConfig",
        "DistBarrier",
        "TCPStoreBarrier",
        "create_barrier_from_config",
        "register_barrier",
    ],
    "checkpoint_writer": ["CheckpointWriter", "CheckpointWriterConfig", "WriterHook"],
    "checkpoint_reader": ["CheckpointReader"],
    "staging": ["CheckpointStager", "CheckpointStagerConfig", "DefaultStager"],
    "checkpoint_process": [
        "CheckpointProcess",
        "CheckpointProcessConfig",
        "RequestType",
        "WorkerRequest",
        "WorkerResponse",
    ],
    "checkpointer": ["AsyncCheckpointer", "Checkpointer", "SyncCheckpointer"],
    "config": ["CheckpointerConfig"],
    "builder": ["make_async_checkpointer", "make_sync_checkpointer"],
}

MODULES_WITHOUT_TORCH = [
    "lastgood",
    "lastgood.types",
    "lastgood.errors",
    "lastgood.utils",
    "lastgood.format",
    "lastgood.storage",
    "lastgood.checkpoint_writer",
    "lastgood.checkpoint_process",
    "lastgood._worker",
]


def in_a_fresh_interpreter(code: str) -> Any:
    """Run ``code`` in a Python of its own and return what it printed as JSON."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def names_by_home_for_type_checkers() -> dict[str, tuple[str, ...]]:
    """The imports that stand under ``if TYPE_CHECKING`` in the package, as {module: names}."""
    tree = ast.parse(Path(lastgood.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {str(node.module).removeprefix("lastgood."): tuple(name.name for name in node.names) for node in imports}


def test_importing_the_package_and_its_lower_layers_leaves_torch_alone() -> None:
    code = f"""
import importlib, json, sys
found = {{}}
for module in {MODULES_WITHOUT_TORCH}:
    importlib.import_module(module)
    found[module] = "torch" in sys.modules
print(json.dumps(found))
"""
    assert in_a_fresh_interpreter(code) == dict.fromkeys(MODULES_WITHOUT_TORCH, False)


def test_catching_an_error_by_its_short_name_does_not_import_torch() -> None:
    code = """
import json, sys
import lastgood
try:
    raise lastgood.CorruptCheckpointError("damaged")
except lastgood.LastgoodError:
    print(json.dumps("torch" in sys.modules))
"""
    assert in_a_fresh_interpreter(code) is False


@pytest.mark.parametrize("name", lastgood.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(lastgood, name) is not None
    assert name in dir(lastgood)


def test_every_error_class_is_public() -> None:
    defined = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert "LastgoodError" in defined
    assert defined <= set(lastgood.__all__)


def test_type_checkers_see_the_names_that_are_there() -> None:
    seen = names_by_home_for_type_checkers()
    assert seen == lastgood._HOMES
    assert {name for names in seen.values() for name in names} | {"__version__"} == set(lastgood.__all__)


def test_a_misspelt_name_is_an_attribute_error_that_repeats_it() -> None:
    with pytest.raises(AttributeError, match="no attribute 'CheckpointReeder'"):
        lastgood.CheckpointReeder  # noqa: B018


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in FLAT_MODULES.items() for name in names]
)
def test_the_names_known_from_pytorch_are_in_the_modules_known_from_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(f"lastgood.{module}"), name)


def test_the_package_is_marked_as_typed() -> None:
    assert Path(lastgood.__file__).with_name("py.typed").is_file()
