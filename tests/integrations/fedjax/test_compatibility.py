"""FedJAX on today's JAX: what is mended, what is left alone, and that all backends agree."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys
import textwrap

import federated_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated_cases import fedjax

from jaxpruner_fedjax import compatibility


def module_of(source: str, tmp_path: pathlib.Path):
    path = tmp_path / "stand_in.py"
    path.write_text(textwrap.dedent(source))
    spec = importlib.util.spec_from_file_location("stand_in", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_jax_and_numpy_removed_works_again():
    tree = {"a": jnp.ones(3), "b": [jnp.full(2, 2.0)]}
    cases.assert_same_bits(fedjax.tree_util.tree_weight(tree, 2.0), jax.tree.map(lambda x: 2 * x, tree))
    cases.assert_same_bits(fedjax.tree_util.tree_zeros_like(tree), jax.tree.map(jnp.zeros_like, tree))
    assert float(fedjax.regularizers.l2_regularizer(0.5, center_params=tree)(tree)) == 0
    packed = fedjax.serialization.msgpack_serialize({"x": np.float32(1.5)})
    assert fedjax.serialization.msgpack_deserialize(packed) == {"x": np.float32(1.5)}


@pytest.mark.parametrize("name", ["shakespeare", "stackoverflow"])
def test_language_models_can_be_made_again(name):
    model = getattr(fedjax.models, name).create_lstm_model()
    masked = [metric for metric in model.eval_metrics.values() if getattr(metric, "logits_mask", None)]
    assert masked
    assert all(-np.inf in metric.logits_mask for metric in masked)
    assert len({hash(metric) for metric in masked}) == len(masked)  # as FedJAX needs them


def test_mending_again_does_nothing():
    assert compatibility.mend() == ()


def test_a_module_that_uses_no_removed_name_is_left_alone(tmp_path, monkeypatch):
    fixed = module_of("import jax\n\ndef double(t):\n    return jax.tree.map(lambda x: 2 * x, t)\n", tmp_path)
    monkeypatch.setitem(sys.modules, "fedjax.core.tree_util", fixed)
    assert compatibility.mend() == ()
    assert fixed.jax is jax


def test_a_broken_module_alone_is_mended(tmp_path, monkeypatch):
    source = "import sys as np\n\ndef is_scalar(x):\n    return np.issctype(type(x))\n"  # `sys` never had this name
    broken = module_of(source, tmp_path)
    monkeypatch.setitem(sys.modules, "fedjax.core.serialization", broken)
    assert compatibility.mend() == ("fedjax.core.serialization: np.issctype",)
    assert broken.is_scalar(np.float32(1))
    assert not broken.is_scalar(1.0)
    assert broken.np.maxsize == sys.maxsize
    assert not hasattr(sys, "issctype")


def test_ones_like_is_mended_only_where_a_list_is_given(tmp_path, monkeypatch):
    name = "fedjax.algorithms.agnostic_fed_avg"
    start = "import jax.numpy as jnp\n\ndef window(init_domain_weights):\n    return "
    fixed = module_of(start + "jnp.ones_like(jnp.array(init_domain_weights))\n", tmp_path)
    monkeypatch.setitem(sys.modules, name, fixed)
    assert compatibility.mend() == ()
    assert fixed.jnp is jnp
    broken = module_of(start + "jnp.ones_like(init_domain_weights)\n", tmp_path)
    monkeypatch.setitem(sys.modules, name, broken)
    assert compatibility.mend() == (f"{name}: jnp.ones_like",)
    assert compatibility.mend() == ()
    assert broken.window([0.5, 0.5]).tolist() == [1, 1]
    assert broken.jnp.ones_like([0.5], dtype=jnp.int32, shape=(2,)).dtype == jnp.int32


def test_a_library_that_lacks_two_names_gets_both(tmp_path, monkeypatch):
    broken = module_of("import jax\n\ndef double(t):\n    return jax.tree_map(lambda x: 2 * x, t)\n", tmp_path)
    broken.jax = compatibility._Extended(jax, {"another": 1})
    monkeypatch.setitem(sys.modules, "fedjax.core.tree_util", broken)
    assert compatibility.mend() == ("fedjax.core.tree_util: jax.tree_map",)
    assert broken.double([1]) == [2]
    assert broken.jax.another == 1


def test_debug_backend_equals_jit():
    optimizer = cases.server("magnitude")
    with fedjax.for_each_client_backend("debug"):
        debug = cases.fed_avg.__wrapped__(optimizer)
    one, other = (cases.run(algorithm, rounds=1)[-1].params for algorithm in (debug, cases.fed_avg(optimizer)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, other)


PMAP = """
import sys
sys.path.insert(0, {folder!r})
import federated_cases as cases
import fedjax, jax, numpy as np
assert jax.device_count() == 2

def both(build):
    results = []
    for backend in ("jit", "pmap"):
        with fedjax.for_each_client_backend(backend):
            results.append(build())
    return results

optimizer = cases.server("magnitude")
for make in (cases.fed_avg.__wrapped__, lambda o: cases.masked.__wrapped__(o, masked=True)):
    jit, pmap = [cases.run(algorithm, rounds=2)[-1] for algorithm in both(lambda: make(optimizer))]
    cases.assert_on_masks(optimizer, pmap)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jit.params, pmap.params)
    assert jax.tree.map(np.shape, jit.params) == jax.tree.map(np.shape, pmap.params)

# Clients of different lengths, one more than a block of two holds, and with results of each step.
def client_step(state, batch):
    return state + batch.sum(), {{"max": batch.max()}}

clients = [
    (b"a", [np.ones(2), np.full(2, 3.0)], np.float32(1)),
    (b"b", [], np.float32(2)),
    (b"c", [np.ones(2)], np.float32(0)),
]
def each():
    init, final = (lambda shared, own: shared + own), (lambda shared, state: state - shared)
    run = fedjax.for_each_client(init, client_step, final, with_step_result=True)
    found = {{i: (float(o), [float(r["max"]) for r in rs]) for i, o, rs in run(np.float32(10), clients)}}
    return dict(sorted(found.items()))
jit, pmap = both(each)
assert jit == pmap == {{b"a": (9.0, [1.0, 3.0]), b"b": (2.0, []), b"c": (2.0, [1.0])}}, (jit, pmap)
print("equal")
"""


@pytest.mark.slow
def test_pmap_on_two_devices_equals_jit():
    program = PMAP.format(folder=str(pathlib.Path(__file__).parent))
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "equal", done.stderr
