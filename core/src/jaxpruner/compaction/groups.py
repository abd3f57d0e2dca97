"""Groups: units of several parameters that must be removed together, and a mask structure that prunes them whole."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner import coupled_structures, trees
from jaxpruner.compaction import axes
from jaxpruner.compaction.axes import Axis
from jaxpruner.selection.score_reading import as_array

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class Place:
    """Where units of a group are in a parameter: some or all entries of one axis."""

    path: trees.KeyPath
    axis: int

    def __str__(self) -> str:
        return f"{trees.leaf_name(self.path)}[{self.axis}]"


@dataclasses.dataclass(frozen=True)
class Group:
    """Units that can be removed one by one, each from all its places at once.

    Attributes:
      name: the first place whose layer produces the units, `mlp/wi/kernel[1]`; a factor of a flattened axis has its
        number after the axis, `query/kernel[1.0]`.
      size: the number of units.
      places: where they are.
      owner: the parameter whose sparsity is that of the group.
      params: the number of parameters of one unit.
      flops: the FLOPs of one unit, for the example.
      reasons: why it must stay whole; none if it is removable.
    """

    name: str
    size: int
    places: tuple[Place, ...]
    owner: trees.KeyPath
    params: int
    flops: int
    reasons: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, repr=False)
class Groups(coupled_structures.Coupled):
    """The groups from :func:`find_groups`: a structure for `sparsity_type`, which also tells `compact` what to remove.

    Masks keep whole units: a unit's score is the sum of the scores of all its entries. Each group keeps
    `max(1, round_half_even(n * (1 - sparsity)))` of its n units. Global algorithms rank the units of all groups
    together, with the scores of a group divided by their norm, and keep at least one of each group.

    Attributes:
      removable: the groups that can lose units.
      frozen: those that cannot, with the reasons.
      multiple_of: the number of remaining units is rounded up to a multiple of this, for hardware that needs it.
      budget: what `sparsity` is a share of, for global algorithms: `units` or `flops`. With `flops`, units compete by
        score per FLOP, and pruning continues until the FLOPs of the products meet the budget.
      chosen: the names of the groups that are pruned; None stands for all.
    """

    removable: tuple[Group, ...]
    frozen: tuple[Group, ...]
    axes: tuple[tuple[trees.KeyPath, tuple[Axis, ...]], ...] = dataclasses.field(repr=False)
    products: tuple[tuple[Axis, ...], ...] = dataclasses.field(repr=False)
    multiple_of: int = 1
    budget: Literal["units", "flops"] = "units"
    chosen: tuple[str, ...] | None = None

    def choose(self, *patterns: str, multiple_of: int = 1, budget: Literal["units", "flops"] = "units") -> Groups:
        """The same groups, but only some of them are pruned.

        Args:
          *patterns: shell patterns over names, such as `*/mlp/*`; all groups if none is given.
          multiple_of: see the class.
          budget: see the class.

        Raises:
          ValueError: for a pattern that names no group, or only groups that cannot be removed, with the reason.
        """
        if multiple_of < 1:
            raise ValueError(f"multiple_of: {multiple_of} is not 1 or more.")
        if budget not in ("units", "flops"):
            raise ValueError(f"budget: {budget!r} is not known; give 'units' or 'flops'.")
        chosen = [group.name for pattern in patterns for group in self._named(pattern)]
        return dataclasses.replace(
            self,
            multiple_of=multiple_of,
            budget=budget,
            chosen=tuple(dict.fromkeys(chosen)) if patterns else None,
        )

    @property
    def pruned(self) -> tuple[Group, ...]:
        """The groups that masks remove units of."""
        return tuple(group for group in self.removable if self.chosen is None or group.name in self.chosen)

    def _named(self, pattern: str) -> list[Group]:
        def matching(groups):
            return [group for group in groups if _matches(pattern, group.name)]

        if not (found := matching(self.removable)):
            if frozen := matching(self.frozen):
                raise ValueError(
                    f"{pattern!r}: {frozen[0].name} ({frozen[0].size}) cannot lose units, since it "
                    f"{frozen[0].reasons[0]}; print(groups) shows what can."
                )
            raise ValueError(
                f"{pattern!r}: names no group; there are {', '.join(group.name for group in self.removable[:8])}."
            )
        return found

    def __repr__(self) -> str:
        options = f", multiple_of={self.multiple_of}, budget={self.budget!r}, chosen={self.chosen}"
        return f"Groups({len(self.removable)} removable, {len(self.frozen)} frozen{options})"

    def __str__(self) -> str:
        lines = [f"{'removable':<48} {'units':>7} {'params/unit':>12} {'FLOPs/unit':>12} {'places':>7}"]
        for group in self.removable:
            numbers = f"{group.size:>7,} {group.params:>12,} {group.flops:>12,} {len(group.places):>7}"
            lines.append(f"{_short(group.name):<48} {numbers}")
        if self.frozen:
            lines += ["", f"{'stays':<48} {'size':>7}  reason"]
            lines += [f"{_short(group.name):<48} {group.size:>7,}  {'; '.join(group.reasons)}" for group in self.frozen]
        return "\n".join(lines)

    # The structure of masks.

    def reach(self, targets: Any, params: Any) -> Any:
        axes_of = self._axes_in(params)
        asked = dict(trees.named_leaves(targets))
        pruned = {group.name: asked[group.owner] for group in self._pruned_in(axes_of) if group.owner in asked}
        if self.pruned and not pruned:
            raise ValueError(
                f"sparsity_type: filter_fn selects none of the {len(self.pruned)} parameters that the groups are named "
                f"after ({trees.leaf_name(self.pruned[0].owner)}, ...); choose a filter_fn that takes some."
            )
        if not pruned:
            raise ValueError(
                "sparsity_type: the groups have nothing that can be removed; print(groups) shows the reasons."
            )
        owned = {group.name: group.owner for group in self._pruned_in(axes_of)}

        def target(path, _):
            here = [name for axis in axes_of.get(path, ()) for name in sorted(axes.groups_of(axis)) if name in pruned]
            own = [name for name in here if owned[name] == path]
            return pruned[(own or here)[0]] if here else None

        reached = trees.map_named(target, params)
        if self.budget == "flops":
            self._check_budget(max(float(share) for share in pruned.values()))
        return reached

    def units_of(self, path: trees.KeyPath) -> int:
        owned = [group.size for group in self.removable if _ends(group.owner, path)]
        return owned[0] if owned else 1

    def masks(
        self,
        scores: Any,
        sparsities: Any,
        updater: Any,
        is_scored: Callable[[trees.KeyPath, int], bool] = lambda *_: True,
    ) -> Any:
        """See the base class; `is_scored` says along which axes of a leaf scores are those of units."""
        axes_of = self._axes_in(scores)
        asked = dict(trees.named_leaves(sparsities))
        # Leaves that other groups reach have a sparsity, and units of their own that nobody chose.
        chosen = _chosen(updater, scores) & asked.keys()
        pruned = {group.name: group for group in self._pruned_in(axes_of) if group.owner in chosen}
        units = self._pool(scores, axes_of, pruned, is_scored)
        shares = {name: asked[group.owner] for name, group in pruned.items()}
        if self.budget == "flops":
            kept = self._within_budget(units, pruned, next(iter(shares.values())))
        else:
            kept = updater.create_masks(units, shares)
        kept = {name: self._rounded(mask, units[name]) for name, mask in kept.items()}

        def expand(path, score):
            if path not in asked:
                return None
            mask = jnp.ones((), bool)
            for axis, along in enumerate(axes_of[path]):
                if not axes.groups_of(along).isdisjoint(kept):
                    others = [other for other in range(score.ndim) if other != axis]
                    mask = mask & jnp.expand_dims(axes.spread(along, kept, jnp), others)
            return jnp.broadcast_to(mask, score.shape)

        return trees.map_named(lambda path, score: None if trees.is_unpruned(score) else expand(path, score), scores)

    def share_pruned(self, masks: Any, targets: Any) -> Any:
        axes_of = self._axes_in(masks)
        pruned = {group.name: group for group in self._pruned_in(axes_of) if group.owner in targets}
        kept = {name: np.ones(group.size, bool) for name, group in pruned.items()}
        for path, mask in trees.named_leaves(masks):
            for axis, along in enumerate(axes_of[path]):
                others = tuple(other for other in range(np.ndim(mask)) if other != axis)
                for name, alive in axes.collect(along, np.asarray(mask).any(others), np.any):
                    if name in kept:
                        kept[name] = kept[name] & alive
        counts = {name: int(units.sum()) for name, units in kept.items()}
        total = sum(group.size for group in pruned.values())
        slack = self.multiple_of * len(pruned) / total
        if self.budget == "flops":
            return max(map(float, targets.values())), 1 - self.flops(counts) / self.flops({}), 1e-3
        asked = sum(float(targets[group.owner]) * group.size for group in pruned.values())
        return asked / total, 1 - sum(counts.values()) / total, slack

    def _pool(
        self,
        scores: Any,
        axes_of: Mapping[trees.KeyPath, tuple[Axis, ...]],
        pruned: Mapping[str, Group],
        is_scored: Callable[[trees.KeyPath, int], bool],
    ) -> dict[str, Float[Array, " units"]]:
        units = {name: jnp.zeros(group.size) for name, group in pruned.items()}
        scored = set()
        for path, score in trees.named_leaves(scores):
            wide = None
            for axis, along in enumerate(axes_of.get(path, ())):
                if axes.groups_of(along).isdisjoint(pruned) or not is_scored(path, axis):
                    continue
                if wide is None:
                    wide = as_array(score)
                    wide = wide.astype(jnp.promote_types(wide.dtype, jnp.float32))
                others = tuple(other for other in range(wide.ndim) if other != axis)
                for name, vector in axes.collect(along, wide.sum(others), jnp.sum):
                    if name in units:
                        units[name] = units[name] + vector
                        scored.add(name)
        if unscored := [name for name in units if name not in scored]:
            raise ValueError(
                f"{unscored[0]}: nothing scores its units, since no product that calibration follows reads them; leave "
                "it whole by groups.choose(...)."
            )
        return units

    def _rounded(self, mask: Bool[Array, " units"], scores: Float[Array, " units"]) -> Bool[Array, " units"]:
        # A group never loses its last unit.
        mask = jnp.where(mask.any(), mask, jnp.arange(mask.size) == jnp.argmax(scores))
        if self.multiple_of == 1:
            return mask
        wanted = jnp.minimum(-(-mask.sum(dtype=jnp.int32) // self.multiple_of) * self.multiple_of, mask.size)
        # Whatever was kept has the highest scores and stays.
        best = jnp.where(mask, jnp.inf, jnp.where(jnp.isnan(scores), -jnp.inf, scores))
        return jnp.zeros(mask.size, bool).at[jnp.argsort(-best, stable=True)].set(jnp.arange(mask.size) < wanted)

    def flops(self, kept: Mapping[str, Any]) -> Any:
        """The FLOPs of the example's products with this many units of each group."""
        return sum(2.0 * math.prod(axes.count(axis, kept) for axis in product) for product in self.products)

    def _check_budget(self, sparsity: float) -> None:
        least = self.flops({group.name: min(self.multiple_of, group.size) for group in self.pruned})
        whole = self.flops({})
        if least > (1 - sparsity) * whole:
            raise ValueError(
                f"sparsity: {sparsity:g} of the FLOPs cannot go, since with one unit of each group {least / whole:.1%} "
                "stay; ask for less, or choose more groups."
            )

    def _within_budget(self, units: Any, pruned: Mapping[str, Group], sparsity: Any) -> Any:
        """Units by score per FLOP, as many as the budget allows: bisection over how many go."""
        per_flop = {}
        for name, scores in units.items():
            norm = jnp.sqrt(jnp.sum(scores * scores)) + 1e-8
            each = jnp.nan_to_num(scores / norm, nan=-jnp.inf) / max(pruned[name].flops, 1)
            # The best unit of a group always stays.
            per_flop[name] = jnp.where(jnp.arange(each.size) == jnp.argmax(each), jnp.inf, each)
        together = jnp.concatenate(list(per_flop.values()))
        # The best unit of all is at 0; of units that tie the lower one stays longer.
        places = jnp.argsort(jnp.argsort(-together, stable=True))
        ends = np.cumsum([each.size for each in per_flop.values()])
        place = dict(zip(per_flop, jnp.split(places, ends[:-1]), strict=True))
        budget = (1 - jnp.asarray(sparsity, jnp.float32)) * self.flops({})

        def kept(gone):
            return {name: (place[name] < together.size - gone) | (each == jnp.inf) for name, each in per_flop.items()}

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) // 2
            counts = {name: mask.sum(dtype=jnp.float32) for name, mask in kept(middle).items()}
            is_enough = self.flops(counts) <= budget
            return jnp.where(is_enough, low, middle + 1), jnp.where(is_enough, middle, high)

        bounds = jnp.int32(0), jnp.int32(together.size)
        _, gone = jax.lax.fori_loop(0, together.size.bit_length() + 1, halve, bounds)
        return kept(gone)

    def _pruned_in(self, axes_of: Mapping[trees.KeyPath, Any]) -> list[Group]:
        """The groups that are pruned, with the paths of a tree for their owners."""
        names = {full: path for path, full in self._full_paths(axes_of).items()}
        return [dataclasses.replace(group, owner=names[group.owner]) for group in self.pruned if group.owner in names]

    def _full_paths(self, paths: Iterable[trees.KeyPath]) -> dict[trees.KeyPath, trees.KeyPath]:
        """The paths of a tree, with what the groups have in front of them, such as `params`."""
        paths, known = list(paths), {path for path, _ in self.axes}
        fronts = [()] + [full[: -len(paths[0])] for full in known if paths and _ends(full, paths[0])]
        fitting = sorted(front for front in set(fronts) if all((*front, *path) in known for path in paths))
        if len(fitting) > 1 and fitting[0]:
            raise ValueError(
                f"params: may be those of {' or '.join(map(trees.leaf_name, fitting))}; find the groups of the "
                "parameters that the optimizer trains, or give it all of them."
            )
        if fitting:
            return {path: (*fitting[0], *path) for path in paths}
        strange = next(path for path in paths if path not in known)
        raise ValueError(
            f"{trees.leaf_name(strange)}: the groups do not know it; find them in a function of the parameters that "
            "the optimizer trains, jaxpruner.find_groups(forward, params, x)."
        )

    def _axes_in(self, tree: Any) -> dict[trees.KeyPath, tuple[Axis, ...]]:
        known = dict(self.axes)
        full = self._full_paths([path for path, _ in trees.named_leaves(tree)])
        return {path: known[whole] for path, whole in full.items()}


def _chosen(updater: Any, scores: Any) -> set[trees.KeyPath]:
    """The leaves that the algorithm was asked to prune."""
    shapes = jax.tree.map(lambda score: jax.ShapeDtypeStruct(score.shape, score.dtype), scores)
    try:
        return {path for path, _ in trees.named_leaves(jax.eval_shape(updater.chosen_sparsities, shapes))}
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):  # it reads weights
        return {path for path, _ in trees.named_leaves(scores)}


def _ends(path: trees.KeyPath, end: trees.KeyPath) -> bool:
    return path[len(path) - len(end) :] == end


def _matches(pattern: str, name: str) -> bool:
    # The brackets of names are no sets of characters.
    return pattern == name or trees.matches(pattern.replace("[", "[[]") if "[" in name else pattern, (name,))


def _short(name: str) -> str:
    return name if len(name) <= 48 else f"...{name[-45:]}"
