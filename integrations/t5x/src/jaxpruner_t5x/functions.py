"""What a T5X model computes, as functions of its parameters: the forward pass, and decoding with its cache."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import gin
import jax
import jax.numpy as jnp
from flax import core

import jaxpruner
from jaxpruner.coupled_structures import AllGroups, Coupled

_LENGTH = 8  # of an example whose groups are those of any length


def forward(model: Any) -> Any:
    """The logits of a batch as T5X's training and scoring compute them, `fn(params, batch)`."""
    return lambda params, batch: model._compute_logits(params, batch)


def predict(model: Any) -> Any:
    """What the model decodes for a batch, with a cache made inside: T5X's `predict_batch`, `fn(params, batch)`."""
    return lambda params, batch: model.predict_batch(params, batch)


def bound(fn: Any) -> Any:
    """A function with its current arguments from gin, which it would otherwise look up when it is traced."""
    try:
        return functools.partial(fn, **gin.get_bindings(fn))
    except (TypeError, ValueError):  # none that gin knows
        return fn


def example(model: Any) -> dict[str, Any]:
    """The shapes of a small batch."""
    features = model.FEATURE_CONVERTER_CLS.MODEL_FEATURES
    return {name: jax.ShapeDtypeStruct((2, _LENGTH), jnp.int32) for name in features}


def shapes(model: Any, batch: Mapping[str, Any]) -> Any:
    """The shapes of the parameters."""
    sizes = {name: leaf.shape for name, leaf in batch.items()}
    variables = jax.eval_shape(lambda rng: model.get_initial_variables(rng, sizes), jax.random.PRNGKey(0))
    return core.unfreeze(variables["params"])


def groups_of(model: Any, wanted: AllGroups) -> Coupled:
    """The groups that a configuration asks for, of a model as its training sees it."""
    batch = example(model)
    return wanted.of(jaxpruner.find_groups(forward(model), shapes(model, batch), batch))
