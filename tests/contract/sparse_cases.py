"""What the contract tests share: small trees, optimizers, configurations, and oracles in NumPy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpruner

# Those of the paper's library, which all cases are for: between them they have every way to make, keep and use a mask.
ALGORITHMS = (
    "no_prune", "magnitude", "random", "saliency", "magnitude_ste", "random_ste", "global_magnitude", "global_saliency",
    "static_sparse", "rigl", "set", "preserve",
)  # fmt: skip
# The others are choices among the same parts, and each has an oracle in tests/core/test_methods.py. One case each, with
# a structure, a storage, an optimizer and a tree, is enough to see that they fit; where the state has a part of its
# own, `movement` stands for all (statistics and dense weights). `grasp` and `synflow` need a loss, which no trainer
# hands on; `srigl` has a structure of its own, and another number of weights when neurons have gone.
MORE = {
    "lamp": ("unstructured", True, "adamw", "list"),
    "movement": ("block_3,4", True, "sgd", "nnx"),
    "soft_movement": ("unstructured", False, "adamw", "dict"),
    "fisher": ("nm_2,4", False, "lion", "namedtuple"),
    "adam_fisher": ("channel_-1", True, "adamw", "nnx"),
    "acdc": ("block_3,4", False, "adamw", "dict"),
    "granet": ("unstructured", True, "sgd", "nnx"),
    "mest": ("block_3,4", False, "sgd", "list"),
    "sr_ste": ("nm_2,4", True, "sgd", "dict"),
    "top_kast": ("block_3,4", False, "adafactor", "list"),
    "snip": ("unstructured", False, "sgd", "nnx"),
}
GLOBAL = ("global_magnitude", "global_saliency")
STRAIGHT_THROUGH = ("magnitude_ste", "random_ste")
DROP_AND_GROW = ("rigl", "set")
SPARSE_FROM_START = ("static_sparse", *DROP_AND_GROW)
SPARSE_GRADIENTS = (*SPARSE_FROM_START, "preserve")
WITHOUT_SPARSITY = ("no_prune", "preserve")
STRUCTURED = tuple(name for name in ALGORITHMS if name not in (*GLOBAL, *WITHOUT_SPARSITY))
# The same kinds with the other methods among them.
ALL_GLOBAL = (*GLOBAL, "lamp", "snip", "soft_movement")
ALL_STRAIGHT_THROUGH = (*STRAIGHT_THROUGH, "movement", "soft_movement", "sr_ste", "top_kast")
ALL_DROP_AND_GROW = (*DROP_AND_GROW, "mest", "granet")
ALL_SPARSE_FROM_START = (*SPARSE_FROM_START, "mest")
ALL_SPARSE_GRADIENTS = (*SPARSE_GRADIENTS, "mest", "granet", "movement", "soft_movement", "snip")
AT_FIRST_STEP = ("preserve", "snip")

STRUCTURES = ("unstructured", "nm_2,4", "block_3,4", "channel_-1")
SPARSITY = 0.7
SHAPES = {"kernel": (8, 16), "out": (16, 8)}

# Masks are made at counts 2, 4 and 6, the last time at the final sparsity.
FIRST, LAST, FREQ, STEPS = 2, 6, 2, 8


def config(algorithm: str, structure: str = "unstructured", packed: bool = False, **changes: Any) -> dict[str, Any]:
    """A configuration of `jaxpruner.create_updater_from_config`."""
    return {
        "algorithm": algorithm,
        "sparsity": 0.5 if structure == "nm_2,4" else SPARSITY,
        "sparsity_type": structure,
        "use_packed_masks": packed,
        "update_start_step": FIRST,
        "update_end_step": LAST,
        "update_freq": FREQ,
        "drop_fraction": 0.6,
    } | changes


def make_updater(algorithm: str, structure: str = "unstructured", packed: bool = False, **changes: Any):
    return jaxpruner.create_updater_from_config(config(algorithm, structure, packed, **changes))


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "lion": lambda: optax.lion(1e-2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "multi_steps": lambda: optax.sgd(0.1, momentum=0.9),
}


def around(name: str, tx: optax.GradientTransformation) -> Any:
    """What a case puts around the sparse transformation."""
    return optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation() if name == "multi_steps" else tx


class Layer(NamedTuple):
    kernel: Any
    bias: Any
    out: Any


@functools.cache
def arrays(seed: int = 0, dtype: str = "float32") -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in {**SHAPES, "bias": (16,)}.items()}


def tree(kind: str, seed: int = 0, kernels: int = 1, dtype: str = "float32") -> Any:
    """Parameters (or gradients) of one kind of tree: a bias and one or two kernels."""
    a = dict(arrays(seed, dtype))
    if kernels == 1:
        del a["out"]
    match kind:
        case "dict":
            rest = {"out": {"kernel": a["out"]}} if kernels == 2 else {}
            return {"dense": {"kernel": a["kernel"], "bias": a["bias"]}} | rest
        case "list":
            return [a["kernel"], a["bias"], *([a["out"]] if kernels == 2 else [])]
        case "namedtuple":
            return Layer(a["kernel"], a["bias"], {"kernel": a["out"]} if kernels == 2 else {})
        case "nnx":
            return _nnx_state(a)
    raise ValueError(kind)


TREES = ("dict", "list", "namedtuple", "nnx")


@functools.cache
def _nnx_template(kernels: int):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(8, 16, rngs=rngs)
            if kernels == 2:
                self.out = nnx.Linear(16, 8, use_bias=False, rngs=rngs)

    return nnx.state(Net(nnx.Rngs(0)), nnx.Param)


def _nnx_state(named: dict[str, jax.Array]) -> Any:
    by_shape = {array.shape: array for array in named.values()}
    template = _nnx_template(len(named) - 1)
    return jax.tree.map(lambda leaf: by_shape[leaf.shape], template)


def gradients(params: Any, step: int, scale: float = 1.0) -> Any:
    """The gradients of this step: they do not depend on the parameters, so runs can be compared."""
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(1000 + step)
    return treedef.unflatten([jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])


class Step(NamedTuple):
    """One step of a run, before and after."""

    index: int
    grads: Any
    params: Any
    state: Any
    updates: Any
    new_params: Any
    new_state: Any


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` that rounds every operation by itself, as NumPy does, and compiles fast.

    At its default level XLA may fuse a product and a sum into one rounding, or not, depending on what
    surrounds them, so that even one optimizer differs in last bits from one program to the next.
    """
    programs = {}

    def call(*args, **kwargs):
        key = str(signature((args, kwargs)))
        if key not in programs:
            programs[key] = jax.jit(fn).lower(*args, **kwargs).compile({"xla_backend_optimization_level": 0})
        return programs[key](*args, **kwargs)

    return call


def run(tx: Any, params: Any, steps: int = STEPS, state: Any = None, start: int = 0, update: Any = None) -> list[Step]:
    """Trains for some steps; the update is compiled once."""
    update = update or compiled(tx.update)
    state = compiled(tx.init)(params) if state is None else state
    trajectory = []
    for index in range(start, start + steps):
        grads = gradients(params, index)
        updates, new_state = update(grads, state, params)
        new_params = optax.apply_updates(params, updates)
        trajectory.append(Step(index, grads, params, state, updates, new_params, new_state))
        params, state = new_params, new_state
    return trajectory


def sparse_state(opt_state: Any) -> jaxpruner.SparseState:
    """The one sparse state of an optimizer state, wherever wrappers have put it."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, jaxpruner.SparseState))
    (found,) = [node for node in nodes if isinstance(node, jaxpruner.SparseState)]
    return found


def mask_list(updater: jaxpruner.BaseUpdater, opt_state: Any, params: Any) -> list[np.ndarray | None]:
    """The boolean masks in the order of the leaves of `params`, None where a leaf is not pruned."""
    masks = updater.current_masks(sparse_state(opt_state), params)
    leaves = jax.tree.structure(params).flatten_up_to(masks)
    return [None if leaf is None else np.asarray(leaf) for leaf in leaves]


def kept_number(size: int, sparsity: float = SPARSITY) -> int:
    """The number of units that are kept, by the formula of the documentation."""
    return max(1, round(size * (1 - sparsity)))


def check_structure(mask: np.ndarray, structure: str, sparsity: float | None = SPARSITY) -> None:
    """That a mask obeys its structure, with exactly the final number of units if a sparsity is given."""
    kind, _, numbers = structure.partition("_")
    match kind:
        case "unstructured":
            units = mask.ravel()
        case "nm":
            n, m = map(int, numbers.split(","))
            np.testing.assert_array_equal(mask.reshape(-1, m).sum(1), n)
            return
        case "block":
            h, w = map(int, numbers.split(","))
            corners = np.ndindex(-(-mask.shape[0] // h), -(-mask.shape[1] // w))
            units = np.asarray([_one_of(mask[i * h : (i + 1) * h, j * w : (j + 1) * w]) for i, j in corners])
        case "channel":
            units = np.asarray([_one_of(channel) for channel in np.moveaxis(mask, int(numbers), 0)])
    if sparsity is not None:
        assert units.sum() == kept_number(units.size, sparsity)


def _one_of(unit: np.ndarray) -> bool:
    assert unit.all() or not unit.any(), "a unit is kept in part"
    return bool(unit.all())


def check_zeros(params: Any, masks: list[np.ndarray | None]) -> None:
    """That parameters are exactly zero outside their masks."""
    for leaf, mask in zip(jax.tree.leaves(params), masks, strict=True):
        if mask is not None:
            np.testing.assert_array_equal(np.asarray(leaf, np.float64)[~mask], 0.0)


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        where = jax.tree_util.keystr(path)
        a, e = np.asarray(a), np.asarray(e)
        assert (a.dtype, a.shape) == (e.dtype, e.shape), where
        np.testing.assert_array_equal(a.view(np.uint8) if a.shape else a, e.view(np.uint8) if e.shape else e, where)


def signature(state: Any) -> Any:
    """Structure, shapes and dtypes."""
    return jax.tree.structure(state), [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(state)]


def masked(tree_: Any, masks: list[np.ndarray | None]) -> Any:
    """A tree with zeros outside masks, made with NumPy."""
    leaves, treedef = jax.tree.flatten(tree_)
    return treedef.unflatten(
        [
            leaf if mask is None else jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))
            for leaf, mask in zip(leaves, masks, strict=True)
        ]
    )
