"""The constants of format version 1. docs/format.md says what they mean; change both together."""

from dataclasses import dataclass

from isal import isal_zlib

FORMAT_VERSION = 1

ARCHIVE_PREFIX = "archive/"
PICKLE_RECORD = ARCHIVE_PREFIX + "data.pkl"
BYTEORDER_RECORD = ARCHIVE_PREFIX + "byteorder"
VERSION_RECORD = ARCHIVE_PREFIX + "version"
STORAGE_RECORD_PREFIX = ARCHIVE_PREFIX + "data/"
LASTGOOD_DIRECTORY = ".lastgood/"
INDEX_RECORD = ARCHIVE_PREFIX + LASTGOOD_DIRECTORY + "index.json"
BLOCKS_RECORD = ARCHIVE_PREFIX + LASTGOOD_DIRECTORY + "blocks.crc32"
TRAILER_RECORD = ARCHIVE_PREFIX + LASTGOOD_DIRECTORY + "trailer"

TORCH_FORMAT_VERSION = b"3\n"
"""Contents of the ``version`` record that torch.load asks for."""

PAGE = 4096
SMALL_ALIGNMENT = 64
PAGE_ALIGNED_FROM = 64 * 1024
"""Records of at least this many bytes start on a page, smaller ones on 64 bytes: padding stays under 7 per cent."""

BLOCK_SIZE = 1024 * 1024
"""Each record is checked in blocks of this many bytes, counted from the record's first byte."""

MAX_INDEX_DEPTH = 100
"""Containers nested deeper than this are pickled as opaque values, so that an index can always be walked."""

UNTYPED = "untyped"
"""The dtype of a storage that tensors of several dtypes share, or that none describes."""


@dataclass(frozen=True, slots=True)
class DtypeInfo:
    """One dtype as files know it: bytes an element, and torch's legacy storage class where there is one."""

    itemsize: int
    storage_class: str | None


DTYPES: dict[str, DtypeInfo] = {
    "float64": DtypeInfo(8, "DoubleStorage"),
    "float32": DtypeInfo(4, "FloatStorage"),
    "float16": DtypeInfo(2, "HalfStorage"),
    "bfloat16": DtypeInfo(2, "BFloat16Storage"),
    "int64": DtypeInfo(8, "LongStorage"),
    "int32": DtypeInfo(4, "IntStorage"),
    "int16": DtypeInfo(2, "ShortStorage"),
    "int8": DtypeInfo(1, "CharStorage"),
    "uint8": DtypeInfo(1, "ByteStorage"),
    "bool": DtypeInfo(1, "BoolStorage"),
    "complex128": DtypeInfo(16, "ComplexDoubleStorage"),
    "complex64": DtypeInfo(8, "ComplexFloatStorage"),
    "complex32": DtypeInfo(4, None),
    "uint16": DtypeInfo(2, None),
    "uint32": DtypeInfo(4, None),
    "uint64": DtypeInfo(8, None),
    "float8_e4m3fn": DtypeInfo(1, None),
    "float8_e4m3fnuz": DtypeInfo(1, None),
    "float8_e5m2": DtypeInfo(1, None),
    "float8_e5m2fnuz": DtypeInfo(1, None),
    "float8_e8m0fnu": DtypeInfo(1, None),
}
"""The dtypes whose tensors the index can describe. All others are opaque values."""

QUANTIZED_STORAGE_CLASSES: dict[str, str] = {
    "quint8": "QUInt8Storage",
    "qint8": "QInt8Storage",
    "qint32": "QInt32Storage",
    "quint4x2": "QUInt4x2Storage",
    "quint2x4": "QUInt2x4Storage",
}
"""Storage classes that appear inside opaque values only."""


def alignment_of(size: int) -> int:
    """The boundary that a storage record of ``size`` bytes starts on."""
    return PAGE if size >= PAGE_ALIGNED_FROM else SMALL_ALIGNMENT


def block_count(size: int) -> int:
    """How many blocks a record of ``size`` bytes has; an empty record has none."""
    return -(-size // BLOCK_SIZE)


def crc32(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """CRC-32 as in zip files (polynomial 0xEDB88320), continuing from ``value``; in hardware, without the GIL."""
    return isal_zlib.crc32(data, value)


def combine_crcs(first: int, second: int, second_size: int) -> int:
    """The CRC-32 of two byte strings joined, from theirs and the second one's length."""
    return isal_zlib.crc32_combine(first, second, second_size)
