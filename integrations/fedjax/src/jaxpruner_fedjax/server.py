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

import jaxpruner
from jaxpruner.training.projection import SparseState, find_state


@dataclasses.dataclass(frozen=True)
class SparseOptimizer(fedjax.optimizers.Optimizer):
    """A `fedjax.optimizers.Optimizer` that keeps the server's parameters exactly on their masks.

    Attributes:
      init, apply: as in FedJAX.
      updater: the algorithm that makes the masks.
    """

    updater: jaxpruner.BaseUpdater = dataclasses.field(kw_only=True)

    def sparse_state(self, server_state: Any) -> SparseState:
        """The `jaxpruner.SparseState` inside a server state."""
        return find_state(server_state.opt_state)

    def masks(self, server_state: Any) -> Any:
        """The boolean masks of a server state, shaped like its parameters; None where not pruned."""
        return self.updater.current_masks(self.sparse_state(server_state), server_state.params)


def server_optimizer(
    inner: optax.GradientTransformation,
    updater: jaxpruner.BaseUpdater | Mapping[str, Any] | None = None,
    /,
    **config: Any,
) -> SparseOptimizer:
    r"""A server optimizer for `fed_avg`, `fed_prox` and `agnostic_fed_avg` that keeps the server sparse.

    The server of FedJAX takes the mean :math:`\Delta` of the clients' `server params - client params`,
    weighted by their examples, for the gradient:

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
      ValueError: if the configuration is not valid.
    """
    if updater is None:
        updater, config = jaxpruner.create_updater_from_config(config), {}
    elif hasattr(updater, "items") and not config:
        updater = jaxpruner.create_updater_from_config(updater)
    stock = fedjax.optimizers.create_optimizer_from_optax(jaxpruner.sparsify(inner, updater, **config))
    return SparseOptimizer(stock.init, stock.apply, updater=updater)


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
)


def guard() -> None:
    """Makes FedJAX's algorithms refuse a sparse optimizer where it would not keep anything sparse.

    They are the stock functions in all else. Importing `jaxpruner_fedjax` does it.
    """
    for module_name, name, argument, reason in _REFUSED:
        module = sys.modules.get(f"fedjax.algorithms.{module_name}")
        build = getattr(module, name, None)
        if build is not None and not hasattr(build, "_refuses_sparse"):
            setattr(module, name, _refusing(build, argument, reason))


def refuse_sparse(optimizer: Any, where: str, reason: str) -> None:
    """Raises a ValueError if an optimizer is a sparse one."""
    if isinstance(optimizer, SparseOptimizer):
        raise ValueError(f"{where}: cannot be sparse, because {reason}")


def refuse_sparse_client(optimizer: Any, algorithm: str) -> None:
    """Raises a ValueError if the optimizer of the clients is a sparse one."""
    refuse_sparse(optimizer, f"{algorithm}: client_optimizer", _STARTS_ANEW)


def _refusing(build: Callable, argument: str, reason: str) -> Callable:
    signature = inspect.signature(build)

    @functools.wraps(build)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args, **kwargs).arguments
        refuse_sparse(given.get(argument), f"{build.__name__}: {argument}", reason)
        return build(*args, **kwargs)

    checked._refuses_sparse = True
    return checked
