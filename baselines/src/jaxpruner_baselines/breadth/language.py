"""Networks for sequences: recurrent cells, language models, decoding with a cache, a mixture of experts."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxpruner_baselines.breadth.cases import Case, Size, arrays, of_module, sequences, tokens

VOCABULARY = 64
HEAD, KEYS, QUERIES = 8, 2, 3  # entries of a head, key heads, query heads of each


class _Recurrent(nn.Module):
    cell: type[nn.RNNCellBase]
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(self.cell(2 * self.width))(nn.Dense(self.width)(x)))


def gru(size: Size) -> Case:
    return of_module(_Recurrent(nn.GRUCell, 16 * size.width), sequences(size, 8 * size.width))


def lstm(size: Size) -> Case:
    return of_module(_Recurrent(nn.OptimizedLSTMCell, 16 * size.width), sequences(size, 8 * size.width))


class _GatedLayer(nnx.Module):
    def __init__(self, dim: int, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.RMSNorm(dim, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, dim, rngs=rngs, decode=False)
        self.gate, self.up = (nnx.Linear(dim, 4 * dim, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(4 * dim, dim, use_bias=False, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norms[0](x), mask=mask)
        y = self.norms[1](x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class _GatedModel(nnx.Module):
    """Gated MLPs, embeddings that are the classifier too."""

    def __init__(self, dim: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, dim, rngs=rngs)
        self.layers = nnx.List([_GatedLayer(dim, rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(dim, rngs=rngs)

    def __call__(self, tokens):
        x, mask = self.embed(tokens), nnx.make_causal_mask(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return self.embed.attend(self.norm(x))


def gated_language_model(size: Size) -> Case:
    graph, params, others = nnx.split(_GatedModel(32 * size.width, nnx.Rngs(0)), nnx.Param, ...)
    return Case(
        lambda params, tokens: nnx.merge(graph, params, others)(tokens), nnx.to_pure_dict(params),
        (tokens(size, VOCABULARY),),
    )  # fmt: skip


# A bare function with grouped queries, rotary embeddings and a gated MLP; every parameter is in `params`.


def _language_params(size: Size) -> dict[str, Any]:
    dim, heads = 32 * size.width, KEYS * size.width

    def layer(seed):
        return arrays(
            seed, query=(dim, heads * QUERIES * HEAD), key=(dim, heads * HEAD), value=(dim, heads * HEAD),
            out=(heads * QUERIES * HEAD, dim), gate=(dim, 4 * dim), up=(dim, 4 * dim), down=(4 * dim, dim),
        ) | {"norms": jnp.ones((2, dim))}  # fmt: skip

    return {"embed": arrays(0, e=(VOCABULARY, dim))["e"], "layers": [layer(1), layer(2)], "norm": jnp.ones(dim)}


def _rms(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def _rotated(x, positions):
    """Heads last but one: `[..., positions, heads, entries]`."""
    angles = positions[:, None, None] * 1e4 ** (-jnp.arange(0, HEAD, 2) / HEAD)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def _projected(layer, x, positions):
    y = _rms(x, layer["norms"][0])
    query, key, value = ((y @ layer[name]).reshape(*y.shape[:2], -1, HEAD) for name in ("query", "key", "value"))
    query, key = _rotated(query, positions), _rotated(key, positions)
    return query.reshape(*y.shape[:2], -1, QUERIES, HEAD), key, value


def _attended(layer, x, query, key, value, mask):
    scores = jnp.einsum("btkqd,bskd->bkqts", query, key) / HEAD**0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
    y = jnp.einsum("bkqts,bskd->btkqd", weights, value)
    x = x + y.reshape(*x.shape[:2], -1) @ layer["out"]
    y = _rms(x, layer["norms"][1])
    return x + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"]


def _language_model(params, tokens):
    length = tokens.shape[1]
    x, positions = params["embed"][tokens], jnp.arange(length)
    mask = positions[:, None] >= positions
    for layer in params["layers"]:
        x = _attended(layer, x, *_projected(layer, x, positions), mask)
    return _rms(x, params["norm"]) @ params["embed"].T


def grouped_queries(size: Size) -> Case:
    return Case(_language_model, _language_params(size), (tokens(size, VOCABULARY),))


def _empty_cache(params, batch, length):
    heads = params["layers"][0]["key"].shape[1] // HEAD
    return [{name: jnp.zeros((batch, length, heads, HEAD)) for name in ("key", "value")} for _ in params["layers"]]


def _decode_one(params, cache, position, tokens):
    """The logits after one more token, and the cache with it."""
    x = params["embed"][tokens][:, None]
    grown = []
    for layer, kept in zip(params["layers"], cache, strict=True):
        query, key, value = _projected(layer, x, position[None])
        kept = {
            name: jax.lax.dynamic_update_slice_in_dim(kept[name], new, position, 1)
            for name, new in (("key", key), ("value", value))
        }
        mask = jnp.arange(kept["key"].shape[1]) <= position
        x = _attended(layer, x, query, kept["key"], kept["value"], mask)
        grown.append(kept)
    return (_rms(x, params["norm"]) @ params["embed"].T)[:, 0], grown


def _decode(params, tokens):
    """Token by token, the logits of each."""

    def one(cache, step):
        logits, cache = _decode_one(params, cache, *step)
        return cache, logits

    batch, length = tokens.shape
    _, logits = jax.lax.scan(one, _empty_cache(params, batch, length), (jnp.arange(length), tokens.T))
    return logits


def decoding(size: Size) -> Case:
    return Case(_decode, _language_params(size), (tokens(size, VOCABULARY),))


def _generate(params, tokens):
    """Greedily from the first tokens on, with `while`; the tokens, and the last logits."""
    batch, length = tokens.shape

    def goes_on(state):
        return state[0] < length - 1

    def one(state):
        position, tokens, cache, _ = state
        current = jax.lax.dynamic_index_in_dim(tokens, position, 1, keepdims=False)
        logits, cache = _decode_one(params, cache, position, current)
        following = jnp.argmax(logits, -1).astype(tokens.dtype)
        return position + 1, jax.lax.dynamic_update_slice(tokens, following[:, None], (0, position + 1)), cache, logits

    start = jnp.int32(0), tokens, _empty_cache(params, batch, length), jnp.zeros((batch, VOCABULARY))
    _, tokens, _, logits = jax.lax.while_loop(goes_on, one, start)
    return tokens, logits


def generation(size: Size) -> Case:
    return Case(_generate, _language_params(size), (tokens(size, VOCABULARY),), is_differentiable=False)


def _mixture(params, x):
    """The best two of four experts, each computed for all."""
    experts = params["gate"].shape[1]
    best, chosen = jax.lax.top_k(jax.nn.softmax(x @ params["gate"]), 2)
    weights = (jax.nn.one_hot(chosen, experts) * best[..., None]).sum(-2)
    hidden = jax.nn.relu(jnp.einsum("bte,xef->btxf", x, params["up"]))
    return jnp.einsum("btxf,xfe,btx->bte", hidden, params["down"], weights)


def mixture_of_experts(size: Size) -> Case:
    dim = 16 * size.width
    params = arrays(0, gate=(dim, 4), up=(4, dim, 4 * dim), down=(4, 4 * dim, dim))
    return Case(_mixture, params, (sequences(size, dim),))
