"""How fast both sides are on other numbers of GPUs than the scenario has.

In: the rates of a scenario, and a model if the file has one. Out: an engine or a learner of another
size. The sweep asks for each shape that it tries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dapo_async.planner.cost_model import (
    Efficiency,
    Training,
    engine_speed,
    learner_fits,
    learner_speed,
)
from dapo_async.planner.engine import EngineSpeed
from dapo_async.planner.hardware import NODE_GPUS, Gpu
from dapo_async.planner.planned_model import PlannedModel
from dapo_async.planner.scenario import LearnerSpeed


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputedRates:
    """Rates from the cost model, for any size."""

    model: PlannedModel
    gpu: Gpu
    work: Training
    efficiency: Efficiency

    def engine(self, *, gpus: int, slots: int) -> EngineSpeed:
        return engine_speed(
            self.model, self.gpu, gpus=gpus, slots=slots, efficiency=self.efficiency
        )

    def learner(
        self, *, gpus: int, tensor_parallel: int, context_parallel: int = 1
    ) -> LearnerSpeed:
        return learner_speed(
            self.model,
            self.gpu,
            self.work,
            gpus=gpus,
            tensor_parallel=tensor_parallel,
            context_parallel=context_parallel,
            efficiency=self.efficiency,
        )

    def learner_fits(self, *, gpus: int, tensor_parallel: int, context_parallel: int = 1) -> bool:
        return learner_fits(
            self.model,
            self.gpu,
            self.work,
            gpus=gpus,
            tensor_parallel=tensor_parallel,
            context_parallel=context_parallel,
            efficiency=self.efficiency,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The rates of the scenario, and how they change with the GPUs.

    With a model, a measured rate is multiplied by the ratio of the computed ones. Without one, the
    learner's time per token falls with (GPUs)^scaling, or is interpolated between measured points.
    """

    engine: EngineSpeed
    engine_gpus: int
    learner: LearnerSpeed
    learner_gpus: int
    tensor_parallel: int = 1
    context_parallel: int = 1
    scaling: float = 1.0
    token_s: Mapping[int, float] = field(default_factory=dict)  # measured, by GPUs of the learner
    computed: ComputedRates | None = None
    is_engine_computed: bool = False

    @property
    def node_gpus(self) -> int:
        """GPUs of a machine; 8 are assumed without a model."""
        return NODE_GPUS if self.computed is None else self.computed.gpu.node_gpus

    def engine_at(self, *, gpus: int, slots: int) -> EngineSpeed:
        """One engine on `gpus` GPUs. Raises ValueError if the rates are not known or do not fit."""
        if self.computed is None or (gpus == self.engine_gpus and not self.is_engine_computed):
            if gpus != self.engine_gpus:
                raise ValueError(
                    f"plan.engine_gpus: the rates hold for engines of {self.engine_gpus} GPUs, not "
                    f"of {gpus}; add the section model"
                )
            return replace(self.engine, step_s=resized(self.engine.step_s, slots))
        computed = self.computed.engine(gpus=gpus, slots=slots)
        if self.is_engine_computed:
            return computed
        known = self.engine.num_slots
        before = self.computed.engine(gpus=self.engine_gpus, slots=known)
        factor = self.engine.step_s[known] / before.step_s[known]
        return replace(
            computed,
            step_s=tuple(factor * seconds for seconds in computed.step_s),
            context_s=self.engine.context_s * _ratio(computed.context_s, before.context_s),
            prefill_s=self.engine.prefill_s * _ratio(computed.prefill_s, before.prefill_s),
            reserve_tokens=self.engine.reserve_tokens,
        )

    def learner_at(
        self, *, gpus: int, tensor_parallel: int, context_parallel: int = 1
    ) -> LearnerSpeed:
        """The learner on `gpus` GPUs. Raises ValueError if the rates are not known."""
        learner = self.learner
        if self.computed is not None:
            now = self.computed.learner(
                gpus=gpus, tensor_parallel=tensor_parallel, context_parallel=context_parallel
            )
            before = self.computed.learner(
                gpus=self.learner_gpus,
                tensor_parallel=self.tensor_parallel,
                context_parallel=self.context_parallel,
            )
            return replace(
                learner,
                token_s=learner.token_s * now.token_s / before.token_s,
                fixed_s=learner.fixed_s * _ratio(now.fixed_s, before.fixed_s),
            )
        if tensor_parallel != self.tensor_parallel:
            raise ValueError(
                "plan.tensor_parallel: the rates hold for a learner of "
                f"{self.tensor_parallel} tensor-parallel ranks; add the section model"
            )
        if context_parallel != self.context_parallel:
            raise ValueError(
                "plan.context_parallel: the rates hold for a learner of "
                f"{self.context_parallel} context-parallel ranks; add the section model"
            )
        return replace(
            learner, token_s=self._token_s(gpus), group_s=learner.group_s * self._scaled(gpus)
        )

    def learner_fits(self, *, gpus: int, tensor_parallel: int, context_parallel: int = 1) -> bool:
        """By memory; without a model nothing is known."""
        if gpus % (tensor_parallel * context_parallel):
            return False
        return self.computed is None or self.computed.learner_fits(
            gpus=gpus, tensor_parallel=tensor_parallel, context_parallel=context_parallel
        )

    def _token_s(self, gpus: int) -> float:
        if len(self.token_s) > 1:
            return between_points(self.token_s, gpus)
        return self.learner.token_s * self._scaled(gpus)

    def _scaled(self, gpus: int) -> float:
        return math.exp(self.scaling * math.log(self.learner_gpus / gpus))


def between_points(points: Mapping[int, float], at: int) -> float:
    """Seconds on `at` GPUs, from those on others: a part that falls with the GPUs and one that does
    not. Beyond the points by the nearest two. Where more GPUs are more than proportionally faster,
    by a power of the GPUs.
    """
    known = sorted(points.items())
    place = max(1, next((i for i, (size, _) in enumerate(known) if size >= at), len(known) - 1))
    (low, low_s), (high, high_s) = known[place - 1], known[place]
    falls = (low_s - high_s) / (1 / low - 1 / high)
    stays = low_s - falls / low
    if stays >= 0 and falls >= 0:
        return falls / at + stays
    slope = math.log(high_s / low_s) / math.log(high / low)
    return low_s * math.exp(slope * math.log(at / low))


def resized(step_s: tuple[float, ...], slots: int) -> tuple[float, ...]:
    """Step times for another number of slots; along the line of the last quarter above it."""
    if slots < len(step_s):
        return step_s[: slots + 1]
    quarter = max(1, len(step_s) // 4)
    slope = (step_s[-1] - step_s[-1 - quarter]) / quarter
    more = (step_s[-1] + slope * (n - len(step_s) + 1) for n in range(len(step_s), slots + 1))
    return (*step_s, *more)


def _ratio(now: float, before: float) -> float:
    return now / before if before else 1.0
