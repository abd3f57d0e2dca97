"""Distributions: how much of each parameter is pruned, from shapes alone (host NumPy)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxpruner import trees

FilterFn = Callable[[trees.KeyPath, Any], bool]
SparsityMap = Mapping[Any, float]


@dataclasses.dataclass(frozen=True)
class Layers:
    """A stack of layers as filters and distributions see it: one layer's shape, and the number of layers."""

    shape: tuple[int, ...]
    dtype: Any
    number: int

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def NOT_DIM_ONE_FILTER_FN(path: trees.KeyPath, param: Any) -> bool:  # noqa: N802 (a name scripts know)
    """Selects parameters with two or more axes: kernels and embeddings, not biases and scales."""
    del path
    return np.ndim(param) > 1


def KERNEL_FILTER_FN(path: trees.KeyPath, param: Any) -> bool:  # noqa: N802 (a name scripts know)
    """Selects parameters whose last key is `kernel`."""
    del param
    return bool(path) and path[-1] == "kernel"


def uniform(
    params: Any,
    sparsity: float,
    filter_fn: FilterFn = NOT_DIM_ONE_FILTER_FN,
    custom_sparsity_map: SparsityMap | None = None,
) -> Any:
    """The same sparsity for every selected parameter.

    Args:
      params: any pytree of arrays (or of shapes that have `.ndim`).
      sparsity: fraction of zeros, in [0, 1).
      filter_fn: `filter_fn(path, param)`, path a tuple of strings, selects the parameters to prune.
      custom_sparsity_map: path (a tuple of strings) or slash pattern -> sparsity of its own.

    Returns:
      A tree like `params` with a sparsity for each selected parameter and None elsewhere.

    Raises:
      ValueError: if a sparsity is outside [0, 1), or a key of the map names no selected parameter.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"up": jnp.ones((8, 4)), "down": jnp.ones((4, 2)), "bias": jnp.ones(2)}
      >>> uniform(params, 0.8, custom_sparsity_map={"down": 0.5})
      {'bias': None, 'down': 0.5, 'up': 0.8}
    """
    check_sparsity("Default sparsity", sparsity)
    selected = dict(_selected_leaves(params, filter_fn))
    custom = _custom_sparsities(custom_sparsity_map, list(selected))
    return trees.map_named(lambda path, _: custom.get(path, sparsity) if path in selected else None, params)


def erk(
    param_tree: Any,
    sparsity: float,
    filter_fn: FilterFn = NOT_DIM_ONE_FILTER_FN,
    custom_sparsity_map: SparsityMap | None = None,
) -> Any:
    """Erdős-Rényi-kernel sparsities (Mocanu et al., 2018; Evci et al., 2020).

    As `uniform`, with the budget spread by `get_sparsities_erdos_renyi`: small layers stay denser.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"large": jnp.ones((64, 64)), "small": jnp.ones((16, 16))}
      >>> {name: round(sparsity, 3) for name, sparsity in erk(params, 0.8).items()}
      {'large': 0.83, 'small': 0.319}
    """
    check_sparsity("Default sparsity", sparsity)
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(param_tree)):
        raise ValueError(
            "Single parameter is provided. Please provide a paramater tree. ERK spreads a budget over several "
            "layers; for one use the uniform distribution."
        )
    selected = _selected_leaves(param_tree, filter_fn)
    shapes = {path: tuple(np.shape(param)) for path, param in selected}
    custom = _custom_sparsities(custom_sparsity_map, list(shapes))
    layers = {path: param.number for path, param in selected if isinstance(param, Layers)}
    sparsities = _spread(shapes, sparsity, custom, layers, lambda shape: _erk_ratio(shape, True)) if shapes else {}
    return trees.map_named(lambda path, _: sparsities.get(path), param_tree)


def get_sparsities_erdos_renyi(
    var_shape_dict: Mapping[trees.KeyPath, tuple[int, ...]],
    default_sparsity: float,
    custom_sparsity_map: SparsityMap | None = None,
    include_kernel: bool = True,
    erk_power_scale: float = 1.0,
) -> dict[trees.KeyPath, float]:
    r"""Sparsity of each shape so that the whole meets the default sparsity.

    The density of a leaf is :math:`\epsilon \, r` with :math:`r = (\sum_i d_i / \prod_i d_i)^{scale}`
    over all its axes, or over the last two with `include_kernel=False`. :math:`\epsilon` solves

    .. math:: \epsilon \sum_l r_l n_l = \sum_l (n_l - \lfloor s \, n_l \rfloor)

    If :math:`\epsilon r` exceeds 1, the leaf stays dense. Then :math:`\epsilon` is solved again over
    the others, which take over its zeros.

    Args:
      var_shape_dict: path -> shape.
      default_sparsity: s, the fraction of zeros over all leaves outside the custom map.
      custom_sparsity_map: path or slash pattern -> sparsity that is kept outside the budget; a key that names no shape
        is ignored.
      include_kernel: whether the spatial axes of convolutions count.
      erk_power_scale: the exponent `scale`; 0 is uniform.

    Returns:
      path -> sparsity in [0, 1).

    Raises:
      ValueError: if there are no shapes, or a sparsity is outside [0, 1).

    Examples:
      >>> sparsities = get_sparsities_erdos_renyi({("large",): (64, 64), ("small",): (16, 16)}, 0.8)
      >>> {path: round(sparsity, 3) for path, sparsity in sparsities.items()}
      {('large',): 0.83, ('small',): 0.319}
    """
    check_sparsity("Default sparsity", default_sparsity)
    if not var_shape_dict:
        raise ValueError("var_shape_dict: is empty, there is nothing to spread a budget over; give path -> shape.")
    shapes = {key: tuple(int(d) for d in shape) for key, shape in var_shape_dict.items()}
    named = {
        pattern: value
        for pattern, value in trees.pattern_pairs(custom_sparsity_map, "custom_sparsity_map")
        if any(trees.matches(pattern, path) for path in shapes)
    }
    custom = _custom_sparsities(named, list(shapes))
    return _spread(
        shapes, default_sparsity, custom, {}, lambda shape: _erk_ratio(shape, include_kernel) ** erk_power_scale
    )


def _spread(
    shapes: Mapping[trees.KeyPath, tuple[int, ...]],
    default_sparsity: float,
    custom: Mapping[trees.KeyPath, float],
    layers: Mapping[trees.KeyPath, int],
    ratio_of: Callable[[tuple[int, ...]], float],
) -> dict[trees.KeyPath, float]:
    """The sparsity of each shape; `layers` tells how many layers of that shape a stack has."""
    budgeted = [key for key in shapes if key not in custom and math.prod(shapes[key]) > 0]
    times = {key: layers.get(key, 1) for key in budgeted}
    sizes = {key: math.prod(shapes[key]) * times[key] for key in budgeted}
    # Floored layer by layer, so that the budget is one of whole entries.
    zeros = {key: math.floor(default_sparsity * math.prod(shapes[key])) * times[key] for key in budgeted}
    ratio = {key: ratio_of(shapes[key]) for key in budgeted}

    dense: set[trees.KeyPath] = set()
    epsilon = 0.0
    while len(dense) < len(budgeted):
        sparse = [key for key in budgeted if key not in dense]
        budget = sum(sizes[key] - zeros[key] for key in sparse) - sum(zeros[key] for key in dense)
        epsilon = budget / sum(ratio[key] * sizes[key] for key in sparse)
        widest = max(ratio[key] for key in sparse)
        if epsilon * widest <= 1.0:
            break
        dense |= {key for key in sparse if ratio[key] == widest}

    sparsities = dict.fromkeys(shapes, 0.0) | dict(custom)
    sparsities |= {key: 1.0 - epsilon * ratio[key] for key in budgeted if key not in dense}
    return sparsities


def _erk_ratio(shape: tuple[int, ...], include_kernel: bool) -> float:
    axes = shape if include_kernel else shape[-2:]
    return sum(axes) / math.prod(axes) if axes else 1.0


def check_sparsity(what: str, sparsity: float) -> None:
    """Raises a ValueError unless `sparsity` is a fraction in [0, 1)."""
    if not hasattr(sparsity, "__float__") or not 0 <= sparsity < 1:
        raise ValueError(
            f"{what} {sparsity!r} is outside [0, 1): it is the fraction of weights that are zero, so 0.8 prunes 80 %."
        )


def _custom_sparsities(custom_sparsity_map: Any, paths: Any) -> dict[trees.KeyPath, float]:
    custom = trees.resolve(custom_sparsity_map, paths, "custom_sparsity_map")
    for path, sparsity in custom.items():
        check_sparsity(f"custom_sparsity_map: {trees.leaf_name(path)}: sparsity", sparsity)
    return custom


def _selected_leaves(params: Any, filter_fn: FilterFn) -> list[tuple[trees.KeyPath, Any]]:
    """What a filter takes of the leaves that can be pruned: those of floating numbers."""
    return [
        (path, param)
        for path, param in trees.named_leaves(params)
        if (trees.is_floating(param) or not hasattr(param, "dtype")) and filter_fn(path, param)
    ]
