"""Small functions in files: the remaining parameters and their units, as NumPy's `.npz`."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpruner import trees
from jaxpruner.compaction import finding
from jaxpruner.compaction.compact import Compact, compact

_KEPT, _PARAMS = "kept:", "params:"


def save_compact(path: str | os.PathLike[str], small: Compact, params: Any = None) -> None:
    """Writes the small parameters, and what is needed to make the small function from the whole one again.

    Args:
      path: the file; it is whole or absent, however the program ends.
      small: the result of :func:`jaxpruner.compact`.
      params: the parameters after further training from `small.params`; by default `small.params`.
    """
    params = small.params if params is None else params
    arrays: dict[str, Any] = {f"{_PARAMS}{_name(path)}": np.asarray(leaf) for path, leaf in _arrays(params)}
    arrays |= {f"{_KEPT}{name}": units for name, units in small.kept.items()}
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
      ValueError: if it is of another function.

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
    kept = {name.removeprefix(_KEPT): units for name, units in stored.items() if name.startswith(_KEPT)}
    try:
        small = compact(fn, finding.shapes_of(params), *args, keep=kept)
    except ValueError as error:
        raise ValueError(f"{path}: of another function or other parameters ({error})") from error
    known = {_name(at): leaf for at, leaf in _arrays(small.params)}
    saved = {name.removeprefix(_PARAMS): leaf for name, leaf in stored.items() if name.startswith(_PARAMS)}
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
        # NumPy knows no bfloat16 by name.
        return jnp.asarray(array.view(leaf.dtype) if array.dtype.kind == "V" else array)

    return dataclasses.replace(small, params=trees.map_named(read, small.params))


def _arrays(tree: Any) -> list[tuple[trees.KeyPath, Any]]:
    return [(path, leaf) for path, leaf in trees.named_leaves(tree) if trees.is_array(leaf)]


def _name(path: trees.KeyPath) -> str:
    # With lengths, so that "a/b" is not "a", "b".
    return "/".join(f"{len(name)}:{name}" if "/" in name else name for name in path)
