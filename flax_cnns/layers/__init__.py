"""Layers and building blocks that networks share. They do not import any network."""

from flax_cnns.layers.attention import MultiHeadAttention, flat_dot_general
from flax_cnns.layers.building import building_blocks, classify, classify_by_maps, make_head
from flax_cnns.layers.cell import Cell, CellRecipe, PaddingRules, ReluConvNorm
from flax_cnns.layers.checks import check_fields, check_images, check_stages
from flax_cnns.layers.conv import Conv, conv2d, inside_control_flow
from flax_cnns.layers.drop_path import (
    DropPath,
    drop_rates,
    for_block,
    make_drop_paths,
    make_key,
    residual,
    split_by_branch,
)
from flax_cnns.layers.fixup import fixup
from flax_cnns.layers.fractal import ColumnDrop, draw_columns, fractal_join, keep_at_least_one
from flax_cnns.layers.initializers import (
    caffe_xavier,
    dirac,
    gaussian,
    get_head_initializer,
    get_initializer,
    he,
    make_whitening_kernel,
    tensorflow_fan_out,
)
from flax_cnns.layers.mbconv import (
    MBConv,
    SeparableConv,
    resolve_padding,
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
    "CellRecipe",
    "CifarStem",
    "ColumnDrop",
    "Conv",
    "ConvUnit",
    "DeepStem",
    "DropPath",
    "ImageNetStem",
    "MBConv",
    "MaxPool",
    "MultiHeadAttention",
    "NoNorm",
    "PaddingRules",
    "ReluConvNorm",
    "SAFPool",
    "SeparableConv",
    "Shake",
    "ShakeDrop",
    "SqueezeExcite",
    "Stage",
    "adaptive_avg_pool",
    "avg_pool",
    "building_blocks",
    "caffe_xavier",
    "check_fields",
    "check_images",
    "check_stages",
    "classify",
    "classify_by_maps",
    "conv2d",
    "dirac",
    "draw_columns",
    "drop_rates",
    "fixup",
    "flat_dot_general",
    "for_block",
    "fractal_join",
    "gaussian",
    "get_head_initializer",
    "get_initializer",
    "global_avg_pool",
    "he",
    "inside_control_flow",
    "keep_at_least_one",
    "local_response_norm",
    "make_drop_paths",
    "make_head",
    "make_key",
    "make_norm",
    "make_shake_drops",
    "make_shakes",
    "make_whitening_kernel",
    "max_pool",
    "residual",
    "resolve_padding",
    "round_depth",
    "round_width",
    "shake_drop",
    "shake_shake",
    "split_by_branch",
    "split_by_stage",
    "tensorflow_fan_out",
]
