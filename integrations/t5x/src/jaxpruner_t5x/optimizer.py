"""Any T5X optimizer, sparse. Trainer, learning-rate schedule, checkpoints and partitioning stay T5X's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization, struct, traverse_util
from t5x import optimizers

import jaxpruner
from jaxpruner import sparsity_distributions, trees
from jaxpruner.coupled_structures import AllGroups
from jaxpruner.training import optimizer_state
from jaxpruner.training.projection import when
from jaxpruner.training.transformation import renewed
from jaxpruner_t5x import functions, layers, metrics
from jaxpruner_t5x.partition_rules import sparse_state_axes
from jaxpruner_t5x.plan import Plan


def create_updater(
    algorithm: str,
    sparsity: float | None = None,
    dist_type: str | None = None,
    filter_fn: Callable[[tuple[str, ...], Any], bool] | None = None,
    **more: Any,
) -> jaxpruner.BaseUpdater:
    """The algorithm that gin asks for.

    Args:
      algorithm: a name of `jaxpruner.all_algorithm_names()`; `no_prune` trains densely.
      sparsity: final fraction of zeros over the pruned weights.
      dist_type: `erk` as in the paper's experiments (the default), or `uniform`.
      filter_fn: selects the parameters to prune, `filter_fn(path, param)`; by default kernels, so no token or position
        embeddings and no scales.
      **more: other keys of `jaxpruner.create_updater_from_config`: `update_start_step`, `update_end_step`,
        `update_freq`, `sparsity_type`, `drop_fraction`, `custom_sparsity_map`, `use_packed_masks`, `rng_seed`, ...
        A `sparsity_distribution_fn` stands in place of the three above.
        Steps are counted from where sparse training begins, so they do not include those of a dense checkpoint.

    Raises:
      ValueError: if the configuration is not valid.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"token_embedder": {"embedding": jnp.ones((32, 8))}, "mlp": {"kernel": jnp.ones((8, 16))}}
      >>> create_updater("static_sparse", sparsity=0.8, dist_type="uniform").get_target_sparsities(params)
      {'mlp': {'kernel': 0.8}, 'token_embedder': {'embedding': None}}
    """
    if more.get("sparsity_distribution_fn") is None:
        dist_type = "erk" if dist_type is None else dist_type
        filter_fn = sparsity_distributions.KERNEL_FILTER_FN if filter_fn is None else filter_fn
    given = {"sparsity": sparsity, "dist_type": dist_type, "filter_fn": filter_fn, **more}
    return jaxpruner.create_updater_from_config({"algorithm": algorithm} | given)


@struct.dataclass
class SparseOptimizerState:
    """A T5X optimizer state with masks; `param_states` is as in the dense optimizer.

    Attributes:
      step: the training step.
      param_states: the state of the dense optimizer.
      sparse: masks, counts and, for straight-through methods, the dense weights.
    """

    step: Any
    param_states: Any
    sparse: jaxpruner.SparseState


class SparseOptimizer(optimizers.OptimizerDef):
    r"""An `OptimizerDef` around another one that keeps parameters on their masks.

    With :math:`\hat p` the parameters after the dense optimizer's step, the new ones are :math:`\hat p` where the mask
    keeps a weight and 0 where it prunes it. The dense optimizer may be any of T5X: Adafactor, MultiOptimizer, an
    `OptaxWrapper`. In checkpoints, its state keeps its names, `state/param_states`, and masks are next to it in
    `state/sparse`. `SparseOptimizer` is the outermost optimizer: a MultiOptimizer goes inside it, not around it.

    Scanned layers count as separate layers, each with its own share of weights: T5X gives the model's logical axes.

    Args:
      inner: the dense optimizer.
      updater: the algorithm, from `create_updater`.
      plan: how long T5X trains, from `planned`, to refuse a schedule that does not fit; None skips this check, for a
        run that you will continue further.
      model: makes the model, `configured_model`; `sparsity_type = 'groups'` means the groups of this model.

    Examples:
      >>> import jax.numpy as jnp
      >>> from t5x import optimizers
      >>> updater = create_updater("magnitude", sparsity=0.5, update_start_step=0, update_end_step=0)
      >>> params = {"mlp": {"kernel": jnp.array([[1.0, -4.0], [3.0, -2.0]])}}
      >>> optimizer = SparseOptimizer(optimizers.sgd(0.25), updater).create(params)
      >>> optimizer.apply_gradient(params).target["mlp"]["kernel"].tolist()
      [[0.0, -3.0], [2.25, 0.0]]
    """

    def __init__(
        self,
        inner: optimizers.OptimizerDef,
        updater: jaxpruner.BaseUpdater,
        plan: Plan | None = None,
        model: Callable[[], Any] | None = None,
    ):
        # The hyperparameters are the inner optimizer's, which may change them when it learns of the model's axes.
        self.inner = inner
        self.updater = self._given = updater
        self._model = model
        self.plan = plan or Plan()
        self._last_step = self.plan.last_step(0)

    @property
    def hyper_params(self) -> Any:
        return self.inner.hyper_params

    def update_hyper_params(self, **overrides: Any) -> Any:
        return self.inner.update_hyper_params(**overrides)

    def set_param_axes(self, param_logical_axes: Any) -> None:
        """Takes what T5X knows about the model, before it initialises."""
        if hasattr(self.inner, "set_param_axes"):
            self.inner.set_param_axes(param_logical_axes)
        self.updater = layers.informed(self._given, param_logical_axes)

    def init_state(self, params: Any) -> SparseOptimizerState:
        if self._model and isinstance(self.updater.sparsity_type, AllGroups):
            self.updater = copy.copy(self.updater)
            self.updater.sparsity_type = functions.groups_of(self._model(), self.updater.sparsity_type)
        dense = self.inner.init_state(params)
        sparse = jaxpruner.init_projection(self.updater, params)
        self.updater.check_inner_state(dense.param_states, params)
        if not (self.plan.relative_steps or self.plan.initial_checkpoint):  # else it is known when that is restored
            self._refuse_late(0, 0)
        self._refuse_frozen(sparse.masks, dense.param_states)
        # Checkpoints save None and then cannot restore it; of an empty state they save nothing.
        empty, hidden = optax.EmptyState(), sparse.inner_state
        sparse = sparse._replace(inner_state=empty if hidden is None else hidden._replace(inner_state=empty))
        return SparseOptimizerState(dense.step, dense.param_states, sparse)

    def _refuse_late(self, step: int, count: int) -> None:
        """Refuses a schedule that starts or ends after training."""
        steps = self.plan.sparse_steps(step, count)
        if steps is None or steps <= count:  # no step is left, which T5X allows
            return
        try:
            jaxpruner.check_schedule(self.updater, num_steps=steps)
        except ValueError as error:
            raise ValueError(
                f"{error} (These {steps} are T5X's TRAIN_STEPS without those before sparse training began; bind "
                "jaxpruner_t5x.SparseOptimizer.plan = None for a run that is to be continued with more.)"
            ) from None

    def _refuse_frozen(self, masks: Any, slots: Any) -> None:
        """Refuses to prune what nothing trains: T5X's MultiOptimizer has None there."""
        frozen = []
        trees.map_named(lambda path, leaf: frozen.append(path) if leaf is None else None, slots)
        if pruned := sorted(set(frozen) & {path for path, _ in trees.named_leaves(masks)}):
            raise ValueError(
                f"{trees.leaf_name(pruned[0])}: would be pruned, but no optimizer trains it; bind "
                "jaxpruner_t5x.create_updater.filter_fn to a function that leaves out what is frozen."
            )

    def apply_gradient(
        self, hyper_params: Any, params: Any, state: SparseOptimizerState, grads: Any
    ) -> tuple[Any, SparseOptimizerState]:
        before = state.sparse
        if self.updater.reads_optimizer:
            before = before._replace(inner_state=state.param_states)
        step = jaxpruner.begin_step(self.updater, params, grads, before)
        step = step._replace(state=step.state._replace(inner_state=state.sparse.inner_state))
        slots = kept = state.param_states
        if self.updater.regrows:
            slots = when(step.is_mask_update, lambda: self._renewed(step, kept), lambda: kept)

        def take() -> tuple[Any, Any]:
            before = optimizers.OptimizerState(state.step, slots)
            proposed, after = self.inner.apply_gradient(hyper_params, step.params, before, step.grads)
            return proposed, after.param_states

        if self.updater.skip_gradients:
            proposed, new_slots = when(step.is_mask_update, lambda: (step.params, slots), take)
        else:
            proposed, new_slots = take()
        stepped, sparse = jaxpruner.end_step(step, proposed)
        # Hidden weights may be more precise than the parameters that show them.
        stepped = jax.tree.map(lambda new, old: new.astype(old.dtype), stepped, params)
        return stepped, SparseOptimizerState(state.step + 1, new_slots, sparse)

    def _renewed(self, step: Any, slots: Any) -> Any:
        """The dense optimizer's state, with the statistics of new weights where weights regrow."""
        regrown = dict(trees.named_leaves(renewed(self.updater, step)))
        fresh = self.inner.init_state(jaxpruner.apply_mask(step.params, step.masks)).param_states

        def reset(path: trees.KeyPath, old: Any, new: Any) -> Any:
            if trees.is_unpruned(old):
                return old
            # optax keeps statistics/parameter, T5X's own optimizers parameter/statistics.
            owner = optimizer_state.owner_of(path, regrown) or optimizer_state.owner_of(path[:-1], regrown)
            # Factored statistics have none for a single weight.
            return jnp.where(regrown[owner], new, old) if owner and regrown[owner].shape == old.shape else old

        return trees.map_named(reset, slots, fresh)

    def derive_logical_axes(self, optimizer: optimizers.Optimizer, param_logical_axes: Any) -> optimizers.Optimizer:
        """The dense optimizer gives its own axes; masks and dense weights have those of their parameters."""
        state = optimizer.state
        dense = self.inner.derive_logical_axes(
            optimizers.Optimizer(
                self.inner, optimizers.OptimizerState(state.step, state.param_states), optimizer.target
            ),
            param_logical_axes,
        )
        sparse = sparse_state_axes(state.sparse, param_logical_axes)
        return optimizers.Optimizer(
            self, SparseOptimizerState(None, dense.state.param_states, sparse), param_logical_axes
        )

    def state_dict(self, target: Any, state: SparseOptimizerState) -> Mapping[str, Any]:
        """For a checkpoint.

        Raises:
          ValueError: if the parameters are not on their masks, or the masks not as sparse as the schedule left them.
        """
        if _is_concrete(state.sparse.count):
            jaxpruner.check_sparse(target, state.sparse, self.updater)
            if int(state.step) == self._last_step:
                metrics.log_reached(self.updater, target, state)
        saved = self.inner.state_dict(target, optimizers.OptimizerState(state.step, state.param_states))
        # Leaves that are not pruned are empty nodes, on which T5X's loop and checkpoints fail.
        flat = traverse_util.flatten_dict(serialization.to_state_dict(state.sparse))
        saved["state"]["sparse"] = traverse_util.unflatten_dict(flat)
        return saved

    def restore_state(
        self, opt_target: Any, opt_state: SparseOptimizerState, state_dict: Mapping[str, Any]
    ) -> tuple[Any, SparseOptimizerState]:
        _refuse_other_shapes(state_dict["target"], opt_target)
        saved = dict(state_dict["state"])
        sparse = traverse_util.flatten_dict(saved.pop("sparse"))
        target, dense = self.inner.restore_state(
            opt_target,
            optimizers.OptimizerState(opt_state.step, opt_state.param_states),
            {"target": state_dict["target"], "state": saved},
        )
        reference = traverse_util.flatten_dict(serialization.to_state_dict(opt_state.sparse), keep_empty_nodes=True)
        empty = {key: leaf for key, leaf in reference.items() if leaf is traverse_util.empty_node}
        whole = traverse_util.unflatten_dict(sparse | empty)
        restored = serialization.from_state_dict(opt_state.sparse, whole)
        for (path, old), (_, new) in zip(
            trees.named_leaves(opt_state.sparse.masks), trees.named_leaves(restored.masks), strict=True
        ):
            if hasattr(new, "shape") and (new.shape, new.dtype) != (old.shape, old.dtype):  # else it is its axes
                raise ValueError(
                    f"{trees.leaf_name(path)}: the checkpoint's mask is {new.dtype}{list(new.shape)}, and "
                    f"{old.dtype}{list(old.shape)} is asked for; bind create_updater.use_packed_masks as in that run."
                )
        if _is_concrete(restored.count):
            self._refuse_late(int(dense.step), int(restored.count))
            self._last_step = self.plan.last_step(int(dense.step))
        return target, SparseOptimizerState(dense.step, dense.param_states, restored)


def _is_concrete(leaf: Any) -> bool:
    """Whether this is an array, and not a shape, axes or a tracer, for which T5X calls the same functions."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic)) and not isinstance(leaf, jax.core.Tracer)


def _refuse_other_shapes(saved: Any, params: Any) -> None:
    found = traverse_util.flatten_dict(serialization.to_state_dict(saved), sep="/")
    for name, param in traverse_util.flatten_dict(serialization.to_state_dict(params), sep="/").items():
        leaf = found.get(name)
        if hasattr(leaf, "shape") and hasattr(param, "shape") and leaf.shape != param.shape:  # else it is its axes
            raise ValueError(
                f"target/{name}: is {list(leaf.shape)} in the checkpoint and {list(param.shape)} in the model. Give "
                "the sizes of the checkpoint's model, or another checkpoint (for a new run, another MODEL_DIR)."
            )
