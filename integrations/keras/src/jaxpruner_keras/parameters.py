"""Lists of Keras variables as the trees that the core works on."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import keras


def paths_of(variables: Sequence[keras.Variable]) -> list[tuple[str, ...]]:
    """A path for each variable, its `path` split at slashes; all differ, and none is the beginning of another.

    Keras allows both, in layers of one's own; a number or an underscore then tells them apart.
    """
    paths = [tuple(variable.path.split("/")) for variable in variables]
    number: dict[tuple[str, ...], int] = collections.defaultdict(int)
    for i, path in enumerate(paths):
        number[path] += 1
        if number[path] > 1:
            paths[i] = (*path[:-1], f"{path[-1]}_{number[path] - 1}")
    folders = {path[:end] for path in paths for end in range(1, len(path))}
    return [(*path[:-1], f"{path[-1]}_") if path in folders else path for path in paths]


def as_tree(paths: Sequence[tuple[str, ...]], values: Sequence[Any]) -> dict[str, Any]:
    """Nested dicts with a value at each path."""
    tree: dict[str, Any] = {}
    for path, value in zip(paths, values, strict=True):
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def as_list(paths: Sequence[tuple[str, ...]], tree: Any) -> list[Any]:
    """The values of a tree at the paths; the other way round."""
    values = []
    for path in paths:
        node = tree
        for name in path:
            node = node[name]
        values.append(node)
    return values
