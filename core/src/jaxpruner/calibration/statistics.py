"""What calibration needs to know of the inputs of a layer: sums over all tokens, so that they add over batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpruner import layouts

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from jaxpruner.calibration.program import Operation


class Statistics(NamedTuple):
    """Sums over the tokens of the inputs x of a layer, of each of a batch of matrices.

    Attributes:
      tokens: their number.
      sums: of x.
      squares: of x².
      gram: of x xᵀ, if a method needs it.
    """

    tokens: Float[Array, ""]
    sums: Float[Array, "batch inputs"]
    squares: Float[Array, "batch inputs"]
    gram: Float[Array, "batch inputs inputs"] | None = None

    @property
    def norms(self) -> Float[Array, "batch inputs"]:
        """The Euclidean norm of each input over all tokens."""
        return jnp.sqrt(self.squares)

    @property
    def means(self) -> Float[Array, "batch inputs"]:
        """The mean of each input."""
        return self.sums / self.tokens

    @property
    def variances(self) -> Float[Array, "batch inputs"]:
        """The variance of each input."""
        return jnp.maximum(self.squares / self.tokens - self.means**2, 0.0)


def wide_dtype() -> Any:
    """What sums and solvers are in: float64 where it is enabled, or float32."""
    return jnp.result_type(float)


def features(operation: Operation, side: int, x: Any) -> Float[Array, "batch tokens inputs"]:
    """The other operand of a product, as what the matrices of the weights on this side are multiplied with."""
    x = jnp.asarray(x)
    if operation.name == "conv_general_dilated":
        return _patches(operation, x)
    contracted, batch = operation.params["dimension_numbers"]
    # In the order of the weights' own axes.
    summed = [axis for _, axis in sorted(zip(contracted[side], contracted[1 - side], strict=True))]
    batched = list(batch[1 - side])
    tokens = [axis for axis in range(x.ndim) if axis not in (*summed, *batched)]
    sizes = [int(np.prod([x.shape[axis] for axis in axes], dtype=np.int64)) for axes in (batched, tokens, summed)]
    return jnp.transpose(x, (*batched, *tokens, *summed)).reshape(sizes)


def _patches(operation: Operation, x: Any) -> Float[Array, "batch tokens inputs"]:
    params = operation.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    _, kernel_inputs, *kernel_space = numbers.rhs_spec
    window = [operation.inputs[1].shape[axis] for axis in kernel_space]
    patches = jax.lax.conv_general_dilated_patches(
        jnp.transpose(x, numbers.lhs_spec),
        window,
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        precision=jax.lax.Precision.HIGHEST,
    )
    images, channels, *space = patches.shape
    inputs = channels // groups // int(np.prod(window))
    patches = patches.reshape(images, groups, inputs, *window, *space)
    where = {kernel_inputs: 2, **{axis: 3 + i for i, axis in enumerate(kernel_space)}}
    summed = [where[axis] for axis in sorted(where)]
    tokens = [0, *range(3 + len(window), patches.ndim)]
    return jnp.transpose(patches, (1, *tokens, *summed)).reshape(groups, images * int(np.prod(space)), -1)


def of_batch(x: Float[Array, "batch tokens inputs"], with_gram: bool) -> Statistics:
    """The sums over one batch."""
    x = x.astype(wide_dtype())
    gram = None
    if with_gram:
        layout = layouts.explicit_layout(x)
        # On a mesh of explicit axes someone has to say that all devices get the sum over tokens.
        where: Any = {} if layout is None else {"out_sharding": NamedSharding(layout.mesh, PartitionSpec())}
        gram = jnp.einsum("bti,btj->bij", x, x, precision=jax.lax.Precision.HIGHEST, **where)
    return Statistics(jnp.asarray(x.shape[1], x.dtype), x.sum(1), jnp.square(x).sum(1), gram)


def added(a: Statistics | None, b: Statistics) -> Statistics:
    """The sums over both."""
    return b if a is None else jax.tree.map(jnp.add, a, b)
