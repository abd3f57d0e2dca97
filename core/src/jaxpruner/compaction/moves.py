"""The rules for primitives that move entries: reshapes, slices, concatenations, indices."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpruner.compaction import axes
from jaxpruner.compaction.axes import Dim
from jaxpruner.compaction.rules import Dims, Step, freeze, fresh, rule, shape_of, unify, unknown, without


@rule("broadcast_in_dim")
def _broadcast(step: Step) -> list[Dims]:
    params = step.equation.params
    outputs = list(fresh(params["shape"]))
    for dim, axis in zip(step.inputs[0], params["broadcast_dimensions"], strict=True):
        if dim.size == outputs[axis].size:
            outputs[axis] = dim
    return [tuple(outputs)]


@rule("tile")
def _tile(step: Step) -> list[Dims]:
    # Entries repeat as a whole: the repeats are the major factor.
    repeats = step.equation.params["reps"]
    return [tuple(axes.product([Dim(times), dim]) for times, dim in zip(repeats, step.inputs[0], strict=True))]


@rule("reshape")
def _reshape(step: Step) -> list[Dims]:
    sizes, where = step.equation.params["new_sizes"], step.where
    if 0 in sizes or step.equation.params.get("dimensions") is not None:
        return unknown(step)
    outputs = axes.regroup(step.inputs[0], sizes, where)
    return [fresh(sizes, f"cannot be told apart in {where}") if outputs is None else tuple(outputs)]


@rule("transpose")
def _transpose(step: Step) -> list[Dims]:
    return [tuple(step.inputs[0][axis] for axis in step.equation.params["permutation"])]


@rule("squeeze")
def _squeeze(step: Step) -> list[Dims]:
    return [without(step.inputs[0], step.equation.params["dimensions"])]


@rule("rev")
def _reverse(step: Step) -> list[Dims]:
    freeze([step.inputs[0][axis] for axis in step.equation.params["dimensions"]], "is reversed")
    return [step.inputs[0]]


@rule("iota")
def _iota(step: Step) -> list[Dims]:
    dims = fresh(step.equation.params["shape"])
    dims[step.equation.params["dimension"]].freeze("is counted by iota")
    return [dims]


@rule("concatenate")
def _concatenate(step: Step) -> list[Dims]:
    along = step.equation.params["dimension"]
    first = step.inputs[0]
    for dims in step.inputs[1:]:
        unify(without(first, [along]), without(dims, [along]), step.where)
    whole = axes.concatenation([dims[along] for dims in step.inputs])
    return [(*first[:along], whole, *first[along + 1 :])]


@rule("stack")
def _stack(step: Step) -> list[Dims]:
    along, (first, *others) = step.equation.params["axis"], step.inputs
    for dims in others:
        unify(first, dims, step.where)
    return [(*first[:along], Dim(len(step.inputs), "is made by stack"), *first[along:])]


@rule("unstack")
def _unstack(step: Step) -> list[Dims]:
    (dims,), along = step.inputs, step.equation.params["axis"]
    dims[along].freeze("is taken apart by unstack")
    return [without(dims, [along])] * len(step.equation.outvars)


@rule("split")
def _split(step: Step) -> list[Dims]:
    (dims,), along = step.inputs, step.equation.params["axis"]
    outputs, rest = [], dims[along]
    for size in step.equation.params["sizes"]:
        part, rest = _cut(rest, size, step.where)
        outputs.append((*dims[:along], part, *dims[along + 1 :]))
    return outputs


def _cut(dim: Dim, position: int, where: str) -> tuple[Dim, Dim]:
    if position in (0, dim.size):
        return (dim, Dim(0)) if position else (Dim(0), dim)
    return axes.cut(dim, position, where)


@rule("slice")
def _slice(step: Step) -> list[Dims]:
    params = step.equation.params
    strides = params["strides"] or [1] * len(params["start_indices"])
    outputs = []
    for dim, start, limit, stride in zip(
        step.inputs[0], params["start_indices"], params["limit_indices"], strides, strict=True
    ):
        if stride == 1 and limit > start:
            before, _ = _cut(dim, limit, step.where)
            outputs.append(_cut(before, start, step.where)[1])
        elif limit > start and (limit - start, stride) != (1, 1):
            dim.freeze("is taken in strides")
            outputs.append(Dim(-(-(limit - start) // stride), "is taken in strides"))
        else:
            dim.freeze("is cut away")
            outputs.append(Dim(0))
    return [tuple(outputs)]


@rule("pad")
def _pad(step: Step) -> list[Dims]:
    outputs = []
    for dim, (low, high, interior) in zip(step.inputs[0], step.equation.params["padding_config"], strict=True):
        if interior == 0 and min(low, high) >= 0:
            outputs.append(axes.concatenation([Dim(low), dim, Dim(high)]))
        else:
            dim.freeze("is padded inside")
            size = low + high + dim.size + interior * max(dim.size - 1, 0)
            outputs.append(Dim(size, "is padded inside"))
    return [tuple(outputs)]


@rule("dynamic_slice")
def _dynamic_slice(step: Step) -> list[Dims]:
    return [_windows(step.inputs[0], step.equation.params["slice_sizes"], step.where)]


def _windows(dims: Dims, sizes: Sequence[int], where: str) -> Dims:
    """Whole axes pass; what is taken by an index stays as it is."""
    reason = f"is indexed by {where}"
    outputs = []
    for dim, size in zip(dims, sizes, strict=True):
        if dim.size != size:
            dim.freeze(reason)
            dim = Dim(size, reason)
        outputs.append(dim)
    return tuple(outputs)


@rule("dynamic_update_slice")
def _dynamic_update_slice(step: Step) -> list[Dims]:
    operand, update, *_ = step.inputs
    _meet_windows(operand, update, step.where)
    return [operand]


def _meet_windows(whole: Sequence[Dim], window: Sequence[Dim], where: str) -> None:
    for dim, part in zip(whole, window, strict=True):
        if dim.size == part.size:
            axes.unify(dim, part, where)
        else:
            freeze([dim, part], f"is indexed by {where}")


@rule("gather")
def _gather(step: Step) -> list[Dims]:
    operand, indices = step.inputs
    numbers, sizes = step.equation.params["dimension_numbers"], step.equation.params["slice_sizes"]
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    for axis, index_axis in zip(batching, getattr(numbers, "start_indices_batching_dims", ()), strict=True):
        axes.unify(operand[axis], indices[index_axis], step.where)
    freeze([operand[axis] for axis in numbers.collapsed_slice_dims], f"is indexed by {step.where}")
    gone = {*batching, *numbers.collapsed_slice_dims}
    kept = [axis for axis in range(len(operand)) if axis not in gone]
    window = _windows(tuple(operand[axis] for axis in kept), [sizes[axis] for axis in kept], step.where)
    outputs = dict(zip(numbers.offset_dims, window, strict=True))
    rest = iter(indices[:-1])
    return [tuple(outputs[i] if i in outputs else next(rest) for i in range(len(shape_of(step.equation.outvars[0]))))]


@rule("scatter", "scatter-add", "scatter_add", "scatter_mul", "scatter_min", "scatter_max", "scatter-mul",
       "scatter-min", "scatter-max")  # fmt: skip
def _scatter(step: Step) -> list[Dims]:
    operand, indices, updates = step.inputs
    numbers = step.equation.params["dimension_numbers"]
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    for axis, index_axis in zip(batching, getattr(numbers, "scatter_indices_batching_dims", ()), strict=True):
        axes.unify(operand[axis], indices[index_axis], step.where)
    freeze([operand[axis] for axis in numbers.inserted_window_dims], f"is indexed by {step.where}")
    gone = {*batching, *numbers.inserted_window_dims}
    _meet_windows(
        [dim for axis, dim in enumerate(operand) if axis not in gone],
        [updates[axis] for axis in numbers.update_window_dims],
        step.where,
    )
    unify(without(updates, numbers.update_window_dims), indices[:-1], step.where)
    return [operand]
