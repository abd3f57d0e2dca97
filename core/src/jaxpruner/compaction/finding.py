"""Finds the groups of a function: reads it, and says for each atom where it is and why it must stay."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from jaxpruner import sparsity_types, trees
from jaxpruner.compaction import axes, reading, rules
from jaxpruner.compaction.axes import Axis, Dim
from jaxpruner.compaction.groups import Group, Groups, Place


@dataclasses.dataclass(eq=False)
class Found:
    """A function that was read, its parameters and its groups.

    Attributes:
      reading: the function.
      parameters: the path and the axes of each parameter, in order.
      groups: its groups.
      names: the name of each atom that can be shortened.
    """

    reading: reading.Reading
    parameters: list[tuple[trees.KeyPath, rules.Dims]]
    groups: Groups
    names: dict[Dim, str]

    def axes_of(self, dims: Sequence[Dim]) -> tuple[Axis, ...]:
        """What these axes are made of."""
        return tuple(axes.resolve(dim, self.names) for dim in dims)


def group(read: reading.Reading, paths: Sequence[trees.KeyPath]) -> Found:
    """The groups of a function whose first inputs, after its constants, are the parameters of these paths.

    Raises:
      ValueError: if the parameters are in no product.
    """
    offset = len(read.constants)
    parameters = list(zip(paths, read.inputs[offset : offset + len(paths)], strict=True))
    for dims in read.inputs[offset + len(paths) :]:
        rules.freeze(dims, reading.ARGUMENT)
    for dims in read.outputs:
        rules.freeze(dims, reading.OUTPUT)

    places: dict[Dim, list[Place]] = {}
    for path, dims in parameters:
        for axis, dim in enumerate(dims):
            for atom in dict.fromkeys(atom for atom in dim.atoms if atom.size > 1):
                places.setdefault(atom, []).append(Place(path, axis))
    contracted = _contracted(read)
    if contracted.isdisjoint(places):
        raise ValueError(
            "find_groups: fn multiplies with none of the parameters. Let it take them as its first argument, such as "
            "lambda params, x: model.apply({'params': params}, x)."
        )
    for atom in places:
        if atom not in contracted and not atom.reasons:
            atom.freeze("is in no product that could do without it")
    names = _name(places, dict(parameters))
    removable = {atom: name for atom, name in names.items() if not atom.reasons}
    found = Found(read, parameters, None, removable)  # type: ignore[arg-type]  # its groups are made of it, below
    shapes = {path: found.axes_of(dims) for path, dims in parameters}
    products = tuple(_products(read, found))

    def describe(atom: Dim) -> Group:
        less = {names[atom]: atom.size - 1}
        shortened = sum(_lost(along, less) for along in shapes.values())
        flops = sum(2 * _lost(product, less) for product in products)
        owner = _owner(places[atom], dict(parameters))
        return Group(names[atom], atom.size, tuple(places[atom]), owner.path, shortened, flops, atom.reasons)

    described = [describe(atom) for atom in places]
    found.groups = Groups(
        removable=tuple(group for group in described if not group.reasons),
        frozen=tuple(group for group in described if group.reasons),
        axes=tuple(shapes.items()),
        products=products,
    )
    return found


def _lost(along: Sequence[Axis], less: Mapping[str, int]) -> int:
    return math.prod(axes.count(axis, {}) for axis in along) - math.prod(axes.count(axis, less) for axis in along)


def _owner(places: Sequence[Place], parameters: Mapping[trees.KeyPath, Sequence[Dim]]) -> Place:
    """The first place whose layer gives the units, rather than takes them."""

    def gives(place: Place) -> bool:
        shape = tuple(dim.size for dim in parameters[place.path])
        return len(shape) > 1 and place.axis not in sparsity_types.contracted_axes(place.path, shape)

    return max(places, key=lambda place: (gives(place), len(parameters[place.path])))


def _name(places: Mapping[Dim, Sequence[Place]], parameters: Mapping[trees.KeyPath, Sequence[Dim]]) -> dict[Dim, str]:
    names = {}
    for atom, where in places.items():
        owner = _owner(where, parameters)
        atoms = [other for other in parameters[owner.path][owner.axis].atoms if other.size > 1]
        number = f".{atoms.index(atom)}" if len(set(atoms)) > 1 else ""
        names[atom] = f"{trees.leaf_name(owner.path)}[{owner.axis}{number}]"
    return names


def _steps(read: reading.Reading, times: int = 1) -> Iterable[tuple[rules.Step, int]]:
    for step in read.steps:
        yield step, times
        for inner in step.inner:
            yield from _steps(inner, times * step.equation.params.get("length", 1))


def _contracted(read: reading.Reading) -> set[Dim]:
    """The atoms that some product sums over."""
    found: set[Dim] = set()
    for step, _ in _steps(read):
        if step.name in rules.PRODUCTS:
            for axis, _ in rules.products(step)[0]:
                found.update(step.inputs[0][axis].atoms)
    return found


def _products(read: reading.Reading, found: Found) -> Iterable[tuple[Axis, ...]]:
    """Of each product, the axes whose lengths make its multiplications."""
    for step, times in _steps(read):
        if step.name not in rules.PRODUCTS:
            continue
        if step.name == "conv_general_dilated":
            kernel = step.equation.params["dimension_numbers"].rhs_spec
            summed = [step.inputs[1][axis] for axis in kernel[1:]]
        else:
            summed = [step.inputs[0][axis] for axis, _ in rules.products(step)[0]]
        yield (axes.Fixed(times), *found.axes_of([*step.outputs[0], *summed]))


def find_groups(fn: Callable[..., Any], params: Any, *args: Any) -> Groups:
    """Finds which axes of which parameters must be removed together in a function.

    A unit of a hidden layer is a column of its kernel, an entry of its bias and a row of the next kernel. A channel
    that residual connections tie is in every block of its stage. The groups are read from the jaxpr of
    `fn(params, *args)`, whatever framework it is written in; nothing is run. As a mask structure,
    `sparsity_type=groups`, they prune whole units, which :func:`compact` then removes.

    Args:
      fn: the forward pass.
      params: all parameters, trained or not (also statistics of batch norm): anything that is not among them cannot be
        cut. Arrays or `jax.ShapeDtypeStruct`.
      *args: the other arguments, as in training or inference.

    Returns:
      The groups. `print(groups)` shows them with the parameters and FLOPs of each unit, and the reasons why other
      groups must stay whole.

    Raises:
      ValueError: if the parameters are in no product.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxpruner
      >>> params = {"up": jnp.ones((4, 32)), "down": jnp.ones((32, 3))}
      >>> groups = jaxpruner.find_groups(lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"], params, jnp.ones((1, 4)))
      >>> [(group.name, group.size, group.params) for group in groups.removable]
      [('up[1]', 32, 7)]
      >>> [group.reasons for group in groups.frozen]
      [('is an axis of what the function returns',), ('is an axis of an argument',)]
    """
    return trace(fn, params, *args).found.groups


@dataclasses.dataclass(eq=False)
class Traced:
    """A function as it was read for arguments of some shapes.

    Attributes:
      found: its groups.
      results: the structure of what it returns.
    """

    found: Found
    results: Any


def trace(fn: Callable[..., Any], params: Any, *args: Any) -> Traced:
    """Reads a function of parameters and other arguments.

    Raises:
      ValueError: see :func:`find_groups`.
    """
    arrays, paths, joined = trees.parted(params)
    traced = jax.make_jaxpr(lambda arrays, *args: fn(joined(arrays), *args), return_shape=True)
    closed, results = traced(arrays, *args)
    arguments = [rules.fresh(variable.aval.shape) for variable in closed.jaxpr.invars]
    found = group(reading.read(closed, arguments), paths)
    return Traced(found, jax.tree.structure(results))


def shapes_of(params: Any) -> Any:
    """The parameters with the shapes of arrays in their place."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype) if trees.is_array(p) else p, params)
