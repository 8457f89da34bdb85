"""The collectives whose names differ between torch versions (2.13 renamed them); everything else takes them from here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

Collective = Callable[..., Any]

# (output, input, group=…): the ranks' tensors, one after the other along the first dimension; and of their sum one part for each rank.
all_gather_single: Collective = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)
reduce_scatter_single: Collective = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)
