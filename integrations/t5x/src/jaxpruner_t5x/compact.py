"""Removes the dead units of a sparse checkpoint from its model: smaller, faster functions, and their parameters.

    python -m jaxpruner_t5x.compact --checkpoint=runs/t5_sparse/checkpoint_2300

The model is that of `config.gin`, which T5X writes next to the checkpoint, or of `--gin_file` and `--gin_bindings`.
Into `compact` next to the checkpoint, or `--output`, it writes the small parameters in Orbax's format; `config.gin`;
`compact.json`, what the small functions are made from, the sizes and the speed; and `report.txt`, which it also prints.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags
from t5x import utils

import jaxpruner
from jaxpruner import trees
from jaxpruner.inspection import timing
from jaxpruner_t5x import export, functions, launch
from jaxpruner_t5x.plan import configured_dataset, configured_model

PARAMS, DESCRIPTION, CONFIG, REPORT = "params", "compact.json", "config.gin", "report.txt"


class CompactT5(NamedTuple):
    """A T5X model without its dead units.

    Attributes:
      params: the small parameters.
      forward: the logits, a function of (params, batch).
      predict: the decoded outputs, a function of (params, batch): T5X's `predict_batch`.
      report: sizes before and after, and the speed, as in `compact.json`.
    """

    params: Any
    forward: Callable[..., Any]
    predict: Callable[..., Any]
    report: Mapping[str, Any]


def compact(
    checkpoint: str,
    output: str | None = None,
    gin_files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    batch_size: int = 8,
) -> CompactT5:
    """Compacts a checkpoint of a run and writes the result.

    Models that were pruned in any way lose their dead units. With `sparsity_type = 'groups'` these are all units that
    masks prune; after pruning weight by weight, those that have no weights left.

    Args:
      checkpoint: a folder `checkpoint_STEP`.
      output: the folder to write into; by default `compact` next to the checkpoint.
      gin_files: those of the run, if `config.gin` is not next to the checkpoint.
      bindings: those of the run, `NAME = VALUE`, likewise.
      batch_size: the number of examples of the run's evaluation on which both models are compared and timed.

    Raises:
      ValueError: if there is no checkpoint or no configuration, or they are of different models.
    """
    source = export.absolute(checkpoint)
    params = export.read(source)["target"]
    files = list(gin_files) or [str(_configuration(source))]
    with launch.parsed(files, list(bindings)):
        config, model = gin.config_str(), _model()
        data = dataclasses.replace(configured_dataset(), pack=False, batch_size=batch_size, shuffle=False)
        converter = model.FEATURE_CONVERTER_CLS
        batch = next(iter(utils.get_dataset(data, 0, 1, converter).as_numpy_iterator()))
    batch = {name: jnp.asarray(batch[name]) for name in converter.MODEL_FEATURES}
    _require_same(params, functions.shapes(model, batch))
    forward, predict = functions.forward(model), functions.predict(model)
    # The logits are compared; what is decoded from equal ones may differ where two tokens are equally likely.
    small = jaxpruner.compact(forward, params, batch)
    decoding = jaxpruner.compact(predict, params, batch, keep=small.kept, check=False)
    timed = {
        f"{what}, {which}": (jax.jit(fn), given)
        for what, pair in {"forward": (forward, small.fn), "predict": (predict, decoding.fn)}.items()
        for which, fn, given in zip(("dense", "compact"), pair, (params, small.params), strict=True)
    }
    decoded = {name: np.asarray(fn(given, batch)) for name, (fn, given) in timed.items() if name.startswith("predict")}
    seconds = timing.alternate({name: functools.partial(fn, given, batch) for name, (fn, given) in timed.items()})
    whole, less = decoded["predict, dense"], decoded["predict, compact"]
    report = {
        "report": dataclasses.asdict(small.report()),
        "seconds": seconds,
        "tokens": {"dense": int((whole != 0).sum()), "compact": int((less != 0).sum())},
        "same_tokens": float((whole == less).mean()),
        "batch_size": batch_size,
        "device": jax.devices()[0].device_kind,
    }
    text = f"{small.report()}\n\n{_told(report)}\n"
    description = {
        "checkpoint": source.name,
        "kept": {name: units.tolist() for name, units in small.kept.items()},
        "batch": {name: list(leaf.shape) for name, leaf in batch.items()},
    } | report
    target = export.absolute(output) if output else source.parent / "compact"
    target.mkdir(parents=True, exist_ok=True)
    ocp.PyTreeCheckpointer().save(target / PARAMS, jax.device_get(small.params), force=True)
    (target / CONFIG).write_text(config)
    (target / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    (target / REPORT).write_text(text)
    print(text, end="")
    return CompactT5(small.params, small.fn, decoding.fn, description)


def load_compact(output: str) -> CompactT5:
    """Loads what `compact` wrote into a folder; no data is read.

    Raises:
      ValueError: if nothing was written.
    """
    folder = export.absolute(output)
    if not (folder / DESCRIPTION).exists():
        raise ValueError(
            f"load_compact: there is no {DESCRIPTION} in {folder}; make it with python -m jaxpruner_t5x.compact."
        )
    description = json.loads((folder / DESCRIPTION).read_text())
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in description["batch"].items()}
    with launch.parsed([str(folder / CONFIG)]):
        model = _model()
    shapes = functions.shapes(model, batch)
    small, decoding = (
        jaxpruner.compact(fn(model), shapes, batch, keep=description["kept"])
        for fn in (functions.forward, functions.predict)
    )
    params = ocp.PyTreeCheckpointer().restore(folder / PARAMS)
    return CompactT5(params, small.fn, decoding.fn, description)


def _model() -> Any:
    """The model that gin describes; it does not need gin afterwards."""
    model = configured_model()
    model._decode_fn = functions.bound(model._decode_fn)
    return model


def _configuration(checkpoint: Any) -> Any:
    if not (file := checkpoint.parent / CONFIG).exists():
        raise ValueError(f"--gin_file: there is no {file}; give the gin files of the run.")
    return file


def _require_same(params: Any, shapes: Any) -> None:
    if difference := trees.first_difference(params, shapes):
        name, saved, expected = difference
        raise ValueError(
            f"--gin_file: is not that of the checkpoint, where {name} is {saved}, and {expected} in this model; "
            "give the gin files and bindings of the run."
        )


def _told(report: Mapping[str, Any]) -> str:
    seconds, tokens = report["seconds"], report["tokens"]
    lines = []
    for what in ("forward", "predict"):
        dense, less = (seconds[f"{what}, {which}"] for which in ("dense", "compact"))
        lines.append(
            f"{'Forward pass' if what == 'forward' else 'Decoding'} of {report['batch_size']} examples on "
            f"{report['device']}: dense {1e3 * dense:.2f} ms, compact {1e3 * less:.2f} ms, {dense / less:.2f} times as "
            "fast."
        )
    rates = [tokens[which] / seconds[f"predict, {which}"] for which in ("dense", "compact")]
    lines.append(
        f"Tokens a second: dense {rates[0]:,.0f}, compact {rates[1]:,.0f}; {report['same_tokens']:.1%} are the same."
    )
    return "\n".join(lines)


def run(_: Any) -> None:
    given = flags.FLAGS
    try:
        compact(given.checkpoint, given.output, given.gin_file, given.gin_bindings, given.batch_size)
    except ValueError as error:
        raise SystemExit(f"compact: {error}") from error


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "The sparse checkpoint, a folder checkpoint_STEP.", required=True)
    flags.DEFINE_string("output", None, "The folder to write into; by default 'compact' beside the checkpoint.")
    flags.DEFINE_multi_string("gin_file", [], "Gin files of the run, where config.gin is not beside the checkpoint.")
    flags.DEFINE_multi_string("gin_bindings", [], "NAME = VALUE, beside the gin files.")
    flags.DEFINE_integer("batch_size", 8, "Examples on which both models are compared and timed.")
    app.run(run)
