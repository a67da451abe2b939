"""Values with torch's tensors as JSON."""

from collections import Counter
from typing import Any

import torch
from tests.compat.describing import Describer, digest


def describe(value: Any) -> Any:
    """The description of a value that was saved, or loaded."""
    return TorchDescriber().describe(value)


class TorchDescriber(Describer):
    tensor_class = torch.Tensor

    def is_plain_tensor(self, value: Any) -> bool:
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.__dict__:
            return False
        return value.layout is torch.strided and not value.is_quantized

    def describe_tensor(self, tensor: Any) -> Any:
        description = {"tensor": _name(tensor.dtype), "shape": list(tensor.shape), "sha256": digest(bytes_of(tensor))}
        flags = {
            "p": isinstance(tensor, torch.nn.Parameter),
            "g": tensor.requires_grad,
            "c": tensor.is_conj(),
            "n": tensor.is_neg(),
        }
        description |= {"stride": list(tensor.stride()), "flags": "".join(name for name in flags if flags[name])}
        if tensor.numel():
            description["memory"] = self.on_memory(tensor.untyped_storage().data_ptr(), tensor.data_ptr())
        return description

    def describe_other(self, value: Any) -> Any:
        if type(value) is torch.Size:
            return {"size": list(value)}
        if type(value) is torch.dtype:
            return {"dtype": _name(value)}
        if type(value) is torch.device:
            return {"device": [value.type, value.index]}
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if type(value) is Counter:
            return {"opaque": kind, "is": describe(dict(value))}
        if isinstance(value, torch.Tensor):
            return {"opaque": kind, "is": describe(_parts(value))}
        return super().describe_other(value)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The elements as they are to be seen, in row-major order."""
    seen = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).flatten()
    return seen.view(torch.uint8).numpy().tobytes()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parts(tensor: torch.Tensor) -> dict[str, Any]:
    """What a tensor that is more than a view of one storage is made of."""
    parts: dict[str, Any] = {"shape": tensor.shape, "dtype": tensor.dtype, "attributes": dict(tensor.__dict__)}
    if tensor.layout is torch.sparse_coo:
        names = ["is_coalesced", "indices", "values"]
    elif tensor.layout is torch.sparse_csr:
        names = ["crow_indices", "col_indices", "values"]
    elif tensor.is_quantized and "channel" in str(tensor.qscheme()):
        names = ["stride", "int_repr", "q_per_channel_scales", "q_per_channel_zero_points", "q_per_channel_axis"]
    elif tensor.is_quantized:
        names = ["stride", "int_repr", "q_scale", "q_zero_point"]
    else:
        return parts | {"tensor": tensor.detach().clone()}
    return parts | {name: getattr(tensor, name)() for name in names}
