"""Schedules in agent steps: the conversion, its properties, and what is refused."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxpruner
from jaxpruner_dopamine.sparsity import Clock, gradient_schedule, sparsify

CLOCK = Clock(first=20_000, period=4)
clocks = st.builds(
    Clock, first=st.integers(0, 50_000), period=st.integers(1, 64), per_update=st.sampled_from([1, 1, 1, 4, 320])
)


@pytest.mark.parametrize(
    ("start", "end", "freq", "expected"),
    [
        (500_000, 2_000_000, 1_000, (120_000, 495_000, 250)),  # the paper's
        (1, 10_000_000, 5_000, (1_250, 2_495_000, 1_250)),  # its dynamic sparse training
        (0, 2_000_000, 1_000, (0, 495_000, 250)),
        (20_000, 20_000, 1_000, (0, 0, 1)),  # at once
        (30_000, 30_000, 1, (2_500, 2_500, 1)),
    ],
)
def test_schedules_of_a_dqn(start, end, freq, expected):
    schedule = gradient_schedule(CLOCK, start, end, freq)
    assert tuple(schedule[k] for k in ("update_start_step", "update_end_step", "update_freq")) == expected


def test_no_start_means_no_updates():
    assert gradient_schedule(CLOCK, None, None, 1) == {}


@given(clocks, st.integers(0, 10**6), st.integers(0, 10**6))
def test_gradient_steps_count_those_that_came_before(clock, a, b):
    """Against counting them one by one."""
    step = min(a, 3_000)
    counted = sum(clock.per_update for t in range(step) if t >= clock.first and (t - clock.first) % clock.period == 0)
    assert clock.gradient_steps(step) == counted
    assert clock.gradient_steps(min(a, b)) <= clock.gradient_steps(max(a, b))


@given(clocks, st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 10**5))
def test_the_final_sparsity_is_reached_near_the_end_that_was_asked_for(clock, start, length, freq):
    end = max(start, clock.first) + length
    config = gradient_schedule(clock, start, end, freq)
    updater = jaxpruner.create_updater_from_config({"algorithm": "magnitude", "sparsity": 0.75} | config)
    period, last = config["update_freq"], config["update_end_step"]
    assert updater.scheduler.should_update_mask(last)
    assert float(updater.scheduler.get_sparsity_at_step(jnp.float32(0.75), last)) == 0.75
    asked = clock.gradient_steps(end)
    assert abs(last - asked) <= max(period, config["update_start_step"] - asked)
    if start and clock.gradient_steps(start) < asked:
        assert config["update_start_step"] >= 1


def config(**values):
    return sparsify(**values)(CLOCK, 0)


def test_dense_is_no_updater():
    assert config(algorithm="no_prune") is None


def test_keys_of_the_core_go_to_the_core():
    updater = config(
        algorithm="rigl", sparsity=0.9, drop_fraction=0.3, use_packed_masks=True, update_start_agent_step=40_000,
        update_end_agent_step=80_000, update_freq_agent_steps=400, rng_seed=5, sparsity_type="nm_2,4",
    )  # fmt: skip
    assert isinstance(updater, jaxpruner.RigL)
    assert (updater.use_packed_masks, updater.rng_seed) == (True, 5)
    assert updater.scheduler == jaxpruner.PolynomialSchedule(
        update_freq=100, update_start_step=5_000, update_end_step=15_000
    )
    assert float(updater.drop_fraction_fn(0)) == pytest.approx(0.3)


def test_random_masks_differ_between_agents_of_other_seeds():
    params = {"kernel": jnp.ones((16, 16))}
    masks = [sparsify("random", 0.5, "uniform")(CLOCK, seed).instant_sparsify(params)[1] for seed in (0, 0, 1)]
    assert bool((masks[0]["kernel"] == masks[1]["kernel"]).all())
    assert not bool((masks[0]["kernel"] == masks[2]["kernel"]).all())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"sparsify.algorithm: missing.*sparse\.gin"),
        ({"algorithm": "magnitud", "sparsity": 0.9}, r"jaxpruner.all_algorithm_names\(\)"),
        ({"algorithm": "magnitude"}, "sparsity: missing"),
        ({"algorithm": "magnitude", "sparsity": 1.0}, "Default sparsity"),
        ({"algorithm": "magnitude", "sparsity": 0.9, "colour": 1}, "colour: no such key"),
        ({"algorithm": "magnitude", "sparsity": 0.9, "update_freq": 3}, "agent steps; bind sparsify.update_freq_agent"),
        ({"algorithm": "magnitude", "sparsity": 0.9, "update_start_agent_step": 5}, "update_end_agent_step: missing"),
        (
            {"algorithm": "set", "sparsity": 0.9, "update_start_agent_step": 9, "update_end_agent_step": 8},
            "8 comes before update_start_agent_step=9",
        ),
        (
            {"algorithm": "set", "sparsity": 0.9, "update_start_agent_step": 1, "update_end_agent_step": 19_999},
            "over before the first gradient step of this training, which is agent step 20000",
        ),
        (
            {
                "algorithm": "set", "sparsity": 0.9, "update_start_agent_step": 1, "update_end_agent_step": 50_000,
                "update_freq_agent_steps": 0,
            },
            "update_freq_agent_steps: 0",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)
