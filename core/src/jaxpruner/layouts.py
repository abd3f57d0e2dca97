"""Where arrays lie, as far as their types tell: on meshes of explicit axes."""

from __future__ import annotations

from typing import Any

import jax


def explicit_layout(leaf: Any) -> Any:
    """The sharding that is part of a leaf's type, on a mesh of explicit axes; None elsewhere."""
    if not hasattr(jax, "typeof"):  # of a JAX that has no such meshes
        return None
    kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    layout = getattr(kind, "sharding", None)
    if layout is None or layout.mesh.empty or not layout.mesh.are_all_axes_explicit:
        return None
    # An array knows its devices; its type knows the names of their axes only, which does where the mesh is set.
    return layout if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", layout)


def laid_out_like(old: Any, new: Any) -> Any:
    """The new array in the layout of the old one, where layouts are part of their types."""
    layout = explicit_layout(old)
    return new if layout is None or layout == explicit_layout(new) else jax.sharding.reshard(new, layout)
