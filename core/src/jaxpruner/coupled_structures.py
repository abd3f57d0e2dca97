"""Structures over many leaves, whose units are kept or pruned in all of them together."""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from jaxpruner import trees
from jaxpruner.sparsity_types import SparsityType

if TYPE_CHECKING:
    from jaxpruner.compaction.groups import Groups


class Coupled(SparsityType):
    """A structure over many leaves: units that are in several parameters are kept or pruned in all of them together."""

    budget: str

    def mask(self, scores: Any, sparsity: Any) -> Any:
        raise ValueError(_OF_A_TREE)

    def regrow(self, mask: Any, drop_scores: Any, grow_scores: Any, drop_fraction: Any) -> Any:
        raise ValueError(_OF_A_TREE)

    def for_leaf(self, path: trees.KeyPath, shape: tuple[int, ...]) -> SparsityType:
        return _Part(self, path)

    @abc.abstractmethod
    def reach(self, targets: Any, params: Any) -> Any:
        """The sparsity of the units of each leaf that masks reach, None elsewhere, from the sparsities asked for."""

    @abc.abstractmethod
    def masks(self, scores: Any, sparsities: Any, updater: Any) -> Any:
        """A tree of masks, None where no unit is, from a tree of scores.

        Args:
          scores: one score per weight, a tree like the parameters.
          sparsities: of the units, a tree as `reach` gives it.
          updater: the algorithm for trees of units; its `create_masks` says which of them stay.
        """

    @abc.abstractmethod
    def units_of(self, path: trees.KeyPath) -> int:
        """How many units the leaf at this path decides on."""

    @abc.abstractmethod
    def share_pruned(self, masks: Any, targets: Any) -> tuple[float, float, float]:
        """The shares of the budget that were asked for, that boolean masks prune, and that rounding allows.

        Args:
          masks: a tree of boolean masks.
          targets: the sparsity of each leaf that was chosen to be pruned, by its path.
        """


_OF_A_TREE = "groups: units are in several leaves, so that one leaf alone has no mask; give the tree of all parameters."


@dataclasses.dataclass(frozen=True)
class _Part(Coupled):
    """What a structure over many leaves is to one of them."""

    whole: Coupled
    path: trees.KeyPath

    def num_units(self, shape: tuple[int, ...]) -> int:
        del shape
        return self.whole.units_of(self.path)

    def for_leaf(self, path: trees.KeyPath, shape: tuple[int, ...]) -> SparsityType:
        return self

    def _of_a_tree(self, *args: Any) -> Any:
        raise ValueError(_OF_A_TREE)

    reach = masks = units_of = share_pruned = _of_a_tree  # type: ignore[assignment]  # whatever is asked


@dataclasses.dataclass(frozen=True)
class AllGroups(Coupled):
    """The groups of a model that is not known yet. A configuration asks for them by `groups`.

    Code that knows the model, such as the adapter of a framework, puts `of(find_groups(...))` in its place.

    Attributes:
      patterns: the groups that are pruned, as for `Groups.choose`; all if there are none.
      multiple_of: see `Groups`.
      budget: see `Groups`.
    """

    patterns: tuple[str, ...] = ()
    multiple_of: int = 1
    budget: Literal["units", "flops"] = "units"

    def of(self, groups: Groups) -> Groups:
        """These of the groups of a model.

        Raises:
          ValueError: see `Groups.choose`.
        """
        return groups.choose(*self.patterns, multiple_of=self.multiple_of, budget=self.budget)

    def _of_a_model(self, *args: Any) -> Any:
        raise ValueError(
            "sparsity_type: 'groups' are those of a model, which nobody has put in here. Find them, and give what is "
            "found: groups = jaxpruner.find_groups(forward, params, x); sparsity_type=groups."
        )

    reach = masks = units_of = share_pruned = _of_a_model  # type: ignore[assignment]  # whatever is asked
