"""How certain a comparison is: what rows keep of single test examples, and the bootstrap over them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from jaxpruner_baselines import intervals


@given(arrays.arrays(bool, st.integers(1, 50)))
def test_what_is_right_is_kept_to_the_bit(right):
    np.testing.assert_array_equal(intervals.unpack(intervals.pack(right)), right)


@given(arrays.arrays(np.float32, st.integers(1, 20), elements=st.floats(-1e6, 1e6, width=32)))
def test_numbers_are_kept(values):
    np.testing.assert_array_equal(intervals.unpack(intervals.pack(values)), values)


def scores(generator, means, seeds=5, examples=400, seed_spread=0.0):
    """Right or wrong with these probabilities; examples differ, and so may seeds."""
    hard = generator.random(examples)  # of all methods
    return {
        name: {
            seed: (hard < mean + seed_spread * generator.normal()).astype(float) for seed in range(seeds)
        }
        for name, mean in means.items()
    }  # fmt: skip


def test_a_difference_on_the_same_examples_is_told_apart():
    """Intervals of two methods overlap widely, since examples differ; that of their difference does not."""
    drawn = intervals.resampled_means(scores(np.random.default_rng(0), {"better": 0.62, "worse": 0.58}))
    (low, _), (_, high) = intervals.interval(drawn["better"]), intervals.interval(drawn["worse"])
    assert low < high
    assert intervals.is_higher(drawn["better"], drawn["worse"]) is True
    assert intervals.is_higher(drawn["worse"], drawn["better"]) is False
    assert intervals.is_higher(drawn["worse"], drawn["worse"]) is None


def test_a_difference_that_seeds_could_make_is_not():
    generator = np.random.default_rng(1)
    drawn = intervals.resampled_means(scores(generator, {"one": 0.62, "other": 0.58}, seed_spread=0.2))
    assert intervals.is_higher(drawn["one"], drawn["other"]) is None


def test_the_interval_of_seeds_alone_is_that_of_students_t():
    generator = np.random.default_rng(2)
    values = generator.normal(size=200)
    drawn = intervals.resampled_means({"method": {i: np.full(3, value) for i, value in enumerate(values)}})["method"]
    usual = stats.t.interval(intervals.LEVEL, 199, values.mean(), stats.sem(values))
    np.testing.assert_allclose(intervals.interval(drawn), usual, atol=0.02)


def test_intervals_of_few_seeds_cover_what_they_promise():
    """A bootstrap alone covers 83 % with five seeds."""
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        scores = {"method": {i: np.full(1, value) for i, value in enumerate(generator.normal(size=5))}}
        low, high = intervals.interval(intervals.resampled_means(scores)["method"])
        covered += low < 0 < high
    assert covered >= 184


def test_all_methods_need_the_same_seeds():
    one, other = {0: np.ones(3), 1: np.ones(3)}, {0: np.zeros(3), 1: np.ones(3)}
    drawn = intervals.resampled_means({"one": one, "other": other})
    assert (drawn["one"] == 1).all()
    assert drawn["other"].mean() == pytest.approx(0.5, abs=0.1)
    assert intervals.resampled_means({"one": one, "other": {0: np.ones(3)}}) == {}
    assert intervals.resampled_means({"one": {0: np.ones(3)}}) == {}  # of one seed, nothing is known of seeds
    assert intervals.resampled_means({}) == {}


@given(arrays.arrays(float, (4, 5), elements=st.integers(0, 3).map(float)))
def test_rank_correlations_are_those_of_scipy(table):
    drawn, published = dict(zip("abcd", table, strict=True)), {"a": 1.0, "b": 3.0, "c": 2.0, "e": 9.0}
    found = intervals.rank_correlations(drawn, published)
    for i, value in enumerate(found):
        with np.errstate(all="ignore"):
            expected = np.nan if np.ptp(table[:3, i]) == 0 else stats.spearmanr(table[:3, i], [1, 3, 2]).statistic
        np.testing.assert_allclose(value, expected, atol=1e-9)
    low, high = intervals.interval(found)
    assert np.isnan(low) == np.isnan(found).all()
    assert np.isnan(low) or -1.001 <= low <= high <= 1.001
