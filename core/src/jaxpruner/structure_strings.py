"""Structures from the strings of configurations."""

from __future__ import annotations

import re
from typing import Any

from jaxpruner import coupled_structures, gradual_structures, sparsity_types

_NUMBER = r"-?[0-9]+"
_NUMBERS = rf"{_NUMBER}(?::{_NUMBER})*"
_NM = re.compile(rf"(gradual_)?nm_([0-9]+)[,:]([0-9]+)(?:,axis=({_NUMBERS}|input))?")
_BLOCK = re.compile(rf"block_([0-9]+),([0-9]+)(?:,axes=({_NUMBER}):({_NUMBER}))?")
_CHANNEL = re.compile(rf"channel_(?:axis=)?({_NUMBER}|input|output)")
_GROUPS = re.compile(r"groups(?:_([^,]+))?(?:,multiple_of=([1-9][0-9]*))?(?:,budget=(units|flops))?")


def parse_sparsity_type(value: Any) -> Any:
    """Turns strings into structures, also inside a mapping or pairs of patterns; everything else stays.

    Raises:
      ValueError: for a string that is not a structure.
    """
    if isinstance(value, str):
        return _parse(value)
    if hasattr(value, "items"):
        return {pattern: parse_sparsity_type(structure) for pattern, structure in value.items()}
    if isinstance(value, list | tuple):
        return [(pattern, parse_sparsity_type(structure)) for pattern, structure in value]
    if isinstance(value, sparsity_types.SparsityType) or callable(value):
        return value
    raise ValueError(_unknown(value))


def _parse(text: str) -> sparsity_types.SparsityType:
    if text == "unstructured":
        return sparsity_types.Unstructured()
    if text == "per_output":
        return sparsity_types.PerOutput()
    try:
        if found := _NM.fullmatch(text):
            gradual, n, m, axis = found.groups()
            kind = sparsity_types.NByM if gradual is None else gradual_structures.GradualNByM
            if axis is None:
                return kind(int(n), int(m))
            axes = axis if axis == "input" else tuple(map(int, axis.split(":")))
            return kind(int(n), int(m), axes[0] if len(axes) == 1 else axes)
        if found := _BLOCK.fullmatch(text):
            h, w, *axes = found.groups()
            tiled: dict[str, Any] = {} if axes[0] is None else {"axes": tuple(map(int, axes))}
            return sparsity_types.Block((int(h), int(w)), **tiled)
        if found := _CHANNEL.fullmatch(text):
            axis = found[1]
            return sparsity_types.Channel(axis if axis in ("input", "output") else int(axis))
        if found := _GROUPS.fullmatch(text):
            patterns, multiple_of, budget = found.groups()
            chosen = () if patterns is None else tuple(patterns.split(":"))
            return coupled_structures.AllGroups(
                chosen, int(multiple_of or 1), "flops" if budget == "flops" else "units"
            )
    except ValueError as error:
        raise ValueError(f"Sparsity type {text!r}: {error}") from error
    raise ValueError(_unknown(text))


def _unknown(value: Any) -> str:
    return (
        f"Sparsity type {value!r} is not known; use 'unstructured', 'per_output', 'nm_2,4' or 'nm_2:4', "
        "'nm_2,4,axis=0', 'nm_2,4,axis=input', 'gradual_nm_2,4', 'block_4,4', 'block_4,4,axes=1:2', 'channel_-1', "
        "'channel_input', 'groups', "
        "'groups_*mlp*:*attention*,multiple_of=8,budget=flops', or an object of jaxpruner.sparsity_types."
    )
