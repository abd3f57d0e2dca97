"""Removes the dead units of a sparse checkpoint from its model: a smaller, faster function, and its parameters.

    python -m jaxpruner_scenic.compact --workdir=runs/vit \\
        --config=integrations/scenic/src/jaxpruner_scenic/configs/vit_small.py:magnitude,0.5

The flags are those of the training. Next to the checkpoints, or in `--output`, it writes `params.msgpack`, the small
variables in Flax's format; `compact.json`, what the small function is made from, the sizes and the speed; and
`report.txt`, which it also prints.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from absl import app, flags
from flax.training import checkpoints
from scenic.train_lib import train_utils
from tensorflow.io import gfile

import jaxpruner
from jaxpruner import trees
from jaxpruner.inspection import timing
from jaxpruner_scenic import datasets, main  # noqa: F401  (datasets registers)
from jaxpruner_scenic.forward import forward

PARAMS, DESCRIPTION, REPORT = "params.msgpack", "compact.json", "report.txt"


def compact(config: Any, workdir: str, output: str | None = None, batch_size: int = 32) -> jaxpruner.Compact:
    """Compacts the latest checkpoint of a training and writes the result.

    Networks that were pruned in any way lose their dead units. With `sparsity_type = "groups"` these are all units that
    masks prune; after pruning weight by weight, those that have no weights left.

    Args:
      config: the configuration of the training.
      workdir: its folder.
      output: the folder to write into; by default `compact` in `workdir`.
      batch_size: how many test images make the example, on which both functions are compared and timed.

    Returns:
      The result of `jaxpruner.compact`; its function is of (variables, inputs).

    Raises:
      ValueError: if there is no checkpoint, or it is of another model.
    """
    if (saved := checkpoints.restore_checkpoint(workdir, target=None)) is None:
        raise ValueError(
            f"--workdir: there is no checkpoint in {workdir}; give the folder of a training whose config.checkpoint is "
            "True."
        )
    dataset = train_utils.get_dataset(config, jax.random.PRNGKey(config.rng_seed))
    images = next(dataset.valid_iter)["inputs"]
    images = jnp.asarray(images.reshape(-1, *images.shape[2:])[:batch_size])
    meta_data = {name: value for name, value in dataset.meta_data.items() if _is_json(value)}
    fn, shapes = _model(config, meta_data, images)
    variables = {"params": saved["params"], **(saved["model_state"] or {})}
    _require_same(variables, shapes)
    small = jaxpruner.compact(fn, variables, images)
    whole, less = jax.jit(fn), jax.jit(small.fn)
    seconds = timing.alternate(
        {"dense": lambda: whole(variables, images), "compact": lambda: less(small.params, images)}
    )
    report, device = small.report(), jax.devices()[0].device_kind
    text = (
        f"{report}\n\nForward pass of {len(images)} images on {device}: dense {1e3 * seconds['dense']:.3f} ms, compact "
        f"{1e3 * seconds['compact']:.3f} ms, {seconds['dense'] / seconds['compact']:.2f} times as fast.\n"
    )
    description = {
        "step": int(saved["global_step"]),
        "kept": {name: units.tolist() for name, units in small.kept.items()},
        "meta_data": meta_data,
        "input": [images.shape[1:], str(images.dtype)],
        "report": dataclasses.asdict(report),
        "seconds": seconds,
        "batch_size": len(images),
        "device": device,
    }
    output = output or os.path.join(workdir, "compact")
    gfile.makedirs(output)
    _write(os.path.join(output, PARAMS), flax.serialization.msgpack_serialize(jax.device_get(small.params)))
    _write(os.path.join(output, DESCRIPTION), json.dumps(description, indent=1) + "\n")
    _write(os.path.join(output, REPORT), text)
    print(text, end="")
    return small


def load_compact(output: str, config: Any) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    """The small function, of (variables, inputs), and its variables, from what `compact` wrote; no data is read.

    Args:
      output: the folder.
      config: the configuration of the training.

    Raises:
      ValueError: if nothing was written.
    """
    if not gfile.exists(os.path.join(output, DESCRIPTION)):
        raise ValueError(
            f"load_compact: there is no {DESCRIPTION} in {output}; make it with python -m jaxpruner_scenic.compact."
        )
    with gfile.GFile(os.path.join(output, DESCRIPTION), "r") as file:
        description = json.loads(file.read())
    with gfile.GFile(os.path.join(output, PARAMS), "rb") as file:
        variables = flax.serialization.msgpack_restore(file.read())
    shape, dtype = description["input"]
    example = jax.ShapeDtypeStruct((1, *shape), dtype)
    fn, shapes = _model(config, description["meta_data"], example)
    small = jaxpruner.compact(fn, shapes, example, keep=description["kept"])
    return small.fn, variables


def _model(config: Any, meta_data: Mapping[str, Any], images: Any) -> tuple[Callable[..., Any], Any]:
    """The function of (variables, inputs), and the shapes of its variables."""
    model = main.get_model(config.model_name)(config, meta_data).flax_model
    image = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.PRNGKey(0), x, train=False, debug=False), image)
    return forward(model), flax.core.unfreeze(shapes)


def _require_same(variables: Any, shapes: Any) -> None:
    if difference := trees.first_difference(variables, shapes):
        name, saved, expected = difference
        raise ValueError(
            f"--config: is not that of the checkpoint, where {name} is {saved}, and {expected} in this model; "
            "give the configuration that it was trained with."
        )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _write(path: str, content: str | bytes) -> None:
    with gfile.GFile(path, "w" if isinstance(content, str) else "wb") as file:
        file.write(content)


def run(_: Any) -> None:
    given = flags.FLAGS
    main.leave_memory_to_jax()
    try:
        compact(given.config, given.workdir, given.output, given.batch_size)
    except ValueError as error:
        raise SystemExit(f"compact: {error}") from error


if __name__ == "__main__":
    from scenic import app as _scenic_app  # noqa: F401  (defines --config and --workdir)

    flags.DEFINE_string("output", None, "The folder to write into; by default 'compact' in workdir.")
    flags.DEFINE_integer("batch_size", 32, "Images of the example, on which both functions are compared and timed.")
    app.run(run)
