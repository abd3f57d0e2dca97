"""The shardings of an optimizer's state when the parameters are spread over many devices."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxpruner import mask_storage, trees
from jaxpruner.training.optimizer_state import owner_of


def state_shardings(tx: optax.GradientTransformation, params: Any, shardings: Any = None) -> Any:
    """The shardings of `tx.init(params)`: what belongs to a parameter lies where the parameter does.

    Statistics, masks and hidden weights with a parameter's shape take its sharding. A packed mask takes its
    `PartitionSpec`, but the packed axis is whole if its number of bytes is not divisible by the devices
    along it. Everything else (counts, target sparsities, factored statistics) is on every device.
    Nothing is run. `tx` may be any optax transformation, sparse or not, however it is wrapped.

    Args:
      tx: the transformation.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.
      shardings: a tree of `NamedSharding` like `params`, all on one mesh. None takes the shardings of the
        parameters.

    Returns:
      A tree like `tx.init(params)` with a `NamedSharding` for each array. Use it as `out_shardings` of a
      jitted `init` or train step, and to restore a checkpoint.

    Raises:
      ValueError: if a parameter has no `NamedSharding`, or if there are several meshes.

    Examples:
      >>> import jax, jax.numpy as jnp, numpy as np, optax, jaxpruner
      >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec
      >>> mesh = Mesh(np.asarray(jax.devices()), ("model",))
      >>> columns = NamedSharding(mesh, PartitionSpec(None, "model"))
      >>> params = {"kernel": jax.device_put(jnp.ones((16, 64)), columns)}
      >>> tx = jaxpruner.sparsify(optax.adam(1e-3), algorithm="static_sparse", sparsity=0.5)
      >>> shardings = jaxpruner.state_shardings(tx, params)
      >>> shardings.masks["kernel"] == shardings.inner_state[0].mu["kernel"] == columns
      True
      >>> shardings.count.is_fully_replicated
      True
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
    """
    params = trees.numbers_only(params)
    placed = _placed(params, shardings)
    # Without shardings of their own: `init` is traced for its shapes, on no mesh.
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params)
    state = jax.eval_shape(tx.init, shapes)
    if not placed:
        raise ValueError("params: holds no arrays, so nothing tells the mesh; give the parameters that tx trains.")
    whole = NamedSharding(_one_mesh(placed), PartitionSpec())

    def place(path, leaf):
        owner = None if trees.is_unpruned(leaf) else owner_of(path, placed)
        if owner is None:
            return leaf if trees.is_unpruned(leaf) else whole
        shape, sharding = placed[owner]
        if leaf.shape == shape:
            return sharding
        if leaf.dtype == jnp.uint8 and leaf.shape == mask_storage.packed_shape(shape):
            return _of_packed(shape, sharding)
        return whole

    return trees.map_named(place, state)


def _placed(params: Any, shardings: Any) -> dict[trees.KeyPath, tuple[tuple[int, ...], NamedSharding]]:
    """The shape and the sharding of each parameter."""
    given = dict(trees.named_leaves(shardings))
    what = "params" if shardings is None else "shardings"
    placed = {}
    for path, param in trees.named_leaves(params):
        sharding = getattr(param, "sharding", None) if shardings is None else given.get(path)
        if not isinstance(sharding, NamedSharding):
            has = "nothing" if sharding is None else f"a {type(sharding).__name__}"
            raise ValueError(
                f"{what}: {trees.leaf_name(path)} has {has} where a NamedSharding is needed; place the parameters on "
                "a mesh with jax.device_put(params, shardings), or give such a tree of shardings as `shardings`."
            )
        placed[path] = (jnp.shape(param), sharding)
    return placed


def _one_mesh(placed: dict[trees.KeyPath, tuple[tuple[int, ...], NamedSharding]]) -> Any:
    (first, (_, sharding)), *others = placed.items()
    for path, (_, other) in others:
        if other.mesh != sharding.mesh:
            raise ValueError(
                f"shardings: {trees.leaf_name(first)} lies on {sharding.mesh} and {trees.leaf_name(path)} on "
                f"{other.mesh}; one step runs on one mesh, place all parameters on the same."
            )
    return sharding.mesh


def _of_packed(shape: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    """The sharding of the packed mask of a parameter of this shape and sharding."""
    packed = mask_storage.packed_shape(shape)
    spec = [*sharding.spec, *[None] * (len(packed) - len(sharding.spec))]
    if shape:
        axis = mask_storage.packed_axis(shape)
        names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
        if packed[axis] % math.prod(sharding.mesh.shape[name] for name in names if name is not None):
            spec[axis] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)
