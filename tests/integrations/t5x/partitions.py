"""`partitions.py DENSE_CHECKPOINT FOLDER`: sparse runs on two devices, by data and by model; for test_runs.py."""

import pathlib
import sys

import jax
import numpy as np
import t5x_cases as cases
from absl import logging

logging.set_verbosity(logging.FATAL)
SUBMESH = "partitioning.PjitPartitioner.model_parallel_submesh"
dense, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
assert jax.device_count() == 2

by_data = {"partitioning.PjitPartitioner.num_partitions": None, SUBMESH: (1, 1)}
by_model = by_data | {SUBMESH: (1, 2)}
packed = by_model | {"jaxpruner_t5x.create_updater.use_packed_masks": True}
states = {}
for name, bindings in {"data": by_data, "model": by_model, "packed": packed}.items():
    _, states[name] = cases.finetune(folder / name, dense, steps=12, **bindings)
    _, restored = cases.finetune(folder / name, dense, steps=12, **bindings)  # its last checkpoint
    cases.assert_equal(cases.of(restored), cases.of(states[name]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(restored._optimizer.state.sparse.masks):
        param = restored.params
        for key in path:
            param = param[key.key]
        if name != "packed":
            assert leaf.sharding == param.sharding, (name, path)
for name in ("model", "packed"):
    for one, other in zip(jax.tree.leaves(states["data"].params), jax.tree.leaves(states[name].params), strict=True):
        np.testing.assert_array_equal(one == 0, other == 0)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
print("all equal")
