"""Reads checkpoints by docs/format.md with the standard library and NumPy: python docs/reader.py FILE_OR_DIRECTORY"""

import json
import struct
import sys
import zipfile
from binascii import a2b_base64, crc32
from collections import OrderedDict
from pathlib import Path

import numpy as np

RAW = {"bfloat16": [("bfloat16", "u2")], "complex32": [("complex32", "2f2")]}  # array["bfloat16"] are the bits
RAW |= {f"float8_{kind}": [(f"float8_{kind}", "u1")] for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")}
PLAIN = {"itself": lambda value: value, "bytes": a2b_base64, "size": tuple, "dtype": "torch.{}".format}
PLAIN |= {"device": lambda *device: device, "opaque": "<{4}, which only a pickle describes, at {0}>".format}
PLAIN["int"] = lambda data: int.from_bytes(a2b_base64(data), "little", signed=True)
PLAIN["float"] = lambda data: struct.unpack(">d", a2b_base64(data))[0]
PLAIN["complex"] = lambda data: complex(*struct.unpack(">dd", a2b_base64(data)))
PLAIN["text"] = lambda data: a2b_base64(data).decode("utf-8", "surrogatepass")
BEGIN = {"dict": lambda items: {}, "map": lambda pairs: {}, "ordered_dict": lambda *_: OrderedDict()}
BEGIN |= {"list": lambda items: [], "bytearray": lambda data: bytearray(a2b_base64(data))}


def read_file(path, wholes):
    """One rank's file: its index, what a manifest has to say of it, its state, and the tensors in that by key path."""
    with zipfile.ZipFile(path) as archive:  # compares whole records with the zip's checksums
        records = {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}
    *checked, table, trailer = records.values()
    *head, save_id = struct.unpack("<8s4I4Q16s", trailer)
    blocks = [crc32(data[start : start + 2**20]) for data in checked for start in range(0, len(data), 2**20)]
    if [*head[:4], table] != [b"LASTGOOD", 1, crc32(checked[-1]), crc32(table), np.array(blocks, "<u4").tobytes()]:
        raise ValueError(f"{path} is damaged, or not of format version 1")
    index, objects, tensors = json.loads(checked[-1]), [], []
    facts = [index["rank"], path.name, path.stat().st_size, crc32(trailer), save_id.hex()]

    def tensor(storage, dtype, offset, shape, stride, flags):
        memory, dtype = records[f"data/{storage}"], np.dtype(RAW.get(dtype, dtype)).newbyteorder(index["byteorder"])
        array = np.ndarray(shape, dtype, memory, offset * dtype.itemsize, dtype.itemsize * np.array(stride, int))
        array = np.asarray(np.conj(array)) if "c" in flags else array
        return np.asarray(np.negative(array)) if "n" in flags else array

    def value(node, path):
        kind, *about = node if isinstance(node, list) else ("itself", node)
        if kind in plain:
            return plain[kind](*about)
        if kind == "tuple":
            return tuple(value(item, f"{path}[{number}]") for number, item in enumerate(about[0]))
        if kind == "sharded":
            mesh, placements, dtype, shape, _, offsets, parts = about
            form = json.dumps([path, dtype, shape, index["meshes"][mesh], placements])
            made, times = wholes.setdefault(form, (np.empty(shape, RAW.get(dtype, dtype)), np.zeros(shape, int)))
            for starts, part in zip(offsets, parts, strict=True):
                box = tuple(slice(start, start + size) for start, size in zip(starts, part[4], strict=True))
                objects.append(tensor(*part[1:]))
                made[box], times[box] = objects[-1], times[box] + 1
        else:  # numbered where its node begins: before it is filled
            made = make[kind](*about)
            objects.append(made)
        if kind in ("tensor", "sharded"):
            tensors.append((path, made))
        elif kind == "list":
            made += [value(item, f"{path}[{number}]") for number, item in enumerate(about[0])]
        elif isinstance(made, dict):
            for key, item in about[0].items() if kind == "dict" else about[0]:
                key = value(key, path)
                made[key if key.__hash__ else id(key)] = value(item, f"{path}.{key}" if path else f"{key}")
            for name, item in about[1].items() if kind == "ordered_dict" else ():
                vars(made)[name] = value(item, f"{path}.{name}")
        return made

    plain = {**PLAIN, "reference": objects.__getitem__}
    make = {**BEGIN, "tensor": tensor, "set": lambda items: set(value(["tuple", items], ""))}
    return index, facts, value(index["root"], ""), tensors


def read(path):
    """What :func:`read_file` gives for each rank; a tensor that is spread over ranks is whole in the state of each."""
    path, wholes = Path(path), {}
    files = [read_file(path / "checkpoint_0.pt" if path.is_dir() else path, wholes)]
    for rank in range(1, files[0][0]["world_size"] if path.is_dir() else 1):
        files.append(read_file(path / f"checkpoint_{rank}.pt", wholes))
    is_committed = all(index["independent"] or index["world_size"] == 1 for index, *_ in files)
    if (path / "manifest.json").exists():
        sealed = json.loads(text := (path / "manifest.json").read_bytes())
        tensors, meshes = sealed["manifest"]["tensors"], sealed["manifest"]["meshes"]
        forms = {json.dumps([name, *form, meshes[mesh], placements]) for name, *form, mesh, placements in tensors}
        named = [list(entry.values()) for entry in sealed["manifest"]["files"]]
        crc = crc32(text[text.index(b'"manifest":') + 11 : text.rindex(b"}")])
        is_committed = (crc, named, forms) == (sealed["crc32"], [facts for _, facts, *_ in files], set(wholes))
    if not is_committed or any((times != 1).any() for _, times in wholes.values()):
        raise ValueError(f"{path} is damaged, or was never committed as a whole")
    return files


if __name__ == "__main__":
    for index, _, _, tensors in read(sys.argv[1]):
        for key, array in tensors:
            print(index["rank"], key, *array.dtype.names or [array.dtype.name], list(array.shape))
