"""The parts that networks share. A layer knows no network."""

from flax_cnns.layers.attention import MultiHeadAttention
from flax_cnns.layers.building import building_blocks, classify, classify_by_maps, make_head
from flax_cnns.layers.cell import Cell, Edges, Recipe
from flax_cnns.layers.checks import check_fields, check_images, check_stages
from flax_cnns.layers.conv import Conv, conv2d, inside_control_flow
from flax_cnns.layers.drop_path import (
    Drop,
    drop_rates,
    fork,
    make_drops,
    make_key,
    pick,
    residual,
)
from flax_cnns.layers.fixup import fixup
from flax_cnns.layers.fractal import ColumnDrop, at_least_one, draw_columns, join
from flax_cnns.layers.initializers import (
    caffe_xavier,
    fan_out_or_window,
    gaussian,
    he,
    head_initializer,
    initializer,
)
from flax_cnns.layers.mbconv import (
    MBConv,
    SeparableConv,
    pad,
    round_depth,
    round_width,
)
from flax_cnns.layers.norm import NoNorm, local_response_norm, make_norm
from flax_cnns.layers.pool import adaptive_avg_pool, avg_pool, global_avg_pool, max_pool
from flax_cnns.layers.saf import SAFPool
from flax_cnns.layers.shake import (
    Shake,
    ShakeDrop,
    make_shake_drops,
    make_shakes,
    shake_drop,
    shake_shake,
)
from flax_cnns.layers.squeeze_excite import SqueezeExcite
from flax_cnns.layers.stage import Stage, split_by_stage
from flax_cnns.layers.stem import CifarStem, DeepStem, ImageNetStem
from flax_cnns.layers.unit import AvgPool, ConvUnit, MaxPool

__all__ = [
    "AvgPool",
    "Cell",
    "CifarStem",
    "ColumnDrop",
    "Conv",
    "ConvUnit",
    "DeepStem",
    "Drop",
    "Edges",
    "ImageNetStem",
    "MBConv",
    "MaxPool",
    "MultiHeadAttention",
    "NoNorm",
    "Recipe",
    "SAFPool",
    "SeparableConv",
    "Shake",
    "ShakeDrop",
    "SqueezeExcite",
    "Stage",
    "adaptive_avg_pool",
    "at_least_one",
    "avg_pool",
    "building_blocks",
    "caffe_xavier",
    "check_fields",
    "check_images",
    "check_stages",
    "classify",
    "classify_by_maps",
    "conv2d",
    "draw_columns",
    "drop_rates",
    "fan_out_or_window",
    "fixup",
    "fork",
    "gaussian",
    "global_avg_pool",
    "he",
    "head_initializer",
    "initializer",
    "inside_control_flow",
    "join",
    "local_response_norm",
    "make_drops",
    "make_head",
    "make_key",
    "make_norm",
    "make_shake_drops",
    "make_shakes",
    "max_pool",
    "pad",
    "pick",
    "residual",
    "round_depth",
    "round_width",
    "shake_drop",
    "shake_shake",
    "split_by_stage",
]
