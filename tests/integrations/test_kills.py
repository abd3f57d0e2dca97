"""kill -9 at random moments of training, again and again: the end is that of the run that went through, to the bit.

    KILLS=20 python -m pytest tests/integrations/test_kills.py -s

Nothing of a host is imported here: its trainings are programs of their own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import pickle
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterable

import numpy as np
import pytest

KILLS = int(os.environ.get("KILLS", "2"))
PERIODS = 8 * (KILLS + 1)  # of checkpoints: a life of a training sees a few of them
HERE = pathlib.Path(__file__).parent

NEEDED = {
    "scenic": ["scenic", "clu"],
    "t5x": ["t5x", "airio", "jestimator", "seqio"],
    "dopamine": ["dopamine"],
    "fedjax": ["fedjax"],
}
# Each leaves its last state at `end`. Masks are made until three quarters of the training.
PROGRAMS = {
    "scenic": """
import scenic_cases as cases
state, _ = cases.run(cases.config(
    "rigl", checkpoint=True, checkpoint_steps=4, num_training_steps=4 * periods, log_eval_steps=4 * periods,
    sparsity_update_end_step=3 * periods, sparsity_use_packed_masks=True), folder)
end([state.params, state.opt_state, state.rng, state.global_step])
""",
    "t5x": """
import t5x_cases as cases
start = folder.parent / "dense"
if not start.exists():
    cases.pretrain(start, **cases.ONE_VERSE)
_, state = cases.finetune(
    folder, start / f"checkpoint_{cases.DENSE_STEPS}", steps=cases.DENSE_STEPS + 2 * periods, CHECKPOINT_PERIOD=2,
    **cases.ONE_VERSE, ALGORITHM="rigl", UPDATE_END_STEP=3 * periods // 2)
end(cases.of(state))
""",
    "dopamine": """
import dopamine_cases as cases
runner = cases.run(folder, ["dqn_cartpole.gin"], [
    *cases.CARTPOLE, *cases.QUIET, f"Runner.num_iterations = {periods}", "Runner.training_steps = 60",
    *cases.bind(algorithm="rigl", update_end_agent_step=45 * periods)])
end([runner.agent.online_params, runner.agent.optimizer_state, runner.train_returns()])
""",
    "fedjax": """
from jaxpruner_fedjax.experiment import Config, build, run
state = run(build(Config(
    task="federated_cases:task", root_dir=str(folder), num_rounds=4 * periods, num_clients_per_round=3, batch_size=16,
    algorithm="set", update_start_round=2, update_end_round=3 * periods, update_freq=2, checkpoint_frequency=4,
    eval_frequency=4 * periods)))
end(state)
""",
}
BEFORE = """
import pathlib, pickle, sys, warnings
warnings.simplefilter("ignore")
sys.path[:] = {path!r}
folder, periods = pathlib.Path({folder!r}), {periods}

def end(state):
    import jax, numpy as np
    leaves = jax.tree_util.tree_leaves_with_path(state)
    found = [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves]
    folder.with_suffix(".end").write_bytes(pickle.dumps(found))
"""


def start(host: str, folder: pathlib.Path, log) -> subprocess.Popen:
    program = BEFORE.format(path=[str(HERE / host), *sys.path], folder=str(folder), periods=PERIODS) + PROGRAMS[host]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen([sys.executable, "-c", program], stdout=log, stderr=log, env=environment)


def checkpoints(folder: pathlib.Path) -> dict[str, int]:
    """When each was written."""
    paths = [path for pattern in ("checkpoint_*", "checkpoints/*") for path in folder.glob(pattern)]
    with contextlib.suppress(FileNotFoundError):  # of one that is removed just now
        return {path.name: path.stat().st_mtime_ns for path in paths}
    return checkpoints(folder)


def newest(names: Iterable[str]) -> int:
    return max((int(re.search(r"\d+", name)[0]) for name in names), default=-1)


@pytest.mark.slow
@pytest.mark.parametrize("host", list(PROGRAMS))
def test_killed_at_random_moments(host, tmp_path):
    if missing := [name for name in NEEDED[host] if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    chance, log = random.Random(KILLS), tmp_path / "log"

    def writes_another(process: subprocess.Popen, folder: pathlib.Path) -> bool:
        """Waits for a checkpoint, or the end."""
        before = checkpoints(folder)
        while checkpoints(folder).keys() <= before.keys():
            if process.poll() is not None:
                assert process.returncode == 0, log.read_text()[-3000:]
                return False
            time.sleep(0.001)
        return True

    with log.open("w") as output, contextlib.ExitStack() as lives:

        def live(folder: pathlib.Path) -> subprocess.Popen:
            process = start(host, folder, output)
            lives.callback(process.kill)
            return process

        process, written = live(tmp_path / "whole"), []
        while writes_another(process, tmp_path / "whole"):
            written.append(time.monotonic())
        period = (written[-1] - written[0]) / PERIODS
        for kill in range(KILLS):
            before = checkpoints(tmp_path / "killed")
            process = live(tmp_path / "killed")
            assert writes_another(process, tmp_path / "killed")
            time.sleep(chance.uniform(0, 2 * period))  # in a step, or while it writes
            process.kill()
            assert process.wait() == -9, "the training was over before it was killed"
            # It went on: from the first step it would have written the earlier ones again. (The newest may be half.)
            after = checkpoints(tmp_path / "killed")
            assert newest(after) >= newest(before)
            whole = [name for name in before if name in after and newest([name]) < newest(before)]
            assert [after[name] for name in whole] == [before[name] for name in whole]
            print(f"{host}: killed {kill + 1} of {KILLS}, with {sorted(after)[-1]}")
        assert live(tmp_path / "killed").wait() == 0, log.read_text()[-3000:]
    ends = [pickle.loads((tmp_path / f"{name}.end").read_bytes()) for name in ("whole", "killed")]
    assert [name for name, _ in ends[0]] == [name for name, _ in ends[1]]
    for (name, expected), (_, found) in zip(*ends, strict=True):
        np.testing.assert_array_equal(found, expected, err_msg=name)
