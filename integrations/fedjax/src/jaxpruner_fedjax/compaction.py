"""A server's model without its dead units: a FedJAX model of the small function, for evaluation and further rounds."""

from __future__ import annotations

import dataclasses
from typing import Any

import fedjax
import jax
import numpy as np
from fedjax.algorithms import fed_avg

import jaxpruner
from jaxpruner.training.projection import find_states


def find_groups(model: fedjax.Model, params: Any, batch: Any) -> jaxpruner.Groups:
    """The units of a model that can be pruned whole. Pass them as `sparsity_type` to `server_optimizer`.

    Args:
      model: the model.
      params: its parameters, or their shapes.
      batch: an example of a batch, `{"x": ..., "y": ...}`.

    Examples:
      >>> model = fedjax.models.emnist.create_dense_model(only_digits=True, hidden_units=32)
      >>> shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0))
      >>> groups = find_groups(model, shapes, {"x": np.zeros((1, 28, 28, 1), np.float32)})
      >>> [(group.name, group.size) for group in groups.removable]
      [('linear/w[1]', 32), ('linear_1/w[1]', 32)]
    """
    return jaxpruner.find_groups(model.apply_for_eval, params, batch)


@dataclasses.dataclass(frozen=True)
class CompactModel:
    """A model without its dead units.

    Attributes:
      model: for FedJAX's algorithms and evaluation; `init` returns `params`.
      params: the remaining parameters.
      small: the small function of evaluation, its report and the remaining units.

    Examples:
      >>> import optax
      >>> from jaxpruner_fedjax import server_optimizer
      >>> model = fedjax.models.emnist.create_dense_model(only_digits=True, hidden_units=32)
      >>> params, batch = model.init(jax.random.PRNGKey(0)), {"x": np.zeros((1, 28, 28, 1), np.float32)}
      >>> params["linear"]["w"] = params["linear"]["w"].at[:, 8:].set(0)  # as a server trained it
      >>> state = fed_avg.ServerState(params, server_optimizer(optax.adam(1e-3), algorithm="preserve").init(params))
      >>> state = compact_model(model, params, batch).server_state(state)  # for rounds with a dense `optax.adam(1e-3)`
      >>> state.params["linear"]["w"].shape, state.opt_state[0].mu["linear"]["w"].shape
      ((784, 8), (784, 8))
    """

    model: fedjax.Model
    params: Any
    small: jaxpruner.Compact

    def server_state(self, state: fed_avg.ServerState) -> fed_avg.ServerState:
        """The state of a `fed_avg` server to continue with: its parameters, and its optimizer's state without masks.

        The rounds that follow take the dense optimizer that was inside the sparse one.
        """
        opt_state = state.opt_state
        if find_states(opt_state):
            opt_state = find_states(opt_state)[0].inner_state
        if isinstance(opt_state, jaxpruner.StraightThroughState):
            opt_state = opt_state.inner_state
        return fed_avg.ServerState(self.params, self.small.cut(opt_state))


def compact_model(model: fedjax.Model, params: Any, batch: Any, small: jaxpruner.Compact | None = None) -> CompactModel:
    """Removes from a model the units that are dead in its parameters.

    Args:
      model: the model.
      params: its trained parameters, such as `state.params` of a server.
      batch: an example of a batch, `{"x": ..., "y": ...}`.
      small: an earlier result to use in place of what is dead in `params`, such as
        `jaxpruner.compaction.files.load_compact(path, model.apply_for_eval, params, batch)`.

    Examples:
      >>> model = fedjax.models.emnist.create_dense_model(only_digits=True, hidden_units=32)
      >>> params, batch = model.init(jax.random.PRNGKey(0)), {"x": np.zeros((1, 28, 28, 1), np.float32)}
      >>> params["linear"]["w"] = params["linear"]["w"].at[:, 8:].set(0)  # as a server trained it
      >>> compacted = compact_model(model, params, batch)
      >>> compacted.small.sizes
      {'linear/w[1]': 8, 'linear_1/w[1]': 32}
      >>> compacted.model.apply_for_eval(compacted.params, batch).shape
      (1, 10)
    """
    if small is None:
        small = jaxpruner.compact(model.apply_for_eval, params, batch)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    # With dropout on the remaining units.
    train = jaxpruner.compact(model.apply_for_train, shapes, batch, jax.random.PRNGKey(0), keep=small.kept)
    compacted = fedjax.Model(
        init=lambda rng: small.params,
        apply_for_train=jax.jit(train.fn),
        apply_for_eval=jax.jit(small.fn),
        train_loss=model.train_loss,
        eval_metrics=model.eval_metrics,
    )
    return CompactModel(compacted, small.params, small)


def example_batch(data: fedjax.FederatedData, size: int = 32) -> Any:
    """A batch of one client, padded as in evaluation."""
    _, dataset = next(data.clients())
    return jax.tree.map(np.asarray, next(iter(dataset.padded_batch(batch_size=size))))
