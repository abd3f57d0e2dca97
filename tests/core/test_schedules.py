"""Schedules against the formulas of the documentation, with Python and with traced steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpruner import NoUpdateSchedule, OneShotSchedule, PeriodicSchedule, PolynomialSchedule

STEPS = range(45)
PROPERTY = settings(max_examples=60, deadline=None)


def over_steps(method):
    """A method of one step at all steps, traced."""
    return np.asarray(jax.jit(jax.vmap(method))(jnp.arange(len(STEPS))))


def check_updates(schedule, expected):
    """That masks are made exactly at the expected steps, for Python, array and traced steps."""
    assert [step for step in STEPS if schedule.should_update_mask(step)] == expected
    assert [step for step in STEPS if schedule.should_update_mask(jnp.int32(step))] == expected
    traced = over_steps(lambda step: jnp.asarray(schedule.should_update_mask(step)) & True)
    np.testing.assert_array_equal(traced, [step in expected for step in STEPS])


def polynomial(target, step, start, end, power):
    p = min(max(step + 1 - start, 0), end - start) / (end - start)
    return target * (1 - (1 - p) ** power)


def test_no_updates():
    check_updates(NoUpdateSchedule(), [])
    assert NoUpdateSchedule().get_sparsity_at_step(0.8, 3) == 0.8


@pytest.mark.parametrize("target", [0, 7])
def test_one_shot(target):
    schedule = OneShotSchedule(target_step=target)
    check_updates(schedule, [target])
    assert schedule.get_sparsity_at_step(0.8, target) == 0.8


def test_one_shot_is_at_the_first_step_by_default():
    check_updates(OneShotSchedule(), [0])


@pytest.mark.parametrize(
    ("freq", "start", "end"), [(1, 0, 44), (5, 0, 40), (5, 3, 38), (7, 7, 7), (10, 1, 9), (3, 0, 0)]
)
def test_steps_of_updates(freq, start, end):
    expected = [step for step in STEPS if step % freq == 0 and start <= step <= end]
    check_updates(PeriodicSchedule(update_freq=freq, update_start_step=start, update_end_step=end), expected)
    check_updates(PolynomialSchedule(update_freq=freq, update_start_step=start, update_end_step=end), expected)


def test_a_periodic_schedule_has_open_bounds_and_the_final_sparsity():
    check_updates(PeriodicSchedule(update_freq=10), [0, 10, 20, 30, 40])
    check_updates(PeriodicSchedule(update_freq=10, update_start_step=15), [20, 30, 40])
    check_updates(PeriodicSchedule(update_freq=10, update_end_step=15), [0, 10])
    assert PeriodicSchedule(update_freq=10).get_sparsity_at_step(0.8, 0) == 0.8


@PROPERTY
@given(
    start=st.integers(0, 50),
    length=st.integers(1, 200),
    step=st.integers(0, 300),
    power=st.sampled_from([1, 2, 3, 0.5]),
    target=st.floats(0, 0.999),
)
def test_polynomial_sparsity(start, length, step, power, target):
    schedule = PolynomialSchedule(update_freq=1, update_start_step=start, update_end_step=start + length, power=power)
    found = schedule.get_sparsity_at_step(target, step)
    np.testing.assert_allclose(found, polynomial(target, step, start, start + length, power), atol=2e-6)


def test_the_power_is_three_by_default():
    schedule = PolynomialSchedule(update_freq=5, update_start_step=10, update_end_step=40)
    expected = [polynomial(0.8, step, 10, 40, 3) for step in STEPS]
    np.testing.assert_allclose([schedule.get_sparsity_at_step(0.8, step) for step in STEPS], expected, atol=1e-6)
    np.testing.assert_allclose(over_steps(lambda step: schedule.get_sparsity_at_step(0.8, step)), expected, atol=1e-6)


def test_a_polynomial_starts_at_zero_and_ends_at_the_target_exactly():
    schedule = PolynomialSchedule(update_freq=1, update_start_step=10, update_end_step=40)
    target = np.float32(0.9)
    traced = over_steps(lambda step: schedule.get_sparsity_at_step(target, step))
    np.testing.assert_array_equal(traced[:10], 0)
    np.testing.assert_array_equal(traced[39:], target)
    assert np.all(np.diff(traced) >= 0)
    for step in STEPS:
        np.testing.assert_allclose(schedule.get_sparsity_at_step(target, step), traced[step], atol=1e-6)
    assert schedule.get_sparsity_at_step(target, 39) == target


def test_start_equal_to_end_is_one_shot():
    schedule = PolynomialSchedule(update_freq=1, update_start_step=4, update_end_step=4)
    check_updates(schedule, [4])
    assert schedule.get_sparsity_at_step(0.8, 4) == 0.8


@pytest.mark.parametrize("schedule", [PeriodicSchedule, PolynomialSchedule])
def test_an_end_before_the_start(schedule):
    with pytest.raises(ValueError, match="end_step: 5 comes before"):
        schedule(update_freq=1, update_start_step=10, update_end_step=5)


@pytest.mark.parametrize("freq", [0, -3])
def test_a_frequency_below_one(freq):
    with pytest.raises(ValueError, match=f"update_freq: {freq} .* 1 or more"):
        PeriodicSchedule(update_freq=freq)


def test_steps_before_the_first():
    with pytest.raises(ValueError, match="target_step: -1 is before the first step"):
        OneShotSchedule(-1)
    with pytest.raises(ValueError, match="update_start_step: -1 is before the first step"):
        PeriodicSchedule(update_freq=1, update_start_step=-1)


def test_a_polynomial_needs_an_end():
    with pytest.raises(ValueError, match="update_end_step: missing"):
        PolynomialSchedule(update_freq=1, update_start_step=0)
