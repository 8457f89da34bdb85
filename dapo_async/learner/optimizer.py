"""AdamW on this rank's parts of the parameters, and linear warm-up.

In: summed and clipped gradients. The weights change in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dapo_async.model import buckets, shard_of

BETAS = (0.9, 0.999)  # decay of the first and second moment: those of Adam's paper
MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedAdamW:
    """Torch's AdamW over plain local tensors.

    Over DTensors each step would cost several times the host time. Weight decay applies to matrices
    only, not to norms and biases, as is usual for language models. With `offload` the moments stay
    in host memory and are moved to the device bucket by bucket for their update.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        offload: bool = False,
    ) -> None:
        self._parameters = dict(model.named_parameters())
        self._shards = {
            name: nn.Parameter(shard_of(parameter)) for name, parameter in self._parameters.items()
        }
        self._offload = offload
        # With more ranks than rows, some ranks have an empty part of a parameter.
        filled = [name for name, shard in self._shards.items() if shard.numel()]
        parts = buckets(filled, lambda name: self._shards[name].numel()) if offload else [filled]
        self._optimizers = [self._adamw(names, lr, weight_decay, betas) for names in parts]

    def _adamw(
        self, names: list[str], lr: float, weight_decay: float, betas: tuple[float, float]
    ) -> torch.optim.AdamW:
        matrices = [self._shards[name] for name in names if self._parameters[name].ndim >= 2]
        vectors = [self._shards[name] for name in names if self._parameters[name].ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        fused = next(iter(self._shards.values())).is_cuda
        return torch.optim.AdamW(groups, lr=lr, betas=betas, foreach=not fused, fused=fused)

    def step(self, *, lr: float) -> None:
        """One update with the parameters' gradients."""
        for name, parameter in self._parameters.items():
            self._shards[name].grad = None if parameter.grad is None else shard_of(parameter.grad)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if self._offload:
                _move(optimizer, None)
            optimizer.step()
            if self._offload:
                _move(optimizer, torch.device("cpu"))

    def zero_grad(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.grad = self._shards[name].grad = None

    @property
    def updates(self) -> int:
        """The number of steps so far, equal for all parameters."""
        for optimizer in self._optimizers:
            for state in optimizer.state.values():
                return int(state["step"])
        return 0

    def moments(self) -> Iterator[tuple[str, str, Tensor]]:
        """Name of the moment, name of the parameter, and the moment's storage on this rank.

        Yields nothing before the first update.
        """
        if not self.updates:
            return
        for name, shard in self._shards.items():
            state = self._state_of(name)
            for moment in MOMENTS:
                # An empty part has no state; it stands for its own moments.
                yield moment, name, state[moment] if state else shard.detach()

    def make_moments(self, updates: int) -> None:
        """Allocates moments as after `updates` steps, with zeros to be overwritten."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for shard in group["params"]:
                    device = torch.device("cpu") if self._offload else shard.device
                    zeros = {
                        moment: torch.zeros_like(shard, device=device, requires_grad=False)
                        for moment in MOMENTS
                    }
                    step_device = shard.device if group["fused"] else torch.device("cpu")
                    optimizer.state[shard] = {
                        "step": torch.tensor(float(updates), device=step_device),
                        **zeros,
                    }

    def _state_of(self, name: str) -> dict[str, Tensor]:
        shard = self._shards[name]
        for optimizer in self._optimizers:
            if shard in optimizer.state:
                return dict(optimizer.state[shard])
        return {}


def _move(optimizer: torch.optim.Optimizer, device: torch.device | None) -> None:
    """Moves the moments to `device`; None: to the device of their parameters."""
    for shard, state in optimizer.state.items():
        for moment in MOMENTS:
            state[moment] = state[moment].to(device or shard.device)


def warmed_up(lr: float, *, step: int, warmup_steps: int) -> float:
    """Linear warm-up over `warmup_steps` learner steps, then constant (DAPO, section 4.1).

    The first step (0) already has a learning rate above 0.
    """
    return lr * min(1.0, (step + 1) / max(1, warmup_steps))
