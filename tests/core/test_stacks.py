"""A stack of layers is so many layers: counts, structures, budgets and filters hold in each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpruner
from jaxpruner import sparsity_types

RNG = np.random.default_rng(0)
# Layers whose weights differ in scale, so that one threshold for all would not do.
KERNELS = [jnp.asarray(RNG.normal(size=(8, 12)) * scale, jnp.float32) for scale in (1.0, 0.1, 10.0)]
BIASES = [jnp.asarray(RNG.normal(size=12), jnp.float32) for _ in range(3)]
HEAD = jnp.asarray(RNG.normal(size=(12, 40)), jnp.float32)
UNSTACKED = {f"layer_{i}": {"kernel": KERNELS[i], "bias": BIASES[i]} for i in range(3)} | {"head": {"kernel": HEAD}}


def stacked(axis):
    kernel, bias = jnp.stack(KERNELS, axis), jnp.stack(BIASES, min(axis, 1))
    return {"layers": {"kernel": kernel, "bias": bias}, "head": {"kernel": HEAD}}


def config(algorithm, axis=None, **changes):
    stacks = {} if axis is None else {"stack_axes": {"layers/kernel": axis, "layers/bias": min(axis, 1)}}
    schedule = {"update_start_step": 2, "update_end_step": 4, "update_freq": 2}
    return {"algorithm": algorithm, "sparsity": 0.75} | schedule | stacks | changes


def trained(algorithm, params, axis=None, **changes):
    tx = jaxpruner.sparsify(optax.sgd(0.01), config(algorithm, axis, **changes))
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(5):
        updates, state = update(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
    return tx.init.updater.current_masks(state, params), state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "axis", "structure", "packed"),
    [
        ("magnitude", 0, "unstructured", False),
        ("magnitude", 2, "nm_2,4", True),
        ("magnitude", 1, "block_3,4", False),
        ("saliency", 1, "channel_-1", True),
        ("magnitude_ste", 2, "unstructured", True),
        ("rigl", 1, "unstructured", False),
        ("rigl", 0, "block_4,4", True),
        ("rigl", 2, "nm_2,4", False),
    ],
)
def test_each_layer_is_masked_as_it_is_alone(algorithm, axis, structure, packed):
    changes = {"sparsity_type": structure, "use_packed_masks": packed}
    if structure == "nm_2,4":
        changes["sparsity"] = 0.5
    masks, state = trained(algorithm, stacked(axis), axis, **changes)
    assert state.masks["layers"]["bias"] == optax.MaskedNode()
    each = [np.take(np.asarray(masks["layers"]["kernel"]), i, axis) for i in range(3)]
    if algorithm == "rigl":  # starts from masks drawn at random, which differ
        alone = [mask.sum() for mask in each]
        assert len(set(alone)) == 1
        assert alone[0] == {"unstructured": 24, "nm_2,4": 48}.get(structure, alone[0])
        return
    expected, _ = trained(algorithm, UNSTACKED, **changes)
    for i in range(3):
        np.testing.assert_array_equal(each[i], expected[f"layer_{i}"]["kernel"])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_erk_counts_layers_as_layers(axis):
    whole = jaxpruner.create_updater_from_config(config("magnitude", axis, dist_type="erk"))
    alone = jaxpruner.create_updater_from_config(config("magnitude", dist_type="erk"))
    one, many = whole.get_target_sparsities(stacked(axis)), alone.get_target_sparsities(UNSTACKED)
    assert one["layers"]["kernel"] == pytest.approx(many["layer_0"]["kernel"])
    assert one["head"]["kernel"] == pytest.approx(many["head"]["kernel"])
    assert one["layers"]["bias"] is None


def test_filters_and_functions_see_one_layer():
    seen = {}

    def filter_fn(path, param):
        seen["/".join(path)] = param.shape
        return param.ndim > 1

    def structure(path, param):
        assert param.shape == ((8, 12) if path[0] == "layers" else (12, 40))
        return sparsity_types.Unstructured()

    trained("magnitude", stacked(1), 1, filter_fn=filter_fn, sparsity_type=structure)
    assert seen == {"layers/kernel": (8, 12), "layers/bias": (12,), "head/kernel": (12, 40)}


def test_a_function_may_tell_the_axis():
    updater = jaxpruner.create_updater_from_config(
        config("magnitude", stack_axes=lambda path, param: 0 if path[0] == "layers" else None)
    )
    _, masks = updater.instant_sparsify(stacked(0))
    assert np.asarray(masks["layers"]["kernel"]).sum((1, 2)).tolist() == [24] * 3


def test_a_global_threshold_is_one_for_all_layers():
    masks, _ = trained("global_magnitude", stacked(0), 0)
    assert masks["layers"]["bias"] is None
    assert sum(int(m.sum()) for m in jax.tree.leaves(masks)) == round((3 * 96 + 480) / 4)


def test_stacks_that_are_none():
    with pytest.raises(ValueError, match=r"stack_axes: 'layer/\*' matches no parameter"):
        trained("magnitude", stacked(0), stack_axes={"layer/*": 0})
    with pytest.raises(ValueError, match=r"stack_axes: 1 is not a mapping; give \{path or pattern: value\}"):
        trained("magnitude", stacked(0), stack_axes=1)
    with pytest.raises(ValueError, match=r"layers/kernel: axis 3 does not exist in \(3, 8, 12\)"):
        trained("magnitude", stacked(0), stack_axes={"layers/kernel": 3})
    params = {"layers": {"kernel": jnp.ones((4, 8, 10))}}
    with pytest.raises(ValueError, match=r"layers/kernel: axis -1 of \(8, 10\) is not a multiple of m=4"):
        trained("magnitude", params, stack_axes={"layers/*": 0}, sparsity_type="nm_2,4", sparsity=0.5)


def test_blocks_of_a_stack_are_pruned_further():
    """Zeros of a checkpoint, scattered over blocks, say nothing against the rest of a block."""
    changes = {"sparsity_type": "block_4,4", "initial_sparsity": "from_params"}
    zeroed = [kernel.at[0, ::2].set(0.0) for kernel in KERNELS]
    alone = {f"layer_{i}": {"kernel": kernel} for i, kernel in enumerate(zeroed)}
    expected, _ = trained("magnitude", alone, **changes)
    together = {"layers": {"kernel": jnp.stack(zeroed)}}
    masks, _ = trained("magnitude", together, stack_axes={"layers/*": 0}, **changes)
    for i in range(3):
        np.testing.assert_array_equal(masks["layers"]["kernel"][i], expected[f"layer_{i}"]["kernel"])
        assert masks["layers"]["kernel"][i].any()
