"""Checksums of whole tensors, by which ranks find out whether they hold the same."""

from collections.abc import Iterable

import torch

from lastgood._memory import memory_at
from lastgood.format.spec import crc32

_PIECE_BYTES = 64 << 20


def checksum(tensor: torch.Tensor) -> int:
    """The CRC-32 of the tensor's elements in row-major order; moves what is elsewhere through bounded host memory."""
    if tensor.numel() == 0:
        return 0
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        return crc32(memory_at(tensor.data_ptr(), tensor.nbytes))
    value = 0
    for part in _parts(tensor):
        # Not yet run on a device.
        host = part.cpu().contiguous()
        value = crc32(memory_at(host.data_ptr(), host.nbytes), value)
    return value


def _parts(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """The tensor in parts along its first dimension, each of about so many bytes."""
    if tensor.dim() == 0 or tensor.nbytes <= _PIECE_BYTES:
        return [tensor]
    rows = max(1, tensor.shape[0] * _PIECE_BYTES // tensor.nbytes)
    return torch.split(tensor, rows)
