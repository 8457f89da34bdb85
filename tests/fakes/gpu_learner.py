"""A learner's rank and its groups, as large as the place where the test runs."""

from __future__ import annotations

from typing import Any

import numpy as np
from gpu_place import Place

from dapo_async.bench.made_up import made_up_group
from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.learner import LearnerRank
from dapo_async.model import Decoder, Mesh
from dapo_async.types import Group

ONE = Mesh()  # of a rank without others


def rank_on(
    place: Place,
    decoder: Decoder,
    *,
    mesh: Mesh = ONE,
    kind: type[LearnerRank] = LearnerRank,
    **learner: Any,
) -> LearnerRank:
    knobs = {"lr": 1e-3, "warmup_steps": 0, "microbatch_tokens": 4 * place.length}
    return kind(
        decoder,
        algorithm=AlgorithmConfig(),
        learner=LearnerConfig(**(knobs | learner)),
        mesh=mesh,
    )


def groups_of(place: Place, count: int = 3) -> list[Group]:
    """Groups of four rollouts; the longest has half of the longest sequence."""
    lengths = np.linspace(place.length // 4, place.length // 2, 4).astype(np.int64)
    vocabulary = place.sizes["vocab_size"]
    return [
        made_up_group(key, lengths, prompt_tokens=6, vocabulary=vocabulary) for key in range(count)
    ]
