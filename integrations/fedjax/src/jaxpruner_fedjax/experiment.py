"""A federated training from a configuration: built and checked before the first round, resumed bit for bit."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import fedjax
import jax
import optax
from absl import logging

import jaxpruner
from jaxpruner_fedjax.clients import check_combination, federated_averaging
from jaxpruner_fedjax.communication import ClientUpdates, Ledger
from jaxpruner_fedjax.recording import Recorder, Saved, load_checkpoint, save_checkpoint
from jaxpruner_fedjax.sampling import PARAMS, branch_key, sample_clients
from jaxpruner_fedjax.server import SparseOptimizer, server_optimizer
from jaxpruner_fedjax.tasks import load_task

MASKS_NEVER_CHANGE = ("no_prune", "preserve", "static_sparse")  # whatever the rounds of updates


def option(default: Any, text: str) -> Any:
    """A field with what `--help` says of it."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a training; defaults are those of the paper's experiment."""

    task: str | None = option(None, "A task of FedJAX such as EMNIST_CONV, or module:function")
    cache_dir: str | None = option(None, "Where FedJAX keeps data (default ~/.cache/fedjax)")
    root_dir: str | None = option(None, "Root directory of experiment outputs")
    num_rounds: int = option(1000, "Number of federated training rounds")
    num_clients_per_round: int = option(50, "Clients that take part in a round")
    checkpoint_frequency: int = option(50, "Checkpoint frequency in rounds; 0: after the last only")
    eval_frequency: int = option(50, "Evaluation frequency in rounds; 0: after the last only")
    seed: int = option(0, "Decides parameters, clients, shuffling, dropout and masks")
    backend: str = option("jit", "How FedJAX goes through the clients: jit, debug or pmap; they differ by rounding")
    server_optimizer: str = option("adam", "adam, yogi, adagrad or sgd")
    server_learning_rate: float = option(10**-2.5, "Server step size")
    server_momentum: float = option(0.0, "Momentum of sgd")
    server_beta1: float = option(0.9, "Adam and Yogi beta 1")
    server_beta2: float = option(0.999, "Adam and Yogi beta 2")
    server_epsilon: float = option(1e-4, "Adam, Yogi and Adagrad epsilon")
    client_learning_rate: float = option(10**-1.5, "Client step size (sgd)")
    client_momentum: float = option(0.0, "Client momentum")
    batch_size: int = option(32, "Batch size of clients")
    num_epochs: int = option(1, "Epochs of clients in a round")
    eval_batch_size: int = option(256, "Batch size of the evaluation")
    algorithm: str = option("magnitude", f"One of {', '.join(jaxpruner.all_algorithm_names())}")
    sparsity: float = option(0.8, "Final fraction of zeros")
    dist_type: str = option("uniform", "uniform or erk")
    sparsity_type: str = option("unstructured", "unstructured, nm_2,4, block_4,4 or channel_-1")
    update_start_round: int = option(250, "First round of mask updates, from 0")
    update_end_round: int = option(750, "Last round of mask updates, a multiple of update_freq unless it is the first")
    update_freq: int = option(10, "Masks are updated in rounds that it divides")
    use_packed_masks: bool = option(False, "Keep a bit a weight instead of a byte")
    masked_clients: bool = option(False, "Clients train and send only what lies on the masks")
    top_k: float | None = option(None, "Share of the changes that clients send")

    @property
    def numbers(self) -> dict[str, Any]:
        """What decides the numbers of a round, so that a checkpoint is not continued with something else.

        Not `backend`: it changes no number but by rounding, and may change with the machine. To the same bits a
        training continues only with the same one.
        """
        free = ("cache_dir", "root_dir", "num_rounds", "checkpoint_frequency", "eval_frequency", "backend")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}


@dataclasses.dataclass
class Experiment:
    """All parts of a training, and where it stands."""

    config: Config
    train: fedjax.FederatedData
    test: fedjax.FederatedData
    model: fedjax.Model
    server: SparseOptimizer
    algorithm: fedjax.FederatedAlgorithm
    ledger: Ledger
    state: Any
    rounds: int = 0
    bytes_total: int = 0


def build(config: Config) -> Experiment:
    """The experiment of a configuration, continued from the last checkpoint in `root_dir` if there is one.

    Raises:
      ValueError: for settings that make no sense, alone or together.
      FileNotFoundError: if the data are missing and cannot be fetched.
    """
    _check(config)
    server = server_optimizer(_inner(config), _sparsity(config))
    updates = ClientUpdates(masked=config.masked_clients, top_k=config.top_k)
    check_combination(server, updates)  # before data are loaded
    train, test, model = load_task(config.task, config.cache_dir)
    sample_clients(train, config.num_clients_per_round, config.seed, 0)  # says so if there are too few
    parts = (
        fedjax.model_grad(model),
        fedjax.optimizers.sgd(config.client_learning_rate, momentum=config.client_momentum or None),
        server,
        fedjax.ShuffleRepeatBatchHParams(batch_size=config.batch_size, num_epochs=config.num_epochs),
    )
    with fedjax.for_each_client_backend(config.backend):
        if updates == ClientUpdates():
            algorithm = fedjax.algorithms.fed_avg.federated_averaging(*parts)
        else:
            algorithm = federated_averaging(*parts, updates)
    state = algorithm.init(model.init(branch_key(config.seed, PARAMS)))
    ledger = Ledger(train.client_ids(), state.params, updates)
    experiment = Experiment(config, train, test, model, server, algorithm, ledger, state)
    if (saved := load_checkpoint(config.root_dir, config.numbers)) is not None:
        if saved.rounds > config.num_rounds:
            raise ValueError(f"num_rounds: {config.num_rounds}, but {saved.rounds} are done in {config.root_dir}.")
        experiment.rounds, experiment.state, ledger.held, experiment.bytes_total = saved
        logging.info("continues after round %d", saved.rounds)
    return experiment


def run(experiment: Experiment) -> Any:
    """Trains to the last round. Returns the server's state."""
    config, first, started = experiment.config, experiment.rounds, time.monotonic()
    columns = [
        "bytes_down",
        "bytes_up",
        "bytes_total",
        *(f"test_{n}" for n in experiment.model.eval_metrics),
        "sparsity",
    ]
    with Recorder(config.root_dir, columns, first) as recorder:
        for round_num in range(first, config.num_rounds):
            row = _round(experiment, round_num)
            done = round_num + 1
            if _due(config.eval_frequency, done, config):
                row |= evaluate(experiment)
            recorder.write(done, row)
            if _due(config.checkpoint_frequency, done, config):
                saved = Saved(done, experiment.state, experiment.ledger.held, experiment.bytes_total)
                save_checkpoint(config.root_dir, config.numbers, saved)
            each = (time.monotonic() - started) / (done - first)
            shown = ", ".join(f"{name} {value:.6g}" for name, value in row.items())
            left = each * (config.num_rounds - done)
            logging.info("round %d of %d: %s; %.2f s a round, %.0f s left", done, config.num_rounds, shown, each, left)
    return experiment.state


def evaluate(experiment: Experiment) -> dict[str, float]:
    """Test metrics of the model, and the sparsity of its parameters of two or more axes."""
    params = experiment.state.params
    batches = fedjax.padded_batch_federated_data(experiment.test, batch_size=experiment.config.eval_batch_size)
    metrics = fedjax.evaluate_model(experiment.model, params, batches)
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    sparsity = jaxpruner.summarize_sparsity(kernels, only_total_sparsity=True)["_total_sparsity"]
    return {f"test_{name}": float(value) for name, value in metrics.items()} | {"sparsity": sparsity}


def _round(experiment: Experiment, round_num: int) -> dict[str, float]:
    config, state = experiment.config, experiment.state
    clients = sample_clients(experiment.train, config.num_clients_per_round, config.seed, round_num)
    ids = [client_id for client_id, *_ in clients]
    traffic = experiment.ledger.record(ids, state.params, experiment.server.masks(state))
    experiment.state, _ = experiment.algorithm.apply(state, clients)
    experiment.rounds = round_num + 1
    experiment.bytes_total += sum(traffic)
    return {"bytes_down": traffic.down, "bytes_up": traffic.up, "bytes_total": experiment.bytes_total}


def _due(frequency: int, done: int, config: Config) -> bool:
    return done == config.num_rounds or (frequency > 0 and done % frequency == 0)


def _check(config: Config) -> None:
    for name in ("task", "root_dir"):
        if not getattr(config, name):
            raise ValueError(f"{name}: missing; give --{name}.")
    for name in ("num_rounds", "num_clients_per_round", "batch_size", "num_epochs", "eval_batch_size", "update_freq"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: {getattr(config, name)} is less than 1.")
    if config.seed < 0:
        raise ValueError(f"seed: {config.seed} is negative; give 0 or more.")
    if os.path.exists(config.root_dir) and not os.path.isdir(config.root_dir):
        raise ValueError(f"root_dir: {config.root_dir} is a file; give a folder, which need not exist.")
    if config.backend not in ("jit", "debug", "pmap"):
        raise ValueError(f"backend: {config.backend!r} is not known; use jit, debug or pmap.")
    if config.algorithm not in MASKS_NEVER_CHANGE:
        _check_rounds(config)


def _check_rounds(config: Config) -> None:
    start, end, freq = config.update_start_round, config.update_end_round, config.update_freq
    if end >= config.num_rounds:
        raise ValueError(
            f"update_end_round: {end} is past the last round, which is {config.num_rounds - 1} (rounds count from 0), "
            "so the masks would never reach the final sparsity; end earlier, or train longer."
        )
    if start < end and end % freq:
        last = end - end % freq
        raise ValueError(
            f"update_end_round: {end} is not a multiple of update_freq={freq}, so no masks would be made then, "
            f"when the final sparsity is due; end at round {last if last >= start else last + freq}."
        )


def _sparsity(config: Config) -> dict[str, Any]:
    return {
        "algorithm": config.algorithm,
        "sparsity": config.sparsity,
        "dist_type": config.dist_type,
        "sparsity_type": config.sparsity_type,
        "update_start_step": config.update_start_round,
        "update_end_step": config.update_end_round,
        "update_freq": config.update_freq,
        "use_packed_masks": config.use_packed_masks,
        "rng_seed": config.seed,
    }


def _inner(config: Config) -> optax.GradientTransformation:
    rate, betas = config.server_learning_rate, {"b1": config.server_beta1, "b2": config.server_beta2}
    match config.server_optimizer:
        case "adam":
            return optax.adam(rate, **betas, eps=config.server_epsilon)
        case "yogi":
            return optax.yogi(rate, **betas, eps=config.server_epsilon)
        case "adagrad":
            return optax.adagrad(rate, eps=config.server_epsilon)
        case "sgd":
            return optax.sgd(rate, momentum=config.server_momentum or None)
    raise ValueError(f"server_optimizer: {config.server_optimizer!r} is not known; use adam, yogi, adagrad or sgd.")
