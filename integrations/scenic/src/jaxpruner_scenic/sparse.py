"""Sparse training by any of Scenic's trainers: one context manager around the stock `train`.

Trainers make their optimizer with `scenic.train_lib.optimizers.get_optimizer` or `scenic.train_lib.optax.make`, and
look the functions up in those modules when they call them. Within `sparse_training` these return JaxPruner's
transformation around the stock optimizer. Nothing else makes a trainer sparse. The other wrappers only
observe: they log the sparsity, and report a training that would not be as sparse as asked.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from scenic.train_lib import optax as scenic_optax
from scenic.train_lib import optimizers, train_utils

import jaxpruner
from jaxpruner import mask_storage, trees
from jaxpruner.inspection import checks
from jaxpruner.training.projection import find_states, state_masks
from jaxpruner_scenic import resuming
from jaxpruner_scenic.forward import Forward, initialized
from jaxpruner_scenic.logs import sparsity_logs, with_sparsity
from jaxpruner_scenic.made import Made

__all__ = ["create_updater", "sparse_training", "sparsity_logs"]

_PROBE = "scenic.train_lib.transfer.linear_probe_utils"
_active = False


@contextlib.contextmanager
def sparse_training(config: Mapping[str, Any], trainer: types.ModuleType | None = None) -> Iterator[None]:
    """Within this context, the optimizers that Scenic makes are sparse as `config.sparsity_config` says.

        with jaxpruner_scenic.sparse_training(config, classification_trainer):
            classification_trainer.train(rng=rng, config=config, ...)

    The keys of `sparsity_config` are those of `jaxpruner.create_updater_from_config`, and `exclude_reg_exp`, which
    leaves out parameters by name in the way Scenic's `freeze_params_reg_exp` freezes them. By default kernels are
    pruned, and no position embeddings, class tokens or probes. What Scenic freezes is never pruned.

    Args:
      config: a Scenic configuration. Without a `sparsity_config`, or with None or the algorithm `no_prune`, the
        training is dense; then the only check is that it does not continue from a sparse checkpoint.
      trainer: the module of the trainer. The logs that its `train_step` returns get `sparsity`, the fraction of zeros
        among the prunable weights, and its `train` compares the configuration with that of a checkpoint.

    Raises:
      RuntimeError: within another `sparse_training`; and if the trainer makes its optimizer in its own way, in the
        first step of its `train_step` or else at the end.
      ValueError: for a configuration that is not valid, or ends after the training; for a checkpoint of another
        configuration; for a global algorithm if the trainer makes several optimizers for groups of parameters; and if
        parameters do not lie on their masks.

    Examples:
      >>> import jax.numpy as jnp, ml_collections, optax
      >>> from scenic.train_lib import optimizers
      >>> at_once = {"algorithm": "magnitude", "sparsity": 0.5, "update_start_step": 0, "update_end_step": 0}
      >>> config = ml_collections.ConfigDict({"optimizer": "sgd", "optimizer_configs": {}, "sparsity_config": at_once})
      >>> params = {"head": {"kernel": jnp.array([[1.0, -4.0], [3.0, -2.0]])}}
      >>> with sparse_training(config):  # what trainers do within it:
      ...     optimizer_config = optimizers.get_optax_optimizer_config(config)
      ...     tx = optimizers.get_optimizer(optimizer_config, lambda step: 0.25, params)
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["head"]["kernel"].tolist()
      [[0.0, -3.0], [2.25, 0.0]]
    """
    if _active:
        raise RuntimeError("sparse_training: is active already. Leave it before the next training starts.")
    sparsity_config = config.get("sparsity_config")
    if sparsity_config is None:
        _refuse_misspelled(config)
        logging.info("sparse_training: there is no sparsity_config, so this training is dense.")
    made = None if sparsity_config is None else Made(sparsity_config)
    watch = _Watch(config, None if made is None or made.is_dense else made)
    with contextlib.ExitStack() as stack:

        def replace(module: types.ModuleType | None, name: str, wrap: Callable[[Any], Any]) -> None:
            if module is not None and hasattr(module, name):
                stack.enter_context(_replaced(module, name, wrap(getattr(module, name))))

        for name in ("train", "train_and_evaluate"):
            replace(trainer, name, watch.train)
        if watch.made is None:
            yield
            return
        # A probe is trained densely, on what the sparse model represents.
        probes = types.SimpleNamespace(**vars(optimizers))
        replace(importlib.import_module(_PROBE), "optimizers", lambda _: probes)
        replace(optimizers, "get_optimizer", watch.get_optimizer)
        replace(scenic_optax, "make", watch.make)
        replace(trainer, "train_step", watch.train_step)
        replace(trainer, "get_train_step", watch.get_train_step)
        replace(train_utils, "initialize_model", watch.initialize_model)
        replace(train_utils, "get_num_training_steps", watch.get_num_training_steps)
        replace(train_utils, "sync_model_state_across_replicas", watch.sync_model_state)
        replace(sys.modules[__name__], "_active", lambda _: True)
        yield
        watch.require_one("the training")


def create_updater(sparsity_config: Mapping[str, Any]) -> jaxpruner.BaseUpdater:
    """The algorithm that `sparse_training` uses if Scenic freezes nothing.

    Raises:
      ValueError: for a configuration that is not valid.
    """
    return Made(sparsity_config).configured


def _refuse_misspelled(config: Mapping[str, Any]) -> None:
    """Refuses what looks like a `sparsity_config` under another name, since nothing would read it."""
    for key, value in config.items():
        if key == "sparsity_config":  # None, of a dense training
            continue
        is_close = bool(difflib.get_close_matches(key, ["sparsity_config"], cutoff=0.9))
        if is_close or (hasattr(value, "keys") and {"algorithm", "sparsity"} <= set(value.keys())):
            raise ValueError(f"config.{key}: nothing reads it; is config.sparsity_config meant?")


@contextlib.contextmanager
def _replaced(module: types.ModuleType, name: str, value: Any) -> Iterator[None]:
    stock = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, stock)


class _Watch:
    """Wrappers of Scenic's functions in one training; each method takes the stock function."""

    def __init__(self, config: Mapping[str, Any], made: Made | None):
        self.config = config
        self.made: Any = made  # None where no wrapper but `train` is in use
        self.in_step = self.steps_checked = False
        self.model: Forward | None = None
        self.shifted_told = False

    def require_one(self, what: str) -> None:
        if not self.made.count:
            raise RuntimeError(
                f"sparse_training: {what} made its optimizer in a way of its own, by neither optimizers.get_optimizer "
                "nor scenic.train_lib.optax.make, so it is dense. Wrap its optimizer with jaxpruner.sparsify."
            )

    def sparsify(self, tx: Any, is_frozen: Callable[[str], bool], params: Any) -> Any:
        tx = self.made.sparsify(tx, is_frozen, params, self.model)
        self.tell_of_shifted()
        return tx

    def get_optimizer(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def get_optimizer(optimizer_config: Any, learning_rate_fn: Any, params: Any = None) -> Any:
            tx = stock(optimizer_config, learning_rate_fn, params=params)
            if self.in_step:  # one that an attack steps its perturbations with
                return tx
            pattern = optimizer_config.get("freeze_params_reg_exp")
            return self.sparsify(tx, lambda name: pattern is not None and re.search(pattern, name) is not None, params)

        return get_optimizer

    def make(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def make(config: Any, schedule: Any, params: Any) -> Any:
            tx, schedule_fns = stock(config, schedule, params)
            if self.in_step:
                return tx, schedule_fns
            if config.get("per_example_clipping") and config.get("max_grad_norm"):
                self.made.require_aggregated_gradients()
            # No schedule means frozen. `stock` has checked that each name is matched by one pattern.
            patterns = [re.compile(pattern) for pattern, _, (fn, _) in schedule if fn is None]
            return self.sparsify(tx, lambda name: any(p.fullmatch(name) for p in patterns), params), schedule_fns

        return make

    def train_step(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def train_step(*args: Any, **kwargs: Any) -> Any:
            self.require_one(stock.__module__)
            self.in_step = True
            try:
                return with_sparsity(stock(*args, **kwargs))
            finally:
                self.in_step = False

        return train_step

    def get_train_step(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(stock)(lambda *args, **kwargs: self.train_step(stock(*args, **kwargs)))

    def initialize_model(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def initialize_model(**kwargs: Any) -> Any:
            params, model_state, *rest = stock(**kwargs)
            self.model, self.shifted_told = initialized(params, model_state, **kwargs), False
            return params, model_state, *rest

        return initialize_model

    def tell_of_shifted(self) -> None:
        """Warns of standardised weights: their zeros are no longer zero when the model multiplies with them."""
        if self.model is None or self.shifted_told:
            return
        self.shifted_told = True
        try:
            shifted = self.model.shifted_parameters()
        except Exception as error:
            logging.info("sparse_training: not known whether the model shifts its weights (%s).", error)
            return
        if named := [name for name in shifted if name in set(map(trees.leaf_name, self.made.asked))]:
            warnings.warn(
                f"sparsity_config: the model shifts {len(named)} pruned parameters before it multiplies with them, as "
                "weight standardisation does, so that their zeros are stored but save no multiplications: "
                f"{', '.join(named)}. Leave them out by exclude_reg_exp, or use a model without.",
                stacklevel=2,
            )

    def get_num_training_steps(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def get_num_training_steps(*args: Any, **kwargs: Any) -> Any:
            steps, *rest = stock(*args, **kwargs)
            if not self.steps_checked:  # a probe asks later on for steps of its own
                self.steps_checked = True
                try:
                    jaxpruner.check_schedule(self.made.configured, steps)
                except ValueError as error:
                    raise ValueError(f"sparsity_config.{error}") from error
            return steps, *rest

        return get_num_training_steps

    def sync_model_state(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Called before each evaluation, with the state of all devices."""

        @functools.wraps(stock)
        def sync_model_state_across_replicas(train_state: Any, *args: Any, **kwargs: Any) -> Any:
            params, opt_state = _of_one_device(train_state)
            if find_states(opt_state):
                # What follows a schedule is compared at the end, with what all groups of parameters share.
                updater = self.made and self.made.configured
                once = updater if updater and updater.reaches_sparsity else None
                jaxpruner.check_sparse(params, opt_state, once)
            return stock(train_state, *args, **kwargs)

        return sync_model_state_across_replicas

    def train(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def train(*args: Any, **kwargs: Any) -> Any:
            updater = self.made and self.made.configured
            if self.config.get("checkpoint") and kwargs.get("workdir"):
                description = self.made.describe() if self.made else jaxpruner.describe(None)
                resuming.check(kwargs["workdir"], updater, description)
            result = stock(*args, **kwargs)
            if self.made and isinstance(result, tuple) and hasattr(result[0], "opt_state"):
                self.tell_of_the_end(*_of_one_device(result[0]))
            return result

        return train

    def tell_of_the_end(self, params: Any, opt_state: Any) -> None:
        """Checks the trained parameters, and logs as the last line how sparse they are."""
        if not find_states(opt_state) or not self.made.asked:
            return
        jaxpruner.check_sparse(params, opt_state)
        if self.made.groups is not None:
            asked, got, slack = checks.shares_pruned(params, find_states(opt_state)[0], self.made.groups)
            tell = logging.warning if asked - got > slack else logging.info
            what = self.made.groups.sparsity_type.budget
            tell("sparsity: asked %.1f %% of the %s, reached %.1f %%.", 100 * asked, what, 100 * got)
            return
        sizes = {path: np.size(leaf) for path, leaf in trees.named_leaves(params) if path in self.made.asked}
        asked = sum(self.made.asked[path] * size for path, size in sizes.items()) / max(1, sum(sizes.values()))
        got = reached(params, opt_state)
        # Each leaf rounds to whole weights.
        tell = logging.warning if asked - got > 0.005 else logging.info
        tell("sparsity: asked %.1f %%, reached %.1f %%.", 100 * asked, 100 * got)


def reached(params: Any, opt_state: Any) -> float:
    """The share of weights that masks prune, among those that have a mask."""
    leaves = dict(trees.named_leaves(params))
    kept = size = 0
    for path, stored in state_masks(opt_state).items():
        mask = mask_storage.storage_of(stored, np.shape(leaves[path])).decode(stored, np.shape(leaves[path]))
        kept, size = kept + int(np.count_nonzero(mask)), size + mask.size
    return 1 - kept / max(1, size)


def _of_one_device(train_state: Any) -> tuple[Any, Any]:
    """The parameters and the optimizer's state, from the first device if they are replicated."""
    trees_ = train_state.params, train_state.opt_state
    replicated = any(np.ndim(state.count) for state in find_states(train_state.opt_state))
    return jax.tree.map(lambda x: x[0], trees_) if replicated else trees_
