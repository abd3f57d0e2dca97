"""Tests of `state_shardings` that need 8 devices; `test_sharding.py` runs them in a process that has as many."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxpruner

# Nothing is timed here, and most of the time would go into optimizing.
jax.config.update("jax_disable_most_optimizations", True)

MESH = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "model"))
WHOLE = NamedSharding(MESH, PartitionSpec())
WHERE = {
    "attention": {"kernel": NamedSharding(MESH, PartitionSpec("data", "model"))},
    "mlp": {"kernel": NamedSharding(MESH, PartitionSpec("model")), "bias": NamedSharding(MESH, PartitionSpec("model"))},
}
SHAPES = {"attention": {"kernel": (16, 64)}, "mlp": {"kernel": (64, 16), "bias": (16,)}}
CONFIG = {"algorithm": "magnitude", "sparsity": 0.5, "update_start_step": 0, "update_end_step": 4, "update_freq": 2}


def placed(shapes=SHAPES, where=WHERE):
    return jax.tree.map(
        lambda sharding, shape: jax.device_put(jnp.ones(shape), sharding),
        where,
        shapes,
        is_leaf=lambda x: isinstance(x, NamedSharding),
    )


def sparse(inner=None, **changes):
    return jaxpruner.sparsify(optax.adam(1e-3) if inner is None else inner, CONFIG | changes)


def one_label(params):
    return jax.tree.map(lambda _: "all", params)


WRAPPED = {
    "alone": lambda: sparse(),
    "packed": lambda: sparse(use_packed_masks=True),
    "straight-through": lambda: sparse(algorithm="magnitude_ste"),
    "remembering": lambda: sparse(algorithm="movement"),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), sparse()),
    "multi_transform": lambda: optax.multi_transform({"all": sparse()}, one_label),
    "masked": lambda: optax.masked(sparse(), {"attention": {"kernel": True}, "mlp": {"kernel": True, "bias": False}}),
    "inject_hyperparams": lambda: optax.inject_hyperparams(lambda rate: sparse(optax.adam(rate)))(rate=1e-3),
    "MultiSteps": lambda: optax.MultiSteps(sparse(), 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(sparse(), 3),
    "adafactor": lambda: sparse(optax.adafactor(1e-3, min_dim_size_to_factor=8)),
    "wrap_optax": lambda: jaxpruner.create_updater_from_config(CONFIG).wrap_optax(optax.lion(1e-3)),
    "not sparse": lambda: optax.adamw(1e-3),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_state_lies_as_the_parameters(name):
    tx, params = WRAPPED[name](), placed()
    shardings = jaxpruner.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    seen = set()
    for path, leaf in found.items():
        expected = WHOLE
        for group, kernel in (("attention", "kernel"), ("mlp", "kernel"), ("mlp", "bias")):
            shape = SHAPES[group][kernel]
            if path.endswith(f"['{group}']['{kernel}']") and leaf.size in (np.prod(shape), np.prod(shape) // 8):
                # Factored statistics have as few entries, but one axis.
                expected = WHERE[group][kernel] if leaf.ndim == len(shape) else WHOLE
                seen.add((group, kernel, leaf.dtype.name))
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), path
    kinds = {dtype for _, _, dtype in seen}
    assert "float32" in kinds
    assert name == "not sparse" or ("uint8" if name == "packed" else "bool") in kinds


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((64, 16), ("model", "data"), ("model", "data")),  # 8 bytes over 4 devices
        ((64, 16), (("data", "model"), None), (("data", "model"), None)),
        ((32, 16), (("data", "model"), None), (None, None)),  # 4 bytes over 8
        ((16, 40), ("data", "model"), ("data", "model")),
        ((24, 40), ("data", "model"), (None, "model")),  # 3 bytes over 2; the axis of 40 is not packed
        ((16, 8, 4), (None, "data", "model"), (None, "data", "model")),
        ((64, 16), (), (None, None)),
    ],
)
def test_packed_masks(shape, spec, expected):
    tx = sparse(use_packed_masks=True)
    sharding = NamedSharding(MESH, PartitionSpec(*spec))
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    shardings = jaxpruner.state_shardings(tx, params, {"w": sharding})
    assert shardings.masks["w"].is_equivalent_to(NamedSharding(MESH, PartitionSpec(*expected)), len(shape))
    assert shardings.inner_state[0].mu["w"] == sharding

    # Where they lie changes no bit of them.
    host = {"w": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    spread = jax.device_put(host, {"w": sharding})
    state = jax.jit(tx.init, out_shardings=shardings)(spread)
    new = jax.jit(tx.update, out_shardings=({"w": sharding}, shardings))(spread, state, spread)[1]
    single = jax.device_put(host, jax.devices()[0])
    expected_masks = jax.jit(tx.update)(single, jax.jit(tx.init)(single), single)[1].masks
    np.testing.assert_array_equal(new.masks["w"], expected_masks["w"])


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


def test_a_bare_array():
    where = WHERE["attention"]["kernel"]
    shardings = jaxpruner.state_shardings(sparse(), jax.device_put(jnp.ones((16, 64)), where))
    assert shardings.masks == shardings.inner_state[0].mu == where
    assert shardings.count == shardings.target_sparsities == WHOLE


def test_lists_and_named_tuples():
    rows, columns = (NamedSharding(MESH, PartitionSpec(*spec)) for spec in (("data",), (None, "model")))
    params = [Pair(*(jax.device_put(jnp.ones((8, 8)), where) for where in (rows, columns)))]
    shardings = jaxpruner.state_shardings(sparse(), params)
    assert shardings.masks == [Pair(rows, columns)]


def test_a_name_that_ends_like_another():
    rows, columns = (NamedSharding(MESH, PartitionSpec(*spec)) for spec in (("data",), (None, "model")))
    params = {"a": {"w": jax.device_put(jnp.ones((8, 8)), rows)}, "w": jax.device_put(jnp.ones((8, 8)), columns)}
    shardings = jaxpruner.state_shardings(sparse(), params)
    assert shardings.inner_state[0].nu == {"a": {"w": rows}, "w": columns}


def test_nnx():
    params = nnx.state(nnx.Linear(16, 64, rngs=nnx.Rngs(0)), nnx.Param)
    where = jax.tree.map(lambda p: NamedSharding(MESH, PartitionSpec(*[None] * (p.ndim - 1), "model")), params)
    shardings = jaxpruner.state_shardings(sparse(), params, where)
    specs = [sharding.spec for sharding in jax.tree.leaves(shardings.inner_state[0].mu)]
    assert specs == [PartitionSpec("model"), PartitionSpec(None, "model")]


def test_nothing_is_run():
    shapes = {"w": jax.ShapeDtypeStruct((2**16, 2**18), jnp.bfloat16, sharding=WHERE["attention"]["kernel"])}
    assert jaxpruner.state_shardings(sparse(), shapes).masks["w"] == WHERE["attention"]["kernel"]


@pytest.mark.parametrize(
    ("params", "shardings", "words"),
    [
        ({"w": np.ones((8, 8))}, None, ("params: w has nothing", "NamedSharding", "jax.device_put")),
        ({"w": jnp.ones((8, 8))}, None, ("params: w has a SingleDeviceSharding", "jax.device_put")),
        (placed(), {"attention": WHERE["attention"]}, ("shardings: mlp/bias has nothing",)),
        (placed(), {**WHERE, "mlp": {"kernel": WHOLE, "bias": PartitionSpec()}}, ("shardings: mlp/bias has a P",)),
        (
            {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))},
            {"a": WHOLE, "b": NamedSharding(Mesh(np.asarray(jax.devices()), ("model",)), PartitionSpec())},
            ("shardings: a lies on", "and b on", "one mesh"),
        ),
    ],
    ids=["no sharding", "one device", "a leaf missing", "a spec alone", "two meshes"],
)
def test_errors(params, shardings, words):
    with pytest.raises(ValueError, match=r"shardings:|params:") as info:
        jaxpruner.state_shardings(sparse(), params, shardings)
    assert all(word in str(info.value) for word in words), str(info.value)


def test_no_parameters():
    with pytest.raises(ValueError, match="params: holds no arrays"):
        jaxpruner.state_shardings(optax.adam(1e-3), {})


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="this JAX has no explicit axes")
@pytest.mark.parametrize(
    ("algorithm", "structure", "packed"),
    [
        ("magnitude", "unstructured", True),
        ("set", "nm_2,4", True),
        ("random_ste", "unstructured", False),
        ("rigl", "channel_-1", False),
        ("magnitude", "channel_-1", False),
        ("static_sparse", "unstructured", False),
    ],
)
@pytest.mark.parametrize("is_set", [False, True])
def test_explicit_axes(algorithm, structure, packed, is_set):
    """The default of `jax.make_mesh` in newer JAX: layouts are part of the types."""
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    tx = sparse(algorithm=algorithm, sparsity_type=structure, use_packed_masks=packed)
    host = {"w": np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)}
    params = jax.device_put(host, NamedSharding(mesh, PartitionSpec("data", "model")))
    shardings = jaxpruner.state_shardings(tx, params)
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        _, new = jax.jit(tx.update)(params, state, params)
    assert new.masks["w"].sharding == shardings.masks["w"] == params["w"].sharding
    single = jax.device_put(host, jax.devices()[0])
    expected = jax.jit(tx.update)(single, jax.jit(tx.init)(single), single)[1].masks
    np.testing.assert_array_equal(new.masks["w"], expected["w"])


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="this JAX has no explicit axes")
@pytest.mark.parametrize(("algorithm", "packed"), [("rigl", True), ("set", False), ("static_sparse", False)])
def test_explicit_axes_eagerly_on_a_mesh_that_is_not_set(algorithm, packed):
    """Random masks are drawn where the parameters lie, and are those of one device."""
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    tx = sparse(algorithm=algorithm, use_packed_masks=packed)
    host = {"w": np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)}
    params = jax.device_put(host, NamedSharding(mesh, PartitionSpec("data", "model")))
    state = tx.init(params)
    assert state.masks["w"].sharding.is_equivalent_to(params["w"].sharding, 2)
    _, new = tx.update(params, state, params)
    single = jax.device_put(host, jax.devices()[0])
    _, expected = tx.update(single, tx.init(single), single)
    np.testing.assert_array_equal(new.masks["w"], expected.masks["w"])
