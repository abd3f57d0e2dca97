"""Makes any of Scenic's trainers sparse from `config.sparsity_config`, without editing it."""

from jaxpruner_scenic import compatibility

compatibility.load()

from jaxpruner_scenic.sparse import sparse_training, sparsity_logs  # noqa: E402  (they import Scenic)

__all__ = ["sparse_training", "sparsity_logs"]
