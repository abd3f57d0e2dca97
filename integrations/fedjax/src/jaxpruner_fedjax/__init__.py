"""Sparse federated learning with FedJAX: a sparse server in one call, sparse clients, counted bytes.

Importing it repairs FedJAX where today's JAX breaks it (`compatibility`), so import it before you build
algorithms.
"""

from jaxpruner_fedjax import compatibility, server

compatibility.mend()
server.guard()

from jaxpruner_fedjax.clients import federated_averaging  # noqa: E402  (builds on what was mended)
from jaxpruner_fedjax.communication import ClientUpdates, Ledger, Traffic  # noqa: E402
from jaxpruner_fedjax.compaction import CompactModel, compact_model, find_groups  # noqa: E402
from jaxpruner_fedjax.sampling import sample_clients  # noqa: E402
from jaxpruner_fedjax.server import SparseOptimizer, server_optimizer  # noqa: E402

__all__ = [
    "ClientUpdates",
    "CompactModel",
    "Ledger",
    "SparseOptimizer",
    "Traffic",
    "compact_model",
    "federated_averaging",
    "find_groups",
    "sample_clients",
    "server_optimizer",
]
