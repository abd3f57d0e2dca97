"""SparseOptimizer around T5X's optimizers: against the optax transformation, states, logical axes, metrics."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import t5x_cases as cases
from flax import core, traverse_util
from flax.linen import partitioning as flax_partitioning
from jax.sharding import PartitionSpec
from t5x import adafactor, optimizers, train_state

import jaxpruner
import jaxpruner_t5x
from jaxpruner_t5x import SparseOptimizer, dense_or_sparse, launch, metrics, plan

pytestmark = cases.quiet
AXES = {"mlp": {"wi": {"kernel": ("embed", "mlp")}, "scale": ("embed",)}, "embedding": ("vocab", "embed")}


def params(seed: int = 0):
    keys = jax.random.split(jax.random.PRNGKey(seed), 2)
    return {
        "mlp": {"wi": {"kernel": jax.random.normal(keys[0], (32, 64))}, "scale": jnp.ones(32)},
        "embedding": jax.random.normal(keys[1], (24, 32)),
    }


def updater(algorithm: str = "magnitude", **more):
    given = {"sparsity": 0.75, "update_start_step": 1, "update_end_step": 5, "update_freq": 2} | more
    return jaxpruner_t5x.create_updater(algorithm, **given)


def state_of(optimizer_def) -> train_state.FlaxOptimTrainState:
    boxed = jax.tree.map(
        lambda axes: flax_partitioning.AxisMetadata(names=axes), AXES, is_leaf=lambda a: isinstance(a, tuple)
    )
    named = traverse_util.unflatten_dict(
        {(*path[:-1], f"{path[-1]}_axes"): axes for path, axes in traverse_util.flatten_dict(boxed).items()}
    )
    return train_state.FlaxOptimTrainState.create(
        optimizer_def, core.freeze({"params": params(), "params_axes": named})
    )


def train(optimizer_def, steps: int = 8):
    @jax.jit
    def step(state, i):
        grads = jax.tree.map(lambda p: jnp.sin(3 * p + i), state.params)
        return state.apply_gradient(grads, learning_rate=1e-2)

    state = state_of(optimizer_def)
    for i in range(steps):
        state = step(state, i)
    return state


def multi():
    def traversal(wanted):
        return traverse_util.ModelParamTraversal(lambda path, _: ("kernel" in path) == wanted)

    return optimizers.MultiOptimizer(
        ((traversal(True), adafactor.Adafactor(beta1=0.9)), (traversal(False), adafactor.Adafactor()))
    )


def factored():
    return adafactor.Adafactor(
        beta1=0.9, min_dim_size_to_factor=8, logical_factor_rules=adafactor.standard_logical_factor_rules()
    )


INNER = {
    "adafactor": factored,
    "multi": multi,
    "adamw": lambda: optimizers.adamw(1e-2),
    "optax_adafactor": lambda: optimizers.OptaxWrapper(optax.adafactor(1e-2, min_dim_size_to_factor=8)),
}


@pytest.mark.parametrize("algorithm", [*cases.ALGORITHMS, "adam_fisher"])  # which reads T5X's optimizer here
def test_it_does_what_the_optax_transformation_does(algorithm):
    """Statistics of regrown weights and dense weights of straight-through methods included."""
    ours = train(jaxpruner_t5x.SparseOptimizer(optimizers.adamw(1e-2), updater(algorithm)))
    theirs = train(optimizers.OptaxWrapper(jaxpruner.sparsify(optax.adamw(1e-2), updater(algorithm))))
    kernel = np.asarray(ours.params["mlp"]["wi"]["kernel"])
    assert (kernel == 0).sum() == 0.75 * kernel.size
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
    sparse, wanted = ours._optimizer.state.sparse, theirs._optimizer.state.param_states
    for a, b in zip(jax.tree.leaves(sparse.masks), jax.tree.leaves(wanted.masks), strict=True):
        np.testing.assert_array_equal(a, b)
    hidden, inner = getattr(wanted.inner_state, "weights", ()), wanted.inner_state
    if hidden != ():
        inner = inner.inner_state
        np.testing.assert_allclose(
            sparse.inner_state.weights["mlp"]["wi"]["kernel"], hidden["mlp"]["wi"]["kernel"], rtol=2e-6, atol=1e-7
        )
    for a, b in zip(jax.tree.leaves(ours.param_states), jax.tree.leaves(inner), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["magnitude", "rigl", "magnitude_ste"])
@pytest.mark.parametrize("inner", INNER)
def test_any_optimizer_of_t5x(inner, algorithm):
    dense = train(INNER[inner]())
    state = train(jaxpruner_t5x.SparseOptimizer(INNER[inner](), updater(algorithm)))
    kernel = np.asarray(state.params["mlp"]["wi"]["kernel"])
    assert (kernel == 0).sum() == 0.75 * kernel.size
    assert int(state.step) == 8
    if algorithm != "rigl":  # which takes no step when it makes masks
        np.testing.assert_array_equal(state.params["embedding"], dense.params["embedding"])
    assert jax.tree.structure(state.param_states) == jax.tree.structure(dense.param_states)
    # Names of checkpoints: those of the dense run, and masks beside them.
    names = set(traverse_util.flatten_dict(state.state_dict(), sep="/"))
    wanted = set(traverse_util.flatten_dict(dense.state_dict(), sep="/"))
    assert names >= wanted
    assert all(name.startswith("state/sparse/") for name in names - wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "packed"),
    [
        *((name, False) for name in cases.ALGORITHMS),
        *((name, True) for name in ("global_saliency", "rigl", "random_ste")),
    ],
)
def test_a_state_that_is_restored_is_the_state_that_was_saved(algorithm, packed):
    state = train(jaxpruner_t5x.SparseOptimizer(factored(), updater(algorithm, use_packed_masks=packed)))
    saved = jax.tree.map(np.asarray, state.state_dict())
    assert traverse_util.flatten_dict(saved).keys() == traverse_util.flatten_dict(saved, keep_empty_nodes=True).keys()
    fresh = state_of(jaxpruner_t5x.SparseOptimizer(factored(), updater(algorithm, use_packed_masks=packed)))
    restored = fresh.restore_state(saved)
    assert jax.tree.structure(restored._optimizer.state) == jax.tree.structure(state._optimizer.state)
    cases.assert_equal(cases.of(restored), cases.of(state))
    assert int(restored.replace_step(jnp.asarray(3)).step) == 3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("wrapped", [False, True], ids=["SparseOptimizer", "OptaxWrapper"])
def test_masks_and_dense_weights_have_the_axes_of_their_parameters(wrapped, packed):
    chosen = updater("movement", use_packed_masks=packed)
    if wrapped:
        state = state_of(optimizers.OptaxWrapper(jaxpruner.sparsify(optax.adam(1e-3), chosen)))
        sparse = state.as_logical_axes()._optimizer.state.param_states
    else:
        state = state_of(jaxpruner_t5x.SparseOptimizer(factored(), chosen))
        axes = state.as_logical_axes()
        sparse = axes._optimizer.state.sparse
        slots = axes.param_states["mlp"]["wi"]["kernel"]
        assert (slots.m, slots.v) == (PartitionSpec("embed", "mlp"), None)  # factored
    kernel = PartitionSpec("embed", "mlp")
    # 64 columns are 8 bytes, which not every model-parallel mesh can share.
    assert sparse.masks["mlp"]["wi"]["kernel"] == (PartitionSpec("embed", None) if packed else kernel)
    assert sparse.masks["embedding"] == optax.MaskedNode()
    assert sparse.inner_state.weights["mlp"]["wi"]["kernel"] == kernel
    assert sparse.statistics["mlp"]["wi"]["kernel"] == kernel
    assert sparse.statistics["embedding"] == optax.MaskedNode()
    assert sparse.count == PartitionSpec()


def test_a_large_packed_mask_is_spread():
    from jaxpruner_t5x.partition_rules import sparse_state_axes

    masks = {"kernel": jax.ShapeDtypeStruct((256, 512), jnp.uint8)}
    axes = {"kernel": PartitionSpec("embed", "mlp")}
    assert sparse_state_axes(jaxpruner.SparseState(masks), axes).masks == axes


def test_factored_states_of_optax_have_axes():
    state = state_of(INNER["optax_adafactor"]())
    factored_state = state.as_logical_axes()._optimizer.state.param_states[0]
    assert factored_state.v["mlp"]["wi"]["kernel"] is None  # factored
    assert factored_state.v["mlp"]["scale"] == PartitionSpec("embed")


@pytest.mark.parametrize("weight_metrics", [False, True])
def test_metrics_are_numbers(weight_metrics):
    before = train(jaxpruner_t5x.SparseOptimizer(factored(), updater()), steps=7)
    after = train(jaxpruner_t5x.SparseOptimizer(factored(), updater()), steps=8)
    computer = jaxpruner_t5x.SparsityMetrics(weight_metrics)
    found = computer.compute_metrics(before.params, before, after)
    if not weight_metrics:
        assert set(found) == {"sparsity/total", "sparsity/mlp/wi/kernel"}
    else:
        assert "weight_update_divided_by_weight_rms/mlp/wi/kernel" in found
    for name, metric in found.items():
        value = metric.replace(steps=1).compute_value() if hasattr(metric, "steps") else metric.compute()
        assert np.isfinite(getattr(value, "value", value)).all(), name
    assert float(found["sparsity/total"].compute()) == 0.75


def test_metrics_of_a_dense_run_are_none():
    assert metrics.sparsities(state_of(factored())) == {}
    none = jaxpruner_t5x.SparseOptimizer(factored(), updater("no_prune", sparsity=None))
    assert metrics.sparsities(train(none, 1)) == {}


def some_trained(trained):
    """Optimizers of the embedding and of `mlp/*` or not, and of nothing else."""
    chosen = traverse_util.ModelParamTraversal(lambda path, _: path.startswith(trained))
    return optimizers.MultiOptimizer(((chosen, adafactor.Adafactor(beta1=0.9)),))


def test_optimizers_that_train_a_part():
    with pytest.raises(ValueError, match="mlp/wi/kernel: would be pruned, but no optimizer trains it"):
        state_of(jaxpruner_t5x.SparseOptimizer(some_trained("/embedding"), updater("rigl")))
    state = train(jaxpruner_t5x.SparseOptimizer(some_trained("/mlp"), updater("rigl")))
    kernel = np.asarray(state.params["mlp"]["wi"]["kernel"])
    assert (kernel == 0).sum() == 0.75 * kernel.size
    np.testing.assert_array_equal(state.params["embedding"], params()["embedding"])


def test_optimizers_of_groups():
    labels = {"mlp": {"wi": {"kernel": "a"}, "scale": "b"}, "embedding": "b"}
    groups = {"a": optax.adam(1e-2), "b": optax.adafactor(1e-2, min_dim_size_to_factor=8)}
    inner = optimizers.OptaxWrapper(optax.multi_transform(groups, core.freeze(labels)))
    state = train(jaxpruner_t5x.SparseOptimizer(inner, updater("rigl")))
    kernel = np.asarray(state.params["mlp"]["wi"]["kernel"])
    assert (kernel == 0).sum() == 0.75 * kernel.size
    state.as_logical_axes()


@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude_ste"])
def test_parameters_keep_their_dtype(algorithm):
    optimizer = jaxpruner_t5x.SparseOptimizer(factored(), updater(algorithm))
    state = state_of(optimizer)
    halved = jax.tree.map(lambda p: p.astype(jnp.bfloat16), state.params)
    stepped = state.replace_params(halved).apply_gradient(halved, learning_rate=1e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(stepped.params)} == {jnp.dtype(jnp.bfloat16)}


def test_masks_stored_in_another_way_are_told():
    saved = train(jaxpruner_t5x.SparseOptimizer(factored(), updater()), 1).state_dict()
    packed = state_of(jaxpruner_t5x.SparseOptimizer(factored(), updater(use_packed_masks=True)))
    with pytest.raises(ValueError, match=r"mask is bool\[32, 64\], .* bind create_updater.use_packed_masks"):
        packed.restore_state(saved)


def test_a_dense_run_is_told_by_the_metrics():
    state = state_of(factored())
    with pytest.raises(ValueError, match=r"dense, by Adafactor. Give sparse.gin after the model's gin file, whose"):
        jaxpruner_t5x.SparsityMetrics().compute_metrics(state.params, state, state)


@pytest.mark.parametrize(("step", "reached"), [(8, 75.0), (4, 65.6)])
def test_the_last_checkpoint_of_a_run_says_what_was_reached(step, reached, caplog):
    caplog.set_level("INFO", logger="absl")
    planned = plan.Plan(total_steps=8)
    optimizer = jaxpruner_t5x.SparseOptimizer(factored(), updater(), planned)
    state = train(optimizer, steps=step)
    state.state_dict()
    assert ("Sparsity at step 8, the last: asked 75.0 %, reached 75.0 %." in caplog.text) == (step == 8)
    caplog.clear()
    metrics.log_reached(optimizer.updater, state.params, state._optimizer.state)
    assert f"at step {step}, the last: asked 75.0 %, reached {reached} %." in caplog.text
    assert {record.levelname for record in caplog.records} == {"INFO" if step == 8 else "WARNING"}


def test_parameters_that_left_their_masks_are_not_saved():
    state = train(jaxpruner_t5x.SparseOptimizer(factored(), updater()))
    with pytest.raises(ValueError, match=r"mlp/wi/kernel: 1536 of the 1536 weights that its mask prunes are not zero"):
        state.replace_params(params(seed=1)).state_dict()


def test_steps_of_sparse_training():
    assert plan.Plan().sparse_steps(4, 0) is None
    assert plan.Plan(total_steps=12).sparse_steps(4, 0) == 8  # from a dense checkpoint
    assert plan.Plan(total_steps=12).sparse_steps(8, 4) == 8  # resumed
    assert plan.Plan(total_steps=12, relative_steps=5).sparse_steps(8, 4) == 9
    assert plan.planned() == plan.Plan()  # no script of T5X is configured


def test_macros_that_nothing_uses():
    plan.refuse_misspelled("ALGORITHM = 'rigl'\nUPDATE_STEPS = 3\nf.x = %UPDATE_STEPS\nEVAL_PERIOD = 2\n")
    with pytest.raises(ValueError, match=r"^SPARSTIY: is bound, and nothing uses it. Is SPARSITY meant"):
        plan.refuse_misspelled("SPARSTIY = 0.9\nf.x = %SPARSITY\n")


@pytest.mark.parametrize("path", ["checkpoint_10", "checkpoint_10/", "", "/"])
def test_an_initial_checkpoint_is_compared_however_it_is_given(path, tmp_path):
    """By itself, or to take the latest of a run, by its MODEL_DIR."""
    given = {"sparsity": 0.5, "update_start_step": 0, "update_end_step": 0}
    before, now = (updater(algorithm, **given) for algorithm in ("magnitude", "saliency"))
    (tmp_path / "sparsity.json").write_text(json.dumps(jaxpruner.describe(before)))
    params = {"wi": {"kernel": jnp.ones((2, 4))}}
    states = [SparseOptimizer(optimizers.adamw(1e-2), each).create(params).state_dict() for each in (before, now)]
    start = plan.Plan(initial_checkpoint=f"{tmp_path}/{path}" if path != "/" else f"{tmp_path}/")
    with pytest.raises(ValueError, match="algorithm: 'magnitude' in the run of"):
        dense_or_sparse(updater=now, plan=start)(*states)


@pytest.mark.parametrize("name", ["DIST_TYPE", "DROP_FRACTION", "USE_PACKED_MASKS", "RNG_SEED", "SPARSITY_TYPE"])
def test_macros_for_keys_that_are_bound_otherwise(name):
    plan.refuse_misspelled(f"{name} = 1\nf.x = %{name}\n")
    with pytest.raises(ValueError, match=rf"^{name}: .* Bind jaxpruner_t5x.create_updater.{name.lower()}\.$"):
        plan.refuse_misspelled(f"{name} = 1\n")


def test_a_distribution_of_ones_own_stands_in_place_of_the_defaults():
    own = {"sparsity_distribution_fn": lambda params: {"kernel": 0.25}}
    chosen = jaxpruner_t5x.create_updater("static_sparse", **own)
    assert chosen.get_target_sparsities({"kernel": jnp.ones((4, 4))}) == {"kernel": 0.25}
    with pytest.raises(ValueError, match="sparsity_distribution_fn: stands in place of dist_type"):
        jaxpruner_t5x.create_updater("static_sparse", dist_type="erk", **own)


def test_a_bad_algorithm():
    with pytest.raises(ValueError, match="'magnitud' is not known"):
        updater("magnitud")


def test_tensorflow_leaves_the_accelerator_to_jax(monkeypatch):
    calls = []
    monkeypatch.setattr(launch.tf.config, "set_visible_devices", lambda *arguments: calls.append(arguments))
    with launch.parsed([]):
        assert calls == [([], "GPU")]
