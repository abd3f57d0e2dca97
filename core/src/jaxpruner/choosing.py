"""Makes the masks of all leaves of a tree, with their selections made together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxpruner import selection, trees


def map_choosing(choose: Callable[..., selection.Choosing], tree: Any, *rest: Any) -> Any:
    """`trees.map_named` of a generator function, with the selections of all leaves made together."""
    choosing: list[selection.Choosing] = []

    def place(*arguments):
        choosing.append(choose(*arguments))
        return len(choosing) - 1

    places = trees.map_named(place, tree, *rest)
    chosen = selection.together(choosing)
    return jax.tree.map(lambda i: chosen[i], places)
