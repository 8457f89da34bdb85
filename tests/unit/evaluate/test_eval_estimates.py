"""avg@k, pass@k, maj@k and their intervals: literal numbers, all subsets, naive resamples."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from dapo_async.evaluate.estimates import bootstrap, majority, pass_at


@pytest.mark.parametrize(
    ("correct", "responses", "k", "expected"),
    [
        (0, 4, 1, 0.0),
        (1, 4, 1, 0.25),
        (1, 4, 2, 0.5),
        (2, 4, 2, 5 / 6),
        (2, 4, 3, 1.0),
        (4, 4, 4, 1.0),
        (1, 32, 32, 1.0),
        (3, 32, 8, 1 - (24 * 23 * 22) / (32 * 31 * 30)),
    ],
)
def test_pass_at_k_has_its_literal_values(
    correct: int, responses: int, k: int, expected: float
) -> None:
    assert pass_at(k, num_correct=correct, num_responses=responses) == pytest.approx(
        expected, abs=1e-15
    )


def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_correct_response() -> None:
    for responses in range(1, 7):
        for correct in range(responses + 1):
            marks = [True] * correct + [False] * (responses - correct)
            for k in range(1, responses + 1):
                subsets = [any(subset) for subset in combinations(marks, k)]
                assert pass_at(k, num_correct=correct, num_responses=responses) == pytest.approx(
                    sum(subsets) / len(subsets), abs=1e-15
                )


def test_pass_at_k_is_unbiased_where_one_minus_the_power_of_the_mean_is_not() -> None:
    generator, p, n, k = np.random.default_rng(0), 0.3, 8, 4
    counts = generator.binomial(n, p, size=4000)
    truth = 1 - (1 - p) ** k  # 0.7599
    unbiased = np.mean([pass_at(k, num_correct=int(count), num_responses=n) for count in counts])
    assert unbiased == pytest.approx(truth, abs=0.012)  # 3 standard errors
    assert np.mean(1 - (1 - counts / n) ** k) < truth - 0.03


def test_pass_at_k_of_more_than_there_are_responses_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pass@5 needs .* n 4 responses and c 1"):
        pass_at(5, num_correct=1, num_responses=4)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["7", "8", "8"], 1),
        (["7", "8", "8", "7"], 0),  # a tie: the first
        (["8", "7", "7", "8"], 0),
        ([None, None, None, "9"], 3),  # no answer never wins
        ([None, None], None),
        ([None, "1", "2", "2", "1", "2"], 2),
        (["", "", "1"], 0),
        (
            ["7", "8.0", "8", "7", "8"],
            2,
        ),  # spellings vote together, the most frequent one is judged
        (["x+1", "1/2", "0.5", "x = 0.50", "x+1"], 1),
    ],
)
def test_majority_is_the_first_response_with_the_most_frequent_answer(
    answers: list[str | None], winner: int | None
) -> None:
    assert majority(answers) == winner


def test_mean_lies_in_an_interval_that_a_naive_bootstrap_gives_too() -> None:
    values = np.random.default_rng(1).random((40, 2)) ** 2
    first, second = bootstrap(values, seed=3)
    generator = np.random.default_rng(99)
    naive = [values[generator.integers(0, 40, size=40), 0].mean() for _ in range(20_000)]
    assert first.mean == pytest.approx(values[:, 0].mean(), abs=1e-15)
    assert (first.low, first.high) == pytest.approx(np.quantile(naive, [0.025, 0.975]), abs=0.006)
    assert (second.low, second.high) != (first.low, first.high)


def test_interval_of_many_coin_flips_is_the_normal_one() -> None:
    (estimate,) = bootstrap(np.array([[0.0], [1.0]] * 200), seed=0)
    half = 1.96 * 0.5 / 400**0.5  # 0.049
    assert (estimate.low, estimate.mean, estimate.high) == pytest.approx(
        (0.5 - half, 0.5, 0.5 + half), abs=0.004
    )


def test_interval_repeats_under_its_seed_and_is_a_point_where_all_problems_are_alike() -> None:
    values = np.random.default_rng(1).random((7, 1))
    assert bootstrap(values, seed=5) == bootstrap(values, seed=5)
    assert bootstrap(values, seed=5) != bootstrap(values, seed=6)
    (alike,) = bootstrap(np.full((7, 1), 0.25), seed=0)
    assert (alike.low, alike.mean, alike.high) == (0.25, 0.25, 0.25)
