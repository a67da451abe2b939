"""Makes the seeds of the fuzz targets from real files: ``python -m tests.hostile.make_corpus``.

What fuzzing has found stands beside them under ``found-...`` and stays.
"""

import json
import pickle
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from tests.hostile.archives import INDEX, PICKLE, stored_in
from tests.hostile.fuzzing import CORPUS
from tests.hostile.samples import exotic_state, single, small_state, spread, theirs


def _store(target: str, name: str, form: bytes, data: bytes) -> None:
    directory = CORPUS / target
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(form + data)


def _record(data: bytes, name: bytes) -> bytes:
    return next(record.data for record in stored_in(data) if record.name == name)


def _plain_values() -> dict[Any, Any]:
    return {
        "module": OrderedDict(weight=torch.nn.Parameter(torch.ones(2, 2)), note=torch.float16),
        "values": [1, -1, 2**40, 2**70, 0.5, True, None, "text", b"bytes", bytearray(b"x"), 1j],
        3: (torch.Size([1, 2]), torch.device("cpu"), {"a", "b"}),
        "sparse": torch.eye(2).to_sparse(),
    }


def main() -> None:
    """Write all seeds."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        ours = single(root / "ours", small_state()).whole["checkpoint_0.pt"]
        _store("archive", "ours", b"f", ours)
        _store("archive", "index", b"i", _record(ours, INDEX))
        plain = single(root / "plain", _plain_values()).whole["checkpoint_0.pt"]
        _store("archive", "plain", b"f", plain)
        exotic = single(root / "exotic", exotic_state()).whole["checkpoint_0.pt"]
        _store("archive", "exotic_index", b"i", _record(exotic, INDEX))
        parts = spread(root / "spread").whole
        _store("archive", "parts", b"f", parts["checkpoint_0.pt"])
        _store("archive", "parts_index", b"i", _record(parts["checkpoint_0.pt"], INDEX))
        _store("archive", "torch_zip", b"f", theirs(root / "zip", small_state()).whole["checkpoint_0.pt"])
        _store("pickle", "ours", b"z", _record(ours, PICKLE))
        _store("pickle", "plain", b"z", _record(plain, PICKLE))
        with_storages = {"a": torch.ones(4), "b": torch.nn.Parameter(torch.ones(2, 2))}
        _store("pickle", "tensors", b"z", _torch_pickle(root / "tensors", with_storages))
        _store("pickle", "values", b"z", _torch_pickle(root / "values", _plain_values()))
        old = theirs(root / "old", with_storages, _use_new_zipfile_serialization=False)
        _store("pickle", "old", b"o", old.whole["checkpoint_0.pt"])
        _store("pickle", "protocol_5", b"z", pickle.dumps({"a": [1, 2, b"3"]}, 5))
        manifest = parts["manifest.json"]
        _store("manifest", "whole", b"r", manifest)
        body = json.loads(manifest)["manifest"]
        _store("manifest", "body", b"s", json.dumps(body).encode())
        body["tensors"] += [
            ["x", "int8", [64, 64], 1, ["_S(0, 2)", "S(0)"]],
            ["y", "int8", [2048, 2048], 1, ["R", "S(1)"]],
        ]
        body["meshes"].append([[2, 2], None, [3, 1, 0, 2]])
        body["world_size"] = 4
        body["files"] += [file | {"rank": file["rank"] + 2} for file in body["files"]]
        _store("manifest", "grid", b"s", json.dumps(body).encode())


def _torch_pickle(root: Path, state: Any) -> bytes:
    data = theirs(root, state).whole["checkpoint_0.pt"]
    return next(record.data for record in stored_in(data) if record.name.endswith(b"/data.pkl"))


if __name__ == "__main__":
    main()
