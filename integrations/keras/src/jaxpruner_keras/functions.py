"""A Keras model as a pure function of its weights, for `jaxpruner.find_groups`, `compact` and `jax.export`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import keras
import numpy as np

from jaxpruner_keras.parameters import as_list, as_tree, paths_of


def weights_of(model: keras.Model) -> dict[str, Any]:
    """The weights of a model by their paths, as nested dicts: trained ones, frozen ones, and statistics of norms.

    They are copies, since Keras donates its variables to the steps of `fit`.

    Examples:
      >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="out")], name="net")
      >>> weights_of(model)["net"]["out"]["kernel"].shape
      (3, 2)
    """
    variables = _weights(model)
    return as_tree(paths_of(variables), [jnp.copy(variable.value) for variable in variables])


def pure_function(model: keras.Model) -> Callable[..., Any]:
    """The forward pass of a model, as in `predict`: `fn(weights, *inputs)`, with weights as from `weights_of`.

        fn, weights = pure_function(model), weights_of(model)
        small = jaxpruner.compact(fn, weights, images)

    Seeds of random layers are constants in it, since prediction is not random.

    Examples:
      >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="out")], name="net")
      >>> pure_function(model)(weights_of(model), jnp.ones((5, 3))).shape
      (5, 2)
    """
    variables = _weights(model)
    paths = paths_of(variables)

    def forward(weights: Any, *inputs: Any) -> Any:
        values = {id(v): value for v, value in zip(variables, as_list(paths, weights), strict=True)}
        trained, others = (
            [values[id(v)] if id(v) in values else np.asarray(v.value) for v in group]
            for group in (model.trainable_variables, model.non_trainable_variables)
        )
        outputs, _ = model.stateless_call(trained, others, *inputs, training=False)
        return outputs

    return forward


def _weights(model: keras.Model) -> list[keras.Variable]:
    if not model.built:
        raise ValueError(f"{model.name}: has no weights yet; call it on a batch, or model.build(input_shape), before.")
    return [variable for variable in model.variables if jnp.issubdtype(variable.value.dtype, jnp.floating)]
