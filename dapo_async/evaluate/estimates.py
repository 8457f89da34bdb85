"""avg@k, pass@k and maj@k from k responses per problem, each with an interval over the problems.

Pure functions; `command.py` and `sampled.py` call them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from dapo_async.reward import vote_key

RESAMPLES = 10_000
COVERAGE = 0.95
_CHUNK = 500  # resamples at a time, to bound the memory


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over the problems and the interval of 95 % of the bootstrap means."""

    mean: float
    low: float
    high: float


def pass_at(k: int, *, num_correct: int, num_responses: int) -> float:
    """The unbiased estimate of pass@k from n responses, c of them correct.

        pass@k = 1 − C(n − c, k) / C(n, k)

    This is the probability that k responses, drawn without replacement, include a correct one.
    Computed in exact integers. Source: Chen et al. 2021 (2107.03374), equation 1. Raises ValueError
    unless 1 ≤ k ≤ n and 0 ≤ c ≤ n.
    """
    if not (1 <= k <= num_responses and 0 <= num_correct <= num_responses):
        raise ValueError(
            f"pass@{k} needs 1 <= k <= n and 0 <= c <= n, with n {num_responses} responses and c "
            f"{num_correct} correct ones"
        )
    whole = comb(num_responses, k)
    return (whole - comb(num_responses - num_correct, k)) / whole


def majority(answers: Sequence[str | None]) -> int | None:
    """The index of the first response with the most frequent answer; None without any answer.

    On a tie the answer that occurs first wins. Spellings of one answer, such as 0.5 and 1/2, vote
    together (`reward.vote_key`), and the most frequent spelling is judged. None never wins. maj@k
    is self-consistency (Wang et al. 2022, 2203.11171).
    """
    votes: dict[str, Counter[str]] = {}
    for answer in answers:
        if answer is not None:
            votes.setdefault(vote_key(answer), Counter())[answer] += 1
    if not votes:
        return None
    spellings = max(votes.values(), key=Counter.total)
    return answers.index(max(spellings, key=spellings.__getitem__))


def bootstrap(values: NDArray[np.float64], *, seed: int) -> list[Estimate]:
    """Percentile bootstrap over the problems: `[P, M]` values give M estimates.

    It takes the means of 10,000 resamples of P problems with replacement; all M columns use the
    same resamples. The interval regards the problems as a sample of all such problems (Efron 1979).
    """
    num_problems = len(values)
    assert num_problems, "no problem to estimate from"
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            generator.multinomial(
                num_problems, np.full(num_problems, 1.0 / num_problems), size=_CHUNK
            )
            @ values
            for _ in range(RESAMPLES // _CHUNK)
        ]
    )
    edges = np.quantile(means / num_problems, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], axis=0)
    return [
        Estimate(*map(float, column)) for column in zip(values.mean(axis=0), *edges, strict=True)
    ]
