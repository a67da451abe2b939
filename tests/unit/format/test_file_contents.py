"""What stands in a file that lastgood.save wrote, byte for byte, read without lastgood's own reader."""

import json
import pickletools
import shutil
import struct
import subprocess
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.unit.format.zip_layout import ZipRecord, read_layout

import lastgood
from lastgood._single_file import save
from lastgood.capture import capture
from lastgood.format.index_head import UNSAVED
from lastgood.format.stream import FileImage, stream_image

BLOCK = 1024 * 1024
SAVE_ID = "0123456789abcdef" * 2


def a_state() -> dict[str, Any]:
    sizes = [0, 1, 63, 64, 65, 65_535, 65_536, 65_537, BLOCK, 3 * BLOCK + 5]
    tensors = [torch.arange(size, dtype=torch.int64).to(torch.uint8) for size in sizes]
    return {"tensors": tensors, "counts": Counter("abc"), "step": 7}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with records of many sizes."""
    file = tmp_path_factory.mktemp("contents") / "file.pt"
    save(a_state(), file)
    return file


@pytest.fixture(scope="module")
def records(path: Path) -> dict[str, ZipRecord]:
    with path.open("rb") as file:
        return {record.name: record for record in read_layout(file)[0]}


def data_of(path: Path, record: ZipRecord) -> bytes:
    return path.read_bytes()[record.data_offset :][: record.size]


def test_the_records_are_torch_s_and_ours_under_one_prefix(records: dict[str, ZipRecord]) -> None:
    storages = [f"archive/data/{number}" for number in range(10)]
    ours = [f"archive/.lastgood/{name}" for name in ("index.json", "blocks.crc32", "trailer")]
    assert list(records) == ["archive/data.pkl", "archive/version", "archive/byteorder", *storages, *ours]
    assert {name.split("/")[0] for name in records} == {"archive"}
    # With this record, torch would calculate where storages stand instead of reading it.
    assert not any("format_version" in name for name in records)


def test_records_are_stored_uncompressed(records: dict[str, ZipRecord]) -> None:
    assert {record.method for record in records.values()} == {zipfile.ZIP_STORED}


def test_large_records_start_on_pages_and_small_ones_on_64_bytes(records: dict[str, ZipRecord]) -> None:
    large = [record for record in records.values() if record.size >= 65_536]
    assert len(large) == 4
    assert {record.data_offset % 4096 for record in large} == {0}
    assert {record.data_offset % 64 for record in records.values()} == {0}
    assert any(record.data_offset % 4096 for record in records.values()), "small ones are not all on pages"


def test_padding_is_zeros(path: Path, records: dict[str, ZipRecord]) -> None:
    for record in records.values():
        kind, length = struct.unpack_from("<HH", record.local_extra)
        assert kind != 1, "no record here needs zip64"
        assert record.local_extra[4:] == bytes(length)


def test_storage_records_hold_the_tensors_bytes(path: Path, records: dict[str, ZipRecord]) -> None:
    for number, tensor in enumerate(a_state()["tensors"]):
        assert data_of(path, records[f"archive/data/{number}"]) == bytes(tensor.tolist())


def test_checksums_in_directory_and_descriptors_are_those_of_the_data(
    path: Path, records: dict[str, ZipRecord]
) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    contents = path.read_bytes()
    for record in records.values():
        crc = zlib.crc32(data_of(path, record))
        assert record.crc == crc
        descriptor = contents[record.data_offset + record.size : record.end]
        assert record.descriptor.unpack(descriptor) == (b"PK\x07\x08", crc, record.size, record.size)


def test_the_block_table_has_the_checksum_of_every_block(path: Path, records: dict[str, ZipRecord]) -> None:
    expected = []
    for record in list(records.values())[:-2]:
        data = data_of(path, record)
        expected += [zlib.crc32(data[start : start + BLOCK]) for start in range(0, len(data), BLOCK)]
    table = data_of(path, records["archive/.lastgood/blocks.crc32"])
    assert list(struct.unpack(f"<{len(table) // 4}I", table)) == expected


def test_the_trailer_leads_to_index_and_block_table(path: Path, records: dict[str, ZipRecord]) -> None:
    index, blocks, trailer = list(records.values())[-3:]
    magic, version, index_crc, blocks_crc, _, *places, save_id = struct.unpack("<8sIIIIQQQQ16s", data_of(path, trailer))
    assert (magic, version) == (b"LASTGOOD", 1)
    assert (index_crc, blocks_crc) == (index.crc, blocks.crc)
    assert places == [index.data_offset, index.size, blocks.data_offset, blocks.size]
    assert json.loads(data_of(path, index))["save_id"] == save_id.hex()


def test_the_pickle_is_of_protocol_2(path: Path, records: dict[str, ZipRecord]) -> None:
    pickled = data_of(path, records["archive/data.pkl"])
    assert pickled.startswith(b"\x80\x02")
    assert max(opcode.proto for opcode, _, _ in pickletools.genops(pickled)) == 2


def test_torch_finds_nothing_unsafe_in_it(path: Path) -> None:
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []


def test_unzip_finds_no_fault(path: Path) -> None:
    unzip = shutil.which("unzip")
    if unzip is None:
        pytest.skip("there is no unzip on this machine")
    run = subprocess.run([unzip, "-t", str(path)], capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "No errors detected" in run.stdout


class Windows:
    """Takes an image through windows of the sizes given, again and again."""

    def __init__(self, *sizes: int) -> None:
        self.written = bytearray()
        self._sizes = sizes
        self._windows = 0
        self._window = memoryview(b"")

    def append(self, data: bytes) -> None:
        self.written += data

    def window(self, limit: int) -> memoryview:
        size = self._sizes[self._windows % len(self._sizes)]
        self._windows += 1
        self._window = memoryview(bytearray(min(size, limit)))
        return self._window

    def advance(self, count: int) -> None:
        self.written += self._window[:count]


def an_image() -> FileImage:
    return capture(a_state()).image(msgspec.structs.replace(UNSAVED, save_id=SAVE_ID))


def test_the_bytes_do_not_depend_on_how_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lastgood._single_file.new_save_id", lambda: SAVE_ID)
    lastgood.save(a_state(), tmp_path / "file.pt")
    expected = (tmp_path / "file.pt").read_bytes()
    for sizes in [(10 * BLOCK,), (4096,), (99_991, 1, 65_536)]:
        windows = Windows(*sizes)
        image = an_image()
        stream_image(image, windows)
        assert len(windows.written) == image.size
        assert windows.written == expected
