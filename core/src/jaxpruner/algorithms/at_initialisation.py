"""Pruning at initialisation: masks from scores on one or a few batches, before anything is trained.

In your own loop, pass the loss to the update, `tx.update(grads, state, params, loss_fn=..., batches=...)`. Give a stock
trainer masks that you made beforehand:

    _, masks = updater.instant_sparsify(params, loss_fn=loss_fn, batches=batches)
    tx = sparsify(inner, StaticRandomSparse(masks=masks, ...)), or PreserveSparsity(masks=masks)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpruner import scores, trees
from jaxpruner.algorithms.global_pruners import GlobalPruning
from jaxpruner.elementwise import require_grads, usable
from jaxpruner.inspection import checks
from jaxpruner.selection.score_reading import as_array
from jaxpruner.sparsity_schedules import OneShotSchedule, Schedule
from jaxpruner.training.projection import apply_mask

Loss = Callable[..., Any]


@dataclasses.dataclass(eq=False)
class _AtInitialisation(GlobalPruning):
    """One global mask, made in the first step, which never changes, whatever schedule is given.

    A leaf that is zero throughout scores 0 and is pruned first: exclude it with `filter_fn`. If all scores are 0, as
    behind a last layer that starts at zero and passes no gradient, nothing is pruned, and `check_sparse` says so.
    """

    is_sparse_gradients: bool = True
    use_normalization: bool = False
    scheduler: Schedule = OneShotSchedule(0)

    follows_schedule = False
    reaches_sparsity = True

    def __post_init__(self) -> None:
        self.scheduler = OneShotSchedule(0)

    def create_masks(self, scores: Any, target_sparsity: Any) -> Any:
        masks = super().create_masks(scores, target_sparsity)
        speaks = trees.map_pruned(lambda score, _: jnp.any(as_array(score) != 0), scores, masks)
        together = [leaf for path, leaf in trees.named_leaves(speaks) if not self._competes_alone(path)]
        any_speaks = functools.reduce(jnp.logical_or, together, jnp.asarray(False))

        def dense_where_silent(path: trees.KeyPath, mask: Any, own: Any) -> Any:
            # By the rule for ties, zero scores would keep the first layers and cut off the last.
            return None if trees.is_unpruned(mask) else mask | ~(own if self._competes_alone(path) else any_speaks)

        return trees.map_named(dense_where_silent, masks, speaks)

    create_masks.reads_unevaluated = True  # type: ignore[attr-defined]  # a mark that who calls it reads

    def instant_sparsify(self, params: Any, grads: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        pruned, masks = super().instant_sparsify(params, grads, **kwargs)
        leaves = jax.tree.leaves(masks)
        is_known = leaves and not any(isinstance(mask, jax.core.Tracer) for mask in leaves)
        if is_known and self.sparsity and all(bool(mask.all()) for mask in leaves):
            raise ValueError(f"sparsity: {self.sparsity:.1%} is asked, and nothing is pruned, since {checks.SILENT}.")
        return pruned, masks

    def _objective(self, loss_fn: Loss | None, batches: Iterable[Any] | None) -> Loss:
        """The mean of a loss over batches, a function of the parameters."""
        if loss_fn is None:
            raise ValueError(
                f"loss_fn: {type(self).__name__} scores with the loss and got none; give tx.update(grads, state, "
                f"params, loss_fn=..., batches=...), or, in a trainer that is not yours, {checks.MASKS_BEFORE}."
            )
        if batches is None:
            return loss_fn
        batches = list(batches)
        if not batches:
            raise ValueError("batches: holds none; give one or more, or leave it out for loss_fn(params).")
        return lambda params: sum(loss_fn(params, batch) for batch in batches) / len(batches)


@dataclasses.dataclass(eq=False)
class SNIP(_AtInitialisation):
    r"""Keeps the largest :math:`|w \, g|` of all leaves together, at initialisation (Lee et al., 2019).

    The gradients are those of the first step, or of `loss_fn` over `batches`.
    """

    def calculate_scores(
        self,
        params: Any,
        sparse_state: Any = None,
        grads: Any = None,
        loss_fn: Loss | None = None,
        batches: Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`|w * g|`.

        Args:
          params: the parameters.
          sparse_state: not used.
          grads: the gradients, unless there is a loss.
          loss_fn: `loss_fn(params, batch)`, or `loss_fn(params)` without batches, to a number.
          batches: the batches over which the loss is averaged.
          **kwargs: not used.
        """
        del sparse_state, kwargs
        if loss_fn is not None:
            grads = jax.grad(self._objective(loss_fn, batches))(params)
        require_grads(self, grads)
        return jax.tree.map(scores.saliency, params, usable(grads))


@dataclasses.dataclass(eq=False)
class GraSP(_AtInitialisation):
    r"""Keeps the weights whose removal would reduce the gradient flow most (Wang et al., 2020).

    .. math:: s = w \odot (H g)

    with the Hessian :math:`H` and the gradient :math:`g` of the loss. To first order, the removal of a weight changes
    :math:`g^T g` by :math:`-2 s`; the paper removes the largest :math:`-w \odot (H g)`, which are the lowest of these.
    The paper's temperature, 200, is part of the loss: divide the logits by it.
    """

    needs_loss = True

    def calculate_scores(
        self,
        params: Any,
        sparse_state: Any = None,
        grads: Any = None,
        loss_fn: Loss | None = None,
        batches: Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`w * (H g)`.

        Args:
          params: the parameters.
          sparse_state: not used.
          grads: not used: the Hessian needs the loss.
          loss_fn: `loss_fn(params, batch)`, or `loss_fn(params)` without batches, to a number.
          batches: the batches over which the loss is averaged.
          **kwargs: not used.

        Raises:
          ValueError: without a loss.
        """
        del sparse_state, grads, kwargs
        gradient = jax.grad(self._objective(loss_fn, batches))
        _, curved = jax.jvp(gradient, (params,), (gradient(params),))
        return jax.tree.map(jnp.multiply, params, curved)


@dataclasses.dataclass(eq=False)
class SynFlow(_AtInitialisation):
    r"""Keeps the weights of the strongest paths, without data and without losing a layer (Tanaka et al., 2020).

    .. math:: s = |w| \odot \partial R / \partial |w|, \qquad R = \mathbb 1^T f(\mathbb 1; |w|)

    where :math:`f` is the network without the parts that are not positively homogeneous. In round :math:`k` of
    :math:`n`, a share :math:`(1 - sparsity)^{k/n}` of the weights stays, scored among those that stayed before.

    Attributes:
      rounds: the :math:`n` above.

    Raises:
      ValueError: for fewer than one round.
    """

    rounds: int = 100

    needs_loss = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds: {self.rounds} prunes nothing; give 1 or more (the paper's are 100).")

    def calculate_scores(
        self,
        params: Any,
        sparse_state: Any = None,
        grads: Any = None,
        loss_fn: Loss | None = None,
        batches: Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The scores of the last round, below all where an earlier round pruned.

        Args:
          params: the parameters; the flow is that of their absolute values.
          sparse_state: not used.
          grads: not used.
          loss_fn: `loss_fn(params)`, the sum of the network's outputs for an input of ones (the R above).
          batches: as for the others, in place of the ones.
          **kwargs: not used.

        Raises:
          ValueError: without a function.
        """
        del sparse_state, grads, kwargs
        flow = jax.grad(self._objective(loss_fn, batches))
        targets, positive = self.get_target_sparsities(params), jax.tree.map(jnp.abs, params)

        def score(masks):
            thin = apply_mask(positive, masks)
            return jax.tree.map(lambda w, g: jnp.abs(w * g), thin, flow(thin))

        def thinned(k, masks):
            now = trees.map_pruned(lambda t, _: 1.0 - (1.0 - t) ** ((k + 1) / self.rounds), targets, targets)
            # Those before stay pruned: their weights are 0 here, and where all are, the first would be kept.
            found = self.create_masks(trees.map_pruned(_last, score(masks), masks), now)
            return trees.map_pruned(jnp.logical_and, found, masks)

        masks = self.get_initial_masks(params, targets)
        masks = jax.lax.fori_loop(0, self.rounds - 1, thinned, masks)
        return trees.map_pruned(_last, score(masks), masks, otherwise=lambda score: score)


def _last(score: Any, mask: Any) -> Any:
    return jnp.where(mask, score, -1.0)
