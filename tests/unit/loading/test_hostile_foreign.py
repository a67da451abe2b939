"""Files made to hurt whoever loads them, in torch's formats: refused, with nothing run and no memory taken."""

import os
import pickle
import resource
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.workers import Worker
from tests.unit.loading.files import call_pickle, edit_pickle, opcodes, verify, zip_of

import lastgood
from lastgood._loading.zip_directory import is_zip, read_directory
from lastgood.errors import CorruptCheckpointError, LastgoodError, UnsafeCheckpointError

MEBIBYTE = 1024 * 1024
SPARE = 64 * MEBIBYTE
SECONDS = 20.0


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    started = Worker()
    yield started
    started.kill()


def peak_memory() -> int:
    """The most resident memory this process has had since :func:`reset_peak`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def load_in_little_memory(path: str, target: Any = None) -> tuple[str, str, int, float]:
    """In a worker: what a load raised, by how much it raised the peak memory, and how long it took.

    The address space is limited too: a large allocation fails even when nothing touches it.
    """
    size = os.path.getsize(path)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    # Threads reserve address space for their stacks and heaps without using it.
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 3 * size + 2048 * MEBIBYTE, before[1]))
    Path("/proc/self/clear_refs").write_text("5")
    resident = peak_memory()
    started = time.monotonic()
    try:
        lastgood.load(path, target)
        outcome, message = "loaded", ""
    except LastgoodError as error:
        outcome, message = type(error).__name__, str(error)
    except BaseException as error:
        outcome, message = f"raw {type(error).__name__}", str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    return outcome, message, peak_memory() - resident, time.monotonic() - started


def refused(worker: Worker, path: Path, *kinds: type[LastgoodError]) -> str:
    """Both a whole and a partial load refuse the file within bounds; returns the message."""
    allowed = [kind.__name__ for kind in kinds or (CorruptCheckpointError, UnsafeCheckpointError)]
    for target in (None, {"a": None}):
        outcome, message, memory, seconds = worker.call(load_in_little_memory, str(path), target)
        assert outcome in allowed, (outcome, message)
        assert memory < path.stat().st_size + SPARE
        assert seconds < SECONDS
        assert str(path) in message
    # Known to be harmless now, here as well.
    with pytest.raises(kinds or (CorruptCheckpointError, UnsafeCheckpointError)):
        lastgood.load(path)
    return message


# Code


class Canary:
    """Pickles into a call that makes a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._file}",)


def test_hazard_21_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    files = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}
    for name, options in files.items():
        torch.save({"a": torch.ones(2), "b": Canary(canary)}, tmp_path / name, **options)
        for target in (None, {"a": None}, {"a": torch.zeros(2)}):
            with pytest.raises(UnsafeCheckpointError, match=r"posix\.system") as caught:
                lastgood.load(tmp_path / name, target)
            assert isinstance(caught.value, pickle.UnpicklingError)
            assert str(tmp_path / name) in str(caught.value)
        with pytest.raises(UnsafeCheckpointError):
            lastgood.load(tmp_path / name, verify=False)
    assert not canary.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins exec",
        "__builtin__ eval",
        "os system",
        "posix system",
        "subprocess Popen",
        "torch.serialization load",
        "torch load",
        "torch.hub load",
        "runpy run_path",
        "builtins getattr",
        "torch._C _jit_compile",
    ],
)
def test_functions_that_are_on_nobodys_list(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    arguments = opcodes((f"open({str(canary)!r}, 'w')",))
    file = zip_of(tmp_path / "f.pt", call_pickle(name, arguments))
    with pytest.raises(UnsafeCheckpointError, match=name.split()[1]):
        lastgood.load(file)
    assert not canary.exists()


def test_plain_pickles_are_no_checkpoints(tmp_path: Path) -> None:
    canary, file = tmp_path / "canary", tmp_path / "plain.pkl"
    for protocol in range(6):
        file.write_bytes(pickle.dumps({"b": Canary(canary)}, protocol))
        with pytest.raises((CorruptCheckpointError, UnsafeCheckpointError)):
            lastgood.load(file)
        with pytest.raises((CorruptCheckpointError, UnsafeCheckpointError)):
            verify(file)
    assert not canary.exists()


# Memory and time


def large(number: int) -> bytes:
    return opcodes((number,))


def nested_tuples(levels: int) -> bytes:
    """A tuple that holds the one below it twice, at every level: 2**levels items in a few hundred bytes."""
    doubled = b"".join(b"q" + bytes([level]) + b"h" + bytes([level]) + b"\x86" for level in range(levels))
    return b"\x80\x02K\x01" + doubled


def tensor_call(storage: bytes, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + opcodes(offset)
        + opcodes(size)
        + opcodes(stride)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def storage_id(numel: int, kind: bytes = b"FloatStorage", key: str = "0") -> bytes:
    return (
        b"(" + opcodes("storage") + b"ctorch\n" + kind + b"\n" + opcodes(key) + opcodes("cpu") + opcodes(numel) + b"tQ"
    )


def bombs() -> dict[str, bytes]:
    storage = storage_id(4)
    expanded = tensor_call(storage, 0, (2**38,), (0,))
    memoized_text = b"\x80\x02" + opcodes("x" * 100_000) + b"q\x00]("
    return {
        "bytearray": call_pickle("builtins bytearray", large(10**11)),
        "bytearray_py2": call_pickle("__builtin__ bytearray", large(10**11)),
        "untyped_storage": call_pickle("torch.storage UntypedStorage", large(10**11)),
        "typed_storage": call_pickle("torch.storage TypedStorage", large(10**11)),
        "float_storage": call_pickle("torch FloatStorage", large(10**11)),
        "tensor": call_pickle("torch Tensor", large(10**11)),
        "tensor_dimensions": call_pickle("torch Tensor", opcodes((10**6, 10**6))),
        "float_tensor": call_pickle("torch FloatTensor", large(10**11)),
        "sparse_tensor": call_pickle("torch.sparse FloatTensor", large(10**11)),
        "new_tensor": b"\x80\x02ctorch\nTensor\n" + large(10**11) + b"\x81.",
        "new_storage": b"\x80\x02ctorch.storage\nUntypedStorage\n" + large(10**11) + b"\x81.",
        "storage_beyond_record": b"\x80\x02" + storage_id(2**30) + b".",
        "storage_of_another_kind": b"\x80\x02" + storage_id(4, b"DoubleStorage") + b".",
        "storage_without_record": b"\x80\x02" + storage_id(4, key="7") + b".",
        "storage_negative": b"\x80\x02" + storage_id(-4) + b".",
        "module_id": b"\x80\x02(" + opcodes("module") + b"ctorch\nTensor\n" + opcodes("") * 2 + b"tQ.",
        "integer_id": b"\x80\x02K\x01Q.",
        "view_beyond_storage": b"\x80\x02" + tensor_call(storage, 0, (10**10,), (1,)) + b".",
        "view_offset": b"\x80\x02" + tensor_call(storage, 2**61, (1,), (1,)) + b".",
        "view_negative": b"\x80\x02" + tensor_call(storage, -1, (2,), (1,)) + b".",
        "view_overflow": b"\x80\x02" + tensor_call(storage, 0, (2**62, 2**62), (0, 0)) + b".",
        "set_state_of_tensor": b"\x80\x02"
        + tensor_call(storage, 0, (4,), (1,))
        + b"("
        + storage
        + opcodes(0)
        + opcodes((10**10,))
        + opcodes((1,))
        + b"tb.",
        "quantized_expanded": b"\x80\x02ctorch._utils\n_rebuild_qtensor\n("
        + storage_id(4, b"QInt8Storage")
        + opcodes(0)
        + opcodes((2**38,))
        + opcodes((0,))
        + b"(ctorch\nper_tensor_affine\n"
        + opcodes(0.5)
        + opcodes(0)
        + b"t\x89ccollections\nOrderedDict\n)RtR.",
        "device_copy_of_expanded": b"\x80\x02ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n("
        + expanded
        + b"ctorch\nfloat64\n"
        + opcodes("cpu")
        + b"\x89tR.",
        "through_type": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\nbytearray\nctorch\nTensor\n"
        + large(10**11)
        + b"}tR.",
        "counter_of_tensor": b"\x80\x02ccollections\nCounter\n" + expanded + b"\x85R.",
        "set_of_tensor": b"\x80\x02cbuiltins\nset\n" + expanded + b"\x85R.",
        "ordered_dict_of_tensor": b"\x80\x02ccollections\nOrderedDict\n" + expanded + b"\x85R.",
        "user_dict_of_tensor": b"\x80\x02cUserDict\nOrderedDict\n" + expanded + b"\x85R.",
        "state_of_ordered_dict": b"\x80\x02ccollections\nOrderedDict\n)R" + expanded + b"b.",
        "arguments_from_tensor": b"\x80\x02cbuiltins\nset\n" + expanded + b"R.",
        "codec": call_pickle("_codecs encode", opcodes(("a" * 1000, "punycode"))),
        "doubled_tuple": b"\x80\x02}" + nested_tuples(60)[2:] + b"K\x01s.",
        "doubled_tuple_value": nested_tuples(60) + b".",
        "deep_tuple": b"\x80\x02)" + b"\x85" * 300_000 + b".",
        "deep_tuple_key": b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.",
        "same_bytes_again": memoized_text + b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R" * 3000 + b"e.",
        "long_text": b"\x80\x02X\xff\xff\xff\xff" + b"a",
        "protocol_4": b"\x80\x04}.",
        "unknown_opcode": b"\x80\x02(I99999\n.",
        "endless_name": b"\x80\x02c" + b"a" * 5000,
        "no_end": b"\x80\x02}q\x00",
        "empty": b"",
        "nothing_on_the_stack": b"\x80\x02.",
        "missing_mark": b"\x80\x02t.",
        "missing_memo": b"\x80\x02h\x05.",
    }


@pytest.mark.parametrize("name", list(bombs()))
def test_bombs_in_the_pickle(tmp_path: Path, worker: Worker, name: str) -> None:
    file = zip_of(tmp_path / "bomb.pt", bombs()[name], {"0": bytes(16)})
    refused(worker, file)


def legacy_file(path: Path, pickled: bytes, storages: dict[str, bytes], itemsize: int = 4) -> Path:
    """A file in torch's old format around any pickle."""
    parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts += [pickled, pickle.dumps(list(storages), 2)]
    parts += [struct.pack("<q", len(data) // itemsize) + data for data in storages.values()]
    path.write_bytes(b"".join(parts))
    return path


def legacy_id(numel: int, key: str = "0", view: bytes = b"N") -> bytes:
    return storage_id(numel, key=key)[:-2] + view + b"tQ"


def test_the_forged_old_format_is_the_real_one(tmp_path: Path) -> None:
    pickled = b"\x80\x02" + tensor_call(legacy_id(4), 0, (4,), (1,)) + b"."
    file = legacy_file(tmp_path / "old.pt", pickled, {"0": struct.pack("<4f", 1, 2, 3, 4)})
    assert torch.equal(torch.load(file), torch.tensor([1.0, 2, 3, 4]))
    assert torch.equal(lastgood.load(file), torch.tensor([1.0, 2, 3, 4]))
    part = legacy_id(4, view=b"(" + opcodes("v") + opcodes(1) + opcodes(2) + b"t")
    legacy_file(file, b"\x80\x02" + tensor_call(part, 0, (2,), (1,)) + b".", {"0": struct.pack("<4f", 1, 2, 3, 4)})
    assert torch.equal(lastgood.load(file), torch.load(file))


def legacy_bombs() -> dict[str, tuple[bytes, dict[str, bytes]]]:
    data = {"0": bytes(16)}
    return {
        "storage_larger_than_the_file": (storage_id(10**10)[:-2] + b"NtQ", data),
        "storage_without_data": (legacy_id(10**6, "1"), data),
        "storage_never_filled": (legacy_id(4), {}),
        "two_sizes": (b"(" + legacy_id(4) + legacy_id(10**9) + b"t", data),
        "view_grows_storage": (tensor_call(legacy_id(4), 0, (10**9,), (1,)), data),
        "part_outside": (legacy_id(4, view=b"(" + opcodes("v") + opcodes(3) + opcodes(2) + b"t"), data),
        "part_of_nothing": (legacy_id(4, view=opcodes((1,))), data),
        "bytearray": (call_pickle("builtins bytearray", large(10**11))[2:-1], data),
        "data_twice": (legacy_id(4), {"0": bytes(16), "1": bytes(16)}),
    }


@pytest.mark.parametrize("name", list(legacy_bombs()))
def test_bombs_in_the_old_format(tmp_path: Path, worker: Worker, name: str) -> None:
    pickled, storages = legacy_bombs()[name]
    file = legacy_file(tmp_path / "bomb.pt", b"\x80\x02" + pickled + b".", storages)
    refused(worker, file)


def test_a_storage_of_another_size_than_its_data(tmp_path: Path, worker: Worker) -> None:
    file = legacy_file(tmp_path / "f.pt", b"\x80\x02" + legacy_id(2) + b".", {"0": bytes(16)})
    refused(worker, file, CorruptCheckpointError)


# The archive


def good_zip(path: Path) -> Path:
    torch.save({"a": torch.arange(1000.0)}, path)
    return path


def test_a_zip_bomb(tmp_path: Path, worker: Worker) -> None:
    file = good_zip(tmp_path / "f.pt")
    with zipfile.ZipFile(file) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records:
            archive.writestr(name, bytes(300 * MEBIBYTE) if name.endswith("data/0") else data)
    assert file.stat().st_size < MEBIBYTE
    assert "compressed" in refused(worker, file, UnsafeCheckpointError)


def directory_entries(data: bytes) -> list[int]:
    places, at = [], data.find(b"PK\x01\x02")
    while at >= 0:
        places.append(at)
        at = data.find(b"PK\x01\x02", at + 1)
    return places


def edited(data: bytearray, at: int, form: str, *values: int) -> bytearray:
    struct.pack_into(form, data, at, *values)
    return data


def broken_archives() -> dict[str, Callable[[bytearray], bytes | bytearray]]:
    """Edits of a whole torch file; entry 4 of its directory is the tensor's."""

    def entry(data: bytearray, number: int = 4) -> int:
        return directory_entries(bytes(data))[number]

    def offset_of(data: bytearray, number: int) -> int:
        return int(struct.unpack_from("<I", data, entry(data, number) + 42)[0])

    return {
        "record_beyond_the_end": lambda data: edited(data, entry(data) + 42, "<I", len(data) - 10),
        "record_far_beyond": lambda data: edited(data, entry(data) + 42, "<I", 0xFFFFFF00),
        "overlapping": lambda data: edited(data, entry(data) + 42, "<I", offset_of(data, 0)),
        "size_beyond_the_end": lambda data: edited(data, entry(data) + 20, "<II", 10**9, 10**9),
        "size_over_the_next": lambda data: edited(data, entry(data) + 20, "<II", 4200, 4200),
        "sizes_differ": lambda data: edited(data, entry(data) + 20, "<II", 4000, 2**31),
        "deflated_flag": lambda data: edited(data, entry(data) + 10, "<H", 8),
        "encrypted_flag": lambda data: edited(data, entry(data) + 8, "<H", 0x0809),
        "directory_flag": lambda data: edited(data, entry(data) + 38, "<I", 0x10),
        "count_too_large": lambda data: edited(data, len(data) - 98 + 24, "<QQ", 2**62, 2**62),
        # The last record is one that torch can do without.
        "count_too_small": lambda data: edited(
            edited(data, len(data) - 98 + 24, "<QQ", 6, 6), len(data) - 22 + 8, "<HH", 6, 6
        ),
        "directory_beyond": lambda data: edited(data, len(data) - 98 + 48, "<Q", 2**62),
        "directory_size": lambda data: edited(data, len(data) - 98 + 40, "<Q", 2**62),
        "two_ends": lambda data: edited(data, len(data) - 22 + 12, "<I", 46),
        "locator_elsewhere": lambda data: edited(data, len(data) - 42 + 8, "<Q", 100),
        "comment": lambda data: edited(data, len(data) - 2, "<H", 5) + b"hello",
        "prepended": lambda data: bytes(data[:30]) + bytes(data),
        "no_header": lambda data: edited(data, offset_of(data, 4), "<I", 0),
        "absolute_name": lambda data: data.replace(b"f/data/0", b"//data/0"),
        "parent_name": lambda data: data.replace(b"f/data/0", b"f/../t/0"),
        "nul_name": lambda data: data.replace(b"f/data/0", b"f/data\0000"),
        "directory_name": lambda data: data.replace(b"f/data/0", b"f/data//"),
    }


@pytest.mark.parametrize("name", list(broken_archives()))
def test_archives_that_no_writer_wrote(tmp_path: Path, worker: Worker, name: str) -> None:
    file = good_zip(tmp_path / "f.pt")
    data = broken_archives()[name](bytearray(file.read_bytes()))
    assert bytes(data) != file.read_bytes()
    file.write_bytes(data)
    refused(worker, file)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["archive/data.pkl", "ARCHIVE/Data.pkl"])
def test_two_records_of_one_name(tmp_path: Path, worker: Worker, second: str) -> None:
    """torch looks names up without regard to case, so these are one name too."""
    file = tmp_path / "f.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", opcodes({"a": 1}) + b".")
        archive.writestr(second, call_pickle("builtins bytearray", large(10**11)))
        archive.writestr("archive/version", b"3\n")
    assert "same name" in refused(worker, file, CorruptCheckpointError)


def test_a_pickle_hidden_from_the_judge(tmp_path: Path, worker: Worker) -> None:
    """Another file is appended or prepended: whichever of the two is judged, the other must not be loaded."""
    bomb = zip_of(tmp_path / "bomb.pt", call_pickle("builtins bytearray", large(10**11))).read_bytes()
    good = good_zip(tmp_path / "good.pt").read_bytes()
    legacy = legacy_file(tmp_path / "l.pt", call_pickle("builtins bytearray", large(10**11)), {}).read_bytes()
    file = tmp_path / "f.pt"
    for data in (bomb + good, good + bomb, legacy + good, good + legacy):
        file.write_bytes(data)
        refused(worker, file)


def test_many_records_on_the_same_bytes(tmp_path: Path, worker: Worker) -> None:
    """A megabyte that the directory lists a hundred times, each time with the right checksum."""
    count = 100
    tensors = [tensor_call(storage_id(MEBIBYTE // 4, key=f"{number:02}"), 0, (4,), (1,)) for number in range(count)]
    file = zip_of(tmp_path / "f.pt", b"\x80\x02](" + b"".join(tensors) + b"e.", {"00": bytes(MEBIBYTE)})
    data = file.read_bytes()
    *others, last, end = *directory_entries(data), data.rindex(b"PK\x05\x06")
    entry = data[last:end]
    copies = [entry.replace(b"data/00", b"data/%02d" % number) for number in range(count)]
    directory = data[others[0] : last] + b"".join(copies)
    total = len(others) + count
    ending = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, total, total, len(directory), others[0], 0)
    file.write_bytes(data[: others[0]] + directory + ending)
    assert len(torch.load(file)) == count  # a hundred megabytes from one
    assert "overlaps" in refused(worker, file, CorruptCheckpointError)


def test_a_directory_that_only_torch_finds(tmp_path: Path, worker: Worker) -> None:
    """Python's zipfile looks for the directory relative to the end, torch from the start of the file."""
    bomb = call_pickle("builtins bytearray", large(10**11))
    harmless = b"\x80\x02" + opcodes("x" * (len(bomb) - 8)) + b"."
    assert len(harmless) == len(bomb)
    hidden = zip_of(tmp_path / "bomb.pt", bomb).read_bytes()
    shown = zip_of(tmp_path / "shown.pt", harmless).read_bytes()
    file = tmp_path / "f.pt"
    file.write_bytes(hidden[:-22] + shown)
    with zipfile.ZipFile(file) as archive:
        assert archive.read("archive/data.pkl") == harmless
    refused(worker, file, CorruptCheckpointError)


class FileWithAHole:
    """What begins as a zip archive does and ends with the end of a directory that fills the rest: zeros."""

    def __init__(self, size: int) -> None:
        self.path, self.size = "/run/step-1/checkpoint_0.pt", size
        self._parts = {0: b"PK\3\4", size - 22: struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size - 26, 4, 0)}

    def read_into(self, offset: int, target: memoryview) -> None:
        assert target.nbytes < 1 << 20, "the size that the file claims is believed"
        content = bytearray(target.nbytes)
        for start, part in self._parts.items():
            if offset <= start and start + len(part) <= offset + target.nbytes:
                content[start - offset : start - offset + len(part)] = part
        target[:] = content


def test_a_directory_that_claims_all_of_a_file_with_a_hole_in_it_is_not_read_as_a_whole() -> None:
    file: Any = FileWithAHole(3 << 30)
    assert is_zip(file)
    with pytest.raises(CorruptCheckpointError, match="announces 1 records and does not hold them"):
        read_directory(file)


def test_zips_that_are_no_checkpoints(tmp_path: Path, worker: Worker) -> None:
    file = tmp_path / "f.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("folder/readme.txt", b"hello")
    assert "no checkpoint" in refused(worker, file, CorruptCheckpointError)
    with zipfile.ZipFile(file, "w"):
        pass
    refused(worker, file, CorruptCheckpointError)


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"PK", b"PK\x03\x04", bytes(200), b"PK\x05\x06" + bytes(18), b"{}\n" * 99],
    ids=["empty", "byte", "start", "magic", "zeros", "empty_zip", "text"],
)
def test_files_that_are_something_else(tmp_path: Path, worker: Worker, data: bytes) -> None:
    file = tmp_path / "f"
    file.write_bytes(data)
    refused(worker, file, CorruptCheckpointError)


def test_wrong_sparse_indices_are_found(tmp_path: Path) -> None:
    """torch checks them only when asked to; unchecked, using the tensor reads memory that is not its own."""
    file = tmp_path / "f.pt"
    torch.save({"a": torch.eye(3).to_sparse()}, file)
    edit_pickle(file, lambda data: data.replace(b"K\x03K\x03\x86", b"K\x02K\x02\x86"))
    with pytest.raises(CorruptCheckpointError):
        lastgood.load(file)
    with pytest.raises(CorruptCheckpointError):
        lastgood.load(file, {"a": None})
