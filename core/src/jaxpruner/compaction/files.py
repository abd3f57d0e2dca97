"""Small functions in files: the remaining parameters and their units, as NumPy's `.npz`."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner import trees
from jaxpruner.compaction import finding
from jaxpruner.compaction.compact import Compact, compact
from jaxpruner.compaction.sparse_kernels import SparseKernel, is_sparse

_KEPT, _PARAMS, _DTYPE = "kept:", "params:", "dtype:"
_PARTS = ("contracted:", "shape:", "data:", "indices:", "indptr:")


def save_compact(path: str | os.PathLike[str], small: Compact, params: Any = None) -> None:
    """Writes the small parameters, and what is needed to make the small function from the whole one again.

    Args:
      path: the file; it is whole or absent, however the program ends.
      small: the result of :func:`jaxpruner.compact`.
      params: the parameters after further training from `small.params`; by default `small.params`.
    """
    arrays: dict[str, Any] = {f"{_KEPT}{name}": units for name, units in small.kept.items()}
    for name, leaf in _arrays(small.params if params is None else params).items():
        parts = dict(zip(_PARTS, leaf.parts, strict=True)) if is_sparse(leaf) else {_PARAMS: leaf}
        arrays |= {f"{part}{name}": np.asarray(array) for part, array in parts.items()}
    # NumPy's files know no bfloat16 by name.
    arrays |= {f"{_DTYPE}{key}": np.asarray(str(array.dtype)) for key, array in arrays.items()}
    partial = f"{os.fspath(path)}.partial"
    with open(partial, "wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)


def load_compact(path: str | os.PathLike[str], fn: Callable[..., Any], params: Any, *args: Any) -> Compact:
    """Loads the small function from a file, with its parameters.

    Args:
      path: the file.
      fn: the whole function that was compacted.
      params: its whole parameters, or their shapes.
      *args: an example of the other arguments, or shapes.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is of another function, or does not say of which dtype its parameters are.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxpruner, tempfile
      >>> from jaxpruner.compaction.files import load_compact, save_compact
      >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
      >>> params = {"up": jnp.ones((4, 32)).at[:, 8:].set(0), "down": jnp.ones((32, 3))}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_compact(f"{folder}/small.npz", jaxpruner.compact(fn, params, jnp.ones((1, 4))))
      ...     small = load_compact(f"{folder}/small.npz", fn, params, jnp.ones((1, 4)))
      >>> small.fn(small.params, jnp.ones((1, 4))).tolist()
      [[32.0, 32.0, 32.0]]
    """
    try:
        with np.load(path) as content:
            stored = dict(content)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise ValueError(f"{path}: no file of save_compact ({error}).") from error
    stored = {
        key: array.view(jnp.dtype(str(stored[f"{_DTYPE}{key}"]))) if f"{_DTYPE}{key}" in stored else array
        for key, array in stored.items()
    }

    def under(prefix: str) -> dict[str, Any]:
        return {key.removeprefix(prefix): array for key, array in stored.items() if key.startswith(prefix)}

    kept = under(_KEPT)
    try:
        small = compact(fn, finding.shapes_of(params), *args, keep=kept)
    except ValueError as error:
        raise ValueError(f"{path}: of another function or other parameters ({error})") from error
    known, saved = _arrays(small.params), under(_PARAMS)
    saved |= {name: SparseKernel.of_parts(*(stored[f"{part}{name}"] for part in _PARTS)) for name in under(_PARTS[0])}
    for name in dict.fromkeys([*known, *saved]):
        there, here = (tuple(np.shape(tree[name])) if name in tree else "nothing" for tree in (saved, known))
        if there != here:
            raise ValueError(
                f"{path}: of another function or other parameters: {name} is {there} there and {here} here."
            )

    def read(at, leaf):
        if not trees.is_array(leaf):
            return leaf
        array = saved[_name(at)]
        if is_sparse(array):
            return array
        if array.dtype.type is np.void:  # of a file without dtypes
            if array.dtype.itemsize != leaf.dtype.itemsize:
                raise ValueError(
                    f"{path}: {_name(at)} has {array.dtype.itemsize} bytes an entry there, of a dtype that the file, "
                    f"from an earlier version, does not name; give params of that dtype instead of {leaf.dtype}."
                )
            array = array.view(leaf.dtype)
        return jnp.asarray(array)

    return dataclasses.replace(small, params=trees.map_named(read, small.params))


def _arrays(tree: Any) -> dict[str, Any]:
    named = zip(trees.key_paths(tree, is_sparse), jax.tree.leaves(tree, is_leaf=is_sparse), strict=True)
    return {_name(path): leaf for path, leaf in named if is_sparse(leaf) or trees.is_array(leaf)}


def _name(path: trees.KeyPath) -> str:
    # With lengths, so that "a/b" is not "a", "b".
    return "/".join(f"{len(name)}:{name}" if "/" in name else name for name in path)
