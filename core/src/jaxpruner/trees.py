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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import optax

KeyPath = tuple[str, ...]

_VARIABLE_FIELDS = ("value", "raw_value")


def key_names(key_path: Sequence[Any]) -> KeyPath:
    """The names along a `jax.tree_util` key path: `(DictKey("a"), SequenceKey(0))` -> `("a", "0")`."""
    names = [_entry_name(entry) for entry in key_path]
    # flax.nnx boxes each array in a variable, which shows as a last attribute that no one named.
    is_boxed = len(names) > 1 and isinstance(key_path[-1], jax.tree_util.GetAttrKey)
    return tuple(names[:-1] if is_boxed and names[-1] in _VARIABLE_FIELDS else names)


def _entry_name(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def leaf_name(path: KeyPath) -> str:
    """`("a", "b")` -> `a/b`; a bare array has no path and is called `params`."""
    return "/".join(path) or "params"


def named_leaves(tree: Any) -> list[tuple[KeyPath, Any]]:
    """The (path, leaf) pairs of a tree, in flattening order."""
    return [(key_names(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`fn(path, leaf, *others)` over a tree; all may hold None or MaskedNode at their leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: fn(key_names(path), *leaves), tree, *rest, is_leaf=is_unpruned
    )


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


def explicit_layout(leaf: Any) -> Any:
    """The sharding that is part of a leaf's type, on a mesh of explicit axes; None elsewhere."""
    if not hasattr(jax, "typeof"):  # of a JAX that has no such meshes
        return None
    layout = getattr(jax.typeof(leaf), "sharding", None)
    is_explicit = layout is not None and not layout.mesh.empty and layout.mesh.are_all_axes_explicit
    return layout if is_explicit else None


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
    slash-joined path; `*` crosses slashes, so `decoder/*` takes all that lies below `decoder`.
    """
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase("/".join(path), pattern)
    return tuple(str(name) for name in pattern) == path


def resolve(custom: Mapping[Any, Any] | None, paths: Sequence[KeyPath], what: str) -> dict[KeyPath, Any]:
    """The value that a custom map gives to each path it names; an earlier key wins.

    Raises:
      ValueError: if a key of the map names none of the paths.
    """
    resolved: dict[KeyPath, Any] = {}
    for pattern, value in (custom or {}).items():
        named = [path for path in paths if matches(pattern, path)]
        if not named:
            raise ValueError(_no_match(pattern, paths, what))
        for path in named:
            resolved.setdefault(path, value)
    return resolved


def _no_match(pattern: str | KeyPath, paths: Sequence[KeyPath], what: str) -> str:
    wanted = pattern if isinstance(pattern, str) else "/".join(map(str, pattern))
    names = ["/".join(path) for path in paths]
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.0)
    return (
        f"{what}: {pattern!r} matches no parameter that filter_fn selects. The nearest are "
        f"{', '.join(near) or '(none: filter_fn selects nothing)'}; use one of these paths, or a "
        "pattern such as 'encoder/*/kernel'."
    )
