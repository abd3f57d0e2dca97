"""Lets FedJAX 0.0.17 run on today's JAX and NumPy.

FedJAX calls functions that JAX and NumPy have since removed or narrowed. `mend` puts them back where FedJAX looks
for them, inside FedJAX's own modules; `jax` and `numpy` stay as they are for everyone else. If
FedJAX's source no longer has the call that broke, or a removed name exists, nothing is done. The pmap backend is
replaced if its source has one of the calls that broke it: a removed one (`device_put_sharded`) or a changed one
(`addressable_data`).
"""

from __future__ import annotations

import inspect
import operator
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fedjax
import jax
import jax.numpy as jnp
import numpy as np


def mend() -> tuple[str, ...]:
    """Repairs FedJAX's modules.

    Backends are bound when a FedJAX algorithm is built, so this must come first. Importing
    `jaxpruner_fedjax` does it.

    Returns:
      What this call repaired, such as `fedjax.core.tree_util: jax.tree_map`; empty if nothing was
      broken, as in a second call.
    """
    mended = []
    for module_name, library, name, call, replacement in _BROKEN:
        # Through sys.modules, since fedjax deletes its attribute `core`.
        module = sys.modules.get(module_name)
        if module is None or call not in inspect.getsource(module):
            continue
        seen = getattr(module, library)
        is_mended = isinstance(seen, _Extended) and name in vars(seen)
        if not (is_mended or _works(seen, name)):
            setattr(module, library, _Extended(seen, {name: replacement}))
            mended.append(f"{module_name}: {library}.{name}")
    clients: Any = sys.modules["fedjax.core.for_each_client"]
    if _uses_removed_placement(clients.ForEachClientPmapBackend):
        clients.ForEachClientPmapBackend = PmapBackend
        mended.append("fedjax.core.for_each_client: ForEachClientPmapBackend")
    return tuple(mended)


class PmapBackend(fedjax.ForEachClientBackend):
    """FedJAX's pmap backend: as many clients at once as there are devices.

    The stock one places arrays by calls that JAX has removed, and reads results in a way that now gives
    them one axis too many.

    Args:
      devices: the devices to use, by default all local ones.
    """

    def __init__(self, devices: Sequence[Any] | None = None):
        self._devices = devices

    def __call__(self, client_init: Callable, client_step: Callable, client_final: Callable) -> Callable:
        devices = list(self._devices or jax.local_devices())

        def masked_step(state, batch, is_real):
            new_state, result = client_step(state, batch)
            new_state = jax.tree.map(lambda new, old: jnp.where(is_real, new, old), new_state, state)
            return new_state, jax.tree.map(lambda x: jnp.where(is_real, x, jnp.zeros_like(x)), result)

        init = jax.pmap(client_init, in_axes=(None, 0), devices=devices)
        step = jax.pmap(masked_step, devices=devices, donate_argnums=0)
        final = jax.pmap(client_final, in_axes=(None, 0), devices=devices)

        def run(shared_input: Any, clients: Any) -> Iterator[tuple[Any, Any, list[Any]]]:
            # FedJAX's own blocks: clients of about the same number of batches, padded to equal shapes.
            blockify = sys.modules["fedjax.core.for_each_client"]._blockify
            for block in blockify(clients, len(devices)):
                state = init(shared_input, _stack(block.client_input))
                results = []
                for batches, are_real in block.masked_batches:
                    state, result = step(state, _stack(batches), np.asarray(are_real))
                    results.append(result)
                output = final(shared_input, state)
                for i, client_id in enumerate(block.client_id):
                    if block.client_mask[i]:
                        own = jax.tree.map(operator.itemgetter(i), (output, results[: block.num_batches[i]]))
                        yield client_id, *jax.device_put(own, devices[0])

        return run


class _Extended(types.ModuleType):
    """A library as one module sees it: with some names added, all else looked up in the library."""

    def __init__(self, library: types.ModuleType, names: dict[str, Any]):
        super().__init__(library.__name__)
        self.__dict__.update(names, _library=library)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_library"], name)


def _is_scalar_type(kind: Any) -> bool:
    """What `numpy.issctype` said of a type."""
    return isinstance(kind, type) and issubclass(kind, np.generic)


def _ones_like(values: Any, *args: Any, **kwargs: Any) -> Any:
    """What `jax.numpy.ones_like` did, also for a list of numbers."""
    return jnp.ones_like(jnp.asarray(values), *args, **kwargs)


# Where FedJAX looks, the library, the name that it calls, the call in FedJAX's source, and the replacement.
_BROKEN = (
    ("fedjax.core.tree_util", "jax", "tree_map", "jax.tree_map(", jax.tree_util.tree_map),
    ("fedjax.core.regularizers", "jax", "tree_map", "jax.tree_map(", jax.tree_util.tree_map),
    ("fedjax.core.serialization", "np", "issctype", "np.issctype(", _is_scalar_type),
    (
        "fedjax.algorithms.agnostic_fed_avg",
        "jnp",
        "ones_like",
        "jnp.ones_like(init_domain_weights)",
        _ones_like,
    ),
    ("fedjax.models.shakespeare", "jnp", "NINF", "jnp.NINF", -np.inf),
    ("fedjax.models.stackoverflow", "jnp", "NINF", "jnp.NINF", -np.inf),
)


def _works(library: types.ModuleType, name: str) -> bool:
    if name == "ones_like":
        return False  # it exists, but takes arrays only; to try it out would start a device
    with warnings.catch_warnings():  # a deprecated name still is one
        warnings.simplefilter("ignore")
        return hasattr(library, name)


def _uses_removed_placement(backend: type) -> bool:
    source = inspect.getsource(backend)
    return "addressable_data(" in source or ("device_put_sharded(" in source and not hasattr(jax, "device_put_sharded"))


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
