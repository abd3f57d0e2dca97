"""All of `optax` and `optax.contrib`, once: what works inside of `sparsify`, what around it, what may not be there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sparse_cases as cases
from optax import contrib

import jaxpruner

if not hasattr(optax, "monitor"):
    pytest.skip("its rows are of a newer optax", allow_module_level=True)

PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32), "b": jnp.ones(8)}
TARGET = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(4, 8)), jnp.float32), "b": jnp.zeros(8)}
KEPT = 8
# One dense step, one that prunes, one that must stay sparse.
ONCE = {"algorithm": "magnitude", "sparsity": 0.75, "update_start_step": 1, "update_end_step": 1}
REGROWING = {"algorithm": "rigl", "sparsity": 0.75, "update_start_step": 2, "update_end_step": 4, "update_freq": 2}
IS_2D = {"w": True, "b": False}


def value_fn(params: Any) -> Any:
    apart = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), params, TARGET)
    return 0.5 * sum(jax.tree.leaves(apart))


def scaled(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """For what only rescales gradients: an optimizer made of it."""
    return optax.chain(transformation, optax.sgd(0.1, momentum=0.9))


def halve(updates: Any, params: Any = None) -> Any:
    del params
    return jax.tree.map(lambda u: u / 2, updates)


def of_matrices(params: Any) -> Any:
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), params)


# As the inner optimizer: weights lie exactly on the masks, kept ones go where the inner optimizer takes them.
INSIDE: dict[str, Callable[[], Any]] = {
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "adabelief": lambda: optax.adabelief(0.1),
    "adadelta": lambda: optax.adadelta(0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=4),
    "adagrad": lambda: optax.adagrad(0.1),
    "adam": lambda: optax.adam(0.1),
    "adamax": lambda: optax.adamax(0.1),
    "adamaxw": lambda: optax.adamaxw(0.1),
    "adamw": lambda: optax.adamw(0.1),
    "adan": lambda: optax.adan(0.1),
    "adaptive_grad_clip": lambda: scaled(optax.adaptive_grad_clip(0.1)),
    "add_decayed_weights": lambda: scaled(optax.add_decayed_weights(0.1)),
    "add_noise": lambda: scaled(optax.add_noise(0.1, 0.5, key=jax.random.key(0))),
    "amsgrad": lambda: optax.amsgrad(0.1),
    "apply_every": lambda: scaled(optax.apply_every(2)),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "centralize": lambda: scaled(optax.centralize()),
    "chain": lambda: optax.chain(optax.clip(1.0), optax.adam(0.1)),
    "clip": lambda: scaled(optax.clip(1.0)),
    "clip_by_block_rms": lambda: scaled(optax.clip_by_block_rms(1.0)),
    "clip_by_global_norm": lambda: scaled(optax.clip_by_global_norm(1.0)),
    "measure_with_ema": lambda: scaled(optax.monitor({"mean": optax.measure_with_ema(optax.tree.norm, 0.9)})),
    "monitor": lambda: scaled(optax.monitor({"norm": optax.tree.norm})),
    "snapshot": lambda: scaled(optax.snapshot("norm", optax.tree.norm)),
    "conditionally_mask": lambda: optax.conditionally_mask(optax.sgd(0.1), lambda step: step % 2 == 0),
    "conditionally_transform": lambda: scaled(optax.conditionally_transform(optax.scale(2.0), lambda step: step > 0)),
    "ema": lambda: scaled(optax.ema(0.9)),
    "flatten": lambda: optax.flatten(optax.adam(0.1)),
    "freeze": lambda: optax.chain(optax.adam(0.1), optax.freeze({"w": False, "b": True})),
    "fromage": lambda: optax.fromage(0.1),
    "identity": lambda: scaled(optax.identity()),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "keep_params_nonnegative": lambda: optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative()),
    "lamb": lambda: optax.lamb(0.1),
    "lars": lambda: optax.lars(0.1),
    "lbfgs": lambda: optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(3)),
    "lion": lambda: optax.lion(0.1),
    "masked": lambda: optax.chain(optax.masked(optax.scale(0.5), IS_2D), optax.adam(0.1)),
    "multi_transform": lambda: optax.multi_transform(
        {"one": optax.adam(0.1), "other": optax.sgd(0.1)}, {"w": "one", "b": "other"}
    ),
    "nadam": lambda: optax.nadam(0.1),
    "nadamw": lambda: optax.nadamw(0.1),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(1.0)), ("adam", optax.adam(0.1))),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=jax.random.key(0)),
    "normalize_by_update_norm": lambda: scaled(optax.normalize_by_update_norm()),
    "novograd": lambda: optax.novograd(0.1),
    "optimistic_adam_v2": lambda: optax.optimistic_adam_v2(0.1),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(0.1),
    "partition": lambda: optax.partition({"one": optax.adam(0.1), "other": optax.sgd(0.1)}, {"w": "one", "b": "other"}),
    "polyak_sgd": lambda: optax.polyak_sgd(),
    "radam": lambda: optax.radam(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1),
    "rprop": lambda: optax.rprop(0.1),
    "scale": lambda: scaled(optax.scale(0.5)),
    "scale_by_adadelta": lambda: scaled(optax.scale_by_adadelta()),
    "scale_by_adam": lambda: scaled(optax.scale_by_adam()),
    "scale_by_adamax": lambda: scaled(optax.scale_by_adamax()),
    "scale_by_adan": lambda: scaled(optax.scale_by_adan()),
    "scale_by_amsgrad": lambda: scaled(optax.scale_by_amsgrad()),
    "scale_by_backtracking_linesearch": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(3)),
    "scale_by_belief": lambda: scaled(optax.scale_by_belief()),
    "scale_by_distance_over_gradients": lambda: scaled(optax.scale_by_distance_over_gradients()),
    "scale_by_factored_rms": lambda: scaled(optax.scale_by_factored_rms(min_dim_size_to_factor=4)),
    "scale_by_lbfgs": lambda: scaled(optax.scale_by_lbfgs()),
    "scale_by_learning_rate": lambda: optax.scale_by_learning_rate(0.1),
    "scale_by_lion": lambda: scaled(optax.scale_by_lion()),
    "scale_by_novograd": lambda: scaled(optax.scale_by_novograd()),
    "scale_by_optimistic_gradient": lambda: scaled(optax.scale_by_optimistic_gradient()),
    "scale_by_param_block_norm": lambda: scaled(optax.scale_by_param_block_norm()),
    "scale_by_param_block_rms": lambda: scaled(optax.scale_by_param_block_rms()),
    "scale_by_polyak": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_polyak()),
    "scale_by_radam": lambda: scaled(optax.scale_by_radam()),
    "scale_by_rms": lambda: scaled(optax.scale_by_rms()),
    "scale_by_rprop": lambda: scaled(optax.scale_by_rprop(0.1)),
    "scale_by_rss": lambda: scaled(optax.scale_by_rss()),
    "scale_by_schedule": lambda: scaled(optax.scale_by_schedule(lambda step: 1.0 / (1 + step))),
    "scale_by_sign": lambda: scaled(optax.scale_by_sign()),
    "scale_by_sm3": lambda: scaled(optax.scale_by_sm3()),
    "scale_by_stddev": lambda: scaled(optax.scale_by_stddev()),
    "scale_by_trust_ratio": lambda: scaled(optax.scale_by_trust_ratio()),
    "scale_by_yogi": lambda: scaled(optax.scale_by_yogi()),
    "scale_by_zoom_linesearch": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(3)),
    "selective_transform": lambda: optax.selective_transform(optax.adam(0.1), freeze_mask={"w": False, "b": True}),
    "set_to_zero": lambda: optax.set_to_zero(),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "sign_sgd": lambda: optax.sign_sgd(0.1),
    "signum": lambda: optax.signum(0.1),
    "sm3": lambda: optax.sm3(0.1),
    "stateless": lambda: scaled(optax.stateless(halve)),
    "stateless_with_tree_map": lambda: scaled(optax.stateless_with_tree_map(lambda u, p: u / 2)),
    "trace": lambda: optax.chain(optax.trace(0.9), optax.scale(-0.1)),
    "with_extra_args_support": lambda: optax.with_extra_args_support(optax.adam(0.1)),
    "yogi": lambda: optax.yogi(0.1),
    "zero_nans": lambda: scaled(optax.zero_nans()),
    "contrib.acprop": lambda: contrib.acprop(0.1),
    "contrib.ademamix": lambda: contrib.ademamix(0.1),
    "contrib.adopt": lambda: contrib.adopt(0.1),
    "contrib.cocob": lambda: contrib.cocob(),
    "contrib.dadapt_adamw": lambda: contrib.dadapt_adamw(),
    "contrib.dog": lambda: contrib.dog(),
    "contrib.dowg": lambda: contrib.dowg(),
    "contrib.galore": lambda: contrib.galore(0.1, rank=2),
    "contrib.madgrad": lambda: contrib.madgrad(0.1),
    "contrib.mechanize": lambda: contrib.mechanize(optax.adam(0.1)),
    "contrib.momo": lambda: contrib.momo(0.1),
    "contrib.momo_adam": lambda: contrib.momo_adam(0.1),
    "contrib.muon": lambda: contrib.muon(0.1),
    "contrib.normalize": lambda: scaled(contrib.normalize()),
    "contrib.prodigy": lambda: contrib.prodigy(),
    "contrib.reduce_on_plateau": lambda: optax.chain(optax.adam(0.1), contrib.reduce_on_plateau(patience=1)),
    "contrib.sam": lambda: contrib.sam(optax.sgd(0.1), optax.sgd(0.01), sync_period=2),
    "contrib.scale_by_acprop": lambda: scaled(contrib.scale_by_acprop()),
    "contrib.scale_by_ademamix": lambda: scaled(contrib.scale_by_ademamix()),
    "contrib.scale_by_adopt": lambda: scaled(contrib.scale_by_adopt()),
    "contrib.scale_by_cocob": lambda: contrib.scale_by_cocob(),
    "contrib.scale_by_galore": lambda: scaled(contrib.scale_by_galore(rank=2)),
    "contrib.scale_by_madgrad": lambda: contrib.scale_by_madgrad(0.1),
    "contrib.scale_by_muon": lambda: optax.multi_transform(
        {"muon": scaled(contrib.scale_by_muon(weight_dimension_numbers=of_matrices)), "sgd": optax.sgd(0.1)},
        {"w": "muon", "b": "sgd"},
    ),
    "contrib.scale_by_simplified_ademamix": lambda: scaled(contrib.scale_by_simplified_ademamix()),
    "contrib.schedule_free": lambda: contrib.schedule_free(optax.sgd(0.1), 0.1),
    "contrib.schedule_free_adamw": lambda: contrib.schedule_free_adamw(0.1),
    "contrib.schedule_free_sgd": lambda: contrib.schedule_free_sgd(0.1),
    "contrib.simplified_ademamix": lambda: contrib.simplified_ademamix(0.1),
    "contrib.hutchinson_estimator_diag_hessian": lambda: scaled(contrib.hutchinson_estimator_diag_hessian()),
    "contrib.sophia": lambda: contrib.sophia(0.1, update_interval=2),
    "contrib.split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(optax.adam(0.1)),
}

# What the update of some takes beside `value`, `grad` and `value_fn`, or takes in their place.
EXTRA_ARGS: dict[str, Callable[..., dict[str, Any]]] = {
    "contrib.sam": lambda **_: {},
    "contrib.sophia": lambda **given: given | {"obj_fn": value_fn},
    "contrib.hutchinson_estimator_diag_hessian": lambda **given: given | {"obj_fn": value_fn},
}

# They take gradients of single examples: they come first in the chain, so that what scores and masks sees their sum.
AGGREGATE = {
    "contrib.differentially_private_aggregate": lambda: contrib.differentially_private_aggregate(1.0, 0.1, key=0),
    "contrib.dpsgd": lambda: contrib.dpsgd(0.1, 1.0, 0.1, seed=0),
}


def sparse(inner: Any = None) -> optax.GradientTransformationExtraArgs:
    return jaxpruner.sparsify(inner or optax.sgd(0.1, momentum=0.9), ONCE)


# Around a sparse optimizer, or after it in a chain: weights stay on the masks.
AROUND: dict[str, Callable[[], Any]] = {
    "MultiSteps": lambda: optax.MultiSteps(sparse(), 1).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(sparse(), 3),
    "chain": lambda: optax.chain(optax.clip(1.0), sparse()),
    "conditionally_mask": lambda: optax.conditionally_mask(sparse(), lambda step: step != 2),
    "freeze": lambda: optax.chain(sparse(), optax.freeze({"w": False, "b": True})),
    "identity": lambda: optax.chain(sparse(), optax.identity()),
    "inject_hyperparams": lambda: optax.inject_hyperparams(lambda rate: sparse(optax.sgd(rate)))(rate=0.1),
    "keep_params_nonnegative": lambda: optax.chain(sparse(), optax.keep_params_nonnegative()),
    "masked": lambda: optax.masked(sparse(), IS_2D),
    "measure_with_ema": lambda: optax.chain(
        sparse(), optax.monitor({"mean": optax.measure_with_ema(optax.tree.norm, 0.9)})
    ),
    "monitor": lambda: optax.chain(sparse(), optax.monitor({"norm": optax.tree.norm})),
    "multi_transform": lambda: optax.multi_transform(
        {"sparse": sparse(), "dense": optax.sgd(0.1)}, {"w": "sparse", "b": "dense"}
    ),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(1.0)), ("sparse", sparse())),
    "partition": lambda: optax.partition({"sparse": sparse(), "dense": optax.sgd(0.1)}, {"w": "sparse", "b": "dense"}),
    "selective_transform": lambda: optax.selective_transform(sparse(), freeze_mask={"w": False, "b": True}),
    "snapshot": lambda: optax.chain(sparse(), optax.snapshot("norm", optax.tree.norm)),
    "with_extra_args_support": lambda: optax.with_extra_args_support(sparse()),
    "zero_nans": lambda: optax.chain(sparse(), optax.zero_nans()),
    "contrib.split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(sparse()),
}

# Around a sparse optimizer, or after it in a chain: they change its updates, and weights leave the masks.
ONLY_INSIDE: dict[str, Callable[[], Any]] = {
    "add_decayed_weights": lambda: optax.chain(sparse(), optax.add_decayed_weights(-0.1)),
    "add_noise": lambda: optax.chain(sparse(), optax.add_noise(0.1, 0.5, key=jax.random.key(0))),
    "apply_every": lambda: optax.chain(sparse(), optax.apply_every(3)),
    "clip": lambda: optax.chain(sparse(), optax.clip(1e-3)),
    "clip_by_global_norm": lambda: optax.chain(sparse(), optax.clip_by_global_norm(1e-3)),
    "conditionally_transform": lambda: optax.conditionally_transform(sparse(), lambda step: step != 2),
    "ema": lambda: optax.chain(sparse(), optax.ema(0.9)),
    "scale": lambda: optax.chain(sparse(), optax.scale(0.5)),
    "scale_by_schedule": lambda: optax.chain(sparse(), optax.scale_by_schedule(lambda step: 0.5)),
    "trace": lambda: optax.chain(sparse(), optax.trace(0.9)),
    "contrib.mechanize": lambda: contrib.mechanize(sparse()),
    "contrib.normalize": lambda: optax.chain(sparse(), contrib.normalize()),
    "contrib.reduce_on_plateau": lambda: optax.chain(sparse(), optax.scale(0.5), contrib.reduce_on_plateau()),
    "contrib.schedule_free": lambda: contrib.schedule_free(sparse(optax.sgd(0.1)), 0.1),
}

# Refused before the first step: what `sparsify` is handed has no axes left to prune along.
REFUSED = {"flatten": (lambda: optax.flatten(sparse()), "filter_fn: selects none")}

# With parameters of its own, in tests of its own.
OTHERWISE = {"lookahead"}

# Old names that optax tells not to use any more.
DEPRECATED = {"inject_stateful_hyperparams", "optimistic_adam"}

# Functions on arrays and trees, schedules, losses.
_NO_TRANSFORMATIONS = """
    apply_updates bias_correction global_norm incremental_update init_empty_state matrix_inverse_pth_root
    microbatch multi_normal nnls per_example_global_norm_clip per_example_layer_norm_clip periodic_update
    power_iteration safe_increment safe_int32_increment safe_norm safe_root_mean_squares scale_gradient
    skip_large_updates skip_not_finite tree_map_params update_infinity_moment update_moment
    update_moment_per_elem_norm value_and_grad_from_state contrib.schedule_free_eval_params

    constant_schedule cosine_decay_schedule cosine_onecycle_schedule exponential_decay join_schedules
    linear_onecycle_schedule linear_schedule piecewise_constant_schedule piecewise_interpolate_schedule
    polynomial_schedule sgdr_schedule warmup_constant_schedule warmup_cosine_decay_schedule
    warmup_exponential_decay_schedule

    convex_kl_divergence cosine_distance cosine_similarity ctc_loss ctc_loss_with_forward_probs
    generalized_kl_divergence hinge_loss huber_loss kl_divergence l2_loss log_cosh ntxent
    safe_softmax_cross_entropy sigmoid_binary_cross_entropy sigmoid_focal_loss smooth_labels
    softmax_cross_entropy softmax_cross_entropy_with_integer_labels squared_error
"""
NO_TRANSFORMATIONS = frozenset(_NO_TRANSFORMATIONS.strip().split())


class Run(NamedTuple):
    params: Any
    state: Any
    signatures: list[Any]


# Their loops and branches are compiled at each eager call; compiled as a whole, they are compiled once.
WITH_CONTROL_FLOW = {
    "MultiSteps",
    "apply_if_finite",
    "conditionally_mask",
    "conditionally_transform",
    "lbfgs",
    "scale_by_backtracking_linesearch",
    "scale_by_zoom_linesearch",
    "contrib.galore",
    "contrib.mechanize",
    "contrib.muon",
    "contrib.sam",
    "contrib.scale_by_galore",
    "contrib.scale_by_muon",
    "contrib.sophia",
    "contrib.hutchinson_estimator_diag_hessian",
}


def train(tx: Any, name: str = "", inner: Any = None, steps: int = 3) -> Run:
    """Some steps, each against the update of the inner optimizer on its own, if one is given."""
    params, state, signatures = PARAMS, tx.init(PARAMS), []
    tx = optax.with_extra_args_support(tx)
    alone = inner and optax.with_extra_args_support(inner)
    extra_args = EXTRA_ARGS.get(name, lambda **given: given)

    def step(params, state):
        value, grad = jax.value_and_grad(value_fn)(params)
        given = extra_args(value=value, grad=grad, value_fn=value_fn)
        expected = alone.update(grad, state.inner_state, params, **given)[0] if alone else None
        return *tx.update(grad, state, params, **given), expected

    step = cases.compiled(step) if name in WITH_CONTROL_FLOW else step
    for _ in range(steps):
        signatures.append(cases.signature(state))
        updates, new_state, expected = step(params, state)
        if inner:
            kept = np.asarray(new_state.masks["w"])
            np.testing.assert_array_equal(np.asarray(updates["w"])[kept], np.asarray(expected["w"])[kept])
            np.testing.assert_array_equal(updates["b"], expected["b"])
        params, state = optax.apply_updates(params, updates), new_state
    return Run(params, state, signatures)


def public_names() -> set[str]:
    """The functions of optax, and what makes transformations among its classes."""
    names = {"MultiSteps"}
    for module, prefix in ((optax, ""), (contrib, "contrib.")):
        for name, thing in vars(module).items():
            if not name.startswith("_") and inspect.isfunction(inspect.unwrap(thing)):
                names.add(prefix + name)
    return names


def test_nothing_of_optax_is_forgotten():
    """A new name of optax needs a row: try it inside and around, and write down what it does."""
    rows = (
        INSIDE.keys() | AGGREGATE.keys() | AROUND.keys() | ONLY_INSIDE.keys() | REFUSED.keys() | OTHERWISE | DEPRECATED
    )
    assert rows & NO_TRANSFORMATIONS == set()
    missing = public_names() - rows - NO_TRANSFORMATIONS
    assert missing == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", INSIDE)
def test_inside(name):
    inner = INSIDE[name]()
    params, state, _ = train(jaxpruner.sparsify(inner, ONCE), name, inner)
    assert int(state.masks["w"].sum()) == KEPT
    jaxpruner.check_sparse(params, state)
    assert np.all(np.asarray(params["w"])[~np.asarray(state.masks["w"])] == 0)


# One of each kind of state: factored, flattened, wrapped, partitioned, of another shape, or none of a single weight.
STATES = [
    *("MultiSteps", "adafactor", "adam", "apply_if_finite", "flatten", "inject_hyperparams", "lbfgs", "masked"),
    *("monitor", "multi_transform", "named_chain", "polyak_sgd", "set_to_zero", "sm3", "contrib.galore"),
    *("contrib.mechanize", "contrib.muon", "contrib.prodigy", "contrib.reduce_on_plateau", "contrib.schedule_free"),
    "contrib.split_real_and_imaginary",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", STATES)
def test_inside_with_masks_that_regrow(name):
    """The statistics of regrown weights are reset, whatever the state of the inner optimizer looks like."""
    params, state, signatures = train(jaxpruner.sparsify(INSIDE[name](), REGROWING), name)
    assert int(state.masks["w"].sum()) == KEPT
    jaxpruner.check_sparse(params, state)
    # Some of optax widen a number in their first step.
    assert signatures[1] == signatures[2]


@pytest.mark.parametrize("name", AROUND)
def test_around(name):
    params, state, _ = train(AROUND[name](), name)
    jaxpruner.check_sparse(params, state)
    assert 0 < np.count_nonzero(params["w"]) <= KEPT


@pytest.mark.parametrize("name", ONLY_INSIDE)
def test_check_sparse_tells_what_may_only_be_inside(name):
    params, state, _ = train(ONLY_INSIDE[name](), name)
    assert np.count_nonzero(params["w"]) > KEPT
    with pytest.raises(ValueError, match=r"(?s)^w: .* are not zero.*sparsify come last.*apply_state_masks"):
        jaxpruner.check_sparse(params, state)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make().init(PARAMS)


@pytest.mark.parametrize("algorithm", ["magnitude", "saliency", "rigl"])
def test_gradients_of_single_examples_are_summed_first(algorithm):
    config = REGROWING if algorithm == "rigl" else ONCE | {"algorithm": algorithm}
    make = AGGREGATE["contrib.differentially_private_aggregate"]
    tx = optax.chain(make(), jaxpruner.sparsify(optax.sgd(0.1), config))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        examples = jax.tree.map(lambda p: jnp.stack([p, -p / 2]), params)
        updates, state = tx.update(examples, state, params)
        params = optax.apply_updates(params, updates)
    jaxpruner.check_sparse(params, state)
    assert np.count_nonzero(params["w"]) <= KEPT


@pytest.mark.filterwarnings("ignore:.*seed.* is deprecated:DeprecationWarning")
def test_dpsgd_inside():
    """It sums them itself: what scores weights alone may be around it."""
    tx = jaxpruner.sparsify(AGGREGATE["contrib.dpsgd"](), ONCE)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(lambda p: jnp.stack([p, -p / 2]), params), state, params)
        params = optax.apply_updates(params, updates)
    jaxpruner.check_sparse(params, state)


def lookahead_run(tx: Any, steps: int) -> tuple[Any, Any]:
    params = optax.LookaheadParams.init_synced(PARAMS)
    state = tx.init(params)
    for _ in range(steps):
        grads = params.fast if isinstance(state, optax.LookaheadState) else params
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_lookahead_around_leaves_no_zeros():
    """Its slow weights remember what was pruned; two steps after the pruning they are given to the fast ones."""
    params, state = lookahead_run(optax.lookahead(sparse(), 2, 0.5), 4)
    assert np.count_nonzero(params.fast["w"]) > KEPT
    with pytest.raises(ValueError, match=r"(?s)^w: .* are not zero.*lookahead"):
        jaxpruner.check_sparse(params.fast, state)
    assert np.count_nonzero(jaxpruner.apply_state_masks(params.slow, state)["w"]) == KEPT


def test_lookahead_inside_a_projection():
    """Its gradients are those of the fast weights alone, so the sparse step goes around it without optax."""
    updater = jaxpruner.create_updater_from_config(ONCE)
    tx, params = optax.lookahead(optax.sgd(0.1), 2, 0.5), optax.LookaheadParams.init_synced(PARAMS)
    state, sparse_state = tx.init(params), jaxpruner.init_projection(updater, PARAMS)
    for _ in range(4):
        updates, state = tx.update(params.fast, state, params)
        proposed = optax.apply_updates(params, updates)
        fast, sparse_state = jaxpruner.project(updater, params.fast, proposed.fast, params.fast, sparse_state)
        params = optax.LookaheadParams(fast, jaxpruner.apply_state_masks(proposed.slow, sparse_state))
    jaxpruner.check_sparse(params.fast, sparse_state)
    jaxpruner.check_sparse(params.slow, sparse_state)
    assert np.count_nonzero(params.fast["w"]) == KEPT


def test_multi_transform_inside_leaves_out_what_is_frozen():
    """With `sparsify` inside, one group is pruned; around, it also prunes what the optimizer would not touch."""
    labels = {"w": "freeze", "b": "train"}
    around = jaxpruner.sparsify(
        optax.multi_transform({"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}, labels), ONCE
    )
    assert np.count_nonzero(train(around).params["w"]) == KEPT
