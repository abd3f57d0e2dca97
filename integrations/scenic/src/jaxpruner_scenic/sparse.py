"""Sparse training by any of Scenic's trainers: one context manager around the stock `train`.

Trainers make their optimizer by `scenic.train_lib.optimizers.get_optimizer` or `scenic.train_lib.optax.make`, and look
the functions up in those modules when they call them. Within `sparse_training` these return JaxPruner's
transformation around the stock optimizer, and that is all that makes a trainer sparse.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from scenic.train_lib import optax as scenic_optax
from scenic.train_lib import optimizers

import jaxpruner
from jaxpruner import sparsity_distributions, trees
from jaxpruner.training.projection import SparseState, pruned_only

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
      RuntimeError: within another `sparse_training`; and if the trainer made its optimizer in a way of its own, in
        the first step of its `train_step` or else at the end.
      ValueError: for a configuration that is not valid, and for budgets over all layers where the trainer makes
        several optimizers for groups of them.
    """
    if _active:
        raise RuntimeError("sparse_training: is active already. Leave it before the next training starts.")
    if config.get("sparsity_config") is None:
        yield
        return
    made = _Made(config["sparsity_config"])
    with contextlib.ExitStack() as stack:
        # A probe is trained densely, on what the sparse model represents.
        probes = types.SimpleNamespace(**vars(optimizers))
        stack.enter_context(_replaced(importlib.import_module(_PROBE), "optimizers", probes))
        stack.enter_context(_replaced(optimizers, "get_optimizer", made.get_optimizer(optimizers.get_optimizer)))
        stack.enter_context(_replaced(scenic_optax, "make", made.make(scenic_optax.make)))
        if hasattr(trainer, "train_step"):
            stack.enter_context(_replaced(trainer, "train_step", made.train_step(trainer.train_step)))
        stack.enter_context(_replaced(sys.modules[__name__], "_active", True))
        yield
        made.require_one("the training")


def create_updater(sparsity_config: Mapping[str, Any]) -> jaxpruner.BaseUpdater:
    """The algorithm that `sparse_training` uses where Scenic freezes nothing.

    Raises:
      ValueError: for a configuration that is not valid.
    """
    return _Made(sparsity_config).updater(is_frozen=lambda name: False)


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
        if "sparsity_distribution_fn" in self.config:
            raise ValueError(
                "sparsity_config.sparsity_distribution_fn: would prune what Scenic freezes as well; use dist_type, "
                "filter_fn and custom_sparsity_map."
            )
        self.exclude = self.config.pop("exclude_reg_exp", None)
        try:
            re.compile(self.exclude or "")
        except re.error as error:
            raise ValueError(f"sparsity_config.exclude_reg_exp: {self.exclude!r} is no pattern: {error}.") from error
        self.count = 0
        self.updater(is_frozen=lambda name: False)  # tells of a bad configuration now

    def updater(self, is_frozen: Callable[[str], bool]) -> jaxpruner.BaseUpdater:
        """An updater that leaves out what Scenic freezes, and what the configuration leaves out."""
        return jaxpruner.create_updater_from_config(self.config | {"filter_fn": self.filter_fn(is_frozen)})

    def filter_fn(self, is_frozen: Callable[[str], bool]) -> Callable[[tuple[str, ...], Any], bool]:
        takes = self.config.get("filter_fn", sparsity_distributions.KERNEL_FILTER_FN)

        def filter_fn(path: tuple[str, ...], param: Any) -> bool:
            name = "/".join(path)
            excluded = self.exclude is not None and re.search(self.exclude, name)
            return not excluded and not is_frozen(name) and takes(path, param)

        return filter_fn

    def require_one(self, what: str) -> None:
        if not self.count:
            raise RuntimeError(
                f"sparse_training: {what} made its optimizer in a way of its own, by neither optimizers.get_optimizer "
                "nor scenic.train_lib.optax.make, so it is dense. Wrap its optimizer with jaxpruner.sparsify."
            )

    def sparsify(
        self, tx: optax.GradientTransformation, is_frozen: Callable[[str], bool], params: Any = None
    ) -> optax.GradientTransformation:
        self.count += 1
        names = [trees.leaf_name(path) for path, _ in trees.named_leaves(params)]
        if names and self.exclude is not None and not any(re.search(self.exclude, name) for name in names):
            raise ValueError(
                f"sparsity_config.exclude_reg_exp: {self.exclude!r} is found in no parameter's name; the names are "
                f"{', '.join(names)}."
            )
        shared = (
            self.config["algorithm"].startswith("global_")
            or self.config.get("dist_type") == "erk"
            or "custom_sparsity_map" in self.config
        )
        if self.count > 1 and shared:
            raise ValueError(
                "sparsity_config: this trainer makes an optimizer for each group of parameters, and a global "
                "algorithm, dist_type='erk' or a custom_sparsity_map would hold in each group instead of over all "
                "layers; use dist_type='uniform' and an algorithm that is not global. (If it is another training: "
                "leave sparse_training in between.)"
            )
        return _dense_if_nothing_is_pruned(
            tx, jaxpruner.sparsify(tx, self.updater(is_frozen)), self.filter_fn(is_frozen)
        )

    def get_optimizer(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def get_optimizer(optimizer_config: Any, learning_rate_fn: Any, params: Any = None) -> Any:
            pattern = optimizer_config.get("freeze_params_reg_exp")
            tx = stock(optimizer_config, learning_rate_fn, params=params)
            return self.sparsify(tx, lambda name: pattern is not None and re.search(pattern, name) is not None, params)

        return get_optimizer

    def make(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def make(config: Any, schedule: Any, params: Any) -> Any:
            tx, schedule_fns = stock(config, schedule, params)
            # No schedule means frozen. `stock` has checked that each name is matched by one pattern.
            patterns = [re.compile(pattern) for pattern, _, (fn, _) in schedule if fn is None]
            return self.sparsify(tx, lambda name: any(p.fullmatch(name) for p in patterns), params), schedule_fns

        return make

    def train_step(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def train_step(*args: Any, **kwargs: Any) -> Any:
            self.require_one(stock.__module__)
            result = stock(*args, **kwargs)
            if isinstance(result, tuple) and len(result) == 3 and _are_logs(result[2]):
                state, metrics, logs = result
                return state, metrics, logs | sparsity_logs(state)
            return result

        return train_step


def _dense_if_nothing_is_pruned(
    dense: optax.GradientTransformation,
    sparse: optax.GradientTransformation,
    filter_fn: Callable[[tuple[str, ...], Any], bool],
) -> optax.GradientTransformationExtraArgs:
    """`sparse`; but `dense` for a group of parameters, as `optax.multi_transform` shows them, without prunable ones."""
    dense = optax.with_extra_args_support(dense)

    def init_fn(params: Any) -> Any:
        is_group = any(map(trees.is_unpruned, jax.tree.leaves(params, is_leaf=trees.is_unpruned)))
        prunes = any(filter_fn(path, param) for path, param in trees.named_leaves(params))
        return dense.init(params) if is_group and not prunes else sparse.init(params)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        tx = sparse if isinstance(state, SparseState) else dense
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _are_logs(result: Any) -> bool:
    return isinstance(result, dict) and all(jnp.ndim(value) == 0 for value in result.values())


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
