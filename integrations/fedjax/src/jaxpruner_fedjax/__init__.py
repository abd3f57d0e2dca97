"""Sparse federated learning with FedJAX: a sparse server in one call, sparse clients, counted bytes.

Importing it mends FedJAX where today's JAX breaks it (`compatibility`), so import it before algorithms
are built.
"""

from jaxpruner_fedjax import compatibility, server

compatibility.mend()
server.guard()

from jaxpruner_fedjax.clients import federated_averaging  # noqa: E402  (builds on what was mended)
from jaxpruner_fedjax.communication import ClientUpdates, Ledger, Traffic  # noqa: E402
from jaxpruner_fedjax.sampling import sample_clients  # noqa: E402
from jaxpruner_fedjax.server import SparseOptimizer, server_optimizer  # noqa: E402

__all__ = [
    "ClientUpdates",
    "Ledger",
    "SparseOptimizer",
    "Traffic",
    "federated_averaging",
    "sample_clients",
    "server_optimizer",
]
