"""A Keras optimizer that keeps parameters on their masks, for `model.compile` and the stock `fit`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax

import jaxpruner
from jaxpruner import trees
from jaxpruner.training.optimizer_state import owner_of
from jaxpruner.training.projection import Step, when
from jaxpruner.training.transformation import renewed
from jaxpruner_keras.parameters import as_list, as_tree, paths_of

# What the sparse optimizer does itself, after the masks: the inner one must not do it before.
_TAKEN_OVER = ("use_ema", "ema_overwrite_frequency", "loss_scale_factor")
# Slots of Keras optimizers that hold second moments, of RMSprop, Adam and its kin, and of Adafactor where it does not
# factor.
_SECOND_MOMENTS = ("velocity", "v")
_DESCRIBED = "sparsity"  # among the variables of a file, which have numbers


@keras.saving.register_keras_serializable(package="jaxpruner")
class SparseOptimizer(keras.optimizers.Optimizer):
    r"""Any Keras optimizer, made sparse.

        model.compile(SparseOptimizer(keras.optimizers.Adam(1e-3), algorithm="magnitude", sparsity=0.8), loss=...)
        model.fit(...)

    After each step, pruned weights are exactly 0, and kept ones are what the inner optimizer gives them. Masks, counts
    and whatever else the algorithm keeps are variables of the optimizer: Keras saves, loads and donates them. The steps
    of the schedule are steps of the optimizer. If the inner one has `gradient_accumulation_steps`, a step takes this
    many batches. Averages of weights (`use_ema` of the inner one) are averages of the sparse weights, on the masks.

    Parameters are named by their path in the model, such as `sequential/dense/kernel`; a `filter_fn` gets the path
    split at slashes. By default all with two or more axes are pruned, including embeddings and the last layer.

    Args:
      inner: the optimizer. A `LossScaleOptimizer` goes outside, around this one, as Keras does for mixed precision.
      updater: an algorithm, or a configuration of `jaxpruner.create_updater_from_config` as a mapping.
      name: the name of the optimizer.
      **config: the configuration as keyword arguments, in place of `updater`.

    Raises:
      ValueError: if the configuration is not valid, or `inner` is not a Keras optimizer that can be made sparse.
      RuntimeError: with a Keras backend other than JAX.

    Examples:
      >>> once = {"algorithm": "magnitude", "sparsity": 0.75, "update_start_step": 4, "update_end_step": 4}
      >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="out")], name="net")
      >>> model.compile(SparseOptimizer(keras.optimizers.Adam(1e-2), once), loss="mse")
      >>> _ = model.fit(jnp.ones((16, 8)), jnp.ones((16, 4)), batch_size=4, epochs=2, verbose=0)
      >>> int((model.get_weights()[0] != 0).sum()), int(model.optimizer.masks()["net/out/kernel"].sum())
      (8, 8)
    """

    def __init__(
        self,
        inner: keras.optimizers.Optimizer,
        updater: jaxpruner.BaseUpdater | Mapping[str, Any] | None = None,
        /,
        *,
        name: str | None = None,
        **config: Any,
    ):
        if keras.backend.backend() != "jax":
            raise RuntimeError(
                f"SparseOptimizer: the backend of Keras is {keras.backend.backend()}, and masks are made by JAX; set "
                "KERAS_BACKEND=jax in the environment before Keras is imported."
            )
        inner = keras.optimizers.get(inner)
        _check_inner(inner)
        ema = {"use_ema": inner.use_ema, "ema_momentum": inner.ema_momentum}
        super().__init__(
            learning_rate=0.0,
            name=name,
            ema_overwrite_frequency=inner.ema_overwrite_frequency,
            loss_scale_factor=inner.loss_scale_factor,
            **ema,
        )
        self._taken_over = {key: getattr(inner, key) for key in _TAKEN_OVER}
        self.inner = inner
        inner.use_ema, inner.ema_overwrite_frequency, inner.loss_scale_factor = False, None, None
        # Refuses configurations that would not be sparse, as for optax.
        jaxpruner.sparsify(optax.identity(), updater, **config)
        self._config = config if updater is None else updater
        if isinstance(updater, jaxpruner.BaseUpdater):
            self.updater = updater
        else:
            self.updater = jaxpruner.create_updater_from_config(config if updater is None else updater)

    # The variables: those of Keras's base class (with averages of weights), the leaves of the sparse state, sums of
    # dense gradients, and then those of the inner optimizer, as in `LossScaleOptimizer`.

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Makes the variables: initial masks and counts, and those of the inner optimizer."""
        if self.built:
            return
        _check_variables(self, variables)
        self._paths = paths_of(variables)
        params = self._tree([variable.value for variable in variables])
        state = jaxpruner.init_projection(self.updater, params)
        self.inner.build(variables)
        self._slots = _slots_of(self.inner, variables)
        self.updater.check_inner_state(self._moments([v.value for v in self.inner.variables]), params)
        super().build(variables)
        self._offset = len(self._variables)
        leaves, self._structure = jax.tree.flatten(state)
        names, owners = [path for path, _ in trees.named_leaves(state)], dict(zip(self._paths, variables, strict=True))
        # In the order of Keras's variables, not by name: files number variables, and names may change when a model is
        # read from one.
        places = {path: i for i, path in enumerate(self._paths)}

        def place(i):
            owner = owner_of(names[i], places) or ()
            return names[i][: len(names[i]) - len(owner)], places.get(owner, -1)

        self._order = sorted(range(len(leaves)), key=place)
        for i in self._order:
            variable = self.add_variable(
                leaves[i].shape,
                dtype=str(leaves[i].dtype),
                name="_".join(("sparse", *names[i])),
                layout=_layout(names[i], leaves[i], owners),
            )
            variable.assign(leaves[i])
        self._sums_at = len(self._variables)
        if self.inner.gradient_accumulation_steps:
            for variable in variables:
                self.add_variable_from_reference(variable, name="dense_gradient")

    @property
    def variables(self) -> list[keras.Variable]:
        return [*self._variables, *self.inner.variables]

    @property
    def iterations(self) -> Any:
        return self.inner.iterations

    @property
    def learning_rate(self) -> Any:
        return self.inner.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner.learning_rate = learning_rate

    def apply_gradients(self, grads_and_vars: Any) -> Any:
        """`apply`, with gradients and variables in pairs. Returns the number of batches seen."""
        super().apply_gradients(grads_and_vars)
        return self.inner._iterations

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[keras.Variable] | None = None) -> None:
        """One step of the variables, for your own loops.

        Args:
          grads: a gradient for each variable.
          trainable_variables: the variables; may be left out once the optimizer is built.

        Raises:
          ValueError: if they are not the ones that the optimizer was built with.
        """
        if not self.built:
            if trainable_variables is None:
                raise ValueError("trainable_variables: are not known yet; give them, or call build(variables) before.")
            self.build(list(trainable_variables))
        variables = self._trainable_variables
        if trainable_variables is not None:
            given = {id(variable): grad for variable, grad in zip(trainable_variables, grads, strict=True)}
            if set(given) != {id(variable) for variable in variables}:
                raise ValueError(
                    f"trainable_variables: {len(given)} variables are not the {len(variables)} that the optimizer was "
                    "built with; give a gradient for each of these (zeros where there is none)."
                )
            grads = [given[id(variable)] for variable in variables]
        own = self.variables
        stepped, state = self.stateless_apply([v.value for v in own], grads, [v.value for v in variables])
        for variable, value in zip([*variables, *own], [*stepped, *state], strict=True):
            variable.assign(value)

    def stateless_apply(
        self, optimizer_variables: Sequence[Any], grads: Sequence[Any], trainable_variables: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """One step, as a function from the values of the variables to those after the step.

        Args:
          optimizer_variables: those of `variables`.
          grads: the gradients.
          trainable_variables: the parameters.

        Returns:
          The new parameters, and the new values of the optimizer's variables.
        """
        if not self.built:
            raise ValueError("stateless_apply: the optimizer has no variables yet; call build(trainable_variables).")
        given, known = len(trainable_variables), len(self._trainable_variables)
        if not given == known == len(grads) or len(optimizer_variables) != len(self.variables):
            raise ValueError(
                f"{self.name}: got {given} parameters, {len(grads)} gradients and {len(optimizer_variables)} variables "
                f"of the optimizer, which was built with {known} parameters and has {len(self.variables)} variables; "
                "where layers were frozen or added since, compile the model again with a new optimizer."
            )
        params = [keras.ops.convert_to_tensor(value) for value in trainable_variables]
        values = [keras.ops.convert_to_tensor(value) for value in optimizer_variables]
        own, inner = values[: len(self._variables)], values[len(self._variables) :]
        grads = list(grads)
        if self.loss_scale_factor is not None:
            grads = [grad / self.loss_scale_factor for grad in grads]
        every = self.inner.gradient_accumulation_steps
        if every:
            sums = [total + grad for total, grad in zip(own[self._sums_at :], grads, strict=True)]
            due = (inner[self._inner_place(self.inner._iterations)] + 1) % every == 0
            mean = [total / every for total in sums]

            def accumulate():
                # The inner optimizer changes its own sums and its count only.
                _, after = self.inner.stateless_apply(inner, grads, params)
                return params, own[self._offset : self._sums_at], after, sums

            def step():
                stepped, state, after = self._step(own, inner, mean, params, times=every)
                return stepped, state, after, [jnp.zeros_like(total) for total in sums]

            stepped, state, inner, sums = when(due, step, accumulate)
        else:
            stepped, state, inner = self._step(own, inner, grads, params)
            sums = []
        own = [*own[: self._offset], *state, *sums]
        stepped, own = self._averaged(stepped, own, inner)
        return stepped, [*own, *inner]

    def _step(
        self, own: Sequence[Any], inner: Sequence[Any], grads: Sequence[Any], params: Sequence[Any], times: int = 1
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """A step of the inner optimizer on the masks: parameters, sparse state, variables of the inner optimizer.

        If it accumulates gradients over `times` batches, `grads` is their mean.
        """
        state = self._state(own)
        if self.updater.reads_optimizer:
            state = state._replace(inner_state=self._moments(inner))
        step = jaxpruner.begin_step(self.updater, self._tree(params), self._tree(grads), state)
        if self.updater.reads_optimizer:
            step = step._replace(state=step.state._replace(inner_state=None))
        kept = self._without_sums(inner) if times > 1 else list(inner)

        def take(slots):
            grads = self._list(step.grads)
            if times > 1:  # the inner optimizer divides
                grads = [times * grad for grad in grads]
            return self.inner.stateless_apply(slots, grads, self._list(step.params))

        def renew():
            return self._renewed(step, kept) if self.updater.regrows else kept

        def skip():
            slots = renew()
            place = self._inner_place(self.inner._iterations)  # batches are counted, as learning rates follow them
            slots = [value + 1 if i == place else value for i, value in enumerate(slots)]
            return self._list(step.params), slots

        if self.updater.skip_gradients:
            proposed, inner = when(step.is_mask_update, skip, lambda: tuple(map(list, take(kept))))
        else:
            proposed, inner = take(when(step.is_mask_update, renew, lambda: kept) if self.updater.regrows else kept)
        stepped, state = jaxpruner.end_step(step, self._tree(proposed))
        stepped = [new.astype(old.dtype) for new, old in zip(self._list(stepped), params, strict=True)]
        leaves = jax.tree.leaves(state)
        return self._constrained(stepped, state), [leaves[i] for i in self._order], list(inner)

    def _current_masks(self, state: jaxpruner.SparseState, params: Sequence[Any]) -> list[Any]:
        return self._list(self.updater.current_masks(state, self._tree(params)))

    def _constrained(self, params: list[Any], state: jaxpruner.SparseState) -> list[Any]:
        """Applies the variables' constraints again: the inner optimizer applied them before weights were pruned."""
        if all(variable.constraint is None for variable in self._trainable_variables):
            return params
        constrained, masks = list(params), self._current_masks(state, params)
        for i, variable in enumerate(self._trainable_variables):
            if variable.constraint is not None:
                value = variable.constraint(params[i]).astype(params[i].dtype)
                constrained[i] = value if masks[i] is None else jnp.where(masks[i], value, 0)
        return constrained

    def _averaged(self, params: list[Any], own: list[Any], inner: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Parameters and own variables with Keras's averages of this step, if there are any, on the masks."""
        if not self.use_ema:
            return params, own
        place = self._inner_place(self.inner._iterations)
        before = (inner[place] - 1) // (self.inner.gradient_accumulation_steps or 1)  # this step, as Keras counts
        state = self._state(own)
        masks = self._current_masks(state, params)
        own = list(own)
        momentum = jnp.where(before == 0, 0.0, self.ema_momentum)
        overwrites = self.ema_overwrite_frequency and (before + 1) % self.ema_overwrite_frequency == 0
        places = {id(variable): i for i, variable in enumerate(self._variables)}
        shown = list(params)
        for i, average in enumerate(self._model_variables_moving_average):
            if average is None:
                continue
            at = places[id(average)]
            decay = momentum.astype(params[i].dtype)
            mean = decay * own[at] + (1 - decay) * params[i]
            own[at] = mean if masks[i] is None else jnp.where(masks[i], mean, 0)
            if self.ema_overwrite_frequency:
                shown[i] = jnp.where(overwrites, own[at], params[i])
        return self._constrained(shown, state) if self.ema_overwrite_frequency else shown, own

    @property
    def count(self) -> int:
        """The steps taken, as the schedule counts them."""
        return int(self._state([variable.value for variable in self._variables]).count) if self.built else 0

    def check_as_asked(self) -> None:
        """Checks the sparsity of the masks once the schedule is over.

        Raises:
          ValueError: if it is lower than asked, as where a file is continued with a higher sparsity and no more steps.
        """
        if not self.built:
            return
        state = self._state([variable.value for variable in self._variables])
        params = self._tree([variable.value for variable in self._trainable_variables])
        # The next step puts weights on the masks, wherever they are from.
        jaxpruner.check_sparse(jaxpruner.apply_state_masks(params, state), state, self.updater)

    def masks(self) -> dict[str, Any]:
        """The boolean mask of each parameter that is pruned, by its path.

        In a callback, call `model.jax_state_sync()` first: variables are not up to date while `fit` runs.
        """
        if not self.built:
            raise ValueError(f"{self.name}: has no masks yet; call fit, or build(model.trainable_variables), before.")
        state = self._state([variable.value for variable in self._variables])
        masks = self.updater.current_masks(state, self._tree([v.value for v in self._trainable_variables]))
        # Copies: the next `fit` donates the variables.
        return {trees.leaf_name(path): jnp.copy(mask) for path, mask in trees.named_leaves(masks)}

    def _state(self, own: Sequence[Any]) -> jaxpruner.SparseState:
        leaves = dict(zip(self._order, own[self._offset : self._sums_at], strict=True))
        return jax.tree.unflatten(self._structure, [leaves[i] for i in range(len(leaves))])

    def _tree(self, values: Sequence[Any]) -> Any:
        return as_tree(self._paths, values)

    def _list(self, tree: Any) -> list[Any]:
        return as_list(self._paths, tree)

    def _inner_place(self, variable: keras.Variable) -> int:
        return next(i for i, own in enumerate(self.inner.variables) if own is variable)

    def _without_sums(self, inner: Sequence[Any]) -> list[Any]:
        sums = {id(variable) for variable in self.inner._accumulated_gradients}
        return [
            jnp.zeros_like(value) if id(variable) in sums else value
            for variable, value in zip(self.inner.variables, inner, strict=True)
        ]

    def _renewed(self, step: Step, inner: Sequence[Any]) -> list[Any]:
        """The variables of the inner optimizer, with the values of a new weight where weights regrow."""
        regrown, params = self._list(renewed(self.updater, step)), self._list(step.params)
        masks = self._list(step.masks)
        values = list(inner)
        for place, variable in enumerate(self.inner.variables):
            slot = self._slots.get(id(variable))
            if slot is None or regrown[slot.owner] is None:
                continue
            fresh = slot.fresh
            if fresh is None:  # it starts as the parameter does
                fresh = jnp.where(masks[slot.owner], params[slot.owner], 0).astype(values[place].dtype)
            values[place] = jnp.where(regrown[slot.owner], fresh, values[place])
        return values

    def _moments(self, inner: Sequence[Any]) -> Any:
        """The second moments as the core finds them in optax's states."""
        moments = {}
        for place, variable in enumerate(self.inner.variables):
            slot = self._slots.get(id(variable))
            if slot is not None and slot.name in _SECOND_MOMENTS:
                moments[self._paths[slot.owner]] = inner[place]
        return {"nu": as_tree(list(moments), list(moments.values()))}

    def finalize_variable_values(self, var_list: Sequence[keras.Variable]) -> None:
        """Replaces the weights by their averages, if there are any; `fit` calls it at its end."""
        if self.use_ema and int(self.inner._iterations.value):  # else the averages are still 0
            for variable, average in zip(var_list, self._model_variables_moving_average, strict=True):
                if average is not None:
                    variable.assign(jnp.copy(average.value))  # the next `fit` donates both

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Calls that of the inner optimizer, which decays the weights."""
        self.inner.exclude_from_weight_decay(var_list, var_names)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets all variables, including those of the inner optimizer."""
        for variable, weight in zip(self.variables, weights, strict=True):
            variable.assign(weight)

    def save_own_variables(self, store: Any) -> None:
        """Saves the variables, and the configuration that they are of."""
        super().save_own_variables(store)
        described = json.dumps(jaxpruner.describe(self.updater))
        store[_DESCRIBED] = np.frombuffer(described.encode(), np.uint8)

    def load_own_variables(self, store: Any) -> None:
        """Loads saved variables. If the file has no variables of an optimizer, the current ones stay as they are.

        Warns of each value of the configuration that differs from the file's; the one at hand holds.

        Raises:
          ValueError: if they are of another algorithm or storage, or of other parameters. (Keras would only warn, and
            train with new masks.)
        """
        if not store.keys():
            return
        if not self.built:
            raise ValueError(
                f"{self.name}: has no variables yet that those of the file could be put into; call "
                "model.optimizer.build(model.trainable_variables) before load_weights."
            )
        found = {key: store[key] for key in store.keys()}  # noqa: SIM118, it is not iterable
        described = found.pop(_DESCRIBED, None)  # files of older code have none
        if described is not None:
            saved = json.loads(bytes(np.asarray(described)))
            for line in jaxpruner.check_resumed(saved, self.updater, "the file"):
                warnings.warn(line, stacklevel=2)
        if len(found) != len(self.variables):
            raise ValueError(
                f"{self.name}: the file has {len(found)} variables of an optimizer and this one has "
                f"{len(self.variables)}, so it was saved with another configuration; compile the model with that one, "
                "or, to start masks anew, load the weights before the model is compiled (load_model: compile=False)."
            )
        super().load_own_variables(found)

    def get_config(self) -> dict[str, Any]:
        """The inner optimizer and the configuration, for `.keras` files."""
        inner = keras.saving.serialize_keras_object(self.inner)
        inner["config"] |= {key: value for key, value in self._taken_over.items() if key in inner["config"]}
        return {"name": self.name, "inner": inner, "sparsity": _written(self._config)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> SparseOptimizer:
        """The optimizer of `get_config`.

        Raises:
          ValueError: if it was made with objects that a file cannot hold.
        """
        inner = keras.saving.deserialize_keras_object(config["inner"], custom_objects=custom_objects)
        return cls(inner, name=config["name"], **_read(config["sparsity"], custom_objects))


class _Slot(NamedTuple):
    """A variable of the inner optimizer that belongs to a parameter.

    Attributes:
      owner: the number of the parameter.
      name: its name, such as `momentum`.
      fresh: the value for a new weight, or None for the weight's own value.
    """

    owner: int
    name: str
    fresh: Any


def _slots_of(inner: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]) -> dict[int, _Slot]:
    """The slots of an optimizer that has just been built, by the id of their variable.

    Raises:
      ValueError: for a variable whose first values are neither the same for all weights nor the weights themselves.
    """
    # `add_variable_from_reference` names them by the path of the parameter. Of parameters with one path, each has the
    # next slot of a name.
    prefixes = [variable.path.replace("/", "_") + "_" for variable in variables]
    slots: dict[int, _Slot] = {}
    taken: set[tuple[int, str]] = set()
    for variable in inner.variables:
        fits = [
            i
            for i, prefix in enumerate(prefixes)
            if variable.name.startswith(prefix) and tuple(variable.shape) == tuple(variables[i].shape)
        ]
        longest = max((len(prefixes[i]) for i in fits), default=0)
        named = [(i, variable.name[longest:]) for i in fits if len(prefixes[i]) == longest]
        free = [each for each in named if each not in taken]
        if not free or not variable.value.size:
            continue
        taken.add(free[0])
        owner, name = free[0]
        first = variable.value.reshape(-1)[0]
        if not bool(jnp.all(variable.value == first)):
            if not bool(jnp.all(variable.value == variables[owner].value)):
                raise ValueError(
                    f"inner: {inner.name} starts {variable.name} with values that are not known of a weight that grows "
                    "again; use another optimizer with this algorithm."
                )
            first = None
        slots[id(variable)] = _Slot(owner, name, first)
    return slots


def _layout(path: tuple[str, ...], leaf: Any, owners: Mapping[tuple[str, ...], keras.Variable]) -> Any:
    """Where a leaf of the state lies: like its parameter if it has the same shape; else everywhere."""
    owner = owners.get(owner_of(path, owners) or ())
    if owner is not None and tuple(owner.shape) == leaf.shape:
        return getattr(owner, "_layout", None)
    # Keras would look for it in its layouts by name, which is that of the parameter in part.
    distribution = keras.distribution.distribution()
    return distribution and keras.distribution.TensorLayout((None,) * leaf.ndim, distribution.device_mesh)


_OBJECTS = "objects"


def _written(config: Any) -> dict[str, Any]:
    """A configuration for a file. Objects that no file can hold are written by name, so saving a model never fails."""
    if isinstance(config, jaxpruner.BaseUpdater):
        return {_OBJECTS: [type(config).__name__]}
    written: dict[str, Any] = {}
    objects = []
    for key, value in dict(config).items():
        try:
            written[key] = _as_json(value)
        except Exception:  # whatever it is, reading the file reports it
            objects.append(key)
    return written | ({_OBJECTS: objects} if objects else {})


def _as_json(value: Any) -> Any:
    if callable(value) and keras.saving.get_registered_object(keras.saving.get_registered_name(value)) is not value:
        raise ValueError(f"{value!r} is not registered.")  # Keras would write its name, and not find it again
    written = keras.saving.serialize_keras_object(value)
    json.dumps(written)
    return written


def _read(written: Mapping[str, Any], custom_objects: Any) -> dict[str, Any]:
    if objects := written.get(_OBJECTS):
        raise ValueError(
            f"SparseOptimizer: the file cannot hold {', '.join(objects)}; load the model with compile=False and "
            "compile it with an optimizer made as before. Then, to go on with the masks and counts of the file, call "
            "model.optimizer.build(model.trainable_variables) and model.load_weights(FILE). (Files hold a "
            "configuration of plain values and of functions registered with "
            "keras.saving.register_keras_serializable.)"
        )
    return {
        key: keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
        for key, value in written.items()
    }


def _check_variables(optimizer: SparseOptimizer, variables: Sequence[keras.Variable]) -> None:
    scaled = optimizer.loss_scale_factor or optimizer.inner.gradient_accumulation_steps
    if scaled and any(getattr(variable, "overwrite_with_gradient", False) for variable in variables):
        raise ValueError(
            "inner: loss_scale_factor and gradient_accumulation_steps are not known of variables that gradients "
            "overwrite, as of float8; train without them."
        )


def _check_inner(inner: Any) -> None:
    if isinstance(inner, SparseOptimizer):
        raise ValueError("inner: is sparse already; give one SparseOptimizer, with the optimizer that it wraps.")
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "inner: is a LossScaleOptimizer, whose gradients are scaled; put it outside, "
            "LossScaleOptimizer(SparseOptimizer(inner, ...))."
        )
    if isinstance(inner, keras.optimizers.MultiOptimizer):
        raise ValueError(
            "inner: is a MultiOptimizer, whose parts count steps and average weights by themselves; give one optimizer "
            "for all variables, and choose by filter_fn what is pruned."
        )
    if inner.built:
        raise ValueError(
            f"inner: {inner.name} has been built already; give a new one, so that its variables are those of the model."
        )
