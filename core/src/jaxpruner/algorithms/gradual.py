"""Dense and sparse phases in turn, and pruning with regrowth: density goes up as well as down."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxpruner import sparsity_schedules, trees
from jaxpruner.algorithms.pruners import MagnitudePruning
from jaxpruner.algorithms.sparse_trainers import RigL
from jaxpruner.base_updater import BaseUpdater


@dataclasses.dataclass(eq=False)
class ACDC(MagnitudePruning):
    r"""Alternating compressed and decompressed training (Peste et al., 2021).

    A phase begins at each mask update. A sparse phase keeps the largest `|w|` of each leaf. In a dense phase, pruned
    weights train on from 0. The last phase is sparse. All optimizer statistics start anew with each phase (its counts
    and schedules of learning rates continue).

    A configuration with a start, an end and a period gives an `AlternatingSchedule`, whose period is the length of a
    phase. With another kind of scheduler, each update starts a sparse phase.
    """

    regrows = True
    renews_all = True
    gradual_schedule = sparsity_schedules.AlternatingSchedule


@dataclasses.dataclass(eq=False)
class GraNet(RigL):
    r"""Gradual pruning with regrowth (Liu et al., 2021).

    Each mask update prunes by `|w|` to the sparsity :math:`s_t` of the schedule, which leaves :math:`k_t` weights of a
    leaf. Then it does what RigL does: the :math:`\mathrm{round}(k_t (1 - f))` largest of these stay, and the weights
    with the largest `|g|` among all others take the free places. Training starts dense, or at `initial_sparsity`.
    Where `masks` leave fewer weights than the schedule at first, their number stays until the schedule is there.

    Attributes:
      drop_fraction_fn: count -> the fraction :math:`f` that is replaced.
    """

    starts_dense = True

    instant_sparsify = BaseUpdater.instant_sparsify
    masks_from_params = BaseUpdater.masks_from_params

    def get_initial_masks(self, params: Any, target_sparsities: Any) -> Any:
        """All ones, None where a leaf is not pruned."""
        return BaseUpdater.get_initial_masks(self, params, target_sparsities)

    def masks_to_regrow(self, sparse_state: Any, params: Any, targets: Any, drop_scores: Any) -> Any:
        """Those of the weights that the sparsity of this update leaves."""
        before = self.current_masks(sparse_state, params)
        among = trees.map_named(self._pruned_last, drop_scores, before)
        masks = self.create_masks(among, self._sparsities_at(targets, sparse_state.count))
        # Masks that it started from may leave fewer weights than the schedule does.
        return masks if self.masks is None else trees.map_pruned(lambda mask, was: mask & was, masks, before)
