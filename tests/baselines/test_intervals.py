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


PUBLISHED = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "not ours": 9.0}


def drawn_around(means, spread):
    generator = np.random.default_rng(0)
    return {name: mean + spread[name] * generator.normal(size=500) for name, mean in means.items()}


def test_bounds_of_an_order_that_is_told_apart_are_its_correlation():
    means = {"b": 1.0, "a": 2.0, "c": 3.0, "d": 4.0, "not published": 0.0}
    low, high = intervals.rank_correlation_bounds(drawn_around(means, dict.fromkeys(means, 0.01)), PUBLISHED)
    expected = stats.spearmanr([2, 1, 3, 4], [1, 2, 3, 4]).statistic
    assert (low, high) == pytest.approx((expected, expected))


def test_bounds_leave_open_what_is_not_told_apart():
    """c and d may come in either order, and nothing else."""
    means = {"a": 1.0, "b": 2.0, "c": 3.9, "d": 4.0}
    drawn = drawn_around(means, {"a": 0.01, "b": 0.01, "c": 0.2, "d": 0.2})
    swapped = stats.spearmanr([1, 2, 4, 3], [1, 2, 3, 4]).statistic
    assert intervals.rank_correlation_bounds(drawn, PUBLISHED) == pytest.approx((swapped, 1.0))
    noise = drawn_around(means, dict.fromkeys(means, 100.0))
    assert intervals.rank_correlation_bounds(noise, PUBLISHED) == pytest.approx((-1.0, 1.0))


def test_bounds_with_ties_in_the_paper_are_those_of_scipy():
    published = {"a": 1.0, "b": 1.0, "c": 2.0}
    drawn = drawn_around({"a": 3.0, "b": 1.0, "c": 2.0}, dict.fromkeys("abc", 0.01))
    expected = stats.spearmanr([3, 1, 2], [1, 1, 2]).statistic
    assert intervals.rank_correlation_bounds(drawn, published) == pytest.approx((expected, expected))


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (1, 0, 2, 4, 3)])
def test_bounds_cover_the_correlation_of_the_true_order(order):
    """Seeds differ as much as neighbours do, so that correlations of single draws are nearly all too low."""
    generator, published = np.random.default_rng(4), dict(enumerate(range(5)))
    truth = stats.spearmanr(order, range(5)).statistic
    covered = 0
    for _ in range(40):
        scores = {m: {seed: order[m] + generator.normal(size=1) for seed in range(3)} for m in range(5)}
        low, high = intervals.rank_correlation_bounds(intervals.resampled_means(scores), published)
        covered += low - 1e-9 <= truth <= high + 1e-9
    assert covered >= 37
