"""The sparse server: one optimizer for FedJAX's own algorithms, and the masks in its state."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import fedjax
import optax
from absl import logging

import jaxpruner
from jaxpruner.inspection import checks
from jaxpruner.training.projection import SparseState, find_state, find_states


@dataclasses.dataclass(frozen=True)
class SparseOptimizer(fedjax.optimizers.Optimizer):
    """A `fedjax.optimizers.Optimizer` that keeps the server's parameters exactly on their masks.

    Attributes:
      init, apply: as in FedJAX.
      updater: the algorithm that makes the masks.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedjax.algorithms import fed_avg
      >>> at_once = {"algorithm": "magnitude", "sparsity": 0.5, "update_start_step": 0, "update_end_step": 0}
      >>> server = server_optimizer(optax.sgd(1.0), at_once)
      >>> params, change = {"w": jnp.array([[1.0, -4.0], [3.0, -2.0]])}, {"w": jnp.ones((2, 2))}
      >>> opt_state, params = server.apply(change, server.init(params), params)  # as `fed_avg` in each round
      >>> params["w"].tolist(), server.masks(fed_avg.ServerState(params, opt_state))["w"].tolist()
      ([[0.0, -5.0], [2.0, 0.0]], [[False, True], [True, False]])
    """

    updater: jaxpruner.BaseUpdater = dataclasses.field(kw_only=True)

    def sparse_state(self, server_state: Any) -> SparseState:
        """The `jaxpruner.SparseState` inside a server state."""
        return find_state(server_state.opt_state)

    def masks(self, server_state: Any) -> Any:
        """The boolean masks of a server state, shaped like its parameters; None where not pruned.

        For `hyp_cluster`, whose state has parameters for each cluster, it is a list of them.
        """
        if hasattr(server_state, "cluster_params"):
            clusters = zip(server_state.opt_states, server_state.cluster_params, strict=True)
            return [self._masks(opt_state, params) for opt_state, params in clusters]
        return self._masks(server_state.opt_state, server_state.params)

    def _masks(self, opt_state: Any, params: Any) -> Any:
        state = find_state(opt_state)
        # Before the first round, the masks of `from_params` and `preserve` are in the parameters alone.
        state = state._replace(masks=self.updater.starting_masks(params, state))
        return self.updater.current_masks(state, params)


def server_optimizer(
    inner: optax.GradientTransformation,
    updater: jaxpruner.BaseUpdater | Mapping[str, Any] | None = None,
    /,
    **config: Any,
) -> SparseOptimizer:
    r"""A server optimizer for `fed_avg`, `fed_prox` and `agnostic_fed_avg` that keeps the server sparse.

    FedJAX's server takes the mean :math:`\Delta` of the clients' `server params - client params`,
    weighted by their examples, as the gradient:

    .. math:: w_{t+1} = m_t \odot \mathrm{inner}(w_t, \Delta_t), \quad m_t \in \{0, 1\}

    So `saliency` scores :math:`|w \Delta|` and `rigl` grows where :math:`|\Delta|` is largest, as in the
    paper. The schedule counts rounds.

    Args:
      inner: any optax optimizer, such as `optax.adam(10**-2.5)`.
      updater: an algorithm of JaxPruner, or a configuration (`jaxpruner.create_updater_from_config`).
      **config: the configuration as keywords, in place of `updater`.

    Returns:
      The optimizer to pass as `server_optimizer=`.

    Raises:
      ValueError: if the configuration is not valid, or the algorithm needs the loss, which FedJAX does not pass on.

    Examples:
      >>> import jax.numpy as jnp
      >>> server = server_optimizer(
      ...     optax.adam(1e-2), algorithm="magnitude", sparsity=0.8, update_start_step=10, update_end_step=20
      ... )
      >>> state = server.init({"w": jnp.ones((4, 5))})
      >>> holds_masks(state)
      True
    """
    transformation = jaxpruner.sparsify(inner, updater, **config)
    stock, algorithm = fedjax.optimizers.create_optimizer_from_optax(transformation), transformation.init.updater
    checks.check_trainer(algorithm)
    if (period := _dropping_period(algorithm)) is not None:
        logging.warning(
            "server_optimizer: one of %d rounds between the first and the last mask update is lost. %s",
            period,
            why_rounds_are_lost(algorithm),
        )

    def apply(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        if not holds_masks(opt_state):
            raise ValueError(
                "opt_state: holds no masks, so it was made by a dense server; start from its parameters with "
                "algorithm.init(params), or go on with the optimizer that it was made by."
            )
        return stock.apply(grads, opt_state, params)

    return SparseOptimizer(stock.init, apply, updater=algorithm)


# The period of mask updates in the paper's federated experiment; rounds lost less often need no warning.
_USUAL_PERIOD = 10


def _dropping_period(updater: jaxpruner.BaseUpdater) -> int | None:
    """How often a round is lost, if that is more often than usual."""
    period = getattr(updater.scheduler, "update_freq", None)
    return period if updater.skip_gradients and period is not None and period < _USUAL_PERIOD else None


def why_rounds_are_lost(updater: jaxpruner.BaseUpdater) -> str:
    """What happens in the rounds of mask updates of a method that skips gradients, and what to do."""
    return (
        f"{type(updater).__name__} takes no server step in a round of mask updates, so what the clients trained in it "
        "is dropped. Update masks less often (update_freq), or give skip_gradients=False, which takes the step too."
    )


_NO_SERVER_STEP = (
    "it mimics one optimizer on all clients and moves the server's parameters without it, so nothing would keep them "
    "on their masks. Use fed_avg, fed_prox or agnostic_fed_avg, with the sparse optimizer as server_optimizer."
)
_STARTS_ANEW = (
    "a client's optimizer starts anew in each round, so its schedule would never leave round 0 and its masks would "
    "not be the server's. Give it as server_optimizer; jaxpruner_fedjax.federated_averaging keeps clients on the "
    "server's masks."
)

# Module of FedJAX, function, argument, why it cannot be sparse.
_REFUSED = (
    ("mime", "mime", "base_optimizer", _NO_SERVER_STEP),
    ("mime_lite", "mime_lite", "base_optimizer", _NO_SERVER_STEP),
    ("fed_avg", "federated_averaging", "client_optimizer", _STARTS_ANEW),
    ("fed_prox", "fed_prox", "client_optimizer", _STARTS_ANEW),
    ("agnostic_fed_avg", "agnostic_federated_averaging", "client_optimizer", _STARTS_ANEW),
    ("hyp_cluster", "hyp_cluster", "client_optimizer", _STARTS_ANEW),
    ("hyp_cluster", "ModelKMeansInitializer.__init__", "client_optimizer", _STARTS_ANEW),
)


def guard() -> None:
    """Makes FedJAX's algorithms refuse a sparse optimizer where it would not keep anything sparse.

    In everything else they are the stock functions. Importing `jaxpruner_fedjax` does it.
    """
    for module_name, path, argument, reason in _REFUSED:
        *classes, name = path.split(".")
        owner = sys.modules.get(f"fedjax.algorithms.{module_name}")
        for class_name in classes:
            owner = getattr(owner, class_name, None)
        build = getattr(owner, name, None)
        if build is not None and not hasattr(build, "_refuses_sparse"):
            where = f"{path.removesuffix('.__init__')}: {argument}"
            setattr(owner, name, _refusing(build, argument, where, reason))


def dense_client(optimizer: Any, algorithm: str) -> fedjax.optimizers.Optimizer:
    """The optimizer of the clients of an algorithm, which may not be a sparse one (`dense_only`)."""
    return dense_only(optimizer, f"{algorithm}: client_optimizer", _STARTS_ANEW)


def dense_only(optimizer: Any, where: str, reason: str) -> fedjax.optimizers.Optimizer:
    """The optimizer, with a ValueError as soon as it is, or turns out to be, a sparse one.

    A sparse optimizer is recognised by the masks in its state, however it was made and whatever it was wrapped in
    (`fedjax.optimizers.create_optimizer_from_optax(jaxpruner.sparsify(...))`). Clients make their states while JAX
    traces them, before anything is trained.
    """
    refusal = f"{where}: cannot be sparse, because {reason}"
    if isinstance(optimizer, SparseOptimizer):
        raise ValueError(refusal)

    def init(params: Any) -> Any:
        return checked(optimizer.init(params))

    def apply(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        return optimizer.apply(grads, checked(opt_state), params)

    def checked(opt_state: Any) -> Any:
        if holds_masks(opt_state):
            raise ValueError(refusal)
        return opt_state

    return fedjax.optimizers.Optimizer(init, apply)


def holds_masks(opt_state: Any) -> bool:
    """Whether a sparse state is anywhere in an optimizer's state."""
    return bool(find_states(opt_state))


def _refusing(build: Callable, argument: str, where: str, reason: str) -> Callable:
    signature = inspect.signature(build)

    @functools.wraps(build)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.arguments[argument] = dense_only(given.arguments[argument], where, reason)
        return build(*given.args, **given.kwargs)

    checked._refuses_sparse = True  # type: ignore[attr-defined]
    return checked
