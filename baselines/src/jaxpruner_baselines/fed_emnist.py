"""fed_emnist: federated averaging, the federated row of the paper, on handwritten characters or on Shakespeare.

    jaxpruner-baselines run fed_emnist --preset digits    # 45 runs, about 25 minutes on 2 cores; dense: 87.6
    jaxpruner-baselines run fed_emnist --preset mnist5k   # 45 runs, about 25 minutes on 2 cores; dense: 91.6
    jaxpruner-baselines run fed_emnist --preset shakespeare    # 45 runs of a minute and a half on one core
    jaxpruner-baselines run fed_emnist --preset paper     # days on 2 cores; meant for an accelerator

FedJAX's own `fed_avg` with a sparse server optimizer; JaxPruner is the one line marked below. A method such as
`magnitude+masked+top_k` changes what clients send: they stay on the server's masks, and send the largest changes only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import fedjax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpruner
import jaxpruner_fedjax
from jaxpruner_baselines import federated_data, federated_plays, intervals
from jaxpruner_baselines.baseline import Baseline, Cost, NotReady, Outcome, Program, Progress, Run, TrainStep
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.costs import SHARES, costs
from jaxpruner_baselines.methods import GROWS, GROWTH_DROP_FRACTION, GROWTH_END, sparsify_config
from jaxpruner_fedjax.clients import round_input
from jaxpruner_fedjax.sampling import PARAMS, branch_key
from jaxpruner_fedjax.tasks import require_emnist

MEGABYTE = 1e6
EMNIST_EXAMPLES = 671_585 / 3_400  # of a client of the training data, on average


@dataclasses.dataclass(frozen=True)
class Preset:
    dataset: str
    rounds: int
    clients: int  # a round
    client_learning_rate: float
    prune_every: int  # rounds
    model: str = "conv"
    prune_start: float = 0.25  # fractions of all rounds
    prune_end: float = 0.75
    batch_size: int = 32
    client_epochs: int = 1
    server_learning_rate: float = 10**-2.5
    server_b1: float = 0.9
    server_b2: float = 0.999
    server_eps: float = 1e-4
    top_k: float = 0.05  # the share of changes that clients send, for methods that say so
    checkpoint_every: int = 0  # rounds; 0: a run is so short that it starts anew
    validation: bool = False  # test on clients held out of the training clients, to choose the numbers above

    def load(self) -> federated_data.Federated:
        if self.dataset == "emnist":
            return federated_data.Federated(*fedjax.datasets.emnist.load_data(only_digits=False))
        return federated_data.DATASETS[self.dataset](validation=self.validation)

    def make_model(self) -> fedjax.Model:
        return MODELS[self.model](only_digits=False)  # 62 classes

    def shapes(self, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Of a batch of so many."""
        return {
            "x": jax.ShapeDtypeStruct((examples, 28, 28, 1), jnp.float32),
            "y": jax.ShapeDtypeStruct((examples,), jnp.int32),
        }

    @property
    def batching(self) -> fedjax.ShuffleRepeatBatchHParams:
        """How clients batch their data in a round."""
        return fedjax.ShuffleRepeatBatchHParams(batch_size=self.batch_size, num_epochs=self.client_epochs)

    def sparsity_config(self, method: str, sparsity: float) -> dict[str, Any]:
        """For `jaxpruner.sparsify`; its steps are the server's, a round each."""
        return sparsify_config(
            method, sparsity, self.rounds, start=self.prune_start, end=self.prune_end, freq=self.prune_every
        ) | {"dist_type": "uniform"}

    def measure(self, model: fedjax.Model, params: Any, test: fedjax.FederatedData) -> tuple[float, dict[str, Any]]:
        """The accuracy, and details of the outcome."""
        batches = fedjax.padded_batch_federated_data(test, batch_size=256)
        measured = fedjax.evaluate_model(model, params, batches)
        return float(measured["accuracy"]), {"test_loss": float(measured["loss"])}


@dataclasses.dataclass(frozen=True)
class Plays(Preset):
    """A character model of Shakespeare's plays by role: FedJAX's LSTM, of these sizes."""

    model: str = "lstm"
    sequence_length: int = 40
    embed_size: int = 8
    hidden_size: int = 128
    layers: int = 2
    client_steps: int = 16  # in a round, at most
    grow_every: int = 10  # rounds, for methods that replace weights

    def load(self) -> federated_data.Federated:
        return federated_plays.plays(self.sequence_length, validation=self.validation)

    def make_model(self) -> fedjax.Model:
        return federated_plays.make_model(self.embed_size, self.hidden_size, self.layers)

    def shapes(self, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
        return dict.fromkeys("xy", jax.ShapeDtypeStruct((examples, self.sequence_length), jnp.int32))

    @property
    def batching(self) -> fedjax.ShuffleRepeatBatchHParams:
        return super().batching.replace(num_steps=self.client_steps)

    def sparsity_config(self, method: str, sparsity: float) -> dict[str, Any]:
        config = super().sparsity_config(method, sparsity)
        if method not in GROWS:
            return config
        # RigL's paper counts optimizer steps, of which the server takes one a round: too few for 100 between updates.
        # 10 is the period of the paper's federated row.
        return config | {
            "drop_fraction": GROWTH_DROP_FRACTION,
            "update_start_step": 1,
            "update_end_step": round(GROWTH_END * self.rounds),
            "update_freq": self.grow_every,
        }

    def measure(self, model: fedjax.Model, params: Any, test: fedjax.FederatedData) -> tuple[float, dict[str, Any]]:
        measured = federated_plays.evaluate_clients(model, params, test)
        right, characters = measured["accuracy"].T.astype(float)
        loss, tokens = measured["loss"].T.astype(float)
        accuracy = right.sum() / characters.sum()
        # The characters of all clients count alike, so that the accuracy is a ratio of two means over clients. A
        # client's score has what it changes of that ratio, to first order: not how much it says.
        scores = accuracy + (right - accuracy * characters) / characters.mean()
        return float(accuracy), {
            "test_loss": float(loss.sum() / tokens.sum()),
            "examples": intervals.pack(scores),
        }


PRESETS = {
    # 11 writers to train on, 3 others to test on.
    "digits": Preset(dataset="digits", rounds=36, clients=2, client_learning_rate=0.1, prune_every=3),
    # 60 artificial clients of uneven size and labels.
    "mnist5k": Preset(dataset="mnist5k", rounds=24, clients=6, client_learning_rate=0.1, prune_every=2),
    # 451 roles of 38 plays: their first speeches to train on, their last to test on.
    "shakespeare": Plays(
        dataset="plays",
        rounds=200,
        clients=4,
        client_learning_rate=10**0.5,
        prune_every=2,
        batch_size=8,
        server_learning_rate=10**-1.5,
    ),
    # The settings that the paper's library shipped: updates in rounds 250 to 750, every 10.
    "paper": Preset(
        dataset="emnist", rounds=1000, clients=50, client_learning_rate=10**-1.5, prune_every=10, checkpoint_every=10
    ),
    "smoke": Preset(
        dataset="digits",
        rounds=4,
        clients=1,
        client_learning_rate=0.1,
        prune_start=0.0,
        prune_end=0.5,
        prune_every=2,
        model="logistic",
        checkpoint_every=1,
    ),
    "smoke_shakespeare": Plays(
        dataset="plays",
        rounds=4,
        clients=1,
        client_learning_rate=1.0,
        prune_start=0.0,
        prune_end=0.5,
        prune_every=2,
        sequence_length=8,
        hidden_size=8,
        client_steps=2,
        grow_every=2,
    ),
}

CLIENT_LEARNING_RATES = (1.0, 10**0.5, 10.0)  # of `shakespeare`

MODELS = {
    # Two convolutions and two dense layers with dropout: the paper's.
    "conv": fedjax.models.emnist.create_conv_model,
    "logistic": fedjax.models.emnist.create_logistic_model,
}


def prepare(preset: Preset) -> None:
    """Says what to download where full federated EMNIST is missing, or what to install where the plays are."""
    if preset.dataset == "plays":
        try:
            federated_plays.roles()
        except ImportError as error:
            raise NotReady(f"{error}\nThe presets digits and mnist5k need nothing else.") from error
    if preset.dataset == "emnist":
        try:
            require_emnist()
        except FileNotFoundError as error:
            raise NotReady(f"{error}\nThe presets digits and mnist5k need no download.") from error


def parse(method: str, top_k: float) -> tuple[str, jaxpruner_fedjax.ClientUpdates]:
    """`magnitude+masked+top_k` -> the algorithm, and what its clients send."""
    algorithm, *options = method.split("+")
    return algorithm, jaxpruner_fedjax.ClientUpdates("masked" in options, top_k if "top_k" in options else None)


def build(run: Run, model: fedjax.Model) -> tuple[Any, Any, jaxpruner_fedjax.ClientUpdates]:
    """The federated algorithm of a run, its server optimizer, and what its clients send."""
    p = run.preset
    method, updates = parse(run.method, p.top_k)
    config = p.sparsity_config(method, run.sparsity) | {"rng_seed": run.seed}
    adam = optax.adam(p.server_learning_rate, b1=p.server_b1, b2=p.server_b2, eps=p.server_eps)
    server = jaxpruner_fedjax.server_optimizer(adam, **config)  # the one-line change
    parts = (
        fedjax.model_grad(model),
        fedjax.optimizers.sgd(p.client_learning_rate),
        server,
        p.batching,
    )
    if updates == jaxpruner_fedjax.ClientUpdates():
        return fedjax.algorithms.fed_avg.federated_averaging(*parts), server, updates
    return jaxpruner_fedjax.federated_averaging(*parts, updates), server, updates


def examples_of_round(batching: fedjax.ShuffleRepeatBatchHParams, clients: fedjax.FederatedData) -> float:
    """How many examples a client trains on in a round, on average."""
    most = np.inf if batching.num_steps is None else batching.num_steps * batching.batch_size
    return float(np.mean([min(batching.num_epochs * size, most) for _, size in clients.client_sizes()]))


def train(run: Run, checkpoint: Checkpoint) -> Iterator[Progress | Outcome]:
    preset = run.preset
    data = preset.load()
    model = preset.make_model()
    algorithm, server, updates = build(run, model)
    state = algorithm.init(model.init(branch_key(run.seed, PARAMS)))
    ledger = jaxpruner_fedjax.Ledger(data.train.client_ids(), state.params, updates)
    traffic = np.zeros((preset.rounds, 2), np.int64)

    leaves, treedef = jax.tree.flatten(state)
    first, saved = checkpoint.load(like={"leaves": leaves, "held": ledger.held, "traffic": traffic})
    state, ledger.held, traffic = (
        treedef.unflatten(saved["leaves"]),
        np.array(saved["held"]),
        np.array(saved["traffic"]),
    )
    for round_num in range(first, preset.rounds):
        clients = jaxpruner_fedjax.sample_clients(data.train, preset.clients, run.seed, round_num)
        traffic[round_num] = ledger.record([client_id for client_id, *_ in clients], state.params, server.masks(state))
        state, _ = algorithm.apply(state, clients)
        done = round_num + 1
        if preset.checkpoint_every and done % preset.checkpoint_every == 0 and done < preset.rounds:
            checkpoint.save(done, {"leaves": jax.tree.leaves(state), "held": ledger.held, "traffic": traffic})
        yield Progress(done, preset.rounds, f"{traffic.sum() / MEGABYTE:.0f} MB")

    kernels = [leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1]  # what may be pruned
    accuracy, measured = preset.measure(model, state.params, data.test)
    down, up = (int(total) for total in traffic.sum(0))
    yield Outcome(
        value=accuracy,
        sparsity_reached=jaxpruner.summarize_sparsity(kernels, only_total_sparsity=True)["_total_sparsity"],
        steps=preset.rounds,
        details={
            **measured,
            "megabytes": down / MEGABYTE + up / MEGABYTE,  # to the bit the sum of what is beside it
            "megabytes_down": down / MEGABYTE,
            "megabytes_up": up / MEGABYTE,
            "prunable_weights": sum(leaf.size for leaf in kernels),
            **costs(
                model.apply_for_eval,
                state.params,
                preset.shapes(1),
                # Clients that train densely leave the masks with their first step.
                updater=server.updater if updates.masked else None,
                steps=preset.rounds,
                batch=preset.clients * examples_of_round(preset.batching, data.train),
            ),
        },
    )


def candidates(preset: Preset) -> dict[str, Preset]:
    """Step sizes of the clients, tested on what is held out of the training data, of `shakespeare`."""
    if not isinstance(preset, Plays):
        return {}
    return {
        f"client learning rate {rate:.2g}": dataclasses.replace(preset, client_learning_rate=rate, validation=True)
        for rate in CLIENT_LEARNING_RATES
    }


class _Functions(fedjax.ForEachClientBackend):
    """A backend of FedJAX that compiles nothing, and shows what it would have compiled for clients."""

    def __call__(self, *functions: Callable[..., Any]) -> None:
        self.init, self.step, self.final = functions


def abstract(run: Run) -> TrainStep:
    """A round on one device, where FedJAX's default backend trains clients one after the other, and the server."""
    preset = run.preset
    model = preset.make_model()
    clients = _Functions()
    with fedjax.for_each_client_backend(clients):
        algorithm, server, updates = build(run, model)
    state = jax.eval_shape(lambda: algorithm.init(model.init(branch_key(run.seed, PARAMS))))
    shared = state.params
    if updates != jaxpruner_fedjax.ClientUpdates():
        shared = jax.eval_shape(lambda state: round_input(server, state, updates), state)
    key = jax.random.PRNGKey(0)
    client = jax.eval_shape(clients.init, shared, key)
    batch = preset.shapes(preset.batch_size)
    if preset.dataset == "emnist":
        examples = preset.client_epochs * EMNIST_EXAMPLES
    else:
        examples = examples_of_round(preset.batching, preset.load().train)
    batches = math.ceil(examples / preset.batch_size)
    programs = [
        Program(jax.jit(clients.init).lower(shared, key), preset.clients),
        Program(jax.jit(clients.step, donate_argnums=0).lower(client, batch), preset.clients * batches),
        Program(jax.jit(clients.final, donate_argnums=1).lower(shared, client), preset.clients),
        Program(jax.jit(server.apply).lower(state.params, state.opt_state, state.params)),
    ]
    return TrainStep(programs, state.params, state.opt_state, server.updater, preset.rounds, devices=1, unit="rounds")


BASELINE = Baseline(
    name="fed_emnist",
    summary="federated averaging: handwritten characters, or Shakespeare by role (FedJAX)",
    metric="accuracy",
    presets=PRESETS,
    train=train,
    prepare=prepare,
    abstract=abstract,
    candidates=candidates,
    variants=("dense+top_k", "magnitude+masked", "magnitude+masked+top_k", "static_sparse+masked"),
    sparsities=(0.8,),  # the paper's
    also=SHARES,
    cost=Cost("megabytes", "megabytes sent down and up, all clients and rounds together", "megabytes sent, mean"),
)
