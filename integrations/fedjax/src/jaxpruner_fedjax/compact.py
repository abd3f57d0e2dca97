"""Makes a compact model from a sparse server's: it removes dead units, and so their bytes in each round.

    python -m jaxpruner_fedjax.compact --task EMNIST_CONV --root_dir runs/emnist --sparsity_type groups ...

Give the flags of the training. The command takes the last checkpoint, writes `compact/model.npz` and
`compact/report.json` into the root directory, and prints what a round sends before and after. `--further_rounds 10`
continues with the small model.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import fedjax
import jax
from absl import app, flags, logging

import jaxpruner_fedjax.train
from jaxpruner.compaction import files
from jaxpruner.inspection import timing
from jaxpruner_fedjax.communication import ClientUpdates, Ledger, Traffic
from jaxpruner_fedjax.compaction import CompactModel, compact_model, example_batch
from jaxpruner_fedjax.experiment import Config, Experiment, build
from jaxpruner_fedjax.sampling import sample_clients
from jaxpruner_fedjax.settings import inner_optimizer

FLAGS = flags.FLAGS


def bytes_of_a_round(experiment: Experiment, compacted: CompactModel) -> dict[str, Traffic]:
    """What the next round sends, for the dense model, for the sparse one as it was trained, and for the compact one.

    Clients of the sparse model hold its masks, and those of the compact model know the remaining units.
    """
    config = experiment.config
    clients = sample_clients(experiment.train, config.num_clients_per_round, config.seed, experiment.rounds)
    ids = [client_id for client_id, *_ in clients]

    def of(params: Any, masks: Any, updates: ClientUpdates) -> Traffic:
        ledger = Ledger(experiment.train.client_ids(), params, updates)
        ledger.record(ids, params, masks)
        return ledger.record(ids, params, masks)

    state, stock = experiment.state, ClientUpdates()
    nothing = jax.tree.map(lambda _: None, state.params)
    return {
        "dense": of(state.params, nothing, stock),
        "sparse": of(state.params, experiment.server.masks(state), experiment.ledger.updates),
        "compact": of(compacted.params, jax.tree.map(lambda _: None, compacted.params), stock),
    }


def further_rounds(experiment: Experiment, compacted: CompactModel, rounds: int) -> Any:
    """Trains the small model for more rounds, with the same clients, optimizers and data, by the stock algorithm.

    Returns:
      The server's state.
    """
    config = experiment.config
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        fedjax.model_grad(compacted.model),
        fedjax.optimizers.sgd(config.client_learning_rate, momentum=config.client_momentum or None),
        fedjax.optimizers.create_optimizer_from_optax(inner_optimizer(config)),
        fedjax.ShuffleRepeatBatchHParams(batch_size=config.batch_size, num_epochs=config.num_epochs),
    )
    state = compacted.server_state(experiment.state)
    for round_num in range(experiment.rounds, experiment.rounds + rounds):
        clients = sample_clients(experiment.train, config.num_clients_per_round, config.seed, round_num)
        state, _ = algorithm.apply(state, clients)
    return state


def metrics(experiment: Experiment, model: fedjax.Model, params: Any) -> dict[str, float]:
    """Test metrics."""
    batches = fedjax.padded_batch_federated_data(experiment.test, batch_size=experiment.config.eval_batch_size)
    return {name: float(value) for name, value in fedjax.evaluate_model(model, params, batches).items()}


def compact(config: Config, rounds: int = 0) -> CompactModel:
    """Compacts the last checkpoint of a training, and saves, prints and returns the result.

    Args:
      config: of the training.
      rounds: how many further rounds to train the small model for; it is saved as it is after them.

    Raises:
      ValueError: if there is no checkpoint, or one of other settings.
    """
    experiment = build(config)
    if not experiment.rounds:
        raise ValueError(f"root_dir: no checkpoint in {config.root_dir}. Train first: python -m jaxpruner_fedjax.train")
    whole, params = experiment.model, experiment.state.params
    batch = example_batch(experiment.test)
    compacted = compact_model(whole, params, batch)
    model, small = compacted.model, compacted.small
    report, traffic = small.report(), bytes_of_a_round(experiment, compacted)
    seconds = timing.alternate(
        {
            "dense": lambda: whole.apply_for_eval(params, batch),
            "compact": lambda: model.apply_for_eval(small.params, batch),
        }
    )
    print(report)
    for name, sent in traffic.items():
        print(f"a round of {config.num_clients_per_round} clients, {name}: {sent.down:,} bytes down, {sent.up:,} up")
    dense, less = (1e3 * seconds[name] for name in ("dense", "compact"))
    size = len(batch["x"]) if "x" in batch else len(next(iter(batch.values())))
    print(f"forward pass of {size}: dense {dense:.3f} ms, compact {less:.3f} ms, {dense / less:.2f} times as fast")
    measured = {"before": metrics(experiment, whole, params), "compact": metrics(experiment, model, small.params)}
    if rounds:
        trained = further_rounds(experiment, compacted, rounds).params
        compacted = dataclasses.replace(compacted, params=trained)
        measured[f"compact, {rounds} rounds more"] = metrics(experiment, model, trained)
    for name, values in measured.items():
        print(f"{name}: " + ", ".join(f"test {metric} {value:.6g}" for metric, value in values.items()))
    path = file_of(config.root_dir)
    path.parent.mkdir(exist_ok=True)
    files.save_compact(path, small, compacted.params)
    told = {
        "report": dataclasses.asdict(report),
        "bytes_of_a_round": {name: sent._asdict() for name, sent in traffic.items()},
        "seconds": seconds,
        "metrics": measured,
    }
    (path.parent / "report.json").write_text(json.dumps(told, indent=1) + "\n")
    print(f"{path}: the compact model")
    return compacted


def file_of(root_dir: str | None) -> Path:
    """Where the compact model of a training is."""
    return Path(root_dir or ".") / "compact" / "model.npz"


def main(argv: list[str]) -> None:
    """Compacts, or says why not."""
    if len(argv) > 1:
        raise SystemExit(f"compact: {argv[1]!r} is no flag; --help lists them.")
    logging.set_verbosity(logging.ERROR)
    try:
        compact(jaxpruner_fedjax.train.config_of_flags(), FLAGS.further_rounds)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"compact: {error}") from error


if __name__ == "__main__":
    jaxpruner_fedjax.train.define_flags()
    flags.adopt_module_key_flags(jaxpruner_fedjax.train)  # so that --help lists them
    flags.DEFINE_integer("further_rounds", 0, "Rounds to go on for with the small model.", lower_bound=0)
    app.run(main)
