"""Sparse training with Keras 3 on JAX: any Keras optimizer made sparse, under the stock `fit`."""

from jaxpruner_keras.callback import SparsityLogger
from jaxpruner_keras.functions import pure_function, weights_of
from jaxpruner_keras.optimizer import SparseOptimizer

__all__ = ["SparseOptimizer", "SparsityLogger", "pure_function", "weights_of"]
