"""Describes checkpoints as ``docs/reader.py`` reads them. To be run where there is nothing but Python and NumPy.

Arguments: the folder that NumPy is in, the reader, then checkpoints. Prints JSON: which of torch and lastgood can be
imported, or were, and the descriptions.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [sys.argv[1], str(Path(__file__).parents[2])]

import numpy as np
from tests.compat.describing import Describer, digest

OPAQUE = re.compile(r"<(.*), which only a pickle describes, at \d+>")


class NumpyDescriber(Describer):
    """Describes what the reader makes: it has tuples for sizes and devices, and names for dtypes."""

    tensor_class = np.ndarray

    def describe(self, value: Any, depth: int = 0) -> Any:
        opaque = OPAQUE.fullmatch(value) if isinstance(value, str) else None
        return {"opaque": opaque[1]} if opaque else super().describe(value, depth)

    def describe_tensor(self, tensor: np.ndarray) -> Any:
        name = tensor.dtype.names[0] if tensor.dtype.names else tensor.dtype.name
        description = {"tensor": name, "shape": list(tensor.shape), "sha256": digest(tensor.tobytes())}
        if tensor.size and isinstance(tensor.base, bytes):
            description["memory"] = self.on_memory(id(tensor.base), tensor.__array_interface__["data"][0])
        return description


def load_module(path: str) -> ModuleType:
    """The module in this file."""
    spec = importlib.util.spec_from_file_location("reader", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def describe_all(reader: ModuleType, path: str) -> list[Any]:
    """The state of each rank, and its tensors by key path."""
    return [
        {"state": NumpyDescriber().describe(state), "keys": [key for key, _ in tensors]}
        for _, _, state, tensors in reader.read(path)
    ]


if __name__ == "__main__":
    reader = load_module(sys.argv[2])
    described = {path: describe_all(reader, path) for path in sys.argv[3:]}
    known = [name for name in ("torch", "lastgood") if name in sys.modules or importlib.util.find_spec(name)]
    print(json.dumps({"known": known, "described": described}))
