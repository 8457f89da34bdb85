"""AdamW on this rank's parts of the parameters, and linear warm-up.

In: summed and clipped gradients. The weights change in place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.profiler import record_function

from dapo_async.learner.device_memory import whole_or_broken
from dapo_async.model import buckets, shard_of

BETAS = (0.9, 0.999)  # decay of the first and second moment: those of Adam's paper
EPS = 1e-8  # of Adam's paper too
MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedAdamW:
    """AdamW over plain local tensors, by torch's fused kernel.

    Over DTensors each step would cost several times the host time. Torch's functional form is used,
    because the class `torch.optim.AdamW` imports the compiler, which takes more than a second.
    Weight decay applies to matrices only, not to norms and biases, as is usual for language models.
    With `offload` the moments stay in host memory and are moved to the device bucket by bucket for
    their update.
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
        self.lr, self._weight_decay, self._betas = lr, weight_decay, betas
        self._parameters = dict(model.named_parameters())
        self._shards = {name: shard_of(each) for name, each in self._parameters.items()}
        self._offload = offload
        # By parameter: the two moments, and the number of its updates. Empty before the first one.
        self._state: dict[str, dict[str, Tensor]] = {}
        # With more ranks than rows, some ranks have an empty part of a parameter.
        filled = [name for name, shard in self._shards.items() if shard.numel()]
        parts = buckets(filled, lambda name: self._shards[name].numel()) if offload else [filled]
        self._parts = [*parts]

    @record_function("optimizer")
    @torch.no_grad()
    def step(self, *, lr: float) -> None:
        """One update with the parameters' gradients.

        An error before it begins changes nothing. Raises WeightsBroken for one in its midst.
        """
        self.lr = lr
        gradients = [self._gradients(names) for names in self._parts]
        for name in chain.from_iterable(gradients):
            if name not in self._state:
                self._state[name] = self._fresh(name, updates=0)
        with whole_or_broken("some of the weights have had their update and others have not"):
            for part in gradients:
                self._update_part(part)

    def _gradients(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {
            name: shard_of(gradient)
            for name in names
            if (gradient := self._parameters[name].grad) is not None
        }

    def _update_part(self, gradients: Mapping[str, Tensor]) -> None:
        if self._offload:
            self._move(gradients, None)
        matrices = {name for name in gradients if self._parameters[name].ndim >= 2}
        self._update(gradients, matrices, weight_decay=self._weight_decay)
        self._update(gradients, gradients.keys() - matrices, weight_decay=0.0)
        if self._offload:
            self._move(gradients, torch.device("cpu"))

    def _update(
        self, gradients: Mapping[str, Tensor], chosen: Collection[str], *, weight_decay: float
    ) -> None:
        names = [name for name in gradients if name in chosen]
        beta1, beta2 = self._betas
        exp_avgs, exp_avg_sqs, steps = (
            [self._state[name][key] for name in names] for key in (*MOMENTS, "step")
        )
        adamw(
            [self._shards[name] for name in names],
            [gradients[name] for name in names],
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=self.lr,
            weight_decay=weight_decay,
            eps=EPS,
            maximize=False,
        )

    def zero_grad(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    @property
    def updates(self) -> int:
        """The number of steps so far, equal for all parameters."""
        return next((int(state["step"]) for state in self._state.values()), 0)

    def moments(self) -> Iterator[tuple[str, str, Tensor]]:
        """Name of the moment, name of the parameter, and the moment's storage on this rank.

        Yields nothing before the first update.
        """
        if not self.updates:
            return
        for name, shard in self._shards.items():
            state = self._state.get(name)
            for moment in MOMENTS:
                # An empty part has no state; it stands for its own moments.
                yield moment, name, state[moment] if state else shard

    def tensors(self) -> Iterator[Tensor]:
        """All moments that there are; the counts of updates stay where they are."""
        for state in self._state.values():
            yield from (state[moment] for moment in MOMENTS)

    def make_moments(self, updates: int) -> None:
        """Allocates moments as after `updates` steps, with zeros to be overwritten."""
        self._state = {
            name: self._fresh(name, updates=updates) for names in self._parts for name in names
        }

    def _fresh(self, name: str, *, updates: int) -> dict[str, Tensor]:
        shard = self._shards[name]
        device = torch.device("cpu") if self._offload else shard.device
        zeros = {moment: torch.zeros_like(shard, device=device) for moment in MOMENTS}
        return {**zeros, "step": torch.tensor(float(updates), device=shard.device)}

    def _move(self, names: Iterable[str], device: torch.device | None) -> None:
        """Moves moments to `device`; None: to the device of their parameters."""
        for name in names:
            state = self._state[name]
            for moment in MOMENTS:
                state[moment] = state[moment].to(device or self._shards[name].device)


def warmed_up(lr: float, *, step: int, warmup_steps: int) -> float:
    """Linear warm-up over `warmup_steps` learner steps, then constant (DAPO, section 4.1).

    The first step (0) already has a learning rate above 0.
    """
    return lr * min(1.0, (step + 1) / max(1, warmup_steps))
