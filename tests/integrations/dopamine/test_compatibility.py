"""Importing Dopamine: the stand-in for OpenAI's baselines, and TensorFlow Probability that does not fit."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import dopamine_cases  # noqa: F401  (skips where Dopamine is not installed)

ROOT = pathlib.Path(__file__).parents[3]


def python(program: str, cwd: pathlib.Path, *path: pathlib.Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


STAND_IN = """
import importlib.util, sys, types
spec = importlib.util.find_spec("jaxpruner_dopamine")
path = spec.submodule_search_locations[0] + "/compatibility.py"
compatibility = types.ModuleType("compatibility")
exec(compile(open(path).read(), path, "exec"), compatibility.__dict__)
print(compatibility.stand_in())
from baselines.common import atari_wrappers
"""


def test_the_stand_in_raises_on_use_where_a_folder_is_called_baselines():
    done = python(STAND_IN + "atari_wrappers.NoopResetEnv", ROOT)
    assert done.stdout.strip() == "True"
    assert "baselines.common.atari_wrappers.NoopResetEnv: OpenAI's baselines are not installed" in done.stderr
    assert "use_ppo_preprocessing = False" in done.stderr


def test_real_baselines_are_left_alone(tmp_path):
    package = tmp_path / "baselines" / "common"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "atari_wrappers.py").write_text("NoopResetEnv = 'the real one'\n")
    done = python(STAND_IN + "print(atari_wrappers.NoopResetEnv)", ROOT, tmp_path)
    assert done.stdout.split("\n")[:2] == ["False", "the real one"], done.stderr


def test_a_probability_library_that_does_not_fit_is_named_with_the_remedy(tmp_path):
    broken = tmp_path / "tensorflow_probability"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise AttributeError('module jax has no attribute foo')\n")
    done = python("import jaxpruner_dopamine", tmp_path, tmp_path)
    assert "ImportError: tensorflow_probability fails on this JAX" in done.stderr
    assert "pip install --no-deps tfp-nightly" in done.stderr
