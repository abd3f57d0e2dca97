"""Scanned layers: T5X's scalable T5 against the same layers unscanned."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import t5x_cases as cases
from flax import core, traverse_util
from flax.linen import partitioning as flax_partitioning
from jax.sharding import PartitionSpec
from t5x import models, optimizers, train_state
from t5x.examples.scalable_t5 import network as scalable
from t5x.examples.t5 import network as minimal

import jaxpruner_t5x

pytestmark = cases.quiet
TINY = {"emb_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 32, "vocab_size": 64}
TINY |= {"num_encoder_layers": 2, "num_decoder_layers": 2}
BASE = {"emb_dim": 768, "num_heads": 12, "head_dim": 64, "mlp_dim": 2048, "vocab_size": 32128}
BASE |= {"num_encoder_layers": 12, "num_decoder_layers": 12, "mlp_activations": ("gelu", "linear")}


def optimizer(algorithm: str = "magnitude", **more) -> jaxpruner_t5x.SparseOptimizer:
    given = {"sparsity": 0.8, "update_start_step": 0, "update_end_step": 1, "update_freq": 1} | more
    updater = jaxpruner_t5x.create_updater(algorithm, **given)
    return jaxpruner_t5x.SparseOptimizer(optimizers.OptaxWrapper(optax.sgd(0.1)), updater)


def shapes_of(network, optimizer_def, **config) -> train_state.FlaxOptimTrainState:
    """The train state of T5 as T5X makes it, in shapes; the optimizer knows the axes then."""
    module = network.Transformer(config=network.T5Config(dropout_rate=0.0, **config))
    model = models.EncoderDecoderModel(module, None, None, optimizer_def)
    inputs = dict.fromkeys(("encoder_input_tokens", "decoder_input_tokens"), (1, 4))

    def create(rng):
        return train_state.FlaxOptimTrainState.create(optimizer_def, model.get_initial_variables(rng, inputs))

    return jax.eval_shape(create, jax.random.PRNGKey(0))


@functools.cache
def scanned_axes():
    """(shapes, logical axes) of a tiny scanned T5: its encoder, and of the decoder the logits."""
    state = shapes_of(scalable, optimizer(), **TINY)
    trees = state.params, flax_partitioning.get_axis_names(state.params_axes)
    return tuple(
        {"encoder": tree["encoder"], "decoder": {"logits_dense": tree["decoder"]["logits_dense"]}}
        for tree in map(core.unfreeze, trees)
    )


def filled(shapes):
    """Numbers, in each layer of a stack of another scale."""
    rng = np.random.default_rng(0)
    leaves, treedef = jax.tree.flatten(shapes)
    layers = [rng.normal(size=leaf.shape) * (1 + np.indices(leaf.shape)[min(1, leaf.ndim - 1)]) for leaf in leaves]
    return treedef.unflatten([jnp.asarray(leaf, jnp.float32) for leaf in layers])


def unstacked(tree) -> dict[tuple[str, ...], np.ndarray]:
    """Leaves by their paths; a scanned one as so many layers, by its axis 1 as T5X has it."""
    found = {}
    for path, leaf in traverse_util.flatten_dict(tree).items():
        if path[1] == "encoder":
            for i, layer in enumerate(np.moveaxis(np.asarray(leaf), 1, 0)):
                found["encoder", f"layers_{i}", *path[2:]] = layer
        else:
            found[path] = np.asarray(leaf)
    return found


def masked(optimizer_def, params, axes=None):
    """The optimizer's state after a step."""
    if axes is not None:
        optimizer_def.set_param_axes(axes)
    grads = jax.tree.map(jnp.sin, params)
    step = jax.jit(lambda p, g: optimizer_def.create(p).apply_gradient(g))
    return step(params, grads)


def test_t5_1_1_base_gets_the_sparsities_that_it_has_unscanned():
    found = []
    for network, config in ((minimal, {}), (scalable, {"scan_layers": False}), (scalable, {})):
        optimizer_def = optimizer()
        params = shapes_of(network, optimizer_def, **BASE | config).params
        targets = traverse_util.flatten_dict(optimizer_def.updater.get_target_sparsities(params), sep="/")
        first = "encoder/encoder" if config == {} and network is scalable else "encoder/layers_0"
        names = ["decoder/logits_dense", f"{first}/attention/query", f"{first}/attention/out", f"{first}/mlp/wi_0"]
        found.append([targets[f"{name}/kernel"] for name in names])
        assert sum(target is not None for target in targets.values()) == (19 if "encoder/encoder" in first else 217)
    np.testing.assert_allclose(found[0], [0.870, 0.746, 0.746, 0.825], atol=5e-4)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("magnitude", {}),
        ("magnitude_ste", {"use_packed_masks": True, "sparsity_type": "block_4,4"}),
        ("magnitude", {"sparsity": 0.5, "dist_type": "uniform", "sparsity_type": "nm_2:4,axis=input"}),
        ("saliency", {"filter_fn": lambda path, param: param.ndim > 1}),
    ],
)
def test_each_scanned_layer_is_the_layer_unscanned(algorithm, more):
    """The same weights, masked alike: exact counts, and groups and blocks that do not leave a layer."""
    shapes, axes = scanned_axes()
    params = filled(shapes)
    whole = masked(optimizer(algorithm, **more), params, axes)
    apart = optimizer(algorithm, **more)
    layers = traverse_util.unflatten_dict(unstacked(params))
    # As distributions see kernels of heads and width.
    names = traverse_util.unflatten_dict(
        {path: unstacked_axes(axes, path) for path in traverse_util.flatten_dict(layers)}
    )
    wanted = traverse_util.flatten_dict(masked(apart, layers, names).target)
    found = unstacked(whole.target)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(found[path] == 0, leaf == 0, err_msg="/".join(path))
    kernels = [leaf for path, leaf in found.items() if path[-1] == "kernel"]
    assert sum((leaf == 0).sum() for leaf in kernels) > 0.45 * sum(leaf.size for leaf in kernels)
    assert all(leaf.all() for path, leaf in found.items() if path[-1] == "scale")


def unstacked_axes(axes, path):
    flat = traverse_util.flatten_dict(axes)
    if path in flat:
        return flat[path]
    stacked = flat["encoder", "encoder", *path[2:]]
    return PartitionSpec(*(name for name in stacked if name != "layers"))


@pytest.mark.slow
def test_sparse_training_keeps_the_count_of_each_layer():
    shapes, axes = scanned_axes()
    chosen = optimizer("rigl", update_end_step=10, update_freq=5)  # at step 0 it changes its masks
    masks = masked(chosen, filled(shapes), axes).state.sparse.masks
    targets = traverse_util.flatten_dict(chosen.updater.get_target_sparsities(shapes))
    pruned = {path: mask for path, mask in traverse_util.flatten_dict(masks).items() if path[-1] == "kernel"}
    for path, mask in pruned.items():
        layers = np.moveaxis(np.asarray(mask), 1, 0) if path[1] == "encoder" else np.asarray(mask)[None]
        kept = round(layers[0].size * (1 - targets[path]))
        assert [layer.sum() for layer in layers] == [kept] * len(layers), path


@pytest.mark.parametrize("packed", [False, True])
def test_masks_of_scanned_layers_have_the_axes_of_their_parameters(packed):
    state = shapes_of(scalable, optimizer(use_packed_masks=packed), **TINY)
    sparse = state.as_logical_axes()._optimizer.state.sparse
    masks = traverse_util.flatten_dict(core.unfreeze(sparse.masks), sep="/")
    wi, query = (masks[f"encoder/encoder/{name}/kernel"] for name in ("mlp/wi", "attention/query"))
    # Packed, the axes of a tiny model cannot be dealt to all meshes.
    assert wi == PartitionSpec("embed", None if packed else "layers", None if packed else "mlp")
    assert query == (PartitionSpec(*query) if packed else PartitionSpec("embed", "layers", "heads", "kv"))


def test_stack_axes_of_ones_own_are_kept():
    _, axes = scanned_axes()
    own = {"encoder/encoder/*/kernel": 1}
    chosen = optimizer(stack_axes=own)
    chosen.set_param_axes(axes)
    assert chosen.updater.stack_axes == own
