"""The host reads from the device once per minibatch, not in every pass.

On a GPU each read makes the host wait until the device has done all its work;
`tests/unit/gpu/test_learner_on_device.py` counts these waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from learner_world import rank_of, synthetic_groups
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dapo_async.learner import LearnerRank
from dapo_async.types import StepMetrics

READS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__")
# The size of their result depends on values, so the host waits for it.
SIZED_BY_VALUES = ("nonzero", "masked_select", "_unique2", "unique_dim", "_local_scalar_dense")


class SizedByValues(TorchDispatchMode):
    def __init__(self, reads: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._reads = reads

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.overloadpacket.__name__
        places = args[1] if name in ("index", "index_put") else ()
        if name in SIZED_BY_VALUES or any(
            each is not None and each.dtype is torch.bool for each in places
        ):
            self._reads[name] += 1
        return func(*args, **(kwargs or {}))


def reads_of(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    reads = Counter[str]()

    def counted(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def read(self: Tensor, *args: Any, **kwargs: Any) -> object:
            reads[name] += 1
            return original(self, *args, **kwargs)

        return read

    with monkeypatch.context() as patch, SizedByValues(reads):
        for name in READS:
            patch.setattr(Tensor, name, counted(name, getattr(Tensor, name)))
        call()
    return reads


FORMS: list[dict[str, Any]] = [
    {},
    {"recompute": True},
    {"algorithm": {"entropy_bonus": 0.1, "overlong_filtering": True}},
    {"algorithm": {"correction": "mask", "proximal": "interpolate"}},
    {"algorithm": {"loss_mean": "sequence"}},
    {"algorithm": {"objective": "gspo"}},
    {"algorithm": {"sequence_band": (0.5, 2.0)}},
    {"algorithm": {"kl_coef": 0.1}},
    {"algorithm": {"correction": "m2po"}},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_more_passes_make_no_more_reads(
    form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, groups = [], synthetic_groups()
    for max_tokens, num_passes in ((100, 1), (20, 5), (1, 12)):
        rank = rank_of(microbatch_tokens=max_tokens, **form)
        assert len(rank.share_of(groups).passes) == num_passes
        counts.append(reads_of(partial(rank.minibatch, groups), monkeypatch))
    assert counts[0] == counts[1] == counts[2]
    assert counts[0]["tolist"] == 2  # advantages, and everything about the minibatch


class ReadsTheLoss(LearnerRank):
    """A broken learner: it looks at the loss of every pass."""

    def _loss(self, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, diagnostics = super()._loss(*args)
        assert float(loss) == float(loss)
        return loss, diagnostics


def test_a_read_in_every_pass_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    def minibatch(max_tokens: int) -> StepMetrics:
        rank = rank_of(kind=ReadsTheLoss, microbatch_tokens=max_tokens)
        return rank.minibatch(synthetic_groups())

    one, twelve = (reads_of(partial(minibatch, size), monkeypatch) for size in (100, 1))
    assert twelve["__float__"] >= one["__float__"] + 22
