"""The convolution that every network uses: the meaning of `nn.Conv`, the fastest lowering known."""

from flax_cnns.layers.conv.control_flow import inside_control_flow
from flax_cnns.layers.conv.module import Conv, conv2d, is_sharded

__all__ = ["Conv", "conv2d", "inside_control_flow", "is_sharded"]
