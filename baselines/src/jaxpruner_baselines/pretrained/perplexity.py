"""How well a language model predicts a text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Forward = Callable[[Any, jax.Array], jax.Array]


def negative_log_likelihoods(forward: Forward, params: Any, windows: np.ndarray, batch_size: int = 1) -> np.ndarray:
    """The mean negative log likelihood of the tokens of each window, given those before them.

    Args:
      forward: `(params, tokens) -> logits`, of shape (batch, tokens, vocabulary). It is compiled once if it is the same
        object in each call.
      params: its parameters.
      windows: tokens of shape (n, length). The first token of each is not scored, as nothing is before it.
      batch_size: windows at once; logits of one take `4 * length * vocabulary` bytes.

    Returns:
      float64 of shape (n,), in nats a token.

    Raises:
      ValueError: if the windows are not of that shape, or not in whole batches.
    """
    if windows.ndim != 2 or windows.shape[1] < 2 or len(windows) % batch_size:
        raise ValueError(
            f"Windows of shape {windows.shape} do not make batches of {batch_size}. Needed: (n, length), "
            "n a multiple of the batch size, and length at least 2."
        )
    batches = windows.reshape(-1, batch_size, windows.shape[1])
    return np.concatenate([np.asarray(_of_batch(forward, params, batch), np.float64) for batch in batches])


def perplexity(forward: Forward, params: Any, windows: np.ndarray, batch_size: int = 1) -> float:
    """The exponential of the mean negative log likelihood over all windows; see `negative_log_likelihoods`."""
    return float(np.exp(negative_log_likelihoods(forward, params, windows, batch_size).mean()))


@functools.partial(jax.jit, static_argnums=0)
def _of_batch(forward: Forward, params: Any, tokens: jax.Array) -> jax.Array:
    logits = forward(params, tokens[:, :-1]).astype(jnp.float32)
    likelihoods = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return -likelihoods.mean(axis=-1)
