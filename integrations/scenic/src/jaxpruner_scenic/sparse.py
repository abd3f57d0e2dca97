"""Sparse training by any of Scenic's trainers: one context manager around the stock `train`.

Trainers make their optimizer by `scenic.train_lib.optimizers.get_optimizer` or `scenic.train_lib.optax.make`, and look
the functions up in those modules when they call them. Within `sparse_training` these return JaxPruner's
transformation around the stock optimizer, and that is all that makes a trainer sparse.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax
from scenic.train_lib import optax as scenic_optax
from scenic.train_lib import optimizers

import jaxpruner
from jaxpruner import sparsity_distributions
from jaxpruner.projection import SparseState, pruned_only

_PROBE = "scenic.train_lib.transfer.linear_probe_utils"
_active = False


@contextlib.contextmanager
def sparse_training(config: Mapping[str, Any], trainer: types.ModuleType | None = None) -> Iterator[None]:
    """Within it, the optimizers that Scenic makes are sparse as `config.sparsity_config` says.

        with jaxpruner_scenic.sparse_training(config, classification_trainer):
            classification_trainer.train(rng=rng, config=config, ...)

    The keys of `sparsity_config` are those of `jaxpruner.create_updater_from_config`, and `exclude_reg_exp`, which
    leaves out parameters by name as Scenic's `freeze_params_reg_exp` freezes them. By default kernels are pruned: no
    position embeddings, class tokens or probes. What Scenic freezes is never pruned.

    Args:
      config: a configuration of Scenic. Without a `sparsity_config`, or with None, nothing is done.
      trainer: the module of the trainer. If its `train_step` returns (state, metrics, training logs), the logs
        get `sparsity`, the fraction of zeros among the prunable weights.

    Raises:
      RuntimeError: within another `sparse_training`; and in the first train step, if the trainer made its optimizer
        in a way of its own.
      ValueError: for a configuration that is not valid, and for budgets over all layers where the trainer makes
        several optimizers for groups of them.
    """
    if config.get("sparsity_config") is None:
        yield
        return
    if _active:
        raise RuntimeError("sparse_training: is active already. Leave it before the next training starts.")
    made = _Made(config["sparsity_config"])
    with contextlib.ExitStack() as stack:
        # A probe is trained densely, on what the sparse model represents.
        if _PROBE in sys.modules:
            probes = types.SimpleNamespace(**vars(optimizers))
            stack.enter_context(_replaced(sys.modules[_PROBE], "optimizers", probes))
        stack.enter_context(_replaced(optimizers, "get_optimizer", made.get_optimizer(optimizers.get_optimizer)))
        stack.enter_context(_replaced(scenic_optax, "make", made.make(scenic_optax.make)))
        if hasattr(trainer, "train_step"):
            stack.enter_context(_replaced(trainer, "train_step", made.train_step(trainer.train_step)))
        stack.enter_context(_replaced(sys.modules[__name__], "_active", True))
        yield


@contextlib.contextmanager
def _replaced(module: types.ModuleType, name: str, value: Any) -> Iterator[None]:
    stock = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, stock)


class _Made:
    """The sparse optimizers made in one training."""

    def __init__(self, sparsity_config: Mapping[str, Any]):
        self.config = {key: value for key, value in sparsity_config.items() if value is not None}
        self.exclude = self.config.pop("exclude_reg_exp", None)
        self.count = 0
        self.updater(is_frozen=lambda name: False)  # tells of a bad configuration now

    def updater(self, is_frozen: Callable[[str], bool]) -> jaxpruner.BaseUpdater:
        """An updater that leaves out what Scenic freezes, and what the configuration leaves out."""
        takes = self.config.get("filter_fn", sparsity_distributions.KERNEL_FILTER_FN)

        def filter_fn(path: tuple[str, ...], param: Any) -> bool:
            name = "/".join(path)
            excluded = self.exclude is not None and re.search(self.exclude, name)
            return not excluded and not is_frozen(name) and takes(path, param)

        return jaxpruner.create_updater_from_config(self.config | {"filter_fn": filter_fn})

    def sparsify(
        self, tx: optax.GradientTransformation, is_frozen: Callable[[str], bool]
    ) -> optax.GradientTransformation:
        self.count += 1
        shared = self.config["algorithm"].startswith("global_") or self.config.get("dist_type") == "erk"
        if self.count > 1 and shared:
            raise ValueError(
                "sparsity_config: this trainer makes an optimizer for each group of parameters, and a global algorithm "
                "or dist_type='erk' would meet the sparsity in each group instead of over all layers; use "
                "dist_type='uniform' and an algorithm that is not global."
            )
        return jaxpruner.sparsify(tx, self.updater(is_frozen))

    def get_optimizer(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def get_optimizer(optimizer_config: Any, learning_rate_fn: Any, params: Any = None) -> Any:
            pattern = optimizer_config.get("freeze_params_reg_exp")
            tx = stock(optimizer_config, learning_rate_fn, params=params)
            return self.sparsify(tx, lambda name: pattern is not None and re.search(pattern, name) is not None)

        return get_optimizer

    def make(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def make(config: Any, schedule: Any, params: Any) -> Any:
            tx, schedule_fns = stock(config, schedule, params)
            # No schedule means frozen. `stock` has checked that each name is matched by one pattern.
            patterns = [re.compile(pattern) for pattern, _, (fn, _) in schedule if fn is None]
            return self.sparsify(tx, lambda name: any(p.fullmatch(name) for p in patterns)), schedule_fns

        return make

    def train_step(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def train_step(*args: Any, **kwargs: Any) -> Any:
            if not self.count:
                raise RuntimeError(
                    f"sparse_training: {stock.__module__} makes its optimizer in a way of its own, by neither "
                    "optimizers.get_optimizer nor scenic.train_lib.optax.make, so it would train dense. Wrap its "
                    "optimizer with jaxpruner.sparsify."
                )
            result = stock(*args, **kwargs)
            if isinstance(result, tuple) and len(result) == 3 and isinstance(result[2], dict):
                state, metrics, logs = result
                return state, metrics, logs | sparsity_logs(state)
            return result

        return train_step


def sparsity_logs(train_state: Any) -> dict[str, Any]:
    """`{"sparsity": ...}` of a train state of Scenic; empty if it is not sparse."""
    states = [
        node
        for node in jax.tree.leaves(train_state.opt_state, is_leaf=lambda node: isinstance(node, SparseState))
        if isinstance(node, SparseState)
    ]
    pruned = [pruned_only(train_state.params, state.masks) for state in states]
    if not jax.tree.leaves(pruned):
        return {}
    return {"sparsity": jaxpruner.summarize_sparsity(pruned, only_total_sparsity=True)["_total_sparsity"]}
