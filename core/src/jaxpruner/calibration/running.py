"""Runs a program over all batches side by side, one product of a parameter after the other."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import numpy as np

from jaxpruner.calibration import statistics
from jaxpruner.calibration.program import Constant, Leaf, Operation, Program, Value, contents
from jaxpruner.calibration.statistics import Statistics
from jaxpruner.calibration.weights import Use, Weights


class Layer(NamedTuple):
    """What calibration sees of a part of a leaf, at its last use.

    Attributes:
      use: the product.
      weights: its matrices, as they are.
      statistics: `Statistics` of their inputs, over all uses; None if the caller skipped them.
    """

    use: Use
    weights: Any
    statistics: Any


class Calibration:
    """One forward pass over batches.

    Args:
      program: the function.
      weights: where the program uses its parameters.
      leaves: their values, which `run` changes.
      batches: the values of the other arguments, for each batch.
      known: the value of anything that depends on no argument.
    """

    def __init__(
        self,
        program: Program,
        weights: Weights,
        leaves: Leaves,
        batches: Sequence[Sequence[Any]],
        known: Callable[[Any], Any],
    ):
        self._program, self._weights, self._known = program, weights, known
        self.leaves = leaves
        self._batches = batches
        self._uses: dict[Operation, list[Use]] = {}
        for use in weights.uses:
            self._uses.setdefault(use.operation, []).append(use)
        self._order = self._needed()
        self._last = {value: i for i, op in enumerate(self._order) for value in self._reads(op)}
        self._compiled: dict[Any, Any] = {}

    def fingerprint(self) -> str:
        """See :meth:`Program.fingerprint`."""
        return self._program.fingerprint()

    def without_data(self) -> Iterator[Layer]:
        """Yields each part of each leaf as `run` does, without statistics, and without the pass."""
        for operation in self._order:
            for use in self._uses.get(operation, ()):
                if use.is_last:
                    yield Layer(use, self._matrices(use), None)

    def run(
        self, name_of: Callable[[Leaf], str], with_gram: bool, skips: Callable[[Use], bool] = lambda use: False
    ) -> Iterator[Layer]:
        """Yields each part of each leaf at its last use.

        The pass continues with whatever the caller made of `self.leaves` before it asked for the next part.

        Args:
          name_of: the name of a leaf.
          with_gram: whether statistics have Gram matrices.
          skips: the uses whose statistics are not needed.

        Raises:
          ValueError: if the inputs of a layer are not finite, or there are none.
        """
        values: dict[Any, list[Any]] = {
            argument: [batch[i] for batch in self._batches] for i, argument in enumerate(self._program.arguments)
        }
        pending: list[Operation] = []
        # Layers that read the same share its statistics, such as query, key and value.
        seen: dict[Any, Statistics] = {}
        sums: dict[int, Statistics] = {}
        for i, operation in enumerate(self._order):
            if uses := self._uses.get(operation):
                self._flush(pending, values, i)
                seen = {key: found for key, found in seen.items() if key[0] in values}
                for use in uses:
                    if not skips(use):
                        more = self._statistics(use, values, with_gram, seen, name_of(use.leaf))
                        sums[use.part] = statistics.added(sums.get(use.part), more)
                    if use.is_last:
                        found = sums.pop(use.part, None)
                        _check_seen(found, name_of(use.leaf))
                        yield Layer(use, self._matrices(use), found)
            pending.append(operation)

    def _needed(self) -> list[Operation]:
        """What the inputs of the products are made of, in order, but for what depends on no data."""
        needed: set[Any] = set()
        kept = []
        for operation in reversed(self._program.operations):
            uses = self._uses.get(operation, ())
            is_read = not needed.isdisjoint(operation.outputs)
            if uses or is_read:
                is_data = any(output in self._weights.data for output in operation.outputs)
                needed.update(use.activation for use in uses)
                if is_read:
                    needed.update(self._reads(operation))
                if uses or is_data:
                    kept.append(operation)
        return kept[::-1]

    def _reads(self, operation: Operation) -> list[Value]:
        # In order: a set has another order for each layer, and then each layer would be compiled anew.
        return [
            operand
            for operand in operation.inputs
            if isinstance(operand, Value) and operand in self._weights.data and not self._weights.leaves_of(operand)
        ]

    def _flush(self, pending: list[Operation], values: dict[Any, list[Any]], now: int) -> None:
        """Runs what waits, for each batch, and forgets what nothing needs any more."""
        waiting = list(pending)
        pending.clear()
        made = dict.fromkeys(output for operation in waiting for output in operation.outputs)
        read = dict.fromkeys(value for operation in waiting for value in self._reads(operation))
        given = [value for value in read if value not in made]
        kept = [value for value in made if self._last.get(value, -1) >= now]
        fixed = list(
            dict.fromkeys(
                operand
                for operation in waiting
                for operand in operation.inputs
                if operand not in made and operand not in read and not _is_literal(operand)
            )
        )
        if kept:
            run = self._segment(waiting, fixed, given, kept)
            constants = [self._constant(value) for value in fixed]
            rows = []
            for batch in range(len(self._batches)):
                rows.append(run(constants, [values[value][batch] for value in given]))
                for value in given:
                    if self._last[value] < now:
                        values[value][batch] = None
            values.update(zip(kept, map(list, zip(*rows, strict=True)), strict=True))
        for value in [value for value in values if self._last.get(value, -1) < now]:
            del values[value]

    def _constant(self, value: Any) -> Any:
        if self._weights.leaves_of(value):
            return self._weights.value(value, self.leaves)
        return self._known(value)

    def _segment(
        self, operations: Sequence[Operation], fixed: list[Any], given: list[Any], kept: list[Any]
    ) -> Callable[..., list[Any]]:
        """One compiled function for operations; layers that are alike share it."""
        numbers = {value: i for i, value in enumerate([*fixed, *given])}
        key: list[Any] = [tuple(map(_kind, [*fixed, *given])), len(fixed)]

        def name(operand: Any) -> Any:
            return contents(operand.value) if _is_literal(operand) else numbers[operand]

        for operation in operations:
            key.append((operation.key, tuple(map(name, operation.inputs))))
            for output in operation.outputs:
                numbers[output] = len(numbers)
        key.append(tuple(numbers[value] for value in kept))

        def run(constants: Sequence[Any], data: Sequence[Any]) -> list[Any]:
            found = dict(zip([*fixed, *given], [*constants, *data], strict=True))
            for operation in operations:
                results = operation.run([o.value if _is_literal(o) else found[o] for o in operation.inputs])
                found.update(zip(operation.outputs, results, strict=True))
            return [found[value] for value in kept]

        return self._compiled.setdefault(tuple(key), jax.jit(run))

    def _matrices(self, use: Use) -> Any:
        return use.of_leaf(self._weights.value(use.weight, self.leaves))

    def _statistics(self, use: Use, values: Any, with_gram: bool, seen: dict[Any, Statistics], name: str) -> Statistics:
        key = use.activation, use.features
        if key not in seen:
            key_of_program = "statistics", use.features, with_gram

            def of_batch(x):
                return statistics.of_batch(statistics.features(use.operation, use.side, x), with_gram)

            sums = self._compiled.setdefault(key_of_program, jax.jit(of_batch))
            is_data = use.activation in self._weights.data
            inputs = values[use.activation] if is_data else [self._known(use.activation)]
            total: Any = functools.reduce(statistics.added, map(sums, inputs), None)
            if not _is_finite(total):  # asked once, so that batches need not wait for one another
                batch = next((i for i, x in enumerate(inputs) if not _is_finite(sums(x))), 0)
                raise ValueError(
                    f"{name}: its inputs are not finite in batch {batch}; look at the parameters before it, or at the "
                    "batch, or compute in a wider dtype."
                )
            seen[key] = total
        return seen[key]


def _is_finite(found: Statistics) -> bool:
    return bool(np.isfinite(np.asarray(found.squares)).all())


def _check_seen(found: Statistics | None, name: str) -> None:
    """Tells if nothing that was seen says which weights of a layer matter."""
    if found is None:
        return
    if not float(found.tokens):
        raise ValueError(f"{name}: its inputs are empty in batch 0, as in all others; give batches with examples.")
    if not np.any(np.asarray(found.squares)):
        warnings.warn(
            f"prune_oneshot: {name}: its inputs are 0 in all batches, which tells nothing of its weights; look at the "
            "batches, give more of them, or leave it out by filter_fn.",
            stacklevel=2,
        )


def _is_literal(operand: Any) -> TypeGuard[Constant]:
    return isinstance(operand, Constant) and operand.is_literal


def _kind(value: Any) -> Any:
    of = value.value if isinstance(value, Constant) else value
    return tuple(of.shape), str(of.dtype)


class Leaves(Mapping[Leaf, Any]):
    """The values of leaves: parameters, layers of those that are stacks, and what became of them.

    Layers are cut out of their stacks when they are asked for, so that there is no second copy of the parameters.
    """

    def __init__(self, leaves: Iterable[Leaf], params: Sequence[Any]):
        self._params = params
        self._changed: dict[Leaf, Any] = dict.fromkeys(leaves)

    def __getitem__(self, leaf: Leaf) -> Any:
        changed = self._changed[leaf]
        if changed is not None:
            return changed
        return self._params[leaf.number][leaf.index] if leaf.index else self._params[leaf.number]

    def __setitem__(self, leaf: Leaf, value: Any) -> None:
        self._changed[leaf] = value

    def __contains__(self, leaf: object) -> bool:
        return leaf in self._changed

    def __iter__(self) -> Iterator[Leaf]:
        return iter(self._changed)

    def __len__(self) -> int:
        return len(self._changed)

    def take(self, leaf: Leaf) -> Any:
        """The value of a leaf, which is forgotten."""
        value = self[leaf]
        del self._changed[leaf]
        return value


def known_values(program: Program, leaves: Leaves) -> Callable[[Any], Any]:
    """A function from what depends on no argument, and on no parameter that is pruned, to its value."""
    producers = {output: operation for operation in program.operations for output in operation.outputs}
    leaf_of = {value: leaf for leaf, value in program.leaves.items()}
    done: dict[Any, Any] = {}

    def look_up(value: Any) -> Any:
        if isinstance(value, Constant):
            return value.value
        if value in leaf_of:
            return leaves[leaf_of[value]]
        if value not in done:
            operation = producers[value]
            done.update(zip(operation.outputs, operation.run([*map(look_up, operation.inputs)]), strict=True))
        return done[value]

    return look_up
