"""Sparsity in the logs of T5X's stock trainer."""

from __future__ import annotations

from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
from absl import logging
from t5x import trainer

import jaxpruner
from jaxpruner import trees
from jaxpruner.coupled_structures import Coupled
from jaxpruner.inspection import checks
from jaxpruner.training.projection import pruned_only

_ROUNDED = 5e-3  # of tiny parameters, whose shares are rounded to whole weights


class SparsityMetrics(trainer.WeightMetricsComputer):
    """For `trainer.Trainer.weight_metrics_computer`: the fraction of zeros among the prunable weights.

    Logs `sparsity/total` and `sparsity/NAME` of each prunable parameter, of the last step since the last log.

    Args:
      weight_metrics: whether to log T5X's own metrics of weights as well. In the metric of the update relative to the
        weight, a weight that is 0 counts as one without an update.

    Raises:
      ValueError: when the train step is compiled, if the run's optimizer is dense.

    Examples:
      >>> import jax.numpy as jnp
      >>> from t5x import optimizers, train_state
      >>> from jaxpruner_t5x import SparseOptimizer, create_updater
      >>> optimizer = SparseOptimizer(optimizers.adamw(1e-2), create_updater("preserve"))
      >>> params = {"wi": {"kernel": jnp.array([[0.0, -4.0], [3.0, 0.0]])}}
      >>> state = train_state.FlaxOptimTrainState(optimizer.create(params))
      >>> logged = SparsityMetrics().compute_metrics(None, state, state)
      >>> {name: float(metric.compute()) for name, metric in logged.items()}
      {'sparsity/total': 0.5, 'sparsity/wi/kernel': 0.5}
    """

    def __init__(self, weight_metrics: bool = False):
        self.weight_metrics = weight_metrics

    def compute_metrics(self, gradients: Any, old_train_state: Any, new_train_state: Any) -> dict[str, Any]:
        optimizer = new_train_state._optimizer
        if not hasattr(optimizer.state, "sparse"):
            raise ValueError(
                f"SparsityMetrics: this run trains dense, by {type(optimizer.optimizer_def).__name__}. Give sparse.gin "
                "after the model's gin file, whose optimizer_def takes its place otherwise. sparse.gin binds T5X's "
                "EncoderDecoderModel and DecoderOnlyModel; for another model bind MODEL_CLASS.optimizer_def = "
                "@jaxpruner_t5x.SparseOptimizer()."
            )
        metrics = {}
        if self.weight_metrics:
            metrics = super().compute_metrics(gradients, old_train_state, new_train_state)
            metrics |= self._make_rms_metrics(
                "weight_update_divided_by_weight_rms",
                jax.tree.map(_relative_update, old_train_state.params, new_train_state.params),
            )
        return metrics | {
            f"sparsity/{name}": clu.metrics.LastValue.from_model_output(jnp.asarray([value]))
            for name, value in sparsities(new_train_state).items()
        }


def sparsities(train_state: Any) -> dict[str, jax.Array]:
    """The fraction of zeros among the prunable weights of a T5X train state: `total`, and of each parameter.

    Empty if its optimizer is not a `SparseOptimizer`, or prunes nothing.
    """
    state = getattr(train_state._optimizer.state, "sparse", None)
    if state is None:
        return {}
    pruned = trees.named_leaves(pruned_only(train_state.params, state.masks))
    if not pruned:
        return {}
    zeros = {trees.leaf_name(path): (leaf == 0).mean(dtype=jnp.float32) for path, leaf in pruned}
    total = jaxpruner.summarize_sparsity([leaf for _, leaf in pruned], only_total_sparsity=True)["_total_sparsity"]
    return {"total": total} | zeros


def log_reached(updater: jaxpruner.BaseUpdater, params: Any, state: Any) -> None:
    """Logs at the end of a run the sparsity that was asked for and reached, as a warning if it reached less.

    Args:
      updater: the algorithm.
      params: the parameters.
      state: the state of a `SparseOptimizer`.
    """
    pruned = dict(trees.named_leaves(pruned_only(params, state.sparse.masks)))
    if not pruned:
        return
    if isinstance(updater.sparsity_type, Coupled):
        asked, reached, slack = checks.shares_pruned(params, state.sparse, updater)
        _log(state.step, f" of the {updater.sparsity_type.budget}", asked, reached, slack)
        return
    targets = dict(trees.named_leaves(updater.get_target_sparsities(params)))
    size = sum(leaf.size for leaf in pruned.values())
    asked = sum(float(targets[path]) * leaf.size for path, leaf in pruned.items()) / size
    reached = jaxpruner.summarize_sparsity(list(pruned.values()), only_total_sparsity=True)["_total_sparsity"]
    _log(state.step, "", asked, reached, _ROUNDED)


def _log(step: Any, what: str, asked: float, reached: float, slack: float) -> None:
    level = logging.WARNING if reached < asked - slack else logging.INFO
    logging.log(
        level,
        "Sparsity at step %d, the last: asked %.1f %%%s, reached %.1f %%.",
        step,
        100 * asked,
        what,
        100 * reached,
    )


def _relative_update(old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.where(old == 0, 0, (new - old) / jnp.where(old == 0, 1, old))
