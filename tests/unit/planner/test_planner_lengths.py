"""Response lengths of simulated runs."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest

from dapo_async.planner import Lengths, mixture
from dapo_async.planner.lengths import Draws

LOGNORMAL = Lengths(tail=1.0, shared=0.5, mean_tokens=500, max_tokens=2000)


def drawn(lengths: Lengths, groups: int = 2000, scale: float = 1.0) -> np.ndarray:
    draws = Draws(lengths, group_size=8)
    return np.array([draws.lengths(group_id, scale=scale) for group_id in range(groups)])


@pytest.mark.parametrize("tail", [0.0, 0.5, 1.5])
def test_the_mean_after_the_cut_is_the_given_one(tail: float) -> None:
    values = drawn(replace(LOGNORMAL, tail=tail))
    assert values.mean() == pytest.approx(500, rel=0.03)
    assert values.max() <= 2000


def test_siblings_share_the_given_part_of_the_variance() -> None:
    logs = np.log(drawn(Lengths(tail=0.5, shared=0.4, mean_tokens=500, max_tokens=10**6)))
    assert logs.mean(axis=1).var() / logs.var() == pytest.approx(0.4 + 0.6 / 8, abs=0.04)


def test_a_group_has_the_same_lengths_in_any_order() -> None:
    draws = Draws(LOGNORMAL, group_size=8)
    later, first = list(draws.lengths(700)), list(draws.lengths(3))
    assert list(LOGNORMAL.of_group(3, 8)) == first
    assert list(LOGNORMAL.of_group(700, 8)) == later
    assert draws.luck(3) != draws.luck(700)


def test_samples_give_their_own_distribution_scaled_to_the_mean() -> None:
    values = drawn(replace(LOGNORMAL, samples=(100.0, 100.0, 100.0, 700.0), mean_tokens=500))
    assert sorted(set(values.flatten().tolist())) == [200, 1400]
    assert (values == 1400).mean() == pytest.approx(0.25, abs=0.03)


def test_a_mixture_has_the_mean_of_its_parts() -> None:
    quantiles = mixture([(3.0, 200.0, 0.3), (1.0, 4000.0, 0.2)])
    assert fmean(quantiles) == pytest.approx((3 * 200 + 4000) / 4, rel=0.02)
    assert sum(value > 1500 for value in quantiles) / len(quantiles) == pytest.approx(
        0.25, abs=0.01
    )


def test_a_mixture_without_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="positive weight"):
        mixture([(0.0, 500.0, 0.5)])


def test_drift_scales_lengths_up_to_the_cut() -> None:
    before, after = drawn(LOGNORMAL), drawn(LOGNORMAL, scale=2.0)
    assert after.max() == 2000
    assert 1.5 * before.mean() < after.mean() < 2 * before.mean()


def test_the_longest_of_a_group_grows_with_its_size() -> None:
    assert replace(LOGNORMAL, tail=0.0).longest_of(8) == 1.0
    assert 1.5 < LOGNORMAL.longest_of(4) < LOGNORMAL.longest_of(16) < 4.0
