"""Pruners with a memory: their scores depend on all earlier steps, kept in `SparseState.statistics`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpruner import scores, trees
from jaxpruner.algorithms.global_pruners import GlobalPruning
from jaxpruner.algorithms.ste import StraightThrough
from jaxpruner.base_updater import BaseUpdater
from jaxpruner.training import optimizer_state


def zeros_like(params: Any) -> Any:
    """Zeros of the parameters' shapes, in float32 at least: sums over many steps."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32)), params)


@dataclasses.dataclass(eq=False)
class MovementPruning(StraightThrough):
    r"""Keeps the weights that moved away from 0 (Sanh et al., 2020).

    .. math:: S_{t+1} = S_t - w_t \, g_t, \qquad g_t = \partial L / \partial (m_t \odot w_t)

    and the highest :math:`S` of each leaf are kept, by a mask that is made in every step. As in the paper, a masked
    weight gets no gradient and keeps its value, while its score still changes. When its score has risen, it comes back
    with that value. The method is for fine-tuning. Before anything has moved, all scores are 0 and ties keep the first
    weights, so start the schedule after step 0.
    """

    is_sparse_gradients: bool = True

    def init_statistics(self, params: Any) -> Any:
        return zeros_like(params)

    def update_statistics(self, params: Any, grads: Any, statistics: Any) -> Any:
        return jax.tree.map(lambda s, w, g: s - w.astype(s.dtype) * g.astype(s.dtype), statistics, params, grads)

    def calculate_scores(self, params: Any, sparse_state: Any = None, grads: Any = None, **kwargs: Any) -> Any:
        """The sum of `-w * g` over all steps; without a state, of these gradients."""
        del kwargs
        return trees.from_state(self.known_statistics(params, sparse_state, grads))


@dataclasses.dataclass(eq=False)
class SoftMovementPruning(GlobalPruning, MovementPruning):
    r"""Movement pruning with one threshold for all leaves, :math:`S > \tau` (Sanh et al., 2020, "soft").

    Layers share the sparsity among themselves. The paper fixes :math:`\tau` and tunes the strength of a regulariser on
    :math:`S` until it reaches the wanted sparsity. Here :math:`\tau` is, in every step, the number that keeps exactly
    as many weights as the schedule says.

    Raises:
      ValueError: for `use_normalization=True`: the threshold applies to the scores themselves.
    """

    is_sparse_gradients: bool = True
    use_normalization: bool = False

    def __post_init__(self) -> None:
        if self.use_normalization:
            raise ValueError(
                "use_normalization: soft_movement has one threshold for the scores as they are; leave it out."
            )


@dataclasses.dataclass(eq=False)
class FisherPruning(BaseUpdater):
    r"""Keeps the largest :math:`w^2 F`, the loss that a weight's removal costs where the Hessian is diagonal.

    .. math:: F_{t+1} = \beta F_t + (1 - \beta) g_t^2

    with the empirical Fisher information :math:`F` in place of the Hessian (Theis et al., 2018; Singh & Alistarh,
    2020). The kept weights are not updated, unlike in the full method.

    Attributes:
      decay: the :math:`\beta` above, in [0, 1).

    Raises:
      ValueError: for a decay outside [0, 1).
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: {self.decay!r} is outside [0, 1); it is what stays of the average in each step.")

    def init_statistics(self, params: Any) -> Any:
        return zeros_like(params)

    def update_statistics(self, params: Any, grads: Any, statistics: Any) -> Any:
        del params
        return jax.tree.map(
            lambda f, g: self.decay * f + (1 - self.decay) * jnp.square(g.astype(f.dtype)), statistics, grads
        )

    def calculate_scores(self, params: Any, sparse_state: Any = None, grads: Any = None, **kwargs: Any) -> Any:
        """`w ** 2 * F`; without a state, of these gradients."""
        del kwargs
        return trees.map_pruned(scores.cost, params, self.known_statistics(params, sparse_state, grads))


@dataclasses.dataclass(eq=False)
class AdamFisherPruning(BaseUpdater):
    r"""Keeps the largest :math:`w^2 \nu`, with :math:`\nu` the second moment that the inner optimizer keeps anyway.

    It is `fisher` without its own memory, for Adam, AdamW, RMSProp and others that keep `nu`, and for Adafactor
    where it does not factor. The optimizer may be wrapped in any way.

    Raises:
      ValueError: by `init`, if the optimizer has no second moment of each prunable weight, or if masks are to be made
        at step 0, when all second moments are 0.
    """

    reads_optimizer = True

    def init_state(self, params: Any) -> Any:
        if self.scheduler.first_update_step == 0:
            raise ValueError(
                "update_start_step: 0, when the second moments that adam_fisher reads are all 0; let the first masks "
                "be made later."
            )
        return super().init_state(params)

    def check_inner_state(self, inner_state: Any, params: Any) -> None:
        targets = self.get_target_sparsities(params)
        self._second_moments(inner_state, trees.map_pruned(lambda p, _: p, params, targets))

    def calculate_scores(
        self, params: Any, sparse_state: Any = None, grads: Any = None, opt_state: Any = None, **kwargs: Any
    ) -> Any:
        """`w ** 2 * nu` of the leaves that are pruned; without a state, nu is read from `opt_state`."""
        del grads, kwargs
        if sparse_state is None:
            marks = self.get_target_sparsities(params)
        else:
            opt_state, marks = sparse_state.inner_state, sparse_state.masks
        pruned = trees.map_pruned(lambda p, _: p, params, marks)
        return trees.map_pruned(scores.cost, pruned, self._second_moments(opt_state, pruned))

    def _second_moments(self, opt_state: Any, params: Any) -> Any:
        found = optimizer_state.second_moments(opt_state, params)
        if missing := [path for path, _ in trees.named_leaves(params) if path not in found]:
            raise ValueError(
                f"opt_state: the optimizer keeps no second moment of {trees.leaf_name(missing[0])} (`nu`, or `v` where "
                "Adafactor does not factor), by which adam_fisher ranks; use Adam or alike (without training, give its "
                "state: instant_sparsify(params, opt_state=...)), or algorithm='fisher', which keeps its own."
            )
        return trees.map_named(lambda path, _: found.get(path), params)
