"""Files beyond what a plain zip can hold: more than 4 GiB in one record, more than 65,535 records."""

import dataclasses
import shutil
import zipfile
from pathlib import Path

import msgspec
import pytest
import torch
from tests.unit.capture.files import loaded_by_torch, loaded_by_us
from tests.unit.format.zip_layout import read_layout

import lastgood
from lastgood._image_writer import write_image
from lastgood.capture import capture
from lastgood.format.index_head import UNSAVED
from lastgood.format.nodes import ListNode
from lastgood.format.pickle_writer import encode_pickle
from lastgood.storage.local import LocalStorage

GIB = 1024**3


def test_a_tensor_of_more_than_four_gigabytes(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    if free < 10 * GIB:
        pytest.skip(f"needs 10 GiB of free disk; {tmp_path} has {free / GIB:.1f}")
    path = tmp_path / "large.pt"
    large = torch.zeros(4 * GIB + 5, dtype=torch.uint8)  # pages that nobody wrote to take no memory
    large[-3:] = torch.tensor([7, 8, 9])
    lastgood.save({"large": large, "after": torch.arange(10.0)}, path)
    try:
        with path.open("rb") as file:
            records = {record.name: record for record in read_layout(file)[0]}
        assert records["archive/data/0"].size == 4 * GIB + 5
        assert records["archive/data/1"].header_offset > 4 * GIB
        with zipfile.ZipFile(path) as archive:
            assert archive.getinfo("archive/data/0").file_size == 4 * GIB + 5
            assert archive.getinfo("archive/data/0").compress_size == 4 * GIB + 5
            assert archive.read("archive/data/1") == bytes(torch.arange(10.0).untyped_storage())
        for loaded in (torch.load(path, mmap=True, weights_only=True), lastgood.load(path, mmap=True)):
            assert loaded["large"].shape == (4 * GIB + 5,)
            assert loaded["large"][-5:].tolist() == [0, 0, 7, 8, 9]
            assert loaded["after"].tolist() == list(range(10))
        target = {"after": torch.empty(10)}
        lastgood.load(path, target)
        assert target["after"].tolist() == list(range(10))
    finally:
        path.unlink()


def test_more_than_65535_records(tmp_path: Path) -> None:
    count = 66_000
    known = capture([tensor.clone() for tensor in torch.arange(count, dtype=torch.int32).split(1)])
    # All records, but a state of a few tensors: torch takes half a minute to load that many.
    tensors = known.index.root.items  # type: ignore[union-attr]
    known.index.root = ListNode([tensors[0], tensors[count // 2], tensors[-1]])
    known.index.pickle_size = len(pickle_bytes := encode_pickle(known.index, b"", []))
    few = dataclasses.replace(known, pickle_bytes=pickle_bytes)
    image = few.image(msgspec.structs.replace(UNSAVED, save_id="ab" * 16))
    path = tmp_path / "many.pt"
    upload = LocalStorage().begin(str(path), image.size)
    write_image(image, upload, str(path), no_progress_timeout_secs=60)
    upload.commit()
    with path.open("rb") as file:
        assert len(read_layout(file)[0]) == count + 6
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == count + 6
        assert archive.read(f"archive/data/{count - 1}") == (count - 1).to_bytes(4, "little")
    for loaded in (*loaded_by_torch(path, safe=True), *loaded_by_us(path)):
        assert [tensor.item() for tensor in loaded] == [0, count // 2, count - 1]
