"""Trains sparse models with federated averaging, from flags.

    python -m jaxpruner_fedjax.train --task EMNIST_CONV --root_dir runs/emnist --num_rounds 1000 \
        --num_clients_per_round 50 --algorithm magnitude --sparsity 0.8 \
        --update_start_round 250 --update_end_round 750 --update_freq 10

The root directory gets `metrics.csv`, TensorBoard events and checkpoints. However it was stopped, the same command
continues from the last checkpoint, to the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

from jaxpruner_fedjax.experiment import Config, build, run


class SparsitiesParser(flags.ArgumentParser):
    """`pattern=number,...` as a mapping."""

    syntactic_help = "path or pattern=sparsity, with commas between"

    def parse(self, argument: Any) -> dict[str, float]:
        """The mapping; absl reports a ValueError with the name of the flag."""
        sparsities = {}
        for part in argument.split(","):
            pattern, is_pair, sparsity = part.rpartition("=")
            if not (is_pair and pattern.strip()):
                raise ValueError(f"{part!r} is not of the form pattern=sparsity")
            if pattern.strip() in sparsities:
                raise ValueError(f"{pattern.strip()!r} is given twice")
            sparsities[pattern.strip()] = float(sparsity)
        return sparsities


def _define_sparsities(name: str, default: Any, text: str) -> None:
    flags.DEFINE(SparsitiesParser(), name, default, text)


_DEFINE: dict[str, Callable[..., Any]] = {
    "int": flags.DEFINE_integer,
    "float": flags.DEFINE_float,
    "str": flags.DEFINE_string,
    "bool": flags.DEFINE_bool,
    "Sequence[str]": flags.DEFINE_list,
    "Mapping[str, float]": _define_sparsities,
}


def define_flags() -> None:
    """A flag for each field of `Config`."""
    for field in dataclasses.fields(Config):
        kind = field.type.removesuffix(" | None")
        _DEFINE[kind](field.name, field.default, field.metadata["help"])


def config_of_flags() -> Config:
    """What the flags say."""
    values: dict[str, Any] = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Config)}
    return Config(**values)


def main(argv: list[str]) -> None:
    """Builds the experiment, or says what is wrong with it; then trains."""
    if len(argv) > 1:
        raise SystemExit(f"train: {argv[1]!r} is no flag; --help lists them.")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)  # progress
    try:
        experiment = build(config_of_flags())
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"train: {error}") from error
    run(experiment)


if __name__ == "__main__":
    define_flags()
    app.run(main)
