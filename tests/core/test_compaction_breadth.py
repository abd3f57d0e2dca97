"""Primitives that architectures of the breadth table have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jaxpruner


def kernels(**shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def test_tiled_units_leave_with_their_repeats():
    params = kernels(up=(4, 16), token=(1, 16), down=(48, 3))

    def fn(params, x):
        hidden = jax.nn.relu(x @ params["up"]) + jnp.tile(params["token"], (x.shape[0], 1))
        return jnp.tile(hidden, (1, 3)) @ params["down"]

    x = jnp.ones((2, 4))
    groups = jaxpruner.find_groups(fn, params, x)
    assert {group.size: len(group.places) for group in groups.removable} == {16: 3, 3: 1}  # units, and repeats
    gone = np.arange(16) % 3 == 0
    pruned = params | {
        "up": params["up"] * ~gone,
        "token": params["token"] * ~gone,
        "down": params["down"] * np.tile(~gone, 3)[:, None],
    }
    small = jaxpruner.compact(fn, pruned, x)
    assert small.params["up"].shape == (4, 10)
    assert small.params["down"].shape == (30, 3)
    np.testing.assert_allclose(small.fn(small.params, x), fn(pruned, x), rtol=1e-5)
