"""The convolution that every network uses."""

from __future__ import annotations

import flax.linen as nn


class Conv(nn.Conv):
    """`nn.Conv`: its fields, its parameters, its meaning; [N H W C] -> [N H' W' features].

    Networks take it from here, never from Flax, so that a faster lowering has one place to go.
    `padding=1` pads both sides as PyTorch does; `"SAME"` is TensorFlow's and differs at stride 2.
    `control_flow=True` says that it runs inside `nn.scan` or `nn.cond`.
    """

    control_flow: bool = False
