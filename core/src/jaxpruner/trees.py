"""Pytrees of parameters: names of leaves, patterns over them, and the leaf that is not pruned.

Parameters may be any pytree. A leaf is named by its key path, `("encoder", "mlp", "kernel")`, which
is written `encoder/mlp/kernel`. This module alone knows what stands for a leaf that is not pruned:
None in the trees that users see, `optax.MaskedNode()` in optimizer states (checkpoint libraries
drop None).
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

KeyPath = tuple[str, ...]

_VARIABLE_FIELDS = ("value", "raw_value")


def key_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[KeyPath]:
    """The names along the path to each leaf, in flattening order: `(DictKey("a"), SequenceKey(0))` -> `("a", "0")`."""
    whole = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]
    named = whole
    if any(path and _is_value(path[-1]) for path in whole):
        # flax.nnx boxes each array in a variable, which shows as a last attribute that no one named; its optimizer
        # boxes what it keeps once more.
        is_end = functools.partial(is_boxed, is_leaf=is_leaf)
        ends = is_end if is_leaf is None else lambda node: is_leaf(node) or is_end(node)
        named = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=ends)]
    return [tuple(map(_entry_name, short or path[:1])) for short, path in zip(named, whole, strict=True)]


def _is_value(entry: Any) -> bool:
    return isinstance(entry, jax.tree_util.GetAttrKey) and entry.name in _VARIABLE_FIELDS


def _entry_name(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def unboxed(tree: Any) -> Any:
    """The tree with arrays in place of the variables that flax.nnx boxes them in."""
    return jax.tree.map(lambda node: jax.tree.leaves(node)[0] if is_boxed(node) else node, tree, is_leaf=is_boxed)


def is_boxed(node: Any, is_leaf: Callable[[Any], bool] | None = None) -> bool:
    """Whether this is a variable of flax.nnx, or similar: all it has is a value, an array or another variable."""
    children = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda child: child is not node)
    if len(children) != 1 or len(children[0][0]) != 1 or not _is_value(children[0][0][0]):
        return False
    child = children[0][1]
    leaves = jax.tree.leaves(child, is_leaf=is_leaf)
    return len(leaves) == 1 and (leaves[0] is child or is_boxed(child, is_leaf))


def leaf_name(path: KeyPath) -> str:
    """`("a", "b")` -> `a/b`; a bare array has no path and is called `params`."""
    return "/".join(path) or "params"


def named_leaves(tree: Any) -> list[tuple[KeyPath, Any]]:
    """The (path, leaf) pairs of a tree, in flattening order."""
    return list(zip(key_paths(tree), jax.tree.leaves(tree), strict=True))


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`fn(path, leaf, *others)` over a tree; all may hold None or MaskedNode at their leaves."""
    paths = iter(key_paths(tree, is_unpruned))
    return jax.tree.map(lambda *leaves: fn(next(paths), *leaves), tree, *rest, is_leaf=is_unpruned)


def is_number(leaf: Any) -> bool:
    """Whether a leaf is an array, the shape of one, or a number, and not a function, string or random key."""
    dtype = getattr(leaf, "dtype", None)
    return isinstance(leaf, numbers.Number) if dtype is None else not jnp.issubdtype(dtype, jax.dtypes.extended)


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is an array of floating numbers, or the shape of one: what can be pruned."""
    return hasattr(leaf, "shape") and is_number(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or the shape of one."""
    return hasattr(leaf, "shape") and is_number(leaf)


class Parted(NamedTuple):
    """A tree in two parts: leaves that a function is traced for, and what stays as it is.

    Attributes:
      leaves: those that are traced, in order.
      paths: theirs.
      joined: from other leaves in their places to the whole tree.
    """

    leaves: list[Any]
    paths: list[KeyPath]
    joined: Callable[[Sequence[Any]], Any]


def parted(tree: Any, is_traced: Callable[[Any], bool] = is_array) -> Parted:
    """Parts a tree; anything that is not an array, such as the functions in an Equinox module, is not traced."""
    leaves, treedef = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if is_traced(leaf)]
    paths = [path for path, leaf in named_leaves(tree) if is_traced(leaf)]

    def joined(others: Sequence[Any]) -> Any:
        whole = list(leaves)
        for place, leaf in zip(places, others, strict=True):
            whole[place] = leaf
        return treedef.unflatten(whole)

    return Parted([leaves[i] for i in places], paths, joined)


def numbers_only(tree: Any) -> Any:
    """The tree with None in place of anything that is not a number, such as the functions in an Equinox module."""
    if all(map(is_number, jax.tree.leaves(tree))):
        return tree
    return jax.tree.map(lambda leaf: leaf if is_number(leaf) else None, tree)


def first_difference(tree: Any, expected: Any) -> tuple[str, Any, Any] | None:
    """The first leaf, by name, that two trees do not have in the same shape: its name and both shapes, or `missing`."""
    here, there = ({leaf_name(path): leaf.shape for path, leaf in named_leaves(each)} for each in (tree, expected))
    for name in sorted({*here, *there}):
        if here.get(name) != there.get(name):
            return name, here.get(name, "missing"), there.get(name, "missing")
    return None


def is_unpruned(leaf: Any) -> bool:
    """Whether this entry of a mask or sparsity tree says that the parameter is not pruned."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def map_pruned(
    fn: Callable[..., Any],
    tree: Any,
    marks: Any,
    *rest: Any,
    otherwise: Callable[[Any], Any] = lambda leaf: None,
) -> Any:
    """`fn(leaf, mark, *others)` where `marks` prunes the leaf, `otherwise(leaf)` elsewhere."""

    def visit(leaf, mark, *others):
        return otherwise(leaf) if is_unpruned(mark) else fn(leaf, mark, *others)

    return jax.tree.map(visit, tree, marks, *rest, is_leaf=is_unpruned)


def to_state(tree: Any) -> Any:
    """A tree with None leaves as it is kept in an optimizer state, with MaskedNode leaves."""
    return jax.tree.map(lambda leaf: optax.MaskedNode() if leaf is None else leaf, tree, is_leaf=is_unpruned)


def from_state(tree: Any) -> Any:
    """The inverse of `to_state`."""
    return jax.tree.map(lambda leaf: None if is_unpruned(leaf) else leaf, tree, is_leaf=is_unpruned)


@contextlib.contextmanager
def errors_at(path: KeyPath) -> Iterator[None]:
    """Puts the name of the leaf in front of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{leaf_name(path)}: {error}") from error


def matches(pattern: str | KeyPath, path: KeyPath) -> bool:
    """Whether a key of a custom map names this leaf.

    A tuple of strings names the leaf of exactly that path. A string is a shell pattern over the
    slash-joined path; `*` crosses slashes, so `decoder/*` matches everything below `decoder`.
    """
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase("/".join(path), pattern)
    return tuple(str(name) for name in pattern) == path


def specificity(pattern: str | KeyPath) -> tuple[bool, int, int]:
    """How narrow a pattern is: a whole path first, then names without wildcards, then characters beside wildcards."""
    names = pattern.split("/") if isinstance(pattern, str) else list(pattern)
    if not isinstance(pattern, str) or not re.search(r"[*?[]", pattern):
        return True, len(names), 0
    wild = [name for name in names if re.search(r"[*?[]", name)]
    return False, len(names) - len(wild), sum(len(re.sub(r"\[[^]]*\]|[*?]", "", name)) for name in wild)


def most_specific(patterns: Iterable[tuple[Any, Any]], path: KeyPath, what: str, default: Any = None) -> Any:
    """The value of the most specific pattern that names this leaf, whatever their order; `default` if none does.

    Raises:
      ValueError: if two of them are equally specific and differ.
    """
    matching = [(pattern, value) for pattern, value in patterns if matches(pattern, path)]
    if not matching:
        return default
    narrowest = max(specificity(pattern) for pattern, _ in matching)
    (pattern, value), *others = [item for item in matching if specificity(item[0]) == narrowest]
    for other, differing in others:
        if differing != value:
            raise ValueError(
                f"{what}: {pattern!r} ({value}) and {other!r} ({differing}) are equally specific and both match "
                f"{leaf_name(path)}; write the full path of the leaf, or make one of them more specific."
            )
    return value


def resolve(custom: Any, paths: Sequence[KeyPath], what: str) -> dict[KeyPath, Any]:
    """The value that a custom map, or pairs, give to each path they name: that of the most specific key.

    Raises:
      ValueError: if a key names none of the paths, or if two equally specific ones differ.
    """
    pairs = pattern_pairs(custom, what)
    for pattern, _ in pairs:
        if not any(matches(pattern, path) for path in paths):
            raise ValueError(_no_match(pattern, paths, what))
    missing = object()
    found = {path: most_specific(pairs, path, what, missing) for path in paths}
    return {path: value for path, value in found.items() if value is not missing}


def pattern_pairs(custom: Any, what: str) -> list[tuple[Any, Any]]:
    """The (pattern, value) pairs of a mapping, of pairs, or of None."""
    if custom is None:
        return []
    try:
        return [(pattern, value) for pattern, value in (custom.items() if hasattr(custom, "items") else custom)]
    except (TypeError, ValueError):
        raise ValueError(f"{what}: {custom!r} is not a mapping; give {{path or pattern: value}}.") from None


def _no_match(pattern: str | KeyPath, paths: Sequence[KeyPath], what: str) -> str:
    wanted = pattern if isinstance(pattern, str) else "/".join(map(str, pattern))
    names = ["/".join(path) for path in paths]
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.0)
    return (
        f"{what}: {pattern!r} matches no parameter that filter_fn selects. The nearest are "
        f"{', '.join(near) or '(none: filter_fn selects nothing)'}; use one of these paths, or a "
        "pattern such as 'encoder/*/kernel'."
    )
