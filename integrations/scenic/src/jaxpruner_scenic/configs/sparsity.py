"""`--config=FILE.py:rigl,0.9`: the argument of the configurations here."""

from __future__ import annotations

from typing import Any

import ml_collections

DENSE = "dense"


def parse(argument: str | None, **defaults: Any) -> ml_collections.ConfigDict | None:
    """The `sparsity_config` for an argument `algorithm,sparsity`; what is left out of it comes from `defaults`.

    Args:
      argument: `rigl,0.9`, `rigl`, or `dense`.
      **defaults: the other keys of `jaxpruner.create_updater_from_config`.

    Returns:
      A ConfigDict, or None for `dense`.

    Raises:
      ValueError: if the argument has another form.
    """
    algorithm, _, sparsity = (argument or "").partition(",")
    if algorithm == DENSE:
        if sparsity:
            raise ValueError(f"--config: {argument!r}: a dense training has no sparsity; say 'dense' alone.")
        return None
    config = ml_collections.ConfigDict(defaults)
    if algorithm:
        config.algorithm = algorithm
    if sparsity:
        try:
            config.sparsity = float(sparsity)
        except ValueError as error:
            raise ValueError(f"--config: {argument!r} is not 'algorithm,sparsity' such as 'rigl,0.9'.") from error
    return config
