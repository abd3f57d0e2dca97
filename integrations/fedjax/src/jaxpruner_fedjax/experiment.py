"""A federated training from a configuration: built and checked before the first round, resumed bit for bit."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, NamedTuple

import fedjax
import jax
import numpy as np
from absl import logging

import jaxpruner
from jaxpruner import trees
from jaxpruner.coupled_structures import AllGroups, Coupled
from jaxpruner.inspection import checks
from jaxpruner.structure_strings import parse_sparsity_type
from jaxpruner.training.projection import find_state
from jaxpruner_fedjax.clients import check_combination, federated_averaging
from jaxpruner_fedjax.communication import ClientUpdates, Ledger
from jaxpruner_fedjax.compaction import example_batch, find_groups
from jaxpruner_fedjax.recording import Recorder, Saved, load_checkpoint, save_checkpoint
from jaxpruner_fedjax.sampling import PARAMS, branch_key, sample_clients
from jaxpruner_fedjax.server import SparseOptimizer, server_optimizer, why_rounds_are_lost
from jaxpruner_fedjax.settings import (
    Config,
    check,
    check_excluded,
    in_settings,
    inner_optimizer,
    sparsity_config,
)
from jaxpruner_fedjax.tasks import load_task


@dataclasses.dataclass
class Experiment:
    """All parts of a training, and its progress."""

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
    check(config)
    try:
        return _build(config)
    except ValueError as error:
        raise ValueError(in_settings(str(error))) from error


def _build(config: Config) -> Experiment:
    asked, loaded = sparsity_config(config), None
    wanted = parse_sparsity_type(asked["sparsity_type"])
    if isinstance(wanted, AllGroups):
        loaded = load_task(config.task, config.cache_dir)
        asked["sparsity_type"] = wanted.of(_groups(config, *loaded[1:]))
    server = server_optimizer(inner_optimizer(config), asked)
    jaxpruner.check_schedule(server.updater, config.num_rounds)
    updates = ClientUpdates(masked=config.masked_clients, top_k=config.top_k)
    check_combination(server, updates)  # before data are loaded
    train, test, model = loaded or load_task(config.task, config.cache_dir)
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
    params = model.init(branch_key(config.seed, PARAMS))
    check_excluded(config, params)
    state = algorithm.init(params)
    ledger = Ledger(train.client_ids(), state.params, updates)
    experiment = Experiment(config, train, test, model, server, algorithm, ledger, state)
    if (saved := load_checkpoint(config.root_dir, config.numbers)) is not None:
        if saved.rounds > config.num_rounds:
            raise ValueError(f"num_rounds: {config.num_rounds}, but {saved.rounds} are done in {config.root_dir}.")
        experiment.rounds, experiment.state, ledger.held, experiment.bytes_total = saved
        logging.info("continues after round %d", saved.rounds)
    return experiment


def _groups(config: Config, test: fedjax.FederatedData, model: fedjax.Model) -> Any:
    """The units of the model of a task."""
    shapes = jax.eval_shape(model.init, branch_key(config.seed, PARAMS))
    return find_groups(model, shapes, example_batch(test))


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
    _tell_lost_rounds(experiment)
    _tell_shifted(experiment)
    is_checked = False
    with Recorder(config.root_dir, columns, first) as recorder:
        for round_num in range(first, config.num_rounds):
            row = _round(experiment, round_num)
            done = round_num + 1
            if _due(config.eval_frequency, done, config):
                row |= evaluate(experiment)
                if not is_checked:
                    state = experiment.state
                    jaxpruner.check_sparse(state.params, state.opt_state, experiment.server.updater)
                    is_checked = True
            recorder.write(done, row)
            if _due(config.checkpoint_frequency, done, config):
                saved = Saved(done, experiment.state, experiment.ledger.held, experiment.bytes_total)
                save_checkpoint(config.root_dir, config.numbers, saved)
            each = (time.monotonic() - started) / (done - first)
            shown = ", ".join(f"{name} {value:.6g}" for name, value in row.items())
            left = each * (config.num_rounds - done)
            logging.info("round %d of %d: %s; %.2f s a round, %.0f s left", done, config.num_rounds, shown, each, left)
    told = reached(experiment.server, experiment.state)
    logging.log(logging.WARNING if told.falls_short else logging.INFO, "%s", told)
    return experiment.state


class Reached(NamedTuple):
    """The sparsity of the parameters that are pruned, all together.

    Attributes:
      weights: how many there are.
      asked: the final sparsity.
      sparsity: the share that is zero.
      of: what these are shares of, if not of weights.
    """

    weights: int
    asked: float
    sparsity: float
    of: str | None = None

    @property
    def falls_short(self) -> bool:
        """Whether more was asked, beyond the rounding to whole weights of small parameters."""
        return self.sparsity < self.asked - 0.005

    def __str__(self) -> str:
        if not self.weights:
            return "done: nothing is pruned"
        asked = f"asked {100 * self.asked:.4g} %, reached {100 * self.sparsity:.4g} %"
        return f"done: {asked} of the {self.of or f'{self.weights} weights that may be pruned'}"


def reached(server: SparseOptimizer, state: Any) -> Reached:
    """The sparsity that was asked of a server, and that of its parameters."""
    targets = jax.tree.leaves(server.updater.get_target_sparsities(state.params), is_leaf=trees.is_unpruned)
    leaves = zip(jax.tree.leaves(state.params), targets, strict=True)
    pruned = [(param, target) for param, target in leaves if not trees.is_unpruned(target)]
    weights = sum(param.size for param, _ in pruned)
    if not weights:
        return Reached(0, 0.0, 0.0)
    structure = server.updater.sparsity_type
    if isinstance(structure, Coupled):
        asked, held, _ = checks.shares_pruned(state.params, find_state(state.opt_state), server.updater)
        return Reached(weights, asked, held, structure.budget)
    asked = sum(param.size * float(target) for param, target in pruned) / weights
    zeros = weights - sum(np.count_nonzero(param) for param, _ in pruned)
    return Reached(weights, asked, zeros / weights)


def _tell_lost_rounds(experiment: Experiment) -> None:
    updater, rounds = experiment.server.updater, experiment.config.num_rounds
    if updater.skip_gradients:
        lost = sum(bool(updater.scheduler.should_update_mask(i)) for i in range(rounds))
        logging.info("%d of %d rounds are lost. %s", lost, rounds, why_rounds_are_lost(updater))


def _tell_shifted(experiment: Experiment) -> None:
    """Names pruned parameters whose zeros the model removes before it multiplies with them."""
    params, state = experiment.state.params, experiment.state
    client = next(experiment.train.shuffled_clients(buffer_size=1, seed=0))[1]
    batch = next(iter(client.batch(batch_size=1)))
    forward = experiment.model.apply_for_train
    shifted = jaxpruner.shifted_parameters(forward, params, batch, jax.random.PRNGKey(0))
    masks = jax.tree.leaves(experiment.server.masks(state), is_leaf=trees.is_unpruned)
    names = [trees.leaf_name(path) for path, _ in trees.named_leaves(params)]
    pruned = {name for name, mask in zip(names, masks, strict=True) if mask is not None}
    if told := [name for name in shifted if name in pruned]:
        logging.warning(
            "%s: pruned, but shifted before they are multiplied (weight standardisation), so no zero is left there; "
            "keep them dense with --exclude.",
            ", ".join(told),
        )


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
