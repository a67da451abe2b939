"""Hazard 13: views that stage their whole storage, resized storages, dropped bits, sparse and quantised tensors."""

import zipfile
from pathlib import Path

import pytest
import torch
from tests.unit.capture.files import loaded_by_torch, loaded_by_us

import lastgood
from lastgood.errors import UnsupportedStateError

FORTY_MB = 40_000_000


def storage_records(path: Path) -> list[int]:
    """The sizes of the records that hold tensor data, in order."""
    with zipfile.ZipFile(path) as archive:
        return [info.file_size for info in archive.infolist() if info.filename.startswith("archive/data/")]


def test_hazard_13_a_view_of_ten_elements_saves_forty_bytes_of_forty_megabytes(tmp_path: Path) -> None:
    large = torch.zeros(FORTY_MB // 4)
    large[5_000_000:5_000_010] = torch.arange(10.0)
    path = tmp_path / "file.pt"
    lastgood.save({"view": large[5_000_000:5_000_010]}, path)
    assert storage_records(path) == [40]
    assert path.stat().st_size < 8192
    for loaded in (*loaded_by_torch(path, safe=True), *loaded_by_us(path)):
        assert loaded["view"].tolist() == list(range(10))
        assert loaded["view"].untyped_storage().nbytes() == 40


def test_hazard_13_two_views_save_the_span_from_the_first_to_the_last_used_byte(tmp_path: Path) -> None:
    large = torch.arange(10_000.0)
    path = tmp_path / "file.pt"
    lastgood.save({"late": large[5_020:5_030], "early": large[5_000:5_010:3], "empty": large[9_000:9_000]}, path)
    assert storage_records(path) == [4 * 30]
    for loaded in (*loaded_by_torch(path, safe=True), *loaded_by_us(path)):
        assert loaded["late"].tolist() == list(range(5_020, 5_030))
        assert loaded["early"].tolist() == [5_000, 5_003, 5_006, 5_009]
        assert loaded["late"].untyped_storage().data_ptr() == loaded["early"].untyped_storage().data_ptr()


def test_hazard_13_an_expanded_scalar_saves_one_element(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    lastgood.save({"ones": torch.ones(1).expand(1000, 1000), "nothing": torch.empty(0, 7)}, path)
    assert storage_records(path) == [4, 0]
    for loaded in (*loaded_by_torch(path, safe=True), *loaded_by_us(path)):
        assert loaded["ones"].stride() == (0, 0)
        assert loaded["ones"].sum() == 1_000_000
        assert loaded["nothing"].shape == (0, 7)


def test_hazard_13_a_storage_resized_to_nothing_is_a_clear_error(tmp_path: Path) -> None:
    tensor = torch.ones(10)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedStateError, match=r"'shard' needs 40 bytes of a storage that was resized to 0"):
        lastgood.save({"shard": tensor}, tmp_path / "file.pt")


def test_hazard_13_a_storage_resized_to_more_saves_what_is_used(tmp_path: Path) -> None:
    tensor = torch.ones(10)
    tensor.untyped_storage().resize_(4096)
    lastgood.save({"grown": tensor}, tmp_path / "file.pt")
    assert storage_records(tmp_path / "file.pt") == [40]
    assert lastgood.load(tmp_path / "file.pt")["grown"].tolist() == [1.0] * 10


def test_hazard_13_conjugate_and_negative_bits_are_kept(tmp_path: Path) -> None:
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    state = {"conj": numbers.conj(), "neg": numbers.conj().imag, "plain": numbers}
    path = tmp_path / "file.pt"
    lastgood.save(state, path)
    for loaded in (*loaded_by_torch(path, safe=True), *loaded_by_us(path)):
        assert [loaded[name].is_conj() for name in state] == [True, False, False]
        assert [loaded[name].is_neg() for name in state] == [False, True, False]
        assert loaded["conj"].tolist() == [1 - 2j, 3 + 4j]
        assert loaded["neg"].tolist() == [-2.0, 4.0]
        assert loaded["plain"].tolist() == [1 + 2j, 3 - 4j]
        assert loaded["conj"].data_ptr() == loaded["plain"].data_ptr()


def test_hazard_13_sparse_tensors_work(tmp_path: Path) -> None:
    dense = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    path = tmp_path / "file.pt"
    lastgood.save({"sparse": dense.to_sparse()}, path)
    for loaded in (*loaded_by_torch(path, safe=True), *loaded_by_us(path)):
        assert loaded["sparse"].layout is torch.sparse_coo
        assert torch.equal(loaded["sparse"].to_dense(), dense)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_hazard_13_quantised_tensors_work(tmp_path: Path) -> None:
    whole = torch.quantize_per_tensor(torch.arange(100_000.0), 0.5, 10, torch.qint32)
    path = tmp_path / "file.pt"
    lastgood.save({"view": whole[50_000:50_010]}, path)
    assert storage_records(path) == [40]
    for loaded in (*loaded_by_torch(path, safe=True), *loaded_by_us(path)):
        assert loaded["view"].is_quantized
        assert loaded["view"].dequantize().tolist() == list(range(50_000, 50_010))
