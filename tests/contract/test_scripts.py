"""Scripts in the style of the paper, and what users override."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sparse_cases as cases

import jaxpruner


@pytest.fixture(scope="module")
def model():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.relu(nn.Dense(16)(x)))

    return Net()


UNIFORM = functools.partial(jaxpruner.sparsity_distributions.uniform, sparsity=0.8)


def train(model, tx, updater, steps=8):
    """The training loop of the paper, hook by hook."""
    x = jax.random.normal(jax.random.key(1), (16, 8))
    y = jnp.arange(16) % 4
    params = model.init(jax.random.key(0), x)["params"]
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, x), y).mean()

        forward = updater.pre_forward_update(params, opt_state)
        value, grads = jax.value_and_grad(loss)(forward)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        params = updater.post_gradient_update(params, opt_state)
        return params, opt_state, value

    losses = []
    for _ in range(steps):
        params, opt_state, loss = step(params, opt_state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    return params, opt_state


def test_magnitude_pruning_by_hand(model):
    updater = jaxpruner.MagnitudePruning(
        sparsity_distribution_fn=functools.partial(jaxpruner.sparsity_distributions.uniform, sparsity=0.8),
        scheduler=jaxpruner.sparsity_schedules.PolynomialSchedule(
            update_freq=2, update_start_step=2, update_end_step=6
        ),
    )
    params, opt_state = train(model, updater.wrap_optax(optax.adam(1e-2)), updater)
    summary = jaxpruner.summarize_sparsity(params)
    sizes = {"Dense_0": 8 * 16, "Dense_1": 16 * 4}
    kept = {name: cases.kept_number(size, 0.8) for name, size in sizes.items()}
    for name, size in sizes.items():
        assert summary[f"{name}/kernel"] == pytest.approx(1 - kept[name] / size)
        assert summary[f"{name}/bias"] == 0
    assert summary["_nparams"] == sum(sizes.values()) + 20
    assert summary["_nparams_nnz"] == sum(kept.values()) + 20
    assert summary["_total_sparsity"] == pytest.approx(1 - (sum(kept.values()) + 20) / (sum(sizes.values()) + 20))
    assert set(jaxpruner.summarize_sparsity(params, only_total_sparsity=True)) == {
        "_total_sparsity",
        "_nparams",
        "_nparams_nnz",
    }
    overlap = jaxpruner.summarize_intersection(opt_state.masks, opt_state.masks)
    assert overlap["_total_intersection"] == 1

    again, masks = updater.instant_sparsify(params)
    cases.assert_same_bits(again, params)
    assert masks["Dense_0"]["bias"] is None
    np.testing.assert_array_equal(masks["Dense_0"]["kernel"], params["Dense_0"]["kernel"] != 0)


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "dist_type"), [
    ("magnitude", "erk"), ("saliency", "uniform"), ("global_magnitude", "uniform"), ("rigl", "erk"),
    ("magnitude_ste", "uniform"), ("no_prune", "uniform"),
])  # fmt: skip
def test_config_dict(model, algorithm, dist_type):
    ml_collections = pytest.importorskip("ml_collections")
    config = ml_collections.ConfigDict()
    config.algorithm = algorithm
    config.dist_type = dist_type
    config.sparsity = 0.5
    config.update_freq = 2
    config.update_start_step = 2
    config.update_end_step = 6
    updater = jaxpruner.create_updater_from_config(config)
    params, opt_state = train(model, updater.wrap_optax(optax.adam(1e-2)), updater)
    params = updater.pre_forward_update(params, opt_state)
    kernels = [np.asarray(leaf["kernel"]) for leaf in params.values()]
    kept = sum(map(np.count_nonzero, kernels))
    if algorithm == "no_prune":
        assert kept == 8 * 16 + 16 * 4
    elif algorithm != "rigl":
        expected = 8 * 16 // 2 + 16 * 4 // 2
        assert abs(kept - expected) <= (2 if dist_type == "erk" else 0)
    # The same config, handed to `sparsify`.
    assert cases.signature(jax.eval_shape(jaxpruner.sparsify(optax.adam(1e-2), config).init, params))


def test_extra_arguments_reach_the_scores_and_the_inner_optimizer():
    seen = []

    class Importance(jaxpruner.BaseUpdater):
        def calculate_scores(self, params, sparse_state=None, grads=None, *, importance, **kwargs):
            seen.append(sorted(kwargs))
            return jax.tree.map(lambda p: jnp.abs(p) * importance, params)

    def inner_update(updates, state, params=None, **extra):
        assert sorted(extra) == ["importance", "other"]
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), inner_update)
    updater = Importance(scheduler=jaxpruner.OneShotSchedule(0), sparsity_distribution_fn=UNIFORM)
    tx = updater.wrap_optax(inner)
    params = cases.tree("dict")
    chosen = jnp.where(jnp.arange(16) < 4, 1.0, 0.0)
    _, state = jax.jit(tx.update)(params, tx.init(params), params, importance=chosen, other=jnp.ones(()))
    mask = np.asarray(state.masks["dense"]["kernel"])
    assert mask.sum() == cases.kept_number(mask.size, 0.8)
    assert not mask[:, 4:].any()
    assert seen == [["other"]]
    with pytest.raises(TypeError, match="importance"):
        tx.update(params, tx.init(params), params)


class SmallestFirst(jaxpruner.BaseUpdater):
    """A user's algorithm: the one hook that must be written."""

    def calculate_scores(self, params, sparse_state=None, grads=None):
        return jax.tree.map(lambda p: -jnp.abs(p), params)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("structure", [jaxpruner.sparsity_types.Unstructured, jaxpruner.sparsity_types.NByM(2, 4)])
def test_a_subclass_of_one_method(structure, packed):
    updater = SmallestFirst(
        sparsity_type=structure, use_packed_masks=packed, scheduler=jaxpruner.OneShotSchedule(1),
        sparsity_distribution_fn=functools.partial(jaxpruner.sparsity_distributions.uniform, sparsity=0.5),
    )  # fmt: skip
    params = cases.tree("dict")
    last = cases.run(updater.wrap_optax(optax.sgd(0.1)), params, 3)[-1]
    mask = cases.mask_list(updater, last.new_state, params)[1]
    assert mask.sum() == mask.size // 2
    cases.check_zeros(last.new_params, [None, mask])
    sparse, masks = updater.instant_sparsify(params)
    kernel = np.abs(np.asarray(params["dense"]["kernel"]))
    np.testing.assert_array_equal(np.asarray(masks["dense"]["kernel"]), np.asarray(sparse["dense"]["kernel"]) != 0)
    if structure is jaxpruner.sparsity_types.Unstructured:
        kept = np.asarray(masks["dense"]["kernel"])
        assert kernel[kept].max() < kernel[~kept].min()


def test_hooks_are_looked_up_late():
    """Scripts assign a scheduler, or a method, to an updater whose transformation exists already."""
    updater = jaxpruner.MagnitudePruning(sparsity_distribution_fn=UNIFORM)
    tx = updater.wrap_optax(optax.sgd(0.0))
    params = cases.tree("dict")
    assert cases.run(tx, params, 2)[-1].new_params["dense"]["kernel"].all()
    updater.scheduler = jaxpruner.PeriodicSchedule(update_freq=1)
    updater.calculate_scores = lambda params, **kwargs: jax.tree.map(lambda p: -p, params)
    # A function that JAX has not traced yet: what it compiled before, it does not look at again.
    last = cases.run(tx, params, 2, update=cases.compiled(lambda *args: tx.update(*args)))[-1]
    kernel, kept = np.asarray(params["dense"]["kernel"]), cases.mask_list(updater, last.new_state, params)[1]
    assert kept.sum() == cases.kept_number(kept.size, 0.8)
    assert kernel[kept].max() < kernel[~kept].min()


def test_register_algorithm(monkeypatch):
    monkeypatch.setattr(jaxpruner.api, "ALGORITHM_REGISTRY", dict(jaxpruner.ALGORITHM_REGISTRY))

    @dataclasses.dataclass(eq=False)
    class Tempered(jaxpruner.MagnitudePruning):
        temperature: float = 1.0

    jaxpruner.register_algorithm("tempered", Tempered)
    assert "tempered" in jaxpruner.all_algorithm_names()
    updater = jaxpruner.create_updater_from_config({"algorithm": "tempered", "sparsity": 0.5, "temperature": 2.0})
    assert isinstance(updater, Tempered)
    assert updater.temperature == 2.0
    assert np.isclose(updater.get_target_sparsities({"w": jnp.ones((2, 2))})["w"], 0.5)
    jaxpruner.register_algorithm("tempered", Tempered)
    with pytest.raises(ValueError, match="tempered"):
        jaxpruner.register_algorithm("tempered", jaxpruner.SET)
    with pytest.raises(ValueError, match=r"jaxpruner\.all_algorithm_names\(\).*tempered"):
        jaxpruner.create_updater_from_config({"algorithm": "unheard", "sparsity": 0.5})


def test_a_step_without_optax():
    """`project` moves what any optimizer proposes onto the masks."""
    params = cases.tree("dict")
    for algorithm in ("saliency", "rigl"):
        updater = cases.make_updater(algorithm)
        steps = cases.run(jaxpruner.sparsify(optax.sgd(0.125), updater), params, 4)
        state, now, step = updater.init_state(params), params, jax.jit(functools.partial(jaxpruner.project, updater))
        for reference in steps:
            proposed = jax.tree.map(lambda p, g: p - 0.125 * g, now, reference.grads)
            now, state = step(now, proposed, reference.grads, state)
            cases.assert_same_bits(now, reference.new_params)
            cases.assert_same_bits(state.masks, reference.new_state.masks)


@pytest.mark.parametrize("inner", [optax.sgd(0.1, momentum=0.9), optax.adam(0.1)], ids=["momentum", "adam"])
@pytest.mark.parametrize("algorithm", ["magnitude_ste", "random_ste"])
def test_a_straight_through_step_without_optax(algorithm, inner):
    """The optimizer steps from masked parameters; the dense weights move on, and come back as they would with optax."""
    updater = jaxpruner.create_updater_from_config({"algorithm": algorithm, "sparsity": 0.5})
    params = {"w": jnp.cos(3 * jnp.arange(16.0)).reshape(4, 4), "b": jnp.ones(4)}
    tx = jaxpruner.sparsify(inner, updater)
    reference, expected = params, tx.init(params)
    inner_state, state = inner.init(params), jaxpruner.init_projection(updater, params)
    for index in range(5):
        grads = {"w": jnp.sin(7 * jnp.arange(16.0) + index).reshape(4, 4), "b": jnp.ones(4)}
        updates, expected = tx.update(grads, expected, reference)
        reference = optax.apply_updates(reference, updates)
        updates, inner_state = inner.update(grads, inner_state, params)
        params, state = jaxpruner.project(updater, params, optax.apply_updates(params, updates), grads, state)
        cases.assert_same_bits(params, reference)
        cases.assert_same_bits(state.masks, expected.masks)
        cases.assert_same_bits(state.inner_state.weights, expected.inner_state.weights)


@pytest.mark.parametrize("algorithm", ["movement", "soft_movement", "sr_ste", "top_kast"])
def test_a_straight_through_step_that_changes_gradients_is_not_after_the_optimizer(algorithm):
    updater = jaxpruner.create_updater_from_config({"algorithm": algorithm, "sparsity": 0.5})
    params = {"w": jnp.arange(16.0).reshape(4, 4)}
    state = jaxpruner.init_projection(updater, params)
    with pytest.raises(ValueError, match=r"project: cannot be used with .* between jaxpruner.begin_step and"):
        jaxpruner.project(updater, params, params, params, state)


# Names of the paper's library.


def test_schedules_by_their_other_names():
    schedule = jaxpruner.PolynomialSchedule(update_freq=2, update_start_step=0, update_end_step=4)
    assert [bool(schedule.is_mask_update_iter(step)) for step in range(4)] == [True, False, True, False]
    found = schedule.get_sparsity_at_step(target_sparsities={"a": 0.8, "b": None}, step=4)
    assert found == {"a": np.float32(0.8), "b": None}

    class Third(jaxpruner.sparsity_schedules.Schedule):
        def is_mask_update_iter(self, step):
            return step == 2

    assert [bool(Third().should_update_mask(step)) for step in range(4)] == [False, False, True, False]
    tx = jaxpruner.MagnitudePruning(scheduler=Third(), sparsity_distribution_fn=UNIFORM).wrap_optax(optax.sgd(0.1))
    kept = [int(s.new_state.masks["dense"]["kernel"].sum()) for s in cases.run(tx, cases.tree("dict"), 4)]
    assert kept == [128, 128, 26, 26]
    with pytest.raises(NotImplementedError, match="does not override should_update_mask"):
        jaxpruner.sparsity_schedules.Schedule().should_update_mask(0)


def test_names_and_defaults():
    assert jaxpruner.base_updater.NoPruning is jaxpruner.algorithms.pruners.NoPruning is jaxpruner.NoPruning
    assert jaxpruner.RigL(is_debug=True).is_debug
    assert jaxpruner.GlobalMagnitudePruning().sparsity == 0
    params = cases.tree("dict")
    targets = jaxpruner.BaseUpdater().get_target_sparsities(params)
    assert targets == {"dense": {"kernel": 0.0, "bias": None}}
    masks = {"a": jnp.ones(4, bool)}
    assert jaxpruner.summarize_intersection(masks, masks, only_total_intersection=True) == {"_total_intersection": 1.0}


@pytest.mark.parametrize("updater", [jaxpruner.MagnitudePruning(), jaxpruner.RigL()])
def test_topk_fn_is_callable(updater):
    scores = jnp.arange(16.0).reshape(4, 4)
    np.testing.assert_array_equal(updater.topk_fn(scores, 0.5), scores >= 8)
    updater.sparsity_type = jaxpruner.sparsity_types.NByM(1, 4)
    np.testing.assert_array_equal(updater.topk_fn(scores, 0.75), jnp.arange(16).reshape(4, 4) % 4 == 3)
    assert dataclasses.replace(updater) == updater
    own = jaxpruner.MagnitudePruning(topk_fn=lambda scores, sparsity: scores > 12, sparsity_distribution_fn=UNIFORM)
    assert int(own.instant_sparsify({"w": scores})[1]["w"].sum()) == 3


def test_distributions_as_scripts_know_them():
    from jaxpruner.sparsity_distributions import erk, get_sparsities_erdos_renyi

    with pytest.raises(ValueError, match="var_shape_dict: is empty"):
        get_sparsities_erdos_renyi({}, 0.5)
    shapes = {("a", "kernel"): (8, 8), ("b", "kernel"): (8, 16)}
    assert get_sparsities_erdos_renyi(shapes, 0.5, {("c", "kernel"): 0.1}) == get_sparsities_erdos_renyi(shapes, 0.5)
    with pytest.raises(ValueError, match=r"Single parameter is provided. Please provide a paramater tree."):
        erk(jnp.ones((4, 4)), 0.5)
    with pytest.raises(ValueError, match="dist_type: 'unknown'"):
        jaxpruner.create_updater_from_config({"algorithm": "magnitude", "dist_type": "unknown"})


def test_straight_through_masks_in_the_forward_pass():
    """`pre_forward_update` makes a mask of the weights as they are, at the sparsity that the schedule has then."""
    updater = cases.make_updater("magnitude_ste", update_freq=3)  # a period that makes no difference
    params = cases.tree("dict")
    state = updater.wrap_optax(optax.sgd(0.1)).init(params)
    for count in range(8):
        other = jax.tree.map(lambda p: jnp.sin(7 * p), params)
        shown = updater.pre_forward_update(other, state._replace(count=jnp.int32(count)))
        sparsity = float(updater.scheduler.get_sparsity_at_step(cases.SPARSITY, count)) if count >= cases.FIRST else 0
        kernel = np.abs(np.asarray(other["dense"]["kernel"]))
        kept = np.asarray(shown["dense"]["kernel"]) != 0
        assert kept.sum() == cases.kept_number(128, sparsity)
        assert kernel[kept].min() >= kernel[~kept].max(initial=0)
