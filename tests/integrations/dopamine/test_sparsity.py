"""Schedules in agent steps: the conversion, its properties, and what is refused."""

from __future__ import annotations

import contextlib
import pickle
import re

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxpruner
from jaxpruner_dopamine.sparsity import Clock, Sparsity, gradient_schedule, sparsify

CLOCK = Clock(first=20_000, period=4)
clocks = st.builds(
    Clock, first=st.integers(0, 50_000), period=st.integers(1, 64), per_update=st.sampled_from([1, 1, 1, 4, 320])
)


@pytest.mark.parametrize(
    ("start", "end", "freq", "expected"),
    [
        (500_000, 2_000_000, 1_000, (120_000, 495_000, 250)),  # the paper's
        (1, 9_995_000, 5_000, (1_250, 2_493_750, 1_250)),  # its dynamic sparse training
        (26_000, 36_100, 1_080, (1_620, 3_780, 270)),  # rounded into start and end, not to the nearest
        (0, 2_000_000, 1_000, (0, 495_000, 250)),
        (20_000, 20_000, 1_000, (0, 0, 1)),  # at once
        (30_000, 30_000, 1, (2_500, 2_500, 1)),
    ],
)
def test_schedules_of_a_dqn(start, end, freq, expected):
    schedule = gradient_schedule(CLOCK, start, end, freq)
    assert tuple(schedule[k] for k in ("update_start_step", "update_end_step", "update_freq")) == expected


def test_nothing_given_means_no_updates():
    assert gradient_schedule(CLOCK, None, None, None) == {}
    assert config(algorithm="static_sparse", sparsity=0.9) is not None
    # These follow no schedule, so that none is judged.
    schedule = {"update_start_agent_step": 1, "update_end_agent_step": 2, "update_freq_agent_steps": 5_000}
    for algorithm in ("preserve", "static_sparse"):
        asked = sparsify(algorithm=algorithm, sparsity=0.9, **schedule)
        assert asked(CLOCK, 0) is not None
        asked.check_length(CLOCK, 1)


@given(clocks, st.integers(0, 10**6), st.integers(0, 10**6))
def test_gradient_steps_count_those_that_came_before(clock, a, b):
    """Against counting them one by one."""
    step = min(a, 3_000)
    counted = sum(clock.per_update for t in range(step) if t >= clock.first and (t - clock.first) % clock.period == 0)
    assert clock.gradient_steps(step) == counted
    assert clock.gradient_steps(min(a, b)) <= clock.gradient_steps(max(a, b))


@given(clocks, st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 10**5))
def test_the_last_masks_are_the_final_ones_and_lie_in_the_training_or_it_is_refused(clock, start, length, freq):
    end = max(start, clock.first) + length
    try:
        converted = gradient_schedule(clock, start, end, freq)
    except ValueError as error:
        nearest = int(re.search(r"by degrees; let the end be (\d+) or later", str(error))[1])
        converted = gradient_schedule(clock, start, nearest, freq)
        if nearest > clock.first + clock.period:
            with pytest.raises(ValueError, match="by degrees"):
                gradient_schedule(clock, start, nearest - clock.period, freq)
    else:
        assert converted["update_end_step"] <= clock.gradient_steps(end)
    updater = jaxpruner.create_updater_from_config({"algorithm": "magnitude", "sparsity": 0.75} | converted)
    schedule, last = updater.scheduler, converted["update_end_step"]
    assert schedule.last_update_step == last
    assert float(schedule.get_sparsity_at_step(jnp.float32(0.75), last)) == 0.75
    if start != end:
        assert converted["update_start_step"] >= max(clock.gradient_steps(start), min(start, 1))
        assert converted["update_start_step"] < last
    jaxpruner.check_schedule(updater)

    asked = Sparsity({"algorithm": "magnitude"}, start, end, freq)
    try:
        asked.check_length(clock, agent_steps := end + freq // 2)
    except ValueError as error:
        if nearest := re.search(r"let it be (\d+) at most", str(error)):
            asked = Sparsity({"algorithm": "magnitude"}, start, int(nearest[1]), freq)
            with contextlib.suppress(ValueError):  # where nothing is left between start and end
                gradient_schedule(clock, start, int(nearest[1]), freq)
                asked.check_length(clock, agent_steps)
    else:
        jaxpruner.check_schedule(updater, clock.reachable(agent_steps))


@pytest.mark.parametrize(
    ("start", "end", "freq", "agent_steps", "message"),
    [
        # A training of 1,000 agent steps takes 244 gradient steps for certain, of which none was the last of these.
        (100, 1_000, 280, 1_000, None),  # gradient step 210, not 245 to the nearest
        (100, 950, 270, 1_000, None),  # 204, not 272
        (100, 1_000, 200, 1_000, None),  # 200, not 250
        (
            100,
            1_000,
            4,
            1_000,
            r"made at agent step 1000, and this training has 1000 agent steps.*let it be 992 at most",
        ),
        (100, 30_000, 200, 1_000, r"last masks are made at agent step 29820.*1000 agent steps.*let it be 820 at most"),
        (2_000, 30_000, 200, 1_000, r"update_start_agent_step: the first masks .*step 2020, .*1000 agent steps"),
        (0, 0, None, 20, r"update_start_agent_step: .* at agent step 20, and this training has 20"),
    ],
)
def test_a_training_that_is_over_before_the_schedule_is_refused(start, end, freq, agent_steps, message):
    clock = Clock(first=20, period=4)
    asked = sparsify("magnitude", 0.9, "erk", start, end, freq)
    expected = contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message)
    with expected:
        asked.check_length(clock, agent_steps)
    sparsify("no_prune").check_length(clock, agent_steps)


def test_updaters_can_be_pickled_and_compared():
    asked = {
        "sparsity": 0.9,
        "update_start_agent_step": 1,
        "update_end_agent_step": 90_000,
        "update_freq_agent_steps": 8,
    }
    for algorithm in jaxpruner.all_algorithm_names():
        if algorithm == "no_prune":
            continue
        updater, again, other = (sparsify(algorithm, **asked)(CLOCK, seed) for seed in (0, 0, 1))
        assert pickle.loads(pickle.dumps(updater)) == updater == again != other
        assert hash(updater) == hash(again)
        assert sparsify(algorithm, **asked) == sparsify(algorithm, **asked)


def config(**values):
    return sparsify(**values)(CLOCK, 0)


def test_dense_is_no_updater():
    assert config(algorithm="no_prune") is None


def test_keys_of_the_core_go_to_the_core():
    updater = config(
        algorithm="rigl", sparsity=0.9, drop_fraction=0.3, use_packed_masks=True, update_start_agent_step=40_000,
        update_end_agent_step=80_000, update_freq_agent_steps=400, rng_seed=5, sparsity_type="block_2,2",
    )  # fmt: skip
    assert isinstance(updater, jaxpruner.RigL)
    assert (updater.use_packed_masks, updater.rng_seed) == (True, 5)
    assert updater.scheduler == jaxpruner.PolynomialSchedule(
        update_freq=100, update_start_step=5_000, update_end_step=15_000
    )
    assert float(updater.drop_fraction_fn(0)) == pytest.approx(0.3)


def test_a_distribution_of_ones_own_stands_in_place_of_the_default():
    own = {"algorithm": "static_sparse", "sparsity_distribution_fn": lambda params: {"kernel": 0.25}}
    assert sparsify(**own)(CLOCK, 0).get_target_sparsities({"kernel": jnp.ones((4, 4))}) == {"kernel": 0.25}
    with pytest.raises(ValueError, match="sparsity_distribution_fn: stands in place of dist_type"):
        sparsify(**own, dist_type="erk")(CLOCK, 0)


def test_random_masks_differ_between_agents_of_other_seeds():
    params = {"kernel": jnp.ones((16, 16))}
    masks = [sparsify("random", 0.5, "uniform", 0, 0)(CLOCK, seed).instant_sparsify(params)[1] for seed in (0, 0, 1)]
    assert bool((masks[0]["kernel"] == masks[1]["kernel"]).all())
    assert not bool((masks[0]["kernel"] == masks[2]["kernel"]).all())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"sparsify.algorithm: missing.*sparse\.gin.*update_start_agent_step, sparsify.update_end_agent_step"),
        ({"algorithm": "magnitude", "sparsity": 0.9}, "start_agent_step: missing.*give update_start_agent_step and"),
        (
            {"algorithm": "magnitude", "sparsity": 0.9, "update_end_agent_step": 50_000},
            "update_start_agent_step: missing, while update_end_agent_step is given",
        ),
        ({"algorithm": "rigl", "sparsity": 0.9}, "update_start_agent_step: RigL would never change its mask"),
        (
            {"algorithm": "rigl", "sparsity": 0.9, "update_start_agent_step": 1, "update_end_agent_step": 50_000},
            "update_freq_agent_steps: 1 is one gradient step.*RigL.*give 8 or more, such as 400",
        ),
        (
            {"algorithm": "set", "sparsity": 0.9, "update_start_agent_step": 9, "update_end_agent_step": 9},
            "over before the first gradient step",
        ),
        (
            {"algorithm": "set", "sparsity": 0.9, "update_start_agent_step": 30_000, "update_end_agent_step": 30_000},
            r"update_end_agent_step: the drop fraction of SET is 0.*\(Steps in this message are gradient steps",
        ),
        ({"algorithm": "magnitude", "sparsity": 0.9, "update_start_agent_step": -1}, "-1 is no number of agent steps"),
        ({"algorithm": "magnitude", "sparsity": 0.9, "update_start_agent_step": "1"}, "'1' is no number of agent"),
        ({"algorithm": "magnitud", "sparsity": 0.9}, r"jaxpruner.all_algorithm_names\(\)"),
        ({"algorithm": "magnitude"}, "sparsity: missing"),
        ({"algorithm": "magnitude", "sparsity": 1.0}, "Default sparsity"),
        ({"algorithm": "magnitude", "sparsity": 0.9, "colour": 1}, "colour: no such key.*update_freq_agent_steps, "),
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
