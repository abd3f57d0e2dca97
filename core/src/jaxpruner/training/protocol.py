"""What a sparse step needs from an algorithm. `jaxpruner.BaseUpdater` provides it; this package knows no class."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from jaxpruner import mask_storage, sparsity_schedules


class Algorithm(Protocol):
    """The hooks that a sparse step calls; see `jaxpruner.BaseUpdater` for what they mean."""

    scheduler: sparsity_schedules.Schedule
    skip_gradients: bool
    is_sparse_gradients: bool
    regrows: ClassVar[bool]
    straight_through: ClassVar[bool]
    renews_all: ClassVar[bool]
    reads_optimizer: ClassVar[bool]

    @property
    def is_stock(self) -> bool: ...

    @property
    def remembers(self) -> bool: ...

    @property
    def storage(self) -> mask_storage.MaskStorage: ...

    def init_state(self, params: Any) -> Any: ...

    def update_state(self, sparse_state: Any, params: Any, grads: Any, **kwargs: Any) -> Any: ...

    def starting_masks(self, params: Any, masks: Any) -> Any: ...

    def update_statistics(self, params: Any, grads: Any, statistics: Any) -> Any: ...

    def step_gradients(self, params: Any, grads: Any, masks: Any, sparse_state: Any) -> Any: ...

    def check_inner_state(self, inner_state: Any, params: Any) -> None: ...

    def check_state(self, sparse_state: Any, params: Any) -> None: ...
