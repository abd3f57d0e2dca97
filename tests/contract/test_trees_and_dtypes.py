"""Parameters of any pytree and dtype."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
import sparse_cases as cases

import jaxpruner

KINDS = ("magnitude", "random", "magnitude_ste", "rigl")


def equinox_module():
    eqx = pytest.importorskip("equinox")
    return eqx.filter(eqx.nn.Linear(16, 8, key=jax.random.key(0)), eqx.is_inexact_array)


def equinox_mlp():
    """With leaves that are None: a filtered module keeps its place for functions."""
    eqx = pytest.importorskip("equinox")
    return eqx.filter(eqx.nn.MLP(16, 8, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array)


def haiku_params():
    hk = pytest.importorskip("haiku")
    net = hk.transform(lambda x: hk.Linear(8, name="linear")(x))
    return net.init(jax.random.key(0), jnp.ones((1, 16)))


def frozen_dict():
    core = pytest.importorskip("flax.core")
    return core.freeze(cases.tree("dict"))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kernel", "bias"], meta_fields=[])
@dataclasses.dataclass
class Weights:
    kernel: jax.Array
    bias: jax.Array


def data_class():
    return Weights(**cases.tree("dict")["dense"])


TREES = {
    "equinox": equinox_module,
    "equinox_mlp": equinox_mlp,
    "haiku": haiku_params,
    "slashed_dict": lambda: {"linear/~/w": cases.tree("dict")["dense"], "count": jnp.ones(())},
    "frozen_dict": frozen_dict,
    "dataclass": data_class,
    "tuple": lambda: (cases.arrays()["kernel"], (cases.arrays()["bias"],)),
    "bare_array": lambda: cases.arrays()["kernel"],
    "empty_leaf": lambda: {"kernel": cases.arrays()["kernel"], "empty": jnp.zeros((0, 4)), "scalar": jnp.ones(())},
    "with_none": lambda: {"kernel": cases.arrays()["kernel"], "absent": None},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [
        (algorithm, kind)
        for row, algorithm in enumerate(KINDS)
        for column, kind in enumerate(TREES)
        # Half of the pairs, such that every tree meets sparse and dense starts.
        if (row + column) % 2 == 0
    ],
)
def test_any_tree(algorithm, kind):
    params = TREES[kind]()
    updater = cases.make_updater(algorithm, packed=algorithm in ("random", "rigl"))
    steps = cases.run(jaxpruner.sparsify(optax.adamw(1e-2), updater), params, cases.LAST + 1)
    last = steps[-1]
    assert cases.signature(last.new_params) == cases.signature(params)
    assert cases.signature(last.new_state) == cases.signature(steps[0].state)
    masks = cases.mask_list(updater, last.new_state, params)
    cases.check_zeros(last.new_params, masks)
    for mask, leaf in zip(masks, jax.tree.leaves(params), strict=True):
        assert (mask is not None) == (leaf.ndim > 1)
        if mask is not None:
            assert mask.sum() == (cases.kept_number(mask.size) if mask.size else 0)


@pytest.mark.parametrize("algorithm", cases.ALGORITHMS)
def test_instant_sparsify_of_a_filtered_module(algorithm):
    params = equinox_mlp()
    updater = cases.make_updater(algorithm)
    if algorithm in cases.SPARSE_FROM_START:
        with pytest.raises(RuntimeError, match="instant_sparsify"):
            updater.instant_sparsify(params)
        return
    sparse, masks = updater.instant_sparsify(params, grads=params)
    kept = sum(int(mask.sum()) for mask in jax.tree.leaves(masks))
    assert cases.signature(sparse) == cases.signature(params)
    sizes = [p.size for p in jax.tree.leaves(params) if p.ndim > 1]
    if algorithm in cases.GLOBAL:
        assert kept == cases.kept_number(sum(sizes))
    elif algorithm not in cases.WITHOUT_SPARSITY:
        assert kept == sum(map(cases.kept_number, sizes))


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "dtype"), [
    ("magnitude", "bfloat16"), ("saliency", "float16"), ("random", "bfloat16"), ("magnitude_ste", "bfloat16"),
    ("random_ste", "float16"), ("global_magnitude", "bfloat16"), ("static_sparse", "float16"),
    ("rigl", "bfloat16"), ("set", "float16"), ("preserve", "bfloat16"),
])  # fmt: skip
def test_half_precision(algorithm, dtype):
    params = cases.tree("dict", dtype=dtype, kernels=2 if algorithm in cases.GLOBAL else 1)
    updater = cases.make_updater(algorithm)
    # The smallest float16 is 6e-8, so that Adam's default eps would be 0.
    tx = jaxpruner.sparsify(optax.adamw(1e-2, eps=1e-3), updater)
    steps = cases.run(tx, params, cases.LAST + 1)
    last = steps[-1]
    assert cases.signature(last.new_params) == cases.signature(params)
    assert cases.signature(last.new_state) == cases.signature(steps[0].state)
    masks = [m for m in cases.mask_list(updater, last.new_state, params) if m is not None]
    cases.check_zeros(last.new_params, cases.mask_list(updater, last.new_state, params))
    total = sum(mask.size for mask in masks)
    assert sum(mask.sum() for mask in masks) == (total if algorithm == "preserve" else cases.kept_number(total))


@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude_ste", "rigl"])
def test_half_precision_params_with_float32_gradients_and_statistics(algorithm):
    """Mixed precision: float32 gradients and moments of bfloat16 parameters."""
    params = cases.tree("dict", dtype="bfloat16")
    updater = cases.make_updater(algorithm, update_start_step=1, update_freq=2 if algorithm == "rigl" else 1)
    tx = jaxpruner.sparsify(optax.adamw(1e-2, mu_dtype=jnp.float32), updater)
    update, state = jax.jit(tx.update), tx.init(params)
    for index in range(3):
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), cases.gradients(params, index))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
        cases.check_zeros(params, cases.mask_list(updater, state, params))


FLOAT64 = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, jaxpruner, numpy as np, optax, sparse_cases as cases
jax.config.update("jax_enable_x64", True)
for algorithm in sys.argv[2:]:
    params = cases.tree("dict", dtype="float64", kernels=2 if algorithm in cases.GLOBAL else 1)
    updater = cases.make_updater(algorithm)
    steps = cases.run(jaxpruner.sparsify(optax.adamw(1e-2), updater), params, cases.LAST + 1)
    last = steps[-1]
    assert {leaf.dtype for leaf in jax.tree.leaves(last.new_params)} == {np.dtype("float64")}
    assert cases.signature(last.new_state) == cases.signature(steps[0].state)
    masks = [m for m in cases.mask_list(updater, last.new_state, params) if m is not None]
    cases.check_zeros(last.new_params, cases.mask_list(updater, last.new_state, params))
    assert sum(m.sum() for m in masks) == cases.kept_number(sum(m.size for m in masks)), algorithm
"""


@pytest.mark.slow
def test_float64():
    algorithms = ["magnitude", "random", "global_saliency", "rigl", "set", "magnitude_ste"]
    command = [sys.executable, "-c", FLOAT64, os.path.dirname(cases.__file__), *algorithms]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
