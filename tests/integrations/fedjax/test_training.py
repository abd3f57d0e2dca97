"""The trainer: kill -9 and resume to the bit, what it writes, data that are missing, and all that it refuses."""

from __future__ import annotations

import csv
import dataclasses
import os
import pathlib
import pickle
import signal
import struct
import subprocess
import sys
import time

import federated_cases as cases
import jax
import numpy as np
import optax
import pytest
from federated_cases import fedjax
from tensorboardX.proto.event_pb2 import Event

import jaxpruner
import jaxpruner_fedjax
from jaxpruner_fedjax.experiment import Config, build, reached, run
from jaxpruner_fedjax.sampling import PARAMS, branch_key
from jaxpruner_fedjax.settings import check
from jaxpruner_fedjax.tasks import EMNIST_FILES, EMNIST_URL, load_task
from jaxpruner_fedjax.train import SparsitiesParser

SETTINGS = {
    "task": "federated_cases:task", "num_rounds": 24, "num_clients_per_round": 3, "batch_size": 16,
    "algorithm": "magnitude", "use_packed_masks": True,
    "update_start_round": 2, "update_end_round": 16, "update_freq": 2,
    "checkpoint_frequency": 4, "eval_frequency": 4, "masked_clients": True, "top_k": 0.2,
    "exclude": ["linear_1/w"], "custom_sparsity_map": {"*/w": 0.8},
}  # fmt: skip


def config(root: pathlib.Path, **more) -> Config:
    return Config(**(SETTINGS | {"root_dir": str(root)} | more))


def command(root: pathlib.Path, **more) -> list[str]:
    settings = dataclasses.asdict(config(root, **more)).items()
    flags = [f"--{name}={as_flag(value)}" for name, value in settings if value is not None]
    return [sys.executable, "-m", "jaxpruner_fedjax.train", *flags]


def as_flag(value) -> str:
    if isinstance(value, dict):
        return ",".join(f"{pattern}={sparsity}" for pattern, sparsity in value.items())
    return ",".join(value) if isinstance(value, list) else str(value).lower()


def environment(compiled: pathlib.Path) -> dict[str, str]:
    """Where subprocesses find the task, and what others have compiled."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def final(root: pathlib.Path):
    (path,) = root.glob("checkpoint_*")
    return path.name, pickle.loads(path.read_bytes())["saved"]


def last_events(root: pathlib.Path) -> list[tuple[int, str, float]]:
    """(round, scalar, value) in the newest event file, which TensorBoard reads from step 1 on."""
    path = max(root.glob("events.out.tfevents.*"))
    content, start, scalars = path.read_bytes(), 0, []
    while start < len(content):  # TFRecord: a length, its checksum, the data, their checksum
        (length,) = struct.unpack_from("<Q", content, start)
        event = Event.FromString(content[start + 12 : start + 12 + length])
        start += length + 16
        if event.HasField("session_log"):
            assert (event.step, scalars) == (1, [])
        scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return sorted(scalars)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    """A training that nothing interrupted, in this process."""
    root = tmp_path_factory.mktemp("whole")
    run(build(config(root)))
    return root


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_to_the_bit(whole, tmp_path):
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(tmp_path), stderr=log, env=environment(tmp_path / "compiled"))
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("checkpoint_????????")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert final(tmp_path)[0] != "checkpoint_00000024"

    resumed = subprocess.run(
        command(tmp_path), capture_output=True, text=True, env=environment(tmp_path / "compiled"), check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "continues after round" in resumed.stderr
    assert "round 24 of 24: bytes_down" in resumed.stderr
    last = resumed.stderr.strip().splitlines()[-1]
    assert last.endswith("done: asked 80 %, reached 80 % of the 4704 weights that may be pruned")
    assert (tmp_path / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    (name, saved), (other_name, other) = final(tmp_path), final(whole)
    assert name == other_name == "checkpoint_00000024"
    cases.assert_same_bits(saved, other)
    assert last_events(tmp_path) == last_events(whole)  # also those that the killed process had not written yet


def test_what_a_training_leaves_behind(whole):
    rows = list(csv.DictReader((whole / "metrics.csv").read_text().splitlines()))
    assert [int(row["round"]) for row in rows] == list(range(1, 25))
    assert list(rows[0]) == ["round", "bytes_down", "bytes_up", "bytes_total", "test_loss", "test_accuracy", "sparsity"]
    assert [bool(row["test_accuracy"]) for row in rows] == [i % 4 == 0 for i in range(1, 25)]
    assert float(rows[-1]["sparsity"]) == pytest.approx(0.8, abs=0.05)
    assert int(rows[-1]["bytes_total"]) == sum(int(row["bytes_down"]) + int(row["bytes_up"]) for row in rows)
    events = last_events(whole)
    assert [event[0] for event in events if event[1] == "bytes_total"] == list(range(1, 25))
    for name in ("bytes_down", "test_accuracy"):
        expected = [np.float32(row[name]) for row in rows if row[name]]
        assert [np.float32(value) for _, tag, value in events if tag == name] == expected
    assert not list(whole.glob("*.partial"))


def test_a_finished_training_is_not_repeated_and_may_be_prolonged(whole):
    before = (whole / "metrics.csv").read_text()
    state = run(build(config(whole)))
    assert (whole / "metrics.csv").read_text() == before
    experiment = build(config(whole, num_rounds=25))
    assert experiment.rounds == 24
    cases.assert_same_bits(experiment.state, state)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sparsity": 0.9}, r"written with sparsity=0.8 \(now 0.9\); give the same settings, or another root_dir"),
        ({"seed": 7, "top_k": None}, r"seed=0 \(now 7\), top_k=0.2 \(now None\)"),
        (
            {"use_packed_masks": False},
            r"use_packed_masks=True \(now False\); give the same settings, or another root_dir",
        ),
        ({"algorithm": "saliency"}, r"algorithm='magnitude' \(now 'saliency'\)"),
        ({"algorithm": "no_prune"}, r"algorithm='magnitude' \(now 'no_prune'\)"),
        ({"custom_sparsity_map": {"*/w": 0.7}}, r"custom_sparsity_map={'\*/w': 0.8} \(now {'\*/w': 0.7}\)"),
        ({"num_rounds": 20}, "num_rounds: 20, but 24 are done"),
    ],
)
def test_another_training_is_not_continued(whole, more, message):
    with pytest.raises(ValueError, match=message):
        build(config(whole, **more))


def test_a_dense_training_is_not_continued_sparse(tmp_path):
    few = {"num_rounds": 1, "update_start_round": 0, "update_end_round": 0, "masked_clients": False, "top_k": None}
    run(build(config(tmp_path, algorithm="no_prune", **few)))
    with pytest.raises(ValueError, match=r"algorithm='no_prune' \(now 'magnitude'\)"):
        build(config(tmp_path, **few))


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"config": {}}), pickle.dumps([1])])
def test_a_checkpoint_that_is_none(content, tmp_path):
    (tmp_path / "checkpoint_00000004").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint_00000004: cannot be read as a checkpoint.*give another root_dir"):
        build(config(tmp_path))


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        ("num_rounds num_clients_per_round batch_size num_epochs eval_batch_size update_freq", [0, -1, 1.5, "1"],
         "not a whole number of 1 or more"),
        ("checkpoint_frequency eval_frequency", [-1, 0.5], "not a whole number of rounds; give 0 for after the last"),
        ("update_start_round update_end_round", [-1, 2.5], "not a round; they count from 0"),
        ("seed", [-1, 2**32, 0.5], "not a seed"),
        ("server_learning_rate server_epsilon client_learning_rate", [-0.1, 0.0, float("nan"), float("inf"), "x"],
         "not a step size; give a number above 0"),
        ("server_momentum server_beta1 server_beta2 client_momentum", [-0.1, 1, 1.5, float("nan")], r"not in \[0, 1\)"),
        ("backend server_optimizer", ["tpu", None], "not known; use one of (jit, debug|adam, yogi)"),
        ("use_packed_masks masked_clients skip_gradients", ["no", 2], "not true or false"),
        ("exclude", ["linear/w", [1], [""]], "not a sequence of paths"),
    ],
)  # fmt: skip
def test_values_that_make_no_sense(names, values, message, tmp_path):
    for name in names.split():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name}: .* is {message}"):
                check(config(tmp_path, **{name: value}))


def test_every_setting_has_a_rule_and_the_largest_seed_works(tmp_path):
    check(config(tmp_path, seed=2**32 - 1))
    assert branch_key(2**32 - 1, PARAMS).shape == (2,)
    assert drawn(2**32 - 1, 0) != drawn(2**31, 0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"server_momentum": 0.9}, "server_momentum: 0.9 has no use for server_optimizer='adam'.*use sgd"),
        ({"server_beta1": 0.5, "server_optimizer": "sgd"}, "server_beta1: 0.5 has no use.*use adam or yogi"),
        ({"server_epsilon": 0.5, "server_optimizer": "sgd"}, "server_epsilon: .*use adam or yogi or adagrad"),
    ],
)
def test_settings_that_another_server_optimizer_has(more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check(config(tmp_path, **more))


def targets(root, **more):
    experiment = build(config(root, masked_clients=False, **more))
    tree = experiment.server.updater.get_target_sparsities(experiment.state.params)
    return {name: leaves["w"] for name, leaves in tree.items()}


def test_layers_that_a_structure_does_not_fit_are_excluded(tmp_path):
    structure = {"sparsity_type": "nm_2,5", "sparsity": 0.6, "custom_sparsity_map": None}
    with pytest.raises(ValueError, match=r"linear/w: axis -1 of \(784, 6\) is not a multiple of m=5; .*with --exclude"):
        targets(tmp_path, **structure, exclude=None)
    assert targets(tmp_path, **structure, exclude=["*ear/w"]) == {"linear": None, "linear_1": 0.6}


def test_layers_of_a_sparsity_of_their_own(tmp_path):
    given = {"exclude": None, "custom_sparsity_map": {"*_1/w": 0.5}}
    assert targets(tmp_path, **given) == {"linear": 0.8, "linear_1": 0.5}
    assert targets(tmp_path, **given, algorithm="global_magnitude")["linear_1"] == 0.5


@dataclasses.dataclass(eq=False)
class InRounds(jaxpruner.MagnitudePruning):
    """An algorithm of one's own, with an option that is a whole number."""

    rounds: int = 1


def test_options_of_the_algorithm(tmp_path):
    given = {"algorithm": "fisher", "algorithm_options": {"decay": 0.5}, "masked_clients": False}
    assert build(config(tmp_path, **given)).server.updater.decay == 0.5
    with pytest.raises(ValueError, match="algorithm_options: update_start_round has a setting of its own"):
        build(config(tmp_path, **given | {"algorithm_options": {"update_start_round": 3.0}}))
    with pytest.raises(ValueError, match=r"dekay: no such key for algorithm 'fisher'; valid keys are .*decay"):
        build(config(tmp_path, **given | {"algorithm_options": {"dekay": 0.5}}))
    assert config(tmp_path, **given).numbers["algorithm_options"] == {"decay": 0.5}
    own = given | {"algorithm": "in_rounds", "algorithm_options": {"rounds": 3.0}}
    jaxpruner.register_algorithm("in_rounds", InRounds)
    rounds = build(config(tmp_path, **own)).server.updater.rounds
    assert (rounds, type(rounds)) == (3, int)
    refusal = "SynFlow scores with the loss, which this trainer does not pass on; make masks"
    with pytest.raises(ValueError, match=refusal):
        build(config(tmp_path, algorithm="synflow", algorithm_options={"rounds": 3.0}, masked_clients=False))


def test_sparsities_on_the_command_line():
    parse = SparsitiesParser().parse
    assert parse("a/*=0.5, b=c/w=0.25") == {"a/*": 0.5, "b=c/w": 0.25}
    for text, message in {"a": "not of the form", "=1": "not of the form", "a=x": "float", "a=0,a=1": "twice"}.items():
        with pytest.raises(ValueError, match=message):
            parse(text)


def standardised(params, batch, rng):
    kernel = params["linear"]["w"]
    return batch["x"].reshape(len(batch["x"]), -1) @ (kernel - kernel.mean(0))


def test_a_server_that_leaves_its_masks_is_told_at_the_first_evaluation(tmp_path):
    experiment = build(config(tmp_path, num_rounds=2, update_start_round=0, update_end_round=0))
    apply = experiment.algorithm.apply

    def moved(state, clients):
        state, told = apply(state, clients)
        return state.replace(params=jax.tree.map(lambda p: p + 1, state.params)), told

    experiment.algorithm = fedjax.FederatedAlgorithm(experiment.algorithm.init, moved)
    with pytest.raises(ValueError, match="linear/w: "):
        run(experiment)


def test_the_last_update_is_the_one_that_the_end_allows(tmp_path):
    schedule = build(config(tmp_path, update_end_round=17)).server.updater.scheduler
    assert schedule.last_update_step == 16
    assert float(schedule.get_sparsity_at_step(0.8, 16)) == pytest.approx(0.8, abs=1e-7)


def test_what_was_asked_and_what_was_reached(tmp_path, caplog):
    caplog.set_level("INFO", "absl")
    experiment = build(config(tmp_path, num_rounds=17))
    experiment.rounds = 17  # as if it had ended without a mask update
    experiment.model = experiment.model.replace(apply_for_train=standardised)
    run(experiment)
    assert "linear/w: pruned, but shifted before they are multiplied" in caplog.text
    assert caplog.records[-1].levelname == "WARNING"
    assert caplog.records[-1].getMessage().startswith("done: asked 80 %, reached 0 %")
    dense = jaxpruner_fedjax.server_optimizer(optax.sgd(0.1), algorithm="no_prune")
    assert str(reached(dense, experiment.state)) == "done: nothing is pruned"


def test_rounds_that_rigl_loses_are_counted(tmp_path, caplog):
    caplog.set_level("INFO", "absl")
    experiment = build(config(tmp_path, algorithm="rigl", masked_clients=False, checkpoint_frequency=0))
    experiment.rounds = 24
    run(experiment)
    assert "8 of 24 rounds are lost. RigL takes no server step" in caplog.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"task": None}, "task: missing; give --task"),
        ({"root_dir": None}, "root_dir: missing"),
        ({"task": "EMNIST"}, "task 'EMNIST' is not known; use one of EMNIST_CONV"),
        ({"task": "no.such:thing"}, "No module named 'no'"),
        ({"task": "federated_cases:nothing"}, "has no attribute 'nothing'"),
        ({"task": "federated_cases:digits"}, r"returns \(<.*return \(training data, test data, model\)"),
        ({"task": "federated_cases:pair"}, r"returns \(int, int\); return"),
        ({"task": ":thing"}, "Empty module name"),
        ({"task": ".a:thing"}, "the 'package' argument is required"),
        ({"task": "federated_cases:ROUNDS"}, "is no function"),
        ({"root_dir": __file__}, "root_dir: .*test_training.py is a file"),
        ({"root_dir": __file__ + "/in/it"}, "root_dir: .*test_training.py is a file"),
        (
            {"exclude": ["*/b"]},
            r"exclude: '\*/b' names no parameter of two or more axes, which are linear/w, linear_1/w",
        ),
        ({"exclude": ["*"], "custom_sparsity_map": None}, "exclude: leaves none of the 4 parameters.*exclude fewer"),
        (
            {"custom_sparsity_map": {"conv/w": 0.5}},
            "custom_sparsity_map: 'conv/w' matches no parameter that exclude leaves",
        ),
        ({"custom_sparsity_map": {"linear/w": 1.0}}, "custom_sparsity_map: linear/w: sparsity 1.0 is outside"),
        ({"algorithm": "set", "task": "no.such:thing"}, "masked clients cannot be combined with SET"),
        ({"num_clients_per_round": 5}, "5 clients a round cannot be taken from 4"),
        ({"algorithm": "rig"}, "algorithm: 'rig' is not known"),
        ({"sparsity": 1.0}, "Default sparsity"),
        (
            {"update_start_round": 250, "update_end_round": 750},
            r"update_start_round: the first mask update is at round 250, and the training has 24 rounds",
        ),
        (
            {"update_end_round": 7, "update_freq": 4},
            "one multiple only of 4 lies between update_start_round=2 and update_end_round=7",
        ),
        (
            {"update_start_round": 5, "update_end_round": 7, "update_freq": 4},
            "no multiple of 4 lies between update_start_round=5 and update_end_round=7",
        ),
        (
            {"update_end_round": 24},
            r"update_end_round: the last mask update is at round 24, and the training has 24 rounds .* is 23",
        ),
        ({"update_start_round": 18}, "update_end_round: 16 comes before update_start_round=18"),
        ({"algorithm": "rigl"}, "masked clients cannot be combined with RigL"),
        ({"algorithm": "rigl", "update_freq": 1, "masked_clients": False}, "update_freq"),
        ({"top_k": 2.0}, "top_k: 2.0 is outside"),
        ({"sparsity_type": "nm_3,7"}, "not a multiple of m=7"),
    ],
)
def test_mistakes_are_told_before_anything_starts(more, message, tmp_path):
    root = tmp_path / "root"
    with pytest.raises(ValueError, match=message):
        build(config(root, **more))
    assert not root.exists()


@pytest.mark.slow
def test_the_command_tells_mistakes_in_one_line(tmp_path):
    mistaken = command(tmp_path / "root", algorithm="rig", skip_gradients=True)
    done = subprocess.run(mistaken, capture_output=True, text=True, env=environment(tmp_path), check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("train: algorithm: 'rig' is not known")
    assert "Traceback" not in done.stderr


def test_missing_emnist_says_what_to_download_and_where_to_put_it(tmp_path, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no network
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    with pytest.raises(FileNotFoundError) as told:
        build(config(tmp_path / "root", task="EMNIST_CONV", cache_dir=str(tmp_path / "cache")))
    for name in EMNIST_FILES:
        assert EMNIST_URL + name in str(told.value)
    assert f"put them into {tmp_path / 'cache'}" in str(told.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["SHAKESPEARE_CHARACTER", "CIFAR100_LOGISTIC"])
def test_other_data_that_are_missing(name, tmp_path, monkeypatch):
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # no network
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "")
    with pytest.raises(FileNotFoundError, match=rf"{name} are not all in {tmp_path}.*cannot be fetched") as told:
        load_task(name, str(tmp_path))
    assert f"to {tmp_path} under the same names" in str(told.value)


def test_emnist_that_was_put_there_is_used(tmp_path):
    for name in EMNIST_FILES:
        with fedjax.SQLiteFederatedDataBuilder(str(tmp_path / name)) as builder:
            examples = {"pixels": np.zeros((5, 28, 28), np.float32), "label": np.arange(5, dtype=np.int32)}
            builder.add_many([(b"f2100_00", examples), (b"f0001_00", examples)])
    train, test, model = load_task("EMNIST_LOGISTIC", str(tmp_path))
    assert [train.num_clients(), test.num_clients()] == [2, 2]
    shapes = [leaf.shape for leaf in jax.tree.leaves(model.init(jax.random.PRNGKey(0)))]
    assert shapes == [(62,), (784, 62)]
    (_, data, _), *_ = jaxpruner_fedjax.sample_clients(train, 1, seed=0, round_num=0)
    (batch,) = data.shuffle_repeat_batch(batch_size=5)
    assert batch["x"].shape == (5, 28, 28, 1)
    assert batch["x"].min() == 1.0


def test_the_default_rounds_are_the_papers_and_prune(tmp_path):
    config = Config(task="federated_cases:task", root_dir=str(tmp_path), num_clients_per_round=3)
    assert (config.num_rounds, config.update_start_round, config.update_end_round) == (1000, 250, 750)
    schedule = build(config).server.updater.scheduler
    rounds = [i for i in range(config.num_rounds) if schedule.should_update_mask(i)]
    assert rounds == list(range(250, 751, 10))
    assert float(schedule.get_sparsity_at_step(config.sparsity, rounds[-1])) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "more",
    [
        {"algorithm": "no_prune", "update_start_round": 250, "update_end_round": 750},
        {"algorithm": "static_sparse", "update_start_round": 250, "update_end_round": 750},
        {"update_start_round": 3, "update_end_round": 3, "update_freq": 10},  # one shot
    ],
)
def test_rounds_of_updates_that_need_no_check(more, tmp_path):
    build(config(tmp_path, **more))


def drawn(seed, round_num):
    clients = jaxpruner_fedjax.sample_clients(cases.digits(), 3, seed, round_num)
    return [
        (cid, np.asarray(key).tobytes(), next(iter(data.shuffle_repeat_batch(cases.BATCHES)))["y"].tobytes())
        for cid, data, key in clients
    ]


def test_sampling_is_a_function_of_seed_and_round():
    assert drawn(0, 3) == drawn(0, 3)
    assert len({tuple(drawn(seed, round_num)) for seed in range(3) for round_num in range(3)}) == 9
    assert len({cid for cid, *_ in drawn(0, 0)}) == 3


def test_clients_parameters_and_masks_have_keys_of_their_own():
    params = cases.params()
    updater = cases.server("random").updater  # rng_seed 0

    def bits(key):
        return np.asarray(key if key.dtype == np.uint32 else jax.random.key_data(key)).tobytes()

    masks = {bits(key) for step in range(-1, 30) for key in jax.tree.leaves(updater.random_keys(params, step))}
    clients = {key for round_num in range(30) for _, key, _ in drawn(0, round_num)}
    first = jax.random.split(branch_key(0, PARAMS), 8)
    initial = {bits(key) for key in (*first, *jax.random.split(first[0], 8))}
    assert (len(masks), len(clients)) == (31 * 4, 30 * 3)
    assert not masks & clients
    assert not masks & initial
    assert not clients & initial
