"""A function with its parameters and batches, ready to be calibrated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxpruner import sparsity_distributions, trees
from jaxpruner.calibration.program import Leaf, program_of, stack_depths
from jaxpruner.calibration.running import Calibration, Leaves, known_values
from jaxpruner.calibration.weights import Weights


class Task:
    """A function and its parameters, with batches to run it on."""

    def __init__(self, forward: Callable[[Any, Any], Any], params: Any, batches: Sequence[Any]):
        check_batches(batches)
        self.arrays, self.paths, self.with_arrays = trees.parted(params)
        # The same with None in place of what is no array.
        self.arrays_only = trees.parted(jax.tree.map(lambda p: p if trees.is_array(p) else None, params)).joined
        self.params = params
        self._closed = jax.make_jaxpr(lambda arrays, batch: forward(self.with_arrays(arrays), batch))(
            self.arrays, batches[0]
        )
        self.batches = [jax.tree.leaves(batch) for batch in batches]

    def layers(self) -> Any:
        """The parameters as filters and distributions see them: a stack that loops run through as one layer."""
        depths = dict(zip(self.paths, stack_depths(self._closed, len(self.arrays)), strict=True))

        def layer(path: trees.KeyPath, leaf: Any) -> Any:
            if not (depth := depths.get(path, 0)):
                return leaf
            number = math.prod(leaf.shape[:depth])
            return sparsity_distributions.Layers(leaf.shape[depth:], leaf.dtype, number)

        return trees.map_named(layer, trees.numbers_only(self.params))

    def calibration(self, prunable: set[int]) -> tuple[Weights, Calibration]:
        """What becomes of the parameters of these numbers, and the pass."""
        program = program_of(self._closed, len(self.arrays), prunable)
        leaves = Leaves(program.leaves, self.arrays)
        known = known_values(program, leaves)
        weights = Weights(program, prunable, known)
        if not weights.uses:
            reasons = "; ".join(self.dense_lines(weights)[:4])
            raise ValueError(
                f"prune_oneshot: forward has no product with a parameter that filter_fn selects ({reasons}). If it "
                "closes over them, let it take them as its first argument, such as lambda params, x: "
                "model.apply({'params': params}, x)."
            )
        return weights, Calibration(program, weights, leaves, self.batches, known)

    def dense_lines(self, weights: Weights) -> list[str]:
        """What cannot be pruned, with the reason; layers of a stack that have the same in one line."""
        together: dict[tuple[int, str], list[str]] = {}
        for leaf, reason in weights.dense.items():
            together.setdefault((leaf.number, reason), []).append(self.name(leaf))
        return [
            f"{names[0]} {reason}"
            if len(names) == 1
            else f"{len(names)} layers of {trees.leaf_name(self.paths[number])} {reason}"
            for (number, reason), names in together.items()
        ]

    def name(self, leaf: Leaf) -> str:
        """What a leaf is called, with its number in a stack."""
        return trees.leaf_name(self.paths[leaf.number]) + "".join(f"[{i}]" for i in leaf.index)


def check_batches(batches: Sequence[Any]) -> None:
    """Raises a ValueError unless all batches have one structure and one shape."""
    if not batches:
        raise ValueError("batches: there are none; give some batches of data like that of the training.")
    structure = jax.tree.structure(batches[0])
    first = {
        path: (jax.numpy.shape(leaf), jax.numpy.result_type(leaf)) for path, leaf in trees.named_leaves(batches[0])
    }
    for i, batch in enumerate(batches):
        if jax.tree.structure(batch) != structure:
            raise ValueError(f"batches: number {i} is {jax.tree.structure(batch)}, the first is {structure}.")
        for path, leaf in trees.named_leaves(batch):
            here = jax.numpy.shape(leaf), jax.numpy.result_type(leaf)
            if here != first[path]:
                raise ValueError(
                    f"batches: {trees.leaf_name(path)} of number {i} is {here[1]}{list(here[0])}, that of the first "
                    f"{first[path][1]}{list(first[path][0])}; leave a smaller last batch out, or pad it."
                )
