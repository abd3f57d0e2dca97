"""`compact`: a function and its parameters without the units that are dead."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner import mask_storage, trees
from jaxpruner.compaction import axes, finding, liveness, sparse_kernels
from jaxpruner.compaction.cutting import front, matching, owner
from jaxpruner.compaction.evaluation import Evaluation
from jaxpruner.compaction.groups import Group, Groups
from jaxpruner.inspection import flops
from jaxpruner.training.projection import find_states


@dataclasses.dataclass(eq=False)
class Compact:
    """A function without its dead units; see :func:`compact`.

    Attributes:
      params: the remaining parameters, a tree like those of the whole function.
      kept: the remaining units, by group: sorted indices. `compact(..., keep=small.kept)` of the whole function
        makes the same small function again, for saved parameters.
      constant_units: how many units of each group stay only because their output is a constant, such as a bias behind a
        kernel of zeros.
    """

    params: Any
    kept: dict[str, np.ndarray]
    constant_units: dict[str, int]
    _fn: Callable[..., Any] = dataclasses.field(repr=False)
    _whole: Any = dataclasses.field(repr=False)  # the shapes of the parameters
    _example: tuple[Any, ...] = dataclasses.field(repr=False)
    _masks: dict[trees.KeyPath, tuple[np.ndarray | None, ...]] = dataclasses.field(repr=False)
    _groups: tuple[Group, ...] = dataclasses.field(repr=False)

    def fn(self, params: Any, *args: Any) -> Any:
        """The small function computes the results of the whole one from the small parameters.

        It takes arguments of any shapes that the whole function takes, and parameters of any dtypes. `jit`, `grad`,
        `vmap` and `jax.export` take it like any other function. The whole function is traced for the parameter shapes
        that it knows and the dtypes that are given, and evaluated with the small ones.

        Raises:
          ValueError: for parameters of other shapes than `self.params`.
        """
        self._check_params(params)
        leaves, treedef = jax.tree.flatten(args)
        leaves_of = functools.partial(jax.tree.leaves, is_leaf=sparse_kernels.is_sparse)
        given = [leaf for leaf in leaves_of(params) if trees.is_array(leaf)]
        evaluation, results = self._evaluation(treedef, *(tuple(map(_Type.of, each)) for each in (given, leaves)))
        return jax.tree.unflatten(results, evaluation([*given, *leaves]))

    def _of_dense(self, params: Any, *args: Any) -> Any:
        return dataclasses.replace(self, params=params).fn(params, *args)

    @functools.cached_property
    def _evaluations(self) -> dict[Any, tuple[Evaluation, Any]]:
        return {}

    def _evaluation(self, treedef: Any, params: tuple[_Type, ...], types: tuple[_Type, ...]) -> tuple[Evaluation, Any]:
        key = (treedef, params, types)
        if key not in self._evaluations:
            shapes, _, joined = trees.parted(self._whole)
            whole = joined([dataclasses.replace(p, shape=w.shape).spec for p, w in zip(params, shapes, strict=True)])
            traced = finding.trace(self._fn, whole, *treedef.unflatten([each.spec for each in types]))
            self._evaluations[key] = Evaluation(traced.found, self._units_in(traced.found)), traced.results
        return self._evaluations[key]

    def _units_in(self, found: finding.Found) -> dict[str, np.ndarray]:
        """The units that are kept, by the groups of the function as it was read for other arguments."""
        kept: dict[str, np.ndarray] = {}
        along = {path: found.axes_of(dims) for path, dims in found.parameters}
        for path, masks in self._masks.items():
            for made, mask in zip(along[path], masks, strict=True):
                for name, part in axes.collect(made, np.ones(made.size, bool) if mask is None else mask, np.any):
                    kept[name] = kept.get(name, False) | part
        for path, masks in self._masks.items():
            for axis, (made, mask) in enumerate(zip(along[path], masks, strict=True)):
                if not np.array_equal(axes.spread(made, kept), np.ones(made.size, bool) if mask is None else mask):
                    raise ValueError(
                        f"{trees.leaf_name(path)}[{axis}]: for arguments of these shapes the function cannot do "
                        "without units that were removed for the example; give the example that it is called with."
                    )
        return kept

    def cut(self, tree: Any) -> Any:
        """Cuts any tree that belongs to the parameters, such as an optimizer state, to the remaining units.

        A leaf belongs to the parameter whose path its own path ends with. If statistics lack one axis (factored second
        moments of Adafactor), their other axes are cut. Masks of a sparse state are cut as they are stored.

        Args:
          tree: a tree for the whole parameters.

        Raises:
          ValueError: if the shape of a leaf does not determine its axes of the parameter, or if the tree may belong to
            several parts of the parameters.
        """
        states = find_states(tree)
        shapes = {path: jnp.shape(leaf) for path, leaf in trees.named_leaves(self._whole) if path in self._masks}
        named = [path for path, leaf in trees.named_leaves(tree) if np.ndim(leaf)]
        at = front(named, shapes)
        stored = {id(mask) for state in states for mask in jax.tree.leaves(state.masks)}

        def cut(path, leaf):
            mine = None if trees.is_unpruned(leaf) else owner(path, at, shapes)
            if mine is None or not np.ndim(leaf):
                return leaf
            shape = shapes[mine]
            if id(leaf) in stored and leaf.dtype == jnp.uint8:
                storage = mask_storage.storage_of(leaf, shape)
                return storage.encode(self._cut(storage.decode(leaf, shape), self._masks[mine]))
            return self._cut(leaf, matching(leaf, shape, self._masks[mine], path))

        return trees.map_named(cut, tree)

    def _cut(self, array: Any, masks: Sequence[np.ndarray | None]) -> Any:
        for axis, mask in enumerate(masks):
            if mask is not None:
                array = array.take(np.flatnonzero(mask), axis)
        return array

    @property
    def sizes(self) -> dict[str, int]:
        """How many units of each group are left. Use it to configure a smaller module."""
        return {name: len(units) for name, units in self.kept.items()}

    def report(self) -> Report:
        """What was removed, before and after; `print(small.report())` shows it."""
        # As it was read, without equations that nothing needs, which the small function lacks too.
        nothing_cut: Any = {path: (None,) * len(masks) for path, masks in self._masks.items()}
        all_units = dataclasses.replace(self, _masks=nothing_cut)
        whole = flops.summarize_flops(all_units._of_dense, self._whole, *self._example)
        dense = jax.tree.map(
            lambda leaf: leaf.todense() if sparse_kernels.is_sparse(leaf) else leaf,
            self.params,
            is_leaf=sparse_kernels.is_sparse,
        )
        small = flops.summarize_flops(self._of_dense, dense, *self._example)
        arrays = [leaf for leaf in jax.tree.leaves(self._whole) if trees.is_array(leaf)]
        nodes = jax.tree.leaves(self.params, is_leaf=sparse_kernels.is_sparse)
        paths = trees.key_paths(self.params, sparse_kernels.is_sparse)
        is_kept = {trees.leaf_name(p): k for p, k in zip(paths, nodes, strict=True) if sparse_kernels.is_sparse(k)}
        return Report(
            params=(_entries(arrays), _entries([getattr(k, "matrix", k) for k in nodes])),
            bytes=(_bytes(arrays), _bytes(jax.tree.leaves(self.params))),
            flops=(whole["_inference_flops"], small["_inference_flops"]),
            units={group.name: (group.size, len(self.kept[group.name])) for group in self._groups},
            constant_units=self.constant_units,
            sparse={name: 1 - kernel.matrix.nse / math.prod(kernel.shape) for name, kernel in is_kept.items()},
        )

    def _check_params(self, params: Any) -> None:
        expected, given = trees.named_leaves(self.params), trees.named_leaves(params)
        if [path for path, _ in expected] != [path for path, _ in given]:
            raise ValueError(
                f"params: a tree of {len(given)} leaves, and the small function takes the {len(expected)} of "
                "small.params; give these, or what was trained from them."
            )
        for (path, mine), (_, leaf) in zip(expected, given, strict=True):
            if isinstance(mine, numbers.Number) and (trees.is_array(leaf) or leaf != mine):
                raise ValueError(
                    f"params: {trees.leaf_name(path)} is a number of the function, {mine}, which stays as it is; make "
                    "it an array before compact()."
                )
            if trees.is_array(mine) and jnp.shape(leaf) != jnp.shape(mine):
                raise ValueError(
                    f"params: {trees.leaf_name(path)} has shape {jnp.shape(leaf)}, and the small function takes "
                    f"{jnp.shape(mine)}; give small.params, or what was trained from them."
                )


@dataclasses.dataclass(frozen=True)
class Report:
    """What a function lost, each as (before, after).

    Attributes:
      params: parameters.
      bytes: their bytes.
      flops: FLOPs of the example's products.
      units: the units of each group.
      constant_units: see :class:`Compact`.
      sparse: the parameters that are kept as sparse matrices, and their sparsity.
    """

    params: tuple[int, int]
    bytes: tuple[int, int]
    flops: tuple[float, float]
    units: dict[str, tuple[int, int]]
    constant_units: dict[str, int]
    sparse: dict[str, float]

    def __str__(self) -> str:
        numbers = [sum(each) for each in zip(*self.units.values(), strict=True)] or [0, 0]
        rows = [
            ("parameters", *self.params),
            ("bytes", *self.bytes),
            ("FLOPs", *map(int, self.flops)),
            ("units", *numbers),
        ]
        lines = [f"{'':<52} {'before':>16} {'after':>16} {'ratio':>7}"]
        for name, before, after in itertools.chain(rows, ((n, *pair) for n, pair in self.units.items())):
            lines.append(f"{name[-52:]:<52} {before:>16,} {after:>16,} {after / max(before, 1):>7.3f}")
        if all(before == after for before, after in self.units.values()):
            lines.append("Nothing was removed: no unit is dead.")
        for name, number in self.constant_units.items():
            lines.append(f"{name}: {number} of its units give a constant and stay (a bias, say, behind zeros).")
        lines += [f"{name}: kept as a sparse matrix, {zeros:.1%} zeros" for name, zeros in self.sparse.items()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Type:
    """The shape and dtype of a parameter or argument."""

    shape: tuple[int, ...]
    dtype: Any
    weak_type: bool

    @classmethod
    def of(cls, value: Any) -> _Type:
        dtype = value.dtype if hasattr(value, "dtype") else jax.dtypes.result_type(value)
        weak = getattr(getattr(value, "aval", value), "weak_type", not hasattr(value, "dtype"))
        return cls(tuple(np.shape(value)), dtype, bool(weak))

    @property
    def spec(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype, weak_type=self.weak_type)


def compact(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    keep: Mapping[str, Any] | None = None,
    sparse_above: float | None = None,
    check: bool = True,
) -> Compact:
    """Removes the units that are dead from a function and its parameters.

    A unit is dead if all weights that read it are zero, or if all weights into it are zero and its output is zero. Dead
    units are found in networks that were pruned in any way, by `sparsity_type=groups` or weight by weight. The result
    computes the same as `fn`, with smaller products and without masks. User-defined derivatives (`jax.custom_vjp`) are
    kept, but only what the function computes decides whether a unit is dead.

    Args:
      fn: the forward pass, of any framework.
      params: its parameters, as for :func:`find_groups`: arrays, or with `keep` also their shapes.
      *args: an example of the other arguments.
      keep: the units to keep instead of those that are not dead, by the name of their group, as indices or as a boolean
        vector. Groups that are not named stay whole.
      sparse_above: after dead units are removed, parameters that are sparser than this and are multiplied with directly
        become sparse matrices (`jax.experimental.sparse.BCSR`), which the report names. On a CPU this is faster from
        90 % zeros on, for batches of 16 and more.
      check: whether both functions are run on the example and compared.

    Returns:
      The small function `fn`, its `params`, `cut` for optimizer states, `report`.

    Raises:
      ValueError: if the function multiplies with none of the parameters, if `keep` names groups that are frozen (with
        the reason) or do not exist, for `sparse_above` on an accelerator, and if the results differ beyond rounding.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxpruner
      >>> params = {"up": jnp.ones((4, 32)).at[:, 8:].set(0), "down": jnp.ones((32, 3))}
      >>> small = jaxpruner.compact(lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"], params, jnp.ones((1, 4)))
      >>> small.params["up"].shape, small.sizes
      ((4, 8), {'up[1]': 8})
      >>> small.fn(small.params, jnp.ones((2, 4))).shape
      (2, 3)
    """
    traced = finding.trace(fn, params, *args)
    found = traced.found
    leaves = [leaf for leaf in jax.tree.leaves(params) if trees.is_array(leaf)]
    is_known = not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    if keep is None and not is_known:
        raise ValueError("params: shapes tell nothing of zeros; give arrays, or the units to keep (keep=).")
    units = liveness.needed_units(found, leaves) if keep is None else _given(found.groups, keep)
    evaluation = Evaluation(found, units)
    along = found.parameters
    masks = {path: tuple(evaluation.mask(dim) for dim in dims) for path, dims in along}

    def cut(path, leaf):
        if path not in masks or not trees.is_array(leaf):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(evaluation.shape(dict(along)[path]), leaf.dtype)
        return evaluation.cut(jnp.asarray(leaf), dict(along)[path])

    small_params = trees.map_named(cut, params)
    if sparse_above is not None:
        small_params = _with_sparse(small_params, found, sparse_above)
    small = Compact(
        params=small_params,
        kept={name: np.flatnonzero(mask) for name, mask in units.items()},
        constant_units=liveness.constant_units(found, leaves, units) if keep is None else {},
        _fn=fn,
        _whole=finding.shapes_of(params),
        _example=args,
        _masks=masks,
        _groups=found.groups.removable,
    )
    is_example = not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(args))
    if check and is_known and is_example:
        # Units that were found dead are still there; otherwise a wrong finding would be on both sides.
        chosen = {} if keep is None else units
        masked = iter(
            liveness.kept_entries(leaf, found.axes_of(dims), chosen)
            for leaf, (_, dims) in zip(leaves, along, strict=True)
        )
        whole = jax.tree.map(lambda leaf: next(masked) if trees.is_array(leaf) else leaf, params)
        _check(small, fn, whole, args)
    return small


def _with_sparse(params: Any, found: finding.Found, above: float) -> Any:
    """The parameters with those that are sparser than that, and only multiplied with, as sparse matrices."""
    if jax.default_backend() != "cpu":
        raise ValueError(
            f"sparse_above: products of sparse matrices are slow on {jax.default_backend()}, where XLA has no kernel "
            "of its own for them; leave it out there, and prune whole units (sparsity_type=groups)."
        )
    paths = [path for path, _ in found.parameters]
    products = sparse_kernels.multiplied(found.reading, found.reading.jaxpr.invars[: len(paths)])

    def make(path, leaf):
        axes_ = products.get(paths.index(path)) if path in paths else None
        if axes_ is None or isinstance(leaf, jax.ShapeDtypeStruct) or np.mean(np.asarray(leaf) == 0) <= above:
            return leaf
        return sparse_kernels.SparseKernel.of(leaf, axes_)

    return trees.map_named(make, params)


def _given(known: Groups, keep: Mapping[str, Any]) -> dict[str, np.ndarray]:
    units = {group.name: np.ones(group.size, bool) for group in known.removable}
    reasons = {group.name: group.reasons for group in known.frozen}
    for name, chosen in keep.items():
        chosen = np.asarray(chosen)
        if name in reasons and chosen.size:
            raise ValueError(f"keep: {name} cannot lose units, since it {reasons[name][0]}.")
        if name not in units:
            raise ValueError(f"keep: no group is called {name!r}; there are {', '.join(list(units)[:8])}.")
        size = units[name].size
        if chosen.dtype == bool and chosen.shape != (size,):
            raise ValueError(f"keep: {name} has {size} units, and the mask has shape {chosen.shape}.")
        indices = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        if not indices.size or indices.min() < 0 or indices.max() >= size:
            raise ValueError(f"keep: {name} has units 0 to {size - 1}; give one of them at least, and no others.")
        units[name] = np.isin(np.arange(size), indices)
    return units


def _check(small: Compact, fn: Callable[..., Any], params: Any, args: Sequence[Any]) -> None:
    def results(fn: Callable[..., Any], params: Any) -> list[tuple[Any, Any]]:
        arrays, _, joined = trees.parted(params)
        return trees.named_leaves(jax.jit(lambda arrays, args: fn(joined(arrays), *args))(arrays, tuple(args)))

    expected, got = results(fn, params), results(small.fn, small.params)
    # Sums of other lengths round otherwise.
    arrays = trees.parted(params).leaves
    widths = [jnp.finfo(leaf.dtype).eps for leaf in arrays if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    for (path, a), (_, b) in zip(expected, got, strict=True):
        if not trees.is_number(a):
            continue
        a, b = np.asarray(a), np.asarray(b)
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            difference, bound = float(np.sum(a != b)), 0.0
        else:
            a, b = a.astype(np.complex128), b.astype(np.complex128)
            finite = np.isfinite(a)
            difference = float(np.max(np.abs(a - b)[finite], initial=0.0))
            bound = float(np.sqrt(max([*widths, jnp.finfo(jnp.float32).eps])) * np.max(np.abs(a[finite]), initial=0.0))
            difference = np.inf if not np.array_equal(finite, np.isfinite(b)) else difference
        if difference > bound:
            raise ValueError(
                f"compact: the small function differs by {difference:g} in {trees.leaf_name(path)} of what the "
                f"function returns, beyond rounding ({bound:g}). Where it draws random numbers, they are others for "
                "other sizes: give check=False. Else please report it, with the function."
            )


def _entries(leaves: Sequence[Any]) -> int:
    return sum(getattr(leaf, "nse", math.prod(np.shape(leaf))) for leaf in leaves if hasattr(leaf, "shape"))


def _bytes(leaves: Sequence[Any]) -> int:
    return sum(math.prod(np.shape(leaf)) * leaf.dtype.itemsize for leaf in leaves if trees.is_array(leaf))
