"""The parts that networks share. A layer knows no network."""

from flax_cnns.layers.conv import Conv
from flax_cnns.layers.initializers import initializer
from flax_cnns.layers.norm import make_norm
from flax_cnns.layers.pool import avg_pool, global_avg_pool, max_pool
from flax_cnns.layers.stack import Stage
from flax_cnns.layers.stem import CifarStem, ImageNetStem, check_images

__all__ = [
    "CifarStem",
    "Conv",
    "ImageNetStem",
    "Stage",
    "avg_pool",
    "check_images",
    "global_avg_pool",
    "initializer",
    "make_norm",
    "max_pool",
]
