"""The same state gives the same bytes, save id aside: in one process, in two, and whatever Python's hashes are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from tests.unit.capture.determined import a_state
from tests.unit.format.zip_layout import read_layout

import lastgood

ROOT = Path(__file__).parents[3]


def without_save_id(path: Path) -> bytes:
    """The file with the save id blanked out, in the two places where it stands, and the checksums that cover it."""
    data = bytearray(path.read_bytes())
    with path.open("rb") as file:
        records = {record.name.removeprefix("archive/.lastgood/"): record for record in read_layout(file)[0]}
    index, blocks, trailer = records["index.json"], records["blocks.crc32"], records["trailer"]

    def blank(start: int, end: int) -> None:
        data[start:end] = bytes(end - start)

    (place,) = re.finditer(rb'"save_id":"[0-9a-f]{32}"', data[index.data_offset :][: index.size])
    blank(index.data_offset + place.start(), index.data_offset + place.end())
    assert index.size <= 1024 * 1024, "one block, whose checksum is the last one in the table"
    blank(blocks.data_offset + blocks.size - 4, blocks.data_offset + blocks.size)
    blank(trailer.data_offset + 12, trailer.data_offset + 20)  # checksums of index and block table
    blank(trailer.data_offset + trailer.size - 16, trailer.data_offset + trailer.size)  # the id
    for record in (index, blocks, trailer):
        blank(record.entry_offset + 16, record.entry_offset + 20)
        descriptor = record.data_offset + record.size
        blank(descriptor + 4, descriptor + 8)
    return bytes(data)


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    state = a_state()
    lastgood.save(state, tmp_path / "first.pt")
    lastgood.save(state, tmp_path / "second.pt")
    lastgood.save(a_state(), tmp_path / "equal.pt")
    files = [tmp_path / name for name in ("first.pt", "second.pt", "equal.pt")]
    assert len({without_save_id(file) for file in files}) == 1
    assert len({file.read_bytes() for file in files}) == 3, "each save has an id of its own"


def test_what_was_loaded_saves_to_the_same_bytes(tmp_path: Path) -> None:
    lastgood.save(a_state(), tmp_path / "first.pt")
    lastgood.save(lastgood.load(tmp_path / "first.pt"), tmp_path / "second.pt")
    lastgood.save(torch.load(tmp_path / "first.pt", weights_only=True), tmp_path / "third.pt")
    first = without_save_id(tmp_path / "first.pt")
    assert without_save_id(tmp_path / "second.pt") == first
    assert without_save_id(tmp_path / "third.pt") == first


def test_two_processes_with_other_hashes_write_the_same_bytes(tmp_path: Path) -> None:
    processes = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-m", "tests.unit.capture.determined", str(tmp_path / f"{seed}.pt")]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
    orders = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert orders[0] != orders[1], "the two processes must iterate over sets in different orders"
    lastgood.save(a_state(), tmp_path / "here.pt")
    expected = without_save_id(tmp_path / "here.pt")
    assert without_save_id(tmp_path / "1.pt") == expected
    assert without_save_id(tmp_path / "2.pt") == expected


def test_the_order_of_a_dict_is_part_of_the_state(tmp_path: Path) -> None:
    pairs = [("b", 1), ("a", 2), (3, 4), ("c", torch.ones(1))]
    lastgood.save(dict(pairs), tmp_path / "file.pt")
    lastgood.save(dict(pairs[::-1]), tmp_path / "reversed.pt")
    assert list(lastgood.load(tmp_path / "file.pt")) == ["b", "a", 3, "c"]
    assert list(torch.load(tmp_path / "file.pt")) == ["b", "a", 3, "c"]
    assert list(lastgood.load(tmp_path / "reversed.pt")) == ["c", 3, "a", "b"]
    assert without_save_id(tmp_path / "file.pt") != without_save_id(tmp_path / "reversed.pt")
