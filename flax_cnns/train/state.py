"""The state that a training step takes and returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct

from flax_cnns.types import Array, PyTree


@struct.dataclass
class TrainState:
    """The arrays of a run, equal on all devices and without a device axis.

    `ema` is a tree `{"params", "batch_stats"}` of averaged weights and statistics, or None.
    """

    step: Array  # i32: number of steps taken
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree | None = None

    if TYPE_CHECKING:  # flax's decorator adds it

        def replace(self, **updates: Any) -> TrainState: ...

    @classmethod
    def create(cls, variables: PyTree, opt_state: PyTree, *, ema: bool = False) -> TrainState:
        """Makes the state of step 0 from `{"params", "batch_stats"}`, where the average starts."""
        variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
        # A copy: the state is donated, and a buffer cannot be donated twice.
        average = jax.tree.map(jnp.copy, variables) if ema else None
        return cls(jnp.zeros((), jnp.int32), **variables, opt_state=opt_state, ema=average)

    @property
    def variables(self) -> PyTree:
        """The variables that evaluation uses: the average if there is one."""
        if self.ema is not None:
            return self.ema
        return {"params": self.params, "batch_stats": self.batch_stats}

    def with_statistics(self, batch_stats: PyTree) -> TrainState:
        """Returns the state with other BatchNorm statistics for evaluation."""
        if self.ema is not None:
            return self.replace(ema=self.ema | {"batch_stats": batch_stats})
        return self.replace(batch_stats=batch_stats)
