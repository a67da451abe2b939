"""Fuzz target: what is said of pickles before torch reads them, and what torch then makes of those that may be read.

The first byte of an input says what the others are: ``z`` the pickle of a zip, ``o`` a file in torch's old format.
"""

import contextlib
import io
import zipfile

from tests.hostile.fuzzing import MemoryFile, instrumented, main

with instrumented():
    from lastgood._contents.shown import show_value
    from lastgood._contents.torch_files import describe_torch_file
    from lastgood._loading.legacy import check_legacy
    from lastgood._loading.opaque_values import refuse_unsafe, safe_torch_load
    from lastgood.errors import CorruptCheckpointError, UnsafeCheckpointError
    from lastgood.format.nodes import walk_paths

REFUSALS = (CorruptCheckpointError, UnsafeCheckpointError)
PATH = "/run/step-5/checkpoint_0.pt"
SIZES = {"0": 16, "1": 16}


def zip_around(pickled: bytes) -> bytes:
    """A zip such as torch.save writes, around a pickle, with two storages of sixteen bytes."""
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for key, size in SIZES.items():
            archive.writestr(f"archive/data/{key}", bytes(size))
    return output.getvalue()


def check(data: bytes) -> None:
    """A pickle is refused, or torch's restricted unpickler reads or refuses it, without harm either way."""
    form, content = data[:1], data[1:]
    stored = content if form == b"o" else zip_around(content)
    with contextlib.suppress(*REFUSALS):
        root = describe_torch_file(MemoryFile(stored, PATH)).root
        for _, node in walk_paths(root):
            show_value(node)
    with contextlib.suppress(*REFUSALS):
        if form == b"o":
            check_legacy(MemoryFile(stored, PATH))
        else:
            refuse_unsafe(PATH, len(stored), content, SIZES.get)
        safe_torch_load(io.BytesIO(stored), PATH, map_location="cpu")


if __name__ == "__main__":
    main("pickle", check)
