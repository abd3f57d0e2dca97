"""The sparse optimizers of one training: one for all parameters, or one for each group of them."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

import jaxpruner
from jaxpruner import sparsity_distributions, sparsity_types, trees
from jaxpruner.coupled_structures import AllGroups, Coupled
from jaxpruner.training.projection import SparseState
from jaxpruner_scenic.forward import Forward

FilterFn = Callable[[tuple[str, ...], Any], bool]
IsFrozen = Callable[[str], bool]

_SCORED_BY_GRADIENTS = (
    "saliency", "global_saliency", "rigl", "srigl", "granet", "mest", "movement", "fisher", "sr_ste", "top_kast",
    "snip", "grasp", "synflow",
)  # fmt: skip


class Made:
    """Makes optimizers sparse as a `sparsity_config` says, and keeps what was asked for.

    Attributes:
      count: how many optimizers were made.
      asked: the final sparsity of each pruned parameter, for the optimizers that were made with parameters.
      groups: the algorithm with the groups of the model, if it prunes groups.
    """

    def __init__(self, sparsity_config: Mapping[str, Any]):
        self.config = {key: value for key, value in sparsity_config.items() if value is not None}
        if "sparsity_distribution_fn" in self.config:
            raise ValueError(
                "sparsity_config.sparsity_distribution_fn: would prune what Scenic freezes as well; use dist_type, "
                "filter_fn and custom_sparsity_map."
            )
        self.exclude = self.config.pop("exclude_reg_exp", None)
        try:
            re.compile(self.exclude or "")
        except re.error as error:
            raise ValueError(f"sparsity_config.exclude_reg_exp: {self.exclude!r} is no pattern: {error}.") from error
        self.count = 0
        self.asked: dict[trees.KeyPath, float] = {}
        self.groups: jaxpruner.BaseUpdater | None = None
        self.configured = self._updater(is_frozen=lambda name: False)
        jaxpruner.sparsify(optax.identity(), self.config)  # reports a bad schedule now

    @property
    def is_dense(self) -> bool:
        """Whether the configuration asks for no pruning."""
        return self.config["algorithm"] == "no_prune"

    def describe(self) -> dict[str, Any]:
        """The configuration as a checkpoint can hold it."""
        if self.is_dense:
            return jaxpruner.describe(None)
        filter_fn = self.config.get("filter_fn", sparsity_distributions.KERNEL_FILTER_FN)
        names = {"filter_fn": getattr(filter_fn, "__qualname__", type(filter_fn).__name__)}
        return jaxpruner.describe(self.configured) | names | {"exclude_reg_exp": self.exclude}

    def sparsify(
        self, tx: optax.GradientTransformation, is_frozen: IsFrozen, params: Any = None, model: Forward | None = None
    ) -> optax.GradientTransformation:
        """Makes `tx` sparse, for all of `params`, or for the part of them that `optax.multi_transform` shows it.

        Args:
          tx: the optimizer.
          is_frozen: whether Scenic freezes the parameter with a given name.
          params: the parameters, if they are known.
          model: the model that was initialised last; `sparsity_type = "groups"` means its groups.
        """
        group, self.count = self.count, self.count + 1
        self._require_exclusions(params)
        if group and (why := self._why_one_optimizer(params)):
            raise ValueError(
                f"sparsity_config: this trainer makes an optimizer for each group of parameters, and {why} (If it is "
                "another training: leave sparse_training in between.)"
            )
        updater = self._updater(is_frozen)
        if isinstance(updater.sparsity_type, AllGroups):
            updater.sparsity_type = _groups(updater.sparsity_type, is_frozen, model)
        if isinstance(updater.sparsity_type, Coupled):
            self.groups = updater
            self.asked |= {} if params is None else dict(trees.named_leaves(updater.get_target_sparsities(params)))
            return jaxpruner.sparsify(tx, updater)
        if params is None:
            return jaxpruner.sparsify(tx, updater)
        targets = dict(trees.named_leaves(updater.get_target_sparsities(params)))
        self.asked |= targets
        return _whole_or_group(
            tx, jaxpruner.sparsify(tx, updater), jaxpruner.sparsify(tx, of_group(updater, targets, group)), targets
        )

    def require_aggregated_gradients(self) -> None:
        """Raises a ValueError if the algorithm reads gradients, because the optimizer gets one for each example."""
        algorithm = self.config["algorithm"]
        if algorithm in _SCORED_BY_GRADIENTS:
            why = "scores weights by gradients; use one that does not, such as magnitude or set"
        elif self.configured.is_sparse_gradients:
            why = "masks gradients; set sparsity_config.is_sparse_gradients to False"
        else:
            return
        raise ValueError(
            "config.optimizer.per_example_clipping: hands the gradient of each example to the optimizer, which "
            f"aggregates them itself, and algorithm {algorithm!r} {why}, or clip the aggregated gradient: "
            "config.optimizer.per_example_clipping = False, without optax_grad_pmean."
        )

    def _updater(self, is_frozen: IsFrozen) -> jaxpruner.BaseUpdater:
        return jaxpruner.create_updater_from_config(self.config | {"filter_fn": self._filter_fn(is_frozen)})

    def _filter_fn(self, is_frozen: IsFrozen) -> FilterFn:
        takes = self.config.get("filter_fn", sparsity_distributions.KERNEL_FILTER_FN)

        def filter_fn(path: tuple[str, ...], param: Any) -> bool:
            name = "/".join(path)
            excluded = self.exclude is not None and re.search(self.exclude, name)
            return not excluded and not is_frozen(name) and takes(path, param)

        return filter_fn

    def _require_exclusions(self, params: Any) -> None:
        names = [trees.leaf_name(path) for path, _ in trees.named_leaves(params)]
        if names and self.exclude is not None and not any(re.search(self.exclude, name) for name in names):
            raise ValueError(
                f"sparsity_config.exclude_reg_exp: {self.exclude!r} is found in no parameter's name; the names are "
                f"{', '.join(names)}."
            )

    def _why_one_optimizer(self, params: Any) -> str | None:
        """Why one optimizer per group cannot meet the configuration; None if it can."""
        if isinstance(self.configured.sparsity_type, Coupled):
            return "units of sparsity_type='groups' are in parameters of several of them; use another sparsity_type."
        if self.config["algorithm"].startswith("global_"):
            return (
                "a global algorithm has one threshold over all layers, of which each optimizer sees its group's only; "
                "use dist_type='erk' or 'uniform' with an algorithm that is not global."
            )
        shared = self.config.get("dist_type") == "erk" or "custom_sparsity_map" in self.config
        if shared and params is None:
            return (
                "makes them without params, so that dist_type='erk' or a custom_sparsity_map would hold in each group "
                "instead of over all layers; use dist_type='uniform', or hand params= to get_optimizer."
            )
        return None


def _groups(wanted: AllGroups, is_frozen: IsFrozen, model: Forward | None) -> Coupled:
    """The groups of a model, without those that have units in what Scenic freezes."""
    if model is None:
        raise ValueError(
            "sparsity_config.sparsity_type: 'groups' are those of the model, and this trainer makes its optimizer "
            "without train_utils.initialize_model; find them yourself, jaxpruner.find_groups(forward, variables, x), "
            "and give them as sparsity_type."
        )
    groups = wanted.of(model.find_groups())
    trained = [
        group.name
        for group in groups.pruned
        if not any(place.path[0] == "params" and is_frozen("/".join(place.path[1:])) for place in group.places)
    ]
    return dataclasses.replace(groups, chosen=tuple(trained))


def of_group(updater: jaxpruner.BaseUpdater, targets: Mapping[Any, float], group: int) -> jaxpruner.BaseUpdater:
    """The algorithm for a part of the parameters, with the sparsities that these have among all."""
    # Names of the whole are no mistakes in a part that lacks them: patterns become functions, which are not checked.
    changes: dict[str, Any] = {
        "sparsity_distribution_fn": lambda part: trees.map_named(
            lambda path, leaf: None if trees.is_unpruned(leaf) else targets.get(path), part
        ),
        "sparsity_type": lambda path, leaf: sparsity_types.for_leaf(updater.sparsity_type, path, leaf),
    }
    if updater.stack_axes is not None:
        changes["stack_axes"] = updater.stack_axis
    if isinstance(updater.rng_seed, int | np.integer):
        # Random masks are drawn by a leaf's number: those of equal layers in two groups would be the same.
        changes["rng_seed"] = int(np.random.SeedSequence([int(updater.rng_seed), group]).generate_state(1)[0] >> 1)
    part = copy.copy(updater)
    for name, value in changes.items():
        setattr(part, name, value)
    return part


def _whole_or_group(
    dense: optax.GradientTransformation,
    whole: optax.GradientTransformation,
    group: optax.GradientTransformation,
    targets: Mapping[trees.KeyPath, float],
) -> optax.GradientTransformationExtraArgs:
    """`whole`, or for a part of the parameters `group`, or `dense` if nothing of the part is pruned."""
    dense = optax.with_extra_args_support(dense)

    def is_part(params: Any) -> bool:
        return any(map(trees.is_unpruned, jax.tree.leaves(params, is_leaf=trees.is_unpruned)))

    def init_fn(params: Any) -> Any:
        if not is_part(params):
            return whole.init(params)
        prunes = any(targets.get(path) for path, _ in trees.named_leaves(params))
        return (group if prunes else dense).init(params)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        sparse = group if is_part(params) else whole
        tx = sparse if isinstance(state, SparseState) else dense
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
