"""FLOPs and parameters, against counts by hand, XLA's cost analysis and a loop over the steps of a training."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxpruner

KERNELS = {"a": {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}, "b": {"kernel": jnp.ones((8, 10))}}


def mlp(params, x):
    return jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"]


def test_a_perceptron_by_hand():
    params = KERNELS | {"b": {"kernel": KERNELS["b"]["kernel"].at[:4].set(0.0)}}
    summary = jaxpruner.summarize_flops(mlp, params, jax.ShapeDtypeStruct((3, 6), jnp.float32))
    assert summary == {
        "_nparams": 136,
        "_nparams_nnz": 96,
        "_inference_flops": 3 * 2 * (48 + 80),
        "_inference_flops_nnz": 3 * 2 * (48 + 40),
        "a/kernel": 3 * 2 * 48,
        "b/kernel": 3 * 2 * 80,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        nn.Conv(4, (3, 3), padding="VALID", use_bias=False),
        nn.Conv(6, (3, 3), strides=2, feature_group_count=3, padding="VALID", use_bias=False),
        nn.Conv(4, (3, 2), kernel_dilation=2, padding="VALID", use_bias=False),
        nn.ConvTranspose(4, (2, 2), strides=(2, 2), padding="VALID", use_bias=False),
        nn.Dense(7, use_bias=False),
        nn.DenseGeneral((2, 5), axis=(-2, -1), use_bias=False),
    ],
)
def test_products_and_convolutions_as_xla_counts_them(module):
    x = jnp.ones((2, 9, 9, 3))
    params = module.init(jax.random.key(0), x)
    counted = jax.jit(module.apply).lower(params, x).compile().cost_analysis()
    counted = counted[0] if isinstance(counted, list) else counted  # of older JAX
    summary = jaxpruner.summarize_flops(module.apply, params, x)
    assert summary["_inference_flops"] == pytest.approx(counted["flops"], rel=0.05)
    assert summary["params/kernel"] == summary["_inference_flops"]


def test_products_among_activations_are_dense():
    attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    x = jnp.ones((1, 5, 8))
    params = jax.tree.map(jnp.zeros_like, attention.init(jax.random.key(0), x))
    summary = jaxpruner.summarize_flops(attention.apply, params, x)
    assert summary["_inference_flops"] == 2 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8)
    assert summary["_inference_flops_nnz"] == 2 * 2 * 5 * 5 * 8


def wrapped(name):
    inner = {
        "jit": jax.jit(mlp),
        "checkpoint": jax.checkpoint(mlp),
        "custom_jvp": jax.custom_jvp(mlp),
        "custom_vjp": jax.custom_vjp(mlp),
        "cast": lambda params, x: mlp(jax.tree.map(lambda p: p.astype(jnp.bfloat16).T.T.reshape(p.shape), params), x),
        "scaled": lambda params, x: mlp(jax.tree.map(lambda p: p * jnp.ones(p.shape), params), x),
        "masked": lambda params, x: mlp(jax.tree.map(lambda p: jnp.where(p > 0, p, 0), params), x),
        "cast in jit": lambda params, x: mlp(jax.jit(lambda p: jax.lax.stop_gradient(p))(params), x),
        "branches": lambda params, x: jax.lax.cond(x.sum() > 0, mlp, lambda p, x: x @ jnp.ones((6, 10)), params, x),
    }[name]
    if name == "custom_jvp":
        inner.defjvp(lambda primals, tangents: (mlp(*primals), mlp(*primals)))
    if name == "custom_vjp":
        inner.defvjp(lambda params, x: (mlp(params, x), None), lambda _, g: (KERNELS, g))
    return inner


@pytest.mark.parametrize(
    "name", ["jit", "checkpoint", "custom_jvp", "custom_vjp", "cast", "cast in jit", "scaled", "masked", "branches"]
)
def test_what_is_wrapped_counts_the_same(name):
    x = jnp.ones((3, 6))
    assert jaxpruner.summarize_flops(wrapped(name), KERNELS, x) == jaxpruner.summarize_flops(mlp, KERNELS, x)


def test_loops():
    stacked = {"kernel": jnp.ones((4, 6, 6)).at[0].set(0.0)}

    def scanned(params, x):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, params["kernel"])[0]

    def repeated(params, x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ params["kernel"][1], x)

    summary = jaxpruner.summarize_flops(scanned, stacked, jnp.ones((2, 6)))
    assert (summary["kernel"], summary["_inference_flops_nnz"]) == (4 * 2 * 2 * 36, 3 * 2 * 2 * 36)
    assert jaxpruner.summarize_flops(repeated, stacked, jnp.ones((2, 6)))["kernel"] == 2 * 2 * 36


def test_kernels_that_are_multiplied_with_as_one():
    params = {"a": jnp.ones((6, 8)), "b": jnp.zeros((6, 4))}
    summary = jaxpruner.summarize_flops(
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=1), params, jnp.ones((1, 6))
    )
    assert (summary["a"], summary["b"]) == (2 * 48, 2 * 24)
    assert summary["_inference_flops_nnz"] == pytest.approx(2 * 48)


@pytest.mark.parametrize("outputs", [1, 8])
def test_a_scale_is_no_weight(outputs):
    params = {"scale": jnp.zeros(6), "kernel": jnp.ones((6, outputs))}
    for batch in (1, 3):
        x = jnp.ones((batch, 6))
        summary = jaxpruner.summarize_flops(lambda p, x: (x * p["scale"]) @ p["kernel"], params, x)
        assert summary["_inference_flops_nnz"] == summary["_inference_flops"] == summary["kernel"]


def test_what_is_looked_up_is_no_weight():
    params = {"embedding": jnp.zeros((100, 6)), "kernel": jnp.ones((6, 8))}
    tokens = jax.ShapeDtypeStruct((1, 5), jnp.int32)
    summary = jaxpruner.summarize_flops(lambda p, tokens: p["embedding"][tokens] @ p["kernel"], params, tokens)
    assert summary["_inference_flops_nnz"] == summary["kernel"] == 5 * 2 * 48


SCHEDULE = {"update_start_step": 4, "update_end_step": 12, "update_freq": 4}


@pytest.mark.slow
@given(
    algorithm=st.sampled_from(["magnitude", "saliency", "magnitude_ste", "global_magnitude", "static_sparse", "rigl"]),
    steps=st.integers(1, 20),
)
def test_training_is_the_sum_over_its_steps(algorithm, steps):
    updater = jaxpruner.create_updater_from_config(
        {"algorithm": algorithm, "sparsity": 0.75, "dist_type": "uniform", **SCHEDULE}
    )
    keep = jnp.arange(80) % 4 == 0  # what the training has reached, or would have
    params = jax.tree.map(lambda p: p * keep[: p.size].reshape(p.shape) if p.ndim > 1 else p, KERNELS)
    summary = jaxpruner.summarize_flops(mlp, params, jnp.ones((1, 6)), updater=updater, steps=steps)
    forward = 2 * (48 + 80)
    starts_sparse = algorithm in ("static_sparse", "rigl")
    updates = [step for step in range(steps) if 4 <= step <= 12 and step % 4 == 0]
    made = {step: float(updater.scheduler.get_sparsity_at_step(1.0, step)) for step in updates}
    total, sparsity = 0.0, 0.75 if starts_sparse else 0.0
    at = [float(updater.sparsity_at(0.75, step)) for step in range(steps + 1)]  # straight-through: a mask in every step
    for step in range(steps):
        if algorithm == "magnitude_ste":
            sparsity = 0.75 * at[step] / at[-1] if at[-1] else 0.0
        is_dense = algorithm.endswith("_ste") or (step in updates and algorithm != "static_sparse")
        total += forward * (2 * (1 - sparsity) + (1.0 if is_dense else 1 - sparsity))
        if step in updates and not starts_sparse and algorithm != "magnitude_ste":
            sparsity = 0.75 * made[step] / made[updates[-1]]
    assert summary["_training_flops"] == 3 * steps * forward
    assert summary["_training_flops_nnz"] == pytest.approx(total, rel=1e-5)


def test_dense_training():
    for updater in (None, jaxpruner.NoPruning()):
        summary = jaxpruner.summarize_flops(mlp, KERNELS, jnp.ones((1, 6)), updater=updater, steps=7)
        assert summary["_training_flops_nnz"] == summary["_training_flops"] == 7 * 3 * 2 * (48 + 80)


def test_preserved_zeros_count_from_the_start():
    params = KERNELS | {"b": {"kernel": jnp.asarray(np.eye(8, 10, dtype=np.float32))}}
    updater = jaxpruner.PreserveSparsity()
    summary = jaxpruner.summarize_flops(mlp, params, jnp.ones((1, 6)), updater=updater, steps=1000)
    assert summary["_training_flops_nnz"] == pytest.approx(3 * 1000 * 2 * (48 + 8), rel=1e-2)


def test_a_function_that_uses_no_parameter_is_refused():
    with pytest.raises(ValueError, match=r"multiplies with none of the parameters\. Let it take them as its first"):
        jaxpruner.summarize_flops(lambda params, x: mlp(KERNELS, x), KERNELS, jnp.ones((1, 6)))


def test_what_goes_through_a_barrier_together_stays_apart():
    params = {"a": jnp.zeros((2, 3)), "b": jnp.ones((3, 4))}

    def fn(params, x):
        a, b = jax.lax.optimization_barrier((params["a"], params["b"]))
        return x @ a @ b

    cost = jaxpruner.summarize_flops(fn, params, jnp.ones((1, 2)))
    assert (cost["a"], cost["b"]) == (12, 24)
    assert cost["_inference_flops_nnz"] == 24
