"""`--config=FILE.py:rigl,0.9`: the argument of the configurations here."""

from __future__ import annotations

from typing import Any

import ml_collections
from ml_collections import config_dict

DENSE = "dense"
# All that flags may set, `--config.sparsity_config.sparsity_type=nm_2:4`; None is "not given".
KEYS = {
    "algorithm": str,
    "sparsity": float,
    "dist_type": str,
    "sparsity_type": str,
    "update_start_step": int,
    "update_end_step": int,
    "update_freq": int,
    "drop_fraction": float,
    "initial_sparsity": object,  # a number, or from_params
    "custom_sparsity_map": object,
    "stack_axes": object,
    "exclude_reg_exp": str,
    "use_packed_masks": bool,
    "rng_seed": int,
    # Keys of single algorithms.
    "decay": float,
    "extra_density": float,
    "gradient_weight": float,
    "is_debug": bool,
    "is_sparse_gradients": bool,
    "min_share": float,
    "normalization_eps": float,
    "rounds": int,
    "skip_gradients": bool,
    "use_normalization": bool,
}


def parse(argument: str | None, **defaults: Any) -> ml_collections.ConfigDict | None:
    """The `sparsity_config` for an argument `algorithm,sparsity`; parts left out of it come from `defaults`.

    Args:
      argument: `rigl,0.9`, `rigl`, or `dense`.
      **defaults: the other keys of `jaxpruner.create_updater_from_config`.

    Returns:
      A ConfigDict with every key of `KEYS`, or None for `dense`.

    Raises:
      ValueError: if the argument has another form.
    """
    algorithm, _, sparsity = (argument or "").partition(",")
    if algorithm == DENSE:
        if sparsity:
            raise ValueError(f"--config: {argument!r}: a dense training has no sparsity; say 'dense' alone.")
        return None
    config = ml_collections.ConfigDict({key: config_dict.placeholder(kind) for key, kind in KEYS.items()})
    config.update(defaults)
    if algorithm:
        config.algorithm = algorithm
    if sparsity:
        try:
            config.sparsity = float(sparsity)
        except ValueError as error:
            raise ValueError(f"--config: {argument!r} is not 'algorithm,sparsity' such as 'rigl,0.9'.") from error
    return config
