"""Fuzz target: opening, describing and checking files, and files with any index whose checksums are all right.

The first byte of an input says what the others are: ``f`` a file, ``i`` the index of a file of ours.
"""

import contextlib
import functools

from tests.hostile.archives import INDEX, PICKLE, Stored, replaced, sealed, stored_in
from tests.hostile.fuzzing import CORPUS, MemoryFile, instrumented, main

with instrumented():
    from lastgood._contents.checking import Findings, verify_archive, verify_torch_file
    from lastgood._contents.reading import describe_archive, tensors
    from lastgood._contents.torch_files import describe_torch_file
    from lastgood._loading.file import load_file, verify_file
    from lastgood.errors import CorruptCheckpointError, UncommittedCheckpointError, UnsafeCheckpointError
    from lastgood.format.archive import open_archive
    from lastgood.format.identity import read_identity
    from lastgood.format.index import InvalidIndexError, decode_index, encode_index
    from lastgood.format.pickle_writer import encode_pickle

REFUSALS = (CorruptCheckpointError, UnsafeCheckpointError, UncommittedCheckpointError)


@functools.cache
def _records() -> list[Stored]:
    return stored_in((CORPUS / "archive" / "ours").read_bytes()[1:])


def file_with_index(index: bytes) -> bytes:
    """A file of ours with this index, and with the pickle that follows from it, if there is one."""
    contents = {INDEX: index}
    with contextlib.suppress(InvalidIndexError, ValueError, TypeError, OverflowError):
        decoded = decode_index(index)
        contents[PICKLE] = encode_pickle(decoded, b"", [])
        decoded.pickle_size = len(contents[PICKLE])
        contents[INDEX] = encode_index(decoded)
    return sealed(replaced(_records(), contents))


def check(data: bytes) -> None:
    """All readers of one file; what they raise is a refusal, and they agree."""
    form, content = data[:1], data[1:]
    file = MemoryFile(file_with_index(content) if form == b"i" else content)
    try:
        archive = open_archive(file)
    except REFUSALS:
        _refused_or_done(file)
        return
    if archive is None:
        _check_theirs(file)
        return
    identity = read_identity(file)
    assert identity is not None
    assert (identity.save_id, identity.rank) == (archive.index.save_id, archive.index.rank)
    list(tensors(describe_archive(archive)))
    findings = Findings(file.path)
    verify_archive(archive, findings)
    loads = True
    try:
        load_file(file, verify=True)
    except REFUSALS:
        loads = False
    except RuntimeError:  # as torch says that it has no such device
        if all(entry.location == "cpu" for entry in archive.index.storages):
            raise
        loads = False
    assert not (loads and findings.problems), findings.problems
    with contextlib.suppress(*REFUSALS):
        verify_file(file)


def _refused_or_done(file: MemoryFile) -> None:
    with contextlib.suppress(*REFUSALS):
        read_identity(file)


def _check_theirs(file: MemoryFile) -> None:
    _refused_or_done(file)
    for read in (lambda: describe_torch_file(file), lambda: verify_torch_file(file, Findings(file.path))):
        with contextlib.suppress(*REFUSALS):
            read()
    with contextlib.suppress(*REFUSALS):
        verify_file(file)


if __name__ == "__main__":
    main("archive", check, json_form=b"i")
