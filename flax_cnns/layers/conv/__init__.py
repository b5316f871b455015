"""The convolution that every network uses: the meaning of `nn.Conv`, the fastest lowering known.

module.py        `Conv` and `conv2d`: what is a plain image convolution, and the library's own
                 for the rest
geometry.py      everything about a convolution but its arrays
control_flow.py  whether it stands in a scan, a cond or a loop
primitive.py     its three products, and how they are differentiated, mapped and lowered
cpu.py           the products on a CPU, by the algorithm that choose.py names: those of matmul.py,
                 winograd.py, depthwise.py and grouped.py, made of taps.py
xla.py           the products everywhere else
"""

from flax_cnns.layers.conv.control_flow import inside_control_flow
from flax_cnns.layers.conv.module import Conv, conv2d, is_sharded

__all__ = ["Conv", "conv2d", "inside_control_flow", "is_sharded"]
