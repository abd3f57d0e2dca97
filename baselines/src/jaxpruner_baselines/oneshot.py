"""oneshot: pretrained networks, pruned with a few batches of data and no training.

    jaxpruner-baselines run oneshot --preset smollm --seeds 1             # 22 runs, an hour on 2 cores; dense: 17.9
    jaxpruner-baselines run oneshot --preset smollm_short --seeds 1       # a few minutes
    jaxpruner-baselines run oneshot_retrieval --preset minilm --seeds 1   # 25 runs, 8 minutes

`oneshot` prunes SmolLM2-135M, a language model: the perplexity of an address of 2026, one of 1981 and Hamlet,
calibrated on other addresses. `oneshot_retrieval` prunes all-MiniLM-L6-v2, which embeds sentences: how often a verse of
1611 finds the same verse in modern English. A method is an algorithm of `jaxpruner.prune_oneshot` and what follows a
plus: `2:4` and `4:8` are structures, `owl` is a distribution, `mlp` and `heads` are units that leave, `tuned` trains
on with the zeros in their places.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpruner
from jaxpruner_baselines.baseline import Baseline, NotReady, Outcome, Progress, Run
from jaxpruner_baselines.benchmarks.figures import alternate
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.memory import Peak
from jaxpruner_baselines.methods import DENSE, is_dense

STRUCTURES = {"2:4": "nm_2,4", "4:8": "nm_4,8"}
# Which groups of units leave: hidden units of the MLPs, heads of keys and values with their queries.
UNITS = {"mlp": "*mlp/*", "heads": "*attention/key/kernel[1.0]"}


@dataclasses.dataclass(frozen=True)
class Preset:
    network: str
    methods: Mapping[str, tuple[float, ...]]
    """Methods and the sparsities of each."""
    windows: int = 16  # of calibration
    length: int = 512  # tokens a window
    scored: int = 2  # windows a document, or verses
    tuning_steps: int = 0
    learning_rate: float = 2e-5
    repeats: int = 5  # of timed forward passes


def _weights(*sparsities: float) -> dict[str, tuple[float, ...]]:
    algorithms = ("magnitude", "wanda", "sparsegpt")
    structured = {f"{name}+{structure}": (0.5,) for structure in STRUCTURES for name in algorithms}
    return dict.fromkeys(algorithms, sparsities) | structured | {"wanda+owl": sparsities[-1:]}


def _units(heads: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
    shares = {"mlp": (0.25, 0.5), "heads": heads}
    return {f"{name}+{units}": shares[units] for units in shares for name in ("magnitude", "flap")}


_TUNED = {f"{name}+tuned": (0.6,) for name in ("magnitude", "sparsegpt")}
_SHORT = dict.fromkeys(("magnitude", "wanda", "sparsegpt", "wanda+2:4", "sparsegpt+2:4"), (0.5,)) | {
    "flap+mlp": (0.25,)
}

PRESETS = {
    # It has three heads of keys and values: a quarter of them is one.
    "smollm": Preset("smollm", _weights(0.5, 0.6) | _units(heads=(0.25,)) | _TUNED, tuning_steps=50),
    "smollm_short": Preset("smollm", _SHORT, windows=4, scored=1, repeats=3),
    "smoke": Preset(
        "smollm_smoke", {"sparsegpt": (0.5,), "flap+mlp": (0.25,)}, windows=2, length=64, scored=1, repeats=1
    ),
}
RETRIEVAL_PRESETS = {
    "minilm": Preset("minilm", _weights(0.5, 0.6, 0.7) | _units(heads=(0.25, 0.5)), windows=256, length=32, scored=500),
    "smoke": Preset("minilm", {"wanda": (0.5,)}, windows=8, length=16, scored=20, repeats=1),
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A pretrained network and its data.

    Attributes:
      forward: (params, tokens) to what it gives.
      params: its parameters.
      batches: to calibrate on.
      score: parameters and forward to the metric, and more numbers by name.
      tuning: tokens to train on with, one batch a step; none if it is not tuned.
    """

    forward: Callable[[Any, Any], Any]
    params: Any
    batches: Sequence[np.ndarray]
    score: Callable[[Callable[[Any, Any], Any], Any], tuple[float, dict[str, float]]]
    tuning: Sequence[np.ndarray] = ()


def smollm(preset: Preset, layers: int | None = None) -> Network:
    """SmolLM2-135M, or its first layers."""
    from jaxpruner_baselines.pretrained import perplexity, smollm, texts

    config, params = _loaded()
    if layers is not None:
        config = dataclasses.replace(config, layers=layers)
        params = {name: leaf for name, leaf in params.items() if int(name.partition("layers_")[2] or 0) < layers}
    forward = smollm.make_forward(config)

    def encode(text):
        return smollm.tokenizer().encode(text).ids

    scored = {name: texts.windows(encode(texts.document(name)), preset.length, preset.scored) for name in texts.SCORED}
    batches = texts.calibration_windows(encode, preset.length, preset.windows + preset.tuning_steps)

    def score(forward, params):
        each = {name: perplexity.negative_log_likelihoods(forward, params, windows) for name, windows in scored.items()}
        whole = float(np.exp(np.concatenate([*each.values()]).mean()))
        return whole, {f"perplexity_{name}": float(np.exp(found.mean())) for name, found in each.items()}

    together = np.array_split(batches[: preset.windows], max(1, preset.windows // 4))
    return Network(forward, params, together, score, batches[preset.windows :, None])


@functools.cache
def _loaded() -> Any:
    from jaxpruner_baselines.pretrained import smollm

    return smollm.load()


def minilm(preset: Preset) -> Network:
    from jaxpruner_baselines.pretrained import minilm, verses

    config, params = minilm.load()
    forward = minilm.make_forward(config)
    batches = verses.calibration(preset.length, preset.windows)
    return Network(
        forward,
        params,
        np.array_split(batches, max(1, len(batches) // 32)),
        lambda forward, params: (verses.retrieval(forward, params, preset.scored), {}),
    )


NETWORKS: dict[str, Callable[[Preset], Network]] = {
    "smollm": smollm,
    "smollm_smoke": functools.partial(smollm, layers=2),
    "minilm": minilm,
}


def is_kernel(path: tuple[str, ...], param: Any) -> bool:
    """The kernels of layers; embeddings and norms stay."""
    return path[-1] == "kernel"


def prune(network: Network, method: str, sparsity: float) -> tuple[Any, Any, jaxpruner.Groups | None]:
    """The pruned parameters of a network, their masks, and the groups of units that were pruned."""
    algorithm, _, how = method.partition("+")
    options: dict[str, Any] = {"algorithm": algorithm, "sparsity": sparsity, "filter_fn": is_kernel}
    if how in STRUCTURES:
        options["sparsity_type"] = STRUCTURES[how]
    elif how == "owl":
        options["dist_type"] = "owl"
    groups = None
    if how in UNITS:
        found = jaxpruner.find_groups(network.forward, network.params, network.batches[0])
        groups = options["sparsity_type"] = found.choose(UNITS[how])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flap: .* have no bias")  # as Llamas have none
        pruned, masks = jaxpruner.prune_oneshot(network.forward, network.params, network.batches, **options)
    return pruned, masks, groups


def train(run: Run, checkpoint: Checkpoint) -> Iterator[Progress | Outcome]:
    preset: Preset = run.preset
    steps = preset.tuning_steps if run.method.endswith("+tuned") else 0
    total = 3 + steps
    yield Progress(0, total, "loads the network")
    network = NETWORKS[preset.network](preset)
    forward, params = network.forward, network.params
    details: dict[str, Any] = {}
    sparsity = 0.0
    if not is_dense(run.method):
        yield Progress(1, total, "prunes")
        started = time.monotonic()
        with Peak() as peak:
            params, masks, groups = prune(network, run.method, run.sparsity)
            jax.block_until_ready(params)
        details |= {"pruning_seconds": time.monotonic() - started, "peak_resident_bytes": peak.resident_bytes}
        kept = [mask for mask in jax.tree.leaves(masks) if mask is not None]
        sparsity = 1 - sum(int(mask.sum()) for mask in kept) / sum(mask.size for mask in kept)
        for step, tuned in enumerate(_tuned(network, params, preset, steps)):
            params = tuned
            yield Progress(2 + step, total, f"trains on: step {step + 1} of {steps}")
        if groups is not None:
            small = jaxpruner.compact(forward, params, network.batches[0])
            before, after = small.report().params
            sparsity = _units_removed(small.report(), groups)
            details |= yield from _timed(network, small, preset, total)
            details["parameters_share"] = after / before
            forward, params = small.fn, small.params
    yield Progress(total - 1, total, "is scored")
    value, more = network.score(forward, params)
    yield Outcome(value, sparsity, steps, details | more)


def _tuned(network: Network, params: Any, preset: Preset, steps: int) -> Iterator[Any]:
    """The parameters after each step on the calibration documents, their zeros in place."""
    if not steps:
        return
    schedule = optax.warmup_cosine_decay_schedule(0.0, preset.learning_rate, steps // 10, steps)
    tx = jaxpruner.sparsify(optax.adamw(schedule), algorithm="preserve", filter_fn=is_kernel)

    def loss(params, tokens):
        logits = network.forward(params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        updates, state = tx.update(jax.grad(loss)(params, tokens), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)  # a step takes its buffers
    state = tx.init(params)
    for tokens in network.tuning[:steps]:
        params, state = step(params, state, tokens)
        yield params


def _units_removed(report: jaxpruner.Report, groups: jaxpruner.Groups) -> float:
    pairs = [report.units[group.name] for group in groups.pruned]
    return 1 - sum(after for _, after in pairs) / sum(before for before, _ in pairs)


def _timed(network: Network, small: jaxpruner.Compact, preset: Preset, total: int) -> Any:
    """Tokens a second of the forward pass, whole and small, which take turns."""
    tokens = jnp.asarray(network.batches[0])
    sides = {
        "dense": functools.partial(jax.jit(network.forward), network.params, tokens),
        "this": functools.partial(jax.jit(small.fn), small.params, tokens),
    }
    timing = alternate(sides, dict.fromkeys(sides, preset.repeats))
    while True:
        try:
            note = next(timing)
        except StopIteration as ended:
            times = ended.value
            break
        yield Progress(total - 2, total, note)
    rate = {name: 1e3 * tokens.size / statistics.median(each) for name, each in times.items()}
    return {
        "tokens_per_second": rate["this"],
        "dense_tokens_per_second": rate["dense"],
        "speedup": statistics.median(d / o for d, o in zip(times["dense"], times["this"], strict=True)),
    }


class _OneShot(Baseline):
    """A baseline whose methods have sparsities of their own, by preset."""

    def plan(self, preset, methods, sparsities, seeds):
        own = self.presets[preset].methods
        asked = [name for name in methods if name in own or is_dense(name)]
        return [
            self.run(preset, method, sparsity, seed)
            for method in asked
            for sparsity in ([0.0] if is_dense(method) else [s for s in own[method] if s in sparsities])
            for seed in seeds
        ]


def prepare(preset: Preset) -> None:
    """Says what is missing."""
    try:
        NETWORKS[preset.network](preset)
    except ImportError as error:
        raise NotReady(f"{error} It is in constraints.txt: make setup installs it.") from error


def _methods(presets: Mapping[str, Preset]) -> tuple[str, ...]:
    return (DENSE, *dict.fromkeys(name for preset in presets.values() for name in preset.methods))


_ALSO = ("pruning_seconds", "peak_resident_bytes", "parameters_share", "tokens_per_second", "speedup")
_SHARED = {
    "train": train,
    "prepare": prepare,
    "sparsities": (0.25, 0.5, 0.6, 0.7),
}
BASELINE = _OneShot(
    name="oneshot",
    summary="a pretrained language model, pruned with a few batches of data",
    metric="perplexity",
    also=("perplexity_2026-Trump-1", "perplexity_1981-Carter-1", "perplexity_hamlet", *_ALSO),
    presets=PRESETS,
    only=_methods(PRESETS),
    **_SHARED,
)
RETRIEVAL = _OneShot(
    name="oneshot_retrieval",
    summary="a pretrained network of sentence embeddings, pruned with a few batches of data",
    metric="retrieval",
    also=_ALSO,
    presets=RETRIEVAL_PRESETS,
    only=_methods(RETRIEVAL_PRESETS),
    **_SHARED,
)
