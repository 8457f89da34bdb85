"""AdamW on this rank's parts of the parameters, with linear warm-up: summed and clipped gradients come in, the weights change in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dapo_async.model import buckets, shard_of

BETAS = (0.9, 0.999)  # decay of the first and second moment: those of Adam's paper
MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedAdamW:
    """torch's AdamW over plain local tensors: over DTensors each step would cost several times the host time.

    Weight decay on matrices only: norms and biases are left alone, as is usual for language models. With `offload` the moments stay in the host's
    memory, and come to the device bucket by bucket while they are updated; on a CPU that is where they are anyhow.
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
        fused = next(iter(self._shards.values())).is_cuda
        filled = [
            name for name, shard in self._shards.items() if shard.numel()
        ]  # where there are more ranks than rows some have none
        self._optimizers: list[torch.optim.AdamW] = []
        for bucket in (
            buckets(filled, lambda name: self._shards[name].numel()) if offload else [filled]
        ):
            matrices = [self._shards[name] for name in bucket if self._parameters[name].ndim >= 2]
            vectors = [self._shards[name] for name in bucket if self._parameters[name].ndim < 2]
            groups = [
                {"params": matrices, "weight_decay": weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ]
            self._optimizers.append(
                torch.optim.AdamW(groups, lr=lr, betas=betas, foreach=not fused, fused=fused)
            )

    def step(self, *, lr: float) -> None:
        """One update by the parameters' gradients."""
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
        """So many steps were done: the same for every parameter."""
        return next(
            (
                int(state["step"])
                for optimizer in self._optimizers
                for state in optimizer.state.values()
            ),
            0,
        )

    def moments(self) -> Iterator[tuple[str, str, Tensor]]:
        """Name of the moment, name of the parameter, and the moment's storage on this rank; none before the first update."""
        if self.updates:
            for name in self._parameters:
                state = self._state_of(name)
                for moment in MOMENTS:
                    yield (
                        moment,
                        name,
                        state[moment] if state else self._shards[name].detach(),
                    )  # an empty part has no state: it is its own

    def make_moments(self, updates: int) -> None:
        """Allocates the moments of `updates` steps, as zeros to be overwritten."""
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
        return next(
            (optimizer.state[shard] for optimizer in self._optimizers if shard in optimizer.state),
            {},
        )


def _move(optimizer: torch.optim.Optimizer, device: torch.device | None) -> None:
    """The moments to `device`; None: to where their parameters are."""
    for shard, state in optimizer.state.items():
        for moment in MOMENTS:
            state[moment] = state[moment].to(device or shard.device)


def warmed_up(lr: float, *, step: int, warmup_steps: int) -> float:
    """Linear warm-up over `warmup_steps` learner steps, constant afterwards (DAPO, section 4.1); the first step (0) already moves."""
    return lr * min(1.0, (step + 1) / max(1, warmup_steps))
