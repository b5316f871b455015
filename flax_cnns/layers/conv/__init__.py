"""The convolution of all networks, with the results of `nn.Conv` by the fastest known algorithm.

module.py        `Conv` and `conv2d`, which use the primitive for plain image convolutions and
                 `lax.conv_general_dilated` for all others
geometry.py      the geometry of a convolution: all its parameters except the arrays
control_flow.py  whether a convolution is traced inside a scan, a cond or a loop
primitive.py     the three products of a convolution as primitives, with derivatives and vmap
cpu.py           the products on a CPU
choose.py        the choice of the algorithm for each product on a CPU
matmul.py, winograd.py, depthwise.py, grouped.py
                 the algorithms
taps.py          the views, slices and padding that the algorithms share
xla.py           the products on all other devices, by XLA's own convolution
"""

from flax_cnns.layers.conv.control_flow import inside_control_flow
from flax_cnns.layers.conv.module import Conv, conv2d, is_sharded

__all__ = ["Conv", "conv2d", "inside_control_flow", "is_sharded"]
