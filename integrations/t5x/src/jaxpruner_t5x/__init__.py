"""Makes T5X runs sparse by one more gin file: the stock trainer, any T5X optimizer, every algorithm of JaxPruner."""

from jaxpruner_t5x import compatibility

compatibility.load()

from jaxpruner_t5x.description import described  # noqa: E402  (they import T5X)
from jaxpruner_t5x.metrics import SparsityMetrics  # noqa: E402
from jaxpruner_t5x.optimizer import SparseOptimizer, create_updater  # noqa: E402
from jaxpruner_t5x.partition_rules import register_partition_rules  # noqa: E402
from jaxpruner_t5x.plan import configured_model, planned  # noqa: E402
from jaxpruner_t5x.restore import dense_or_sparse  # noqa: E402

register_partition_rules()

__all__ = [
    "SparseOptimizer",
    "SparsityMetrics",
    "configured_model",
    "create_updater",
    "dense_or_sparse",
    "described",
    "planned",
]
