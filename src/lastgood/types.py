"""Types that every part of lastgood shares."""

from dataclasses import dataclass
from typing import Any, TypeAlias

STATE_DICT: TypeAlias = dict[str, Any]
"""What a checkpoint holds: tensors and Python values under string keys, nested at will."""


@dataclass
class RankInfo:
    """Where this process stands among the processes that train together.

    ``global_rank`` counts from 0 up to ``global_world_size`` - 1.
    """

    global_rank: int
    global_world_size: int
