"""Random configurations, good and bad: either a ValueError that says what is wrong, or exact sparsity; nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxpruner

STEPS = 13
SHAPES = {"dense": {"kernel": (8, 16), "bias": (16,)}, "conv": {"kernel": (3, 2, 4, 8)}}

# Of each key what is valid alone, and what is not. What goes together and what does not is found by drawing.
VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "algorithm": (list(jaxpruner.all_algorithm_names()), ["magnitud", 3]),
    "sparsity": ([0.5, 0.5, 0.8, 0.75, 0.97, 0], [1.0, -0.1, 1.5, float("nan"), "0.5", True]),
    "dist_type": (["uniform", "erk"], ["ERK", None, 0.5]),
    "sparsity_type": (
        ["unstructured", "nm_2,4", "nm_2:4", "nm_1,4,axis=0", "gradual_nm_2,4", "block_2,4", "channel_-1",
         "channel_input", "per_output", {"dense*": "nm_2,4"}],
        ["nm_4,2", "nm_3,7", "block_0,4", "stripes", 4, {"dense*": 4}],
    ),
    "update_start_step": ([0, 0, 2, 3, 5], [-1, 1.5, "2"]),
    "update_end_step": ([5, 8, 9, 12], [1, -3, 8.5, "9"]),
    "update_freq": ([1, 1, 2, 3, 5], [0, -1, 40, 1.5, "2"]),
    "initial_sparsity": ([0.0, 0.3, "from_params"], [0.99, "params", -1]),
    "drop_fraction": ([0.0, 0.1, 0.5, 1.0], [1.5, "0.1"]),
    "use_packed_masks": ([True, False], ["yes"]),
    "custom_sparsity_map": ([{"dense*": 0.75}, {"dense/kernel": 0.25}], [{"none*": 0.5}, {"conv*": 2.0}, 0.5]),
    "filter_fn": ([lambda path, param: "dense" in path], [lambda path, param: False, "dense"]),
    "stack_axes": ([{"conv*": 1}], [{"dense*": 5}, 1, {"conv*": "one"}]),
    "rng_seed": ([0, 7], ["seven", 1.5]),
    "sparcity": ([], [0.5]),
}  # fmt: skip
# How often a key is given, of ten times.
OFTEN = {"algorithm": 10, "sparsity": 10, "update_start_step": 9, "update_end_step": 9, "sparsity_type": 5}


def drawn(pick: Callable[[Sequence[Any]], Any]) -> dict[str, Any]:
    """A configuration, most of whose values are valid."""
    config = {}
    for key, (good, bad) in VALUES.items():
        if pick(range(10)) < OFTEN.get(key, 2):
            config[key] = pick(bad if not good or pick(range(40)) == 0 else good)
    return config


@st.composite
def configurations(draw):
    return drawn(lambda choices: draw(st.sampled_from(choices)))


def trees(seed):
    rng = np.random.default_rng(seed)
    shapes, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda shape: isinstance(shape, tuple))
    return treedef.unflatten([jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes])


def loss(params):
    return sum(jnp.sum((leaf - 0.1) ** 2) for leaf in jax.tree.leaves(params))


def trained(tx, params):
    """The parameters and the state after some steps, of one program."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params, loss_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    many = jax.tree.map(lambda *each: jnp.stack(each), *(trees(1000 + i) for i in range(STEPS)))
    return jax.jit(lambda carry: jax.lax.scan(step, carry, many)[0])((params, tx.init(params)))


def check(config):
    try:
        updater = jaxpruner.create_updater_from_config(config)
        tx = jaxpruner.sparsify(optax.sgd(0.01), updater)
        params, state = trained(tx, trees(0))
    except ValueError as error:
        # It names a key, a leaf or a value of the configuration, and what would be right.
        told = str(error)
        assert any(word in told for word in (*VALUES, "kernel", "bias", "masks")), told
        assert len(told) > 30, told
        return "refused"
    jaxpruner.check_sparse(params, state, updater)
    return "trained"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* a share of .* is pruned:UserWarning")
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(configurations())
def test_a_configuration_is_refused_or_exactly_sparse(config):
    check(config)
