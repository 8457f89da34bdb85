"""Engine against learner where both mean the same weights: literal numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dapo_async.learner.batching import Microbatch, TrainingSequence, pack
from dapo_async.learner.mismatch import mismatch_metrics, mismatch_sums
from dapo_async.types import Completion, FinishReason, StepMetrics

PROMPT = np.asarray([1, 2], dtype=np.int32)


def row(
    number: int, *, versions: list[int], prefill: int, behaviour: list[float], in_loss: bool = True
) -> TrainingSequence:
    ids = np.full(len(versions), 5, dtype=np.int32)
    arrays = np.asarray(behaviour, dtype=np.float32), np.asarray(versions, dtype=np.int32)
    return TrainingSequence(
        number,
        number,
        PROMPT,
        Completion(ids, *arrays, prefill, FinishReason.LENGTH),
        advantage=1.0,
        temperature=1.0,
        in_loss=in_loss,
    )


def metrics_of(batch: Microbatch, proximal: list[float], floor: float | None = None) -> StepMetrics:
    sums = mismatch_sums(batch, torch.tensor(proximal), learner_version=4, cap=2.0, floor=floor)
    return mismatch_metrics({name: float(value) for name, value in sums.items()})


def test_each_token_counts_where_its_versions_put_it() -> None:
    batch = pack(
        [
            row(0, versions=[4, 4], prefill=4, behaviour=[-1.0, -2.0]),
            row(
                1, versions=[3, 4], prefill=3, behaviour=[-9.0, -1.0]
            ),  # the second token on KV of version 3
            row(2, versions=[4], prefill=4, behaviour=[-50.0], in_loss=False),
        ]
    )
    assert metrics_of(batch, [-1.25, -1.0, -3.0, -1.5, -1.0]).flat() == {
        "mismatch": pytest.approx((0.25 + 1.0) / 2),
        "mismatch_max": pytest.approx(1.0),
        "mismatch_k3": pytest.approx((math.exp(-0.25) + 0.25 - 1 + math.e - 1 - 1) / 2),
        "mismatch_outside_fraction": pytest.approx(0.5),  # e > 2
        "kv_gap": pytest.approx(0.5),
        "kv_gap_max": pytest.approx(0.5),
    }


def test_floor_of_the_band_counts_too() -> None:
    batch = pack([row(0, versions=[4, 4], prefill=4, behaviour=[-1.0, -1.0])])
    metrics = metrics_of(batch, [-1.0, -2.0], floor=0.5)
    assert metrics.flat()["mismatch_outside_fraction"] == pytest.approx(0.5)  # 1/e < 0.5


def test_tokens_of_older_versions_say_nothing() -> None:
    batch = pack([row(0, versions=[3, 3], prefill=3, behaviour=[-1.0, -1.0])])
    assert metrics_of(batch, [-9.0, -9.0]).flat() == {}
