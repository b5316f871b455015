"""What a training step takes and gives back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from flax_cnns.types import Array, PyTree


@struct.dataclass
class TrainState:
    """The arrays of a run, without any device axis: equal on all devices.

    `ema` is None, or a tree `{"params", "batch_stats"}` of averaged weights and statistics.
    """

    step: Array  # i32, how many steps were taken
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree | None = None

    @classmethod
    def create(cls, variables: PyTree, opt_state: PyTree, *, ema: bool = False) -> TrainState:
        """Step 0 from `{"params", "batch_stats"}` (grafted ones: the average starts from them)."""
        variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
        # A copy: the state is donated, and one buffer cannot be donated under two names.
        average = jax.tree.map(jnp.copy, variables) if ema else None
        return cls(jnp.zeros((), jnp.int32), **variables, opt_state=opt_state, ema=average)

    @property
    def variables(self) -> PyTree:
        """What evaluation uses: the average where there is one."""
        if self.ema is not None:
            return self.ema
        return {"params": self.params, "batch_stats": self.batch_stats}

    def with_statistics(self, batch_stats: PyTree) -> TrainState:
        """The state with other statistics for evaluation."""
        if self.ema is not None:
            return self.replace(ema=self.ema | {"batch_stats": batch_stats})
        return self.replace(batch_stats=batch_stats)
