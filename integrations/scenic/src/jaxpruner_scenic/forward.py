"""The forward pass of a Scenic model, as a function of all its variables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from scenic.common_lib import debug_utils

import jaxpruner


class Forward(NamedTuple):
    """What a model computes at evaluation.

    Attributes:
      fn: of (variables, *inputs); the variables are those of Flax, parameters and the model's state.
      variables: their shapes.
      inputs: the shapes of an example of each input.
    """

    fn: Callable[..., Any]
    variables: dict[str, Any]
    inputs: tuple[Any, ...]

    def find_groups(self) -> jaxpruner.Groups:
        """The groups of units; see `jaxpruner.find_groups`."""
        return jaxpruner.find_groups(self.fn, self.variables, *self.inputs)

    def shifted_parameters(self) -> tuple[str, ...]:
        """The parameters that it shifts before it multiplies with them; see `jaxpruner.shifted_parameters`."""

        def of_params(params: Any, variables: Any, *inputs: Any) -> Any:
            return self.fn({**variables, "params": params}, *inputs)

        return jaxpruner.shifted_parameters(of_params, self.variables["params"], self.variables, *self.inputs)


def forward(model_def: Any, **more: Any) -> Callable[..., Any]:
    """The function of (variables, *inputs) that Scenic's trainers call to evaluate a model."""

    def fn(variables: Any, *inputs: Any) -> Any:
        return model_def.apply(variables, *inputs, train=False, debug=False, mutable=False, **more)

    return fn


def initialized(
    params: Any, model_state: Any, *, model_def: Any, input_spec: Sequence[Any], train: bool = False, **kwargs: Any
) -> Forward:
    """The forward pass of what `train_utils.initialize_model` was called with and has returned."""
    del train
    more = {key: value for key, value in kwargs.items() if key not in ("config", "rngs")}
    inputs = [spec and debug_utils.input_spec_to_jax_shape_dtype_struct(spec, batch_size=1) for spec in input_spec]
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), {"params": params, **model_state})
    return Forward(forward(model_def, **more), shapes, tuple(inputs))
