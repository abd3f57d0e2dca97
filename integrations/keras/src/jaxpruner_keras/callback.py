"""Logs how sparse a model is while it trains."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

import jaxpruner
from jaxpruner_keras.optimizer import SparseOptimizer

_WIDTH = 20  # characters of the bar


class SparsityLogger(keras.callbacks.Callback):
    """Adds `sparsity` to the logs of each epoch, for `History` and later callbacks, and draws it.

    Before the first step, it also refuses a schedule that would not end within the training, and one that has ended
    below the sparsity that is asked for, as when a file is continued with a higher one.

    Args:
      verbose: whether a line with a bar is printed after each epoch.

    Examples:
      >>> once = {"algorithm": "magnitude", "sparsity": 0.75, "update_start_step": 4, "update_end_step": 4}
      >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
      >>> model.compile(SparseOptimizer(keras.optimizers.Adam(1e-2), once), loss="mse")
      >>> images, labels, given = np.ones((16, 8)), np.ones((16, 4)), {"batch_size": 4, "epochs": 2, "verbose": 0}
      >>> history = model.fit(images, labels, **given, callbacks=[SparsityLogger()])
      ░░░░░░░░░░░░░░░░░░░░ 0.00% of 32 weights pruned
      ███████████████░░░░░ 75.00% of 32 weights pruned
      >>> history.history["sparsity"]
      [0.0, 0.75]
    """

    def __init__(self, verbose: bool = True):
        super().__init__()
        self.verbose = verbose
        self._is_checked = False
        self._line = ""

    def on_train_begin(self, logs: Any = None) -> None:
        self._is_checked = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._print()
        if not self._is_checked:
            self._is_checked = True
            self._check_schedule(epoch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.jax_state_sync()  # else the variables are still those of before the epoch
        masks = self._optimizer().masks()
        size = sum(mask.size for mask in masks.values())
        sparsity = 1 - sum(int(np.count_nonzero(mask)) for mask in masks.values()) / size if size else 0.0
        if logs is not None:
            logs["sparsity"] = sparsity
        done = round(_WIDTH * sparsity)
        # Printed later: Keras's own progress bar has not ended its line yet.
        self._line = f"{'█' * done}{'░' * (_WIDTH - done)} {sparsity:.2%} of {size:,} weights pruned"

    def on_train_end(self, logs: Any = None) -> None:
        self._print()

    def _print(self) -> None:
        if self.verbose and self._line:
            print(self._line)
        self._line = ""

    def _check_schedule(self, epoch: int) -> None:
        optimizer = self._optimizer()
        optimizer.check_as_asked()
        steps, epochs = self.params.get("steps"), self.params.get("epochs")
        if steps:  # known of arrays, and of datasets that have a length
            left = steps * (epochs - epoch) // (optimizer.inner.gradient_accumulation_steps or 1)
            jaxpruner.check_schedule(optimizer.updater, num_steps=optimizer.count + left)

    def _optimizer(self) -> SparseOptimizer:
        optimizer = self.model.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            optimizer = optimizer.inner_optimizer
        if not isinstance(optimizer, SparseOptimizer):
            raise ValueError(
                f"SparsityLogger: the model is compiled with {type(self.model.optimizer).__name__}, which prunes "
                "nothing; compile it with a SparseOptimizer."
            )
        return optimizer
