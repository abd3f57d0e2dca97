"""What of a state holds when the configuration is another one, and what is told of it."""

from __future__ import annotations

import copy
import functools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxpruner

PARAMS = {"a": jnp.arange(1.0, 101.0).reshape(10, 10), "b": jnp.arange(1.0, 41.0).reshape(4, 10), "bias": jnp.ones(10)}
TWICE = {"update_start_step": 1, "update_end_step": 5, "update_freq": 2}


def updater(algorithm="magnitude", **changes):
    config = {"algorithm": algorithm, "sparsity": 0.75} | TWICE | changes
    return jaxpruner.create_updater_from_config(config)


def transformation(algorithm="magnitude", inner=optax.adam(0.1), **changes):
    return jaxpruner.sparsify(inner, updater(algorithm, **changes))


def trained(tx, steps, params=PARAMS, state=None, jit=jax.jit):
    update = jit(tx.update)
    state = tx.init(params) if state is None else state
    for _ in range(steps):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.slow
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("algorithm", ["magnitude", "global_magnitude", "magnitude_ste"])
def test_the_sparsity_at_hand_wins(algorithm, jit):
    params, state = trained(transformation(algorithm), 3)
    params, state = trained(transformation(algorithm, sparsity=0.9), 5, params, state, jit)
    assert sum(int(mask.sum()) for mask in jax.tree.leaves(state.masks)) == 14
    np.testing.assert_allclose(jax.tree.leaves(state.target_sparsities), 0.9, rtol=1e-6)


def test_a_distribution_that_reads_weights_goes_on_with_what_init_found():
    def read(params):
        return {"a": float(params["a"].sum()) / 1e4, "b": None, "bias": None}

    tx = jaxpruner.sparsify(
        optax.sgd(0.0),
        jaxpruner.MagnitudePruning(scheduler=jaxpruner.OneShotSchedule(0), sparsity_distribution_fn=read),
    )
    _, state = trained(tx, 1)
    assert int(state.masks["a"].sum()) == round(100 * (1 - 0.505))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"use_packed_masks": True}, "a: use_packed_masks=True now, .* made with use_packed_masks=False"),
        ({"use_packed_masks": True}, {}, "a: use_packed_masks=False now, .* made with use_packed_masks=True"),
        ({"algorithm": "magnitude_ste"}, {}, "opt_state: holds the dense weights of a straight-through algorithm"),
        ({}, {"algorithm": "magnitude_ste"}, "opt_state: holds no dense weights, which SteMagnitudePruning trains"),
        ({"filter_fn": lambda path, _: path == ("a",)}, {}, "b: filter_fn takes it, and the state has no mask for it"),
    ],
)
def test_a_state_of_another_configuration_is_told(before, after, message):
    params, state = trained(transformation(**before), 1)
    with pytest.raises(ValueError, match=message):
        trained(transformation(**after), 1, params, state)
    with pytest.raises(ValueError, match=message):
        trained(transformation(**after), 2, params, state, lambda f: f)  # leaves are compared when masks are made


def test_a_state_of_another_shape_is_told():
    state = transformation().init(PARAMS)
    with pytest.raises(
        ValueError, match=r"a: the mask of the state, bool\[10, 10\], is not one of a parameter of shape"
    ):
        trained(transformation(), 1, PARAMS | {"a": jnp.ones((10, 5))}, state)


@pytest.mark.parametrize("algorithm", jaxpruner.all_algorithm_names())
def test_updaters_pickle_compare_and_hash(algorithm):
    one = updater(algorithm, drop_fraction=0.3, custom_sparsity_map={"a": 0.5}, rng_seed=jax.random.key(3))
    for other in (pickle.loads(pickle.dumps(updater(algorithm))), copy.deepcopy(updater(algorithm))):
        assert other == updater(algorithm)
        assert hash(other) == hash(updater(algorithm))
        assert other != one
    assert copy.deepcopy(one) == one
    assert one != updater(algorithm, drop_fraction=0.3, custom_sparsity_map={"a": 0.5}, rng_seed=jax.random.key(4))
    inner, longer = optax.adam(0.1), {"update_end_step": 6}  # of which phases alternate
    assert transformation(algorithm, inner, **longer) == transformation(algorithm, inner, **longer)
    if algorithm not in ("no_prune", "preserve"):
        assert transformation(algorithm, inner, **longer) != transformation(algorithm, inner, sparsity=0.5, **longer)


def test_a_changed_updater_is_no_longer_equal():
    one, other = updater(), updater()
    other.scheduler = jaxpruner.OneShotSchedule(3)
    assert one != other


@pytest.mark.parametrize("algorithm", jaxpruner.all_algorithm_names())
def test_a_description_is_json_and_the_same_in_the_next_process(algorithm):
    described = jaxpruner.describe(updater(algorithm, sparsity_type={"a": "nm_1,4"} if algorithm == "rigl" else None))
    assert json.loads(json.dumps(described)) == described
    assert described["algorithm"] == algorithm
    assert " at 0x" not in str(described)
    assert (
        jaxpruner.check_resumed(
            described, updater(algorithm, sparsity_type={"a": "nm_1,4"} if algorithm == "rigl" else None), "x"
        )
        == []
    )


def test_what_differs_when_a_training_is_resumed():
    saved = jaxpruner.describe(updater())
    for changes, message in (
        ({"algorithm": "rigl"}, "algorithm: 'magnitude' in the run of runs/x, 'rigl' now"),
        ({"use_packed_masks": True}, "use_packed_masks: False in the run of runs/x, True now"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxpruner.check_resumed(saved, updater(**changes), "runs/x")
    with pytest.raises(ValueError, match="algorithm: 'magnitude' in the run of runs/x, 'no_prune' now"):
        jaxpruner.check_resumed(saved, None, "runs/x")
    with pytest.raises(ValueError, match="algorithm: 'no_prune' in the run of runs/x, 'magnitude' now"):
        jaxpruner.check_resumed(jaxpruner.describe(None), updater(), "runs/x")
    (line,) = jaxpruner.check_resumed(saved, updater(sparsity=0.9), "runs/x")
    assert line.startswith("sparsity: 0.75 in the run of runs/x, 0.9 now")


# Starting masks, and pruning on.


def sparse_checkpoint(share=0.7):
    pruned, masks = jaxpruner.MagnitudePruning(
        sparsity_distribution_fn=functools.partial(jaxpruner.sparsity_distributions.uniform, sparsity=share)
    ).instant_sparsify(PARAMS)
    return pruned, masks


@pytest.mark.slow
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("algorithm", ["magnitude", "saliency", "random", "global_magnitude"])
def test_zeros_of_a_checkpoint_stay_while_pruning_goes_on(algorithm, packed, jit):
    params, _ = sparse_checkpoint()
    tx = transformation(algorithm, initial_sparsity="from_params", sparsity=0.9, use_packed_masks=packed)
    state, update, zeros = tx.init(PARAMS), jit(tx.update), []  # hosts restore after `init`
    before = params
    for _ in range(6):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
        assert not any(
            ((b == 0) & (p != 0)).any() for b, p in zip(*map(jax.tree.leaves, (before, params)), strict=True)
        )
        zeros.append(jaxpruner.summarize_sparsity([params["a"], params["b"]])["_total_sparsity"])
        before = params
    assert zeros[0] == 0.7
    assert zeros[-1] == 0.9
    assert zeros == sorted(zeros)


@functools.cache
def started_sparse(algorithm):
    tx = transformation(algorithm, optax.sgd(0.0), initial_sparsity="from_params")
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("algorithm", ["rigl", "static_sparse", "mest"])
@settings(max_examples=20)
@given(nonzero=st.integers(0, 64), seed=st.integers(0, 99))
def test_what_starts_sparse_takes_the_largest_of_the_nonzero_weights(algorithm, nonzero, seed):
    """As many as were asked for, or fewer if fewer are nonzero; a leaf that starts at zero has its random mask."""
    rank = np.random.default_rng(seed).permutation(64).reshape(8, 8)
    weights = np.where(rank < nonzero, rank + 1.0, 0.0) * np.where(np.arange(8) % 2, 1, -1)
    params = {"w": jnp.asarray(weights, jnp.float32), "zero": jnp.zeros((4, 16))}
    tx, update = started_sparse(algorithm)
    new, state = trained(tx, 1, params, jit=lambda _: update)
    kept = min(nonzero, 16) if nonzero else 16
    assert int(state.masks["w"].sum()) == kept
    if nonzero:
        np.testing.assert_array_equal(new["w"] != 0, (rank < nonzero) & (rank >= nonzero - kept))
    new, state = trained(tx, 5, new, state, jit=lambda _: update)
    assert (int(state.masks["w"].sum()), int(state.masks["zero"].sum())) == (kept, 16)
    jaxpruner.check_sparse(new, state, tx.init.updater)


@pytest.mark.parametrize("structure", ["nm_2,4", "block_2,4", "per_output"])
def test_what_starts_sparse_from_parameters_has_its_structure(structure):
    changes = {"sparsity": 0.5, "sparsity_type": structure, "use_packed_masks": True}
    tx = transformation("rigl", optax.sgd(0.0), initial_sparsity="from_params", **changes)
    params = {"w": jax.random.normal(jax.random.key(0), (8, 8))}
    pruned, _ = updater(sparsity=0.5, sparsity_type=structure).instant_sparsify(params)
    new, _ = trained(tx, 1, params)
    np.testing.assert_array_equal(new["w"], pruned["w"])


@pytest.mark.parametrize("way", ["from_params", "masks"])
def test_granet_revives_no_zeros_that_the_schedule_does_not_ask_for(way):
    pruned, masks = sparse_checkpoint(0.7)  # sparser than the first update of the schedule
    start = {"initial_sparsity": "from_params"} if way == "from_params" else {"masks": masks}
    tx = transformation("granet", optax.sgd(0.0), drop_fraction=0.3, **start)
    state, update, kept = tx.init(pruned), jax.jit(tx.update), []
    for _ in range(6):
        updates, state = update(jax.tree.map(jnp.ones_like, pruned), state, pruned)
        pruned = optax.apply_updates(pruned, updates)
        kept.append(int(state.masks["a"].sum()))
    assert kept == [30, 30, 30, 30, 25, 25]


def test_check_sparse_tells_a_training_that_stayed_dense():
    """As one whose state is of a dense training."""
    chosen = updater("rigl", initial_sparsity="from_params")
    _, state = trained(jaxpruner.sparsify(optax.sgd(0.1), chosen), 1)
    dense = state._replace(masks=jax.tree.map(jnp.ones_like, state.masks))
    with pytest.raises(ValueError, match=r"sparsity: asked 75.0%, masks hold 0.0%, and RigL .* start anew"):
        jaxpruner.check_sparse(PARAMS, dense, chosen)
    ticket = updater("rigl", masks={"a": PARAMS["a"] > 1})  # as its maker wants it
    jaxpruner.check_sparse(PARAMS, dense, ticket)


@pytest.mark.parametrize("algorithm", ["rigl", "set", "static_sparse"])
@pytest.mark.parametrize(("before", "asked"), [(0.5, 0.75), (0.75, 0.5)])
def test_check_sparse_tells_another_sparsity_than_that_of_the_masks(algorithm, before, asked):
    """A sparse trainer that is resumed keeps as many weights as before, whatever the configuration says now."""
    first, now = (updater(algorithm, sparsity=sparsity) for sparsity in (before, asked))
    params, state = trained(jaxpruner.sparsify(optax.sgd(0.1), first), 1)
    jaxpruner.check_sparse(params, state, first)
    with pytest.raises(ValueError, match=f"sparsity: asked {asked:.1%}, masks hold {before:.1%}, and .* start anew"):
        jaxpruner.check_sparse(params, state, now)


def test_check_sparse_lets_srigl_remove_neurons_whose_inputs_find_no_place():
    """One output takes all of its ten inputs, the others become idle, and the rest of the budget is left over."""
    chosen = updater("srigl", sparsity=0.5, min_share=1.0, drop_fraction=0.9)
    tx = jaxpruner.sparsify(optax.sgd(0.1), chosen)
    params = {"w": jnp.ones((10, 4)).at[:, 0].set(5.0)}
    grads = {"w": jnp.zeros((10, 4)).at[:, 0].set(9.0).at[:4, 1].set(5.0).at[:3, 2:].set(5.0)}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert state.masks["w"].sum(0).tolist() == [10, 0, 0, 0]  # of 20
    jaxpruner.check_sparse(params, state, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rigl", "set", "preserve", "static_sparse", "magnitude"])
def test_training_starts_from_given_masks(algorithm):
    """A lottery ticket, rewound to parameters that do not show it: one leaf is zero throughout."""
    _, masks = sparse_checkpoint()
    params = PARAMS | {"a": jnp.zeros((10, 10))}
    updater = jaxpruner.create_updater_from_config(
        {"algorithm": algorithm, "sparsity": 0.7, "update_start_step": 4, "update_end_step": 8, "update_freq": 4}
    )
    updater.masks = masks
    new, state = trained(jaxpruner.sparsify(optax.sgd(0.1), updater), 3, params)
    for name in ("a", "b"):
        np.testing.assert_array_equal(state.masks[name], masks[name])
        np.testing.assert_array_equal(np.asarray(new[name]) != 0, masks[name])


def test_masks_that_cannot_be_started_from():
    with pytest.raises(ValueError, match="masks: cannot be used with SteMagnitudePruning"):
        transformation("magnitude_ste", masks="from_params").init(PARAMS)
    for masks in ("from_params", {"a": np.ones((10, 10), bool)}):
        with pytest.raises(ValueError, match=r"masks: cannot be used with ACDC, nor .* its dense phases"):
            transformation("acdc", update_end_step=6, masks=masks).init(PARAMS)
    with pytest.raises(ValueError, match=r"masks: a has shape \(2,\), and the parameter \(10, 10\)"):
        transformation(masks={"a": np.ones(2, bool)}).init(PARAMS)
    with pytest.raises(ValueError, match="masks: bias is no parameter that filter_fn selects"):
        transformation(masks={"bias": np.ones(10, bool)}).init(PARAMS)
    with pytest.raises(ValueError, match="masks: 'from_checkpoint' is not known"):
        transformation(masks="from_checkpoint").init(PARAMS)


def test_a_schedule_may_start_from_a_sparsity():
    schedule = updater(initial_sparsity=0.5).scheduler
    steps = [float(schedule.get_sparsity_at_step(0.75, step)) for step in range(8)]
    assert steps[0] == 0.5
    assert steps == sorted(steps)
    assert steps[5:] == [0.75] * 3
    assert float(schedule.get_sparsity_at_step(0.3, 1)) == pytest.approx(0.3)  # never above the final one


@pytest.mark.parametrize(("start", "end", "freq"), [(0, 105, 10), (3, 17, 5), (2, 8, 2), (0, 100, 7)])
def test_the_last_update_has_the_final_sparsity_exactly(start, end, freq):
    schedule = jaxpruner.PolynomialSchedule(update_freq=freq, update_start_step=start, update_end_step=end)
    last = schedule.last_update_step
    assert last == max(step for step in range(start, end + 1) if step % freq == 0)
    assert schedule.first_update_step == min(step for step in range(start, end + 1) if step % freq == 0)
    assert schedule.num_updates == sum(step % freq == 0 for step in range(start, end + 1))
    assert schedule.get_sparsity_at_step(0.8, last) == np.float32(0.8)
    assert schedule.get_sparsity_at_step(0.8, last - freq) < 0.8


def test_gradients_that_overflowed_grow_nothing():
    tx = transformation("rigl")
    state = tx.init(PARAMS)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    for step in range(4):
        bad = grads | {"a": grads["a"].at[3, 3].set(jnp.nan)} if step == 2 else grads
        _, new = jax.jit(tx.update)(bad, state, PARAMS)
        if step == 2:
            np.testing.assert_array_equal(new.masks["a"], state.masks["a"])
            assert (np.asarray(new.masks["b"]) != np.asarray(state.masks["b"])).any()
        state = new


@pytest.mark.slow
def test_a_key_for_each_seed_under_vmap():
    def train(key):
        tx = transformation("set", rng_seed=key)
        state = tx.init(PARAMS)
        first = state.masks["a"]
        for _ in range(3):
            _, state = tx.update(PARAMS, state, PARAMS)
        return first, state.masks["a"]

    first, last = jax.vmap(train)(jax.random.split(jax.random.key(0), 3))
    assert len({m.tobytes() for m in np.asarray(first)}) == 3
    assert (last.sum((1, 2)) == 25).all()
