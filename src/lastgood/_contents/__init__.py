"""What is in a checkpoint, and whether every byte of it is right, found without torch and without running anything."""

from lastgood._contents.model import Contents, FileContents, Problem, SpreadTensor, TensorInfo, VerifyReport
from lastgood._contents.reading import open_contents, tensors
from lastgood._contents.verifying import verify_checkpoint

__all__ = [
    "Contents",
    "FileContents",
    "Problem",
    "SpreadTensor",
    "TensorInfo",
    "VerifyReport",
    "open_contents",
    "tensors",
    "verify_checkpoint",
]
