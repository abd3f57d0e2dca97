"""Converts lists of Keras variables to the trees that the core works on, and back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import keras


def paths_of(variables: Sequence[keras.Variable]) -> list[tuple[str, ...]]:
    """A path for each variable, its `path` split at slashes. All differ, and none is the beginning of another.

    Keras allows both cases, in models inside models and in custom layers; a number then distinguishes them.
    """
    paths = [tuple(variable.path.split("/")) for variable in variables]
    folders = {path[:end] for path in paths for end in range(1, len(path))}
    taken: set[tuple[str, ...]] = set(folders)
    for i, path in enumerate(paths):
        numbers = itertools.count(1)
        while paths[i] in taken:
            paths[i] = (*path[:-1], f"{path[-1]}_{next(numbers)}")
        taken.add(paths[i])
    return paths


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
    """The values of a tree at the paths; the inverse of `as_tree`."""
    values = []
    for path in paths:
        node = tree
        for name in path:
            node = node[name]
        values.append(node)
    return values
