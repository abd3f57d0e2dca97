"""Dopamine's JAX agents made sparse from gin, with the stock train steps."""

from jaxpruner_dopamine import compatibility

compatibility.load()

from jaxpruner_dopamine.agents import (  # noqa: E402  (they import Dopamine)
    SparseJaxDQNAgent,
    SparseJaxFullRainbowAgent,
    SparseJaxImplicitQuantileAgent,
    SparseJaxQuantileAgent,
    SparseJaxRainbowAgent,
    SparsePPOAgent,
    SparseSACAgent,
    sparse_agent,
)
from jaxpruner_dopamine.experiment import create_runner, create_sparse_agent  # noqa: E402
from jaxpruner_dopamine.mixin import SparseAgent  # noqa: E402
from jaxpruner_dopamine.sparsity import sparsify  # noqa: E402

__all__ = [
    "SparseAgent",
    "SparseJaxDQNAgent",
    "SparseJaxFullRainbowAgent",
    "SparseJaxImplicitQuantileAgent",
    "SparseJaxQuantileAgent",
    "SparseJaxRainbowAgent",
    "SparsePPOAgent",
    "SparseSACAgent",
    "create_runner",
    "create_sparse_agent",
    "sparse_agent",
    "sparsify",
]
