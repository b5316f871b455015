"""The networks that test_contract.py checks: one or more rows per family.

A new family needs a row for each of its classes, and for each smallest image size. published.py has
the published counts of every variant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

RESIDUAL = dict(drop_path=0.5)
STACKED = dict(scan=True, remat=True)
NORM = dict(momentum=0.5, epsilon=0.01)
RESNET = dict(dropout=0.3, zero_init=True) | RESIDUAL | STACKED | NORM
DENSENET = dict(dropout=0.3, remat=True) | NORM
NASNET = dict(dropout=0.3, remat=True, padding="torch") | RESIDUAL | NORM
DROPOUT = dict(dropout=0.3)


class Network(NamedTuple):
    """A network and what it promises."""

    name: str
    features: int  # channels of its output with num_classes=None
    smallest: int = 1  # height and width of the smallest images that it takes, in pixels
    fields: Mapping[str, Any] = {}  # make the network small, so that it is traced quickly
    options: Mapping[str, Any] = {}  # other values of the fields that change no parameter
    aux: tuple[str, ...] = ()  # names of auxiliary heads


ONE_BLOCK = {"depths": (1, 1, 1, 1)}
THREE_STAGES = {"depths": (1, 1, 1)}
_CELLS = {"depths": (1, 1), "width": 8, "stem_width": 8}
_TABLE = (("mixed4a", (4, 4, 4, 4, 4, 4)), ("mixed4d", (4, 4, 4, 4, 4, 4)))

NETWORKS = {
    "lenet": [Network("lenet5", 84, 32), Network("lenet5_original", 84, 32)],
    "alexnet": [
        Network("alexnet", 4096, 63, options=DROPOUT),
        Network("alexnet_2gpu", 4096, 67, options=DROPOUT),
        Network("alexnet_single_tower", 4096, 67, options=DROPOUT),
    ],
    "zfnet": [Network("zfnet_fig3", 4096, 47, options=DROPOUT)],
    "cifar_resnet": [
        Network(
            "cifar_resnet20",
            64,
            fields=THREE_STAGES,
            options=dict(shake_drop=0.5, zero_init=True) | RESIDUAL | STACKED,
        ),
    ],
    "resnet": [
        Network("resnet18", 512, fields=ONE_BLOCK, options=RESNET),
        Network("resnet50d", 2048, fields=ONE_BLOCK, options=RESNET),
    ],
    "resnext": [Network("resnext50_32x4d", 2048, fields=ONE_BLOCK, options=RESNET)],
    "senet": [
        Network("legacy_seresnet18", 512, 3, ONE_BLOCK, RESNET),
        Network("senet154", 2048, fields=ONE_BLOCK, options=RESNET),
    ],
    "preact_resnet": [
        Network("resnetv2_50", 2048, fields=ONE_BLOCK, options=RESIDUAL | STACKED | NORM),
    ],
    "cifar_preact": [
        Network("cifar_preact110", 64, fields=THREE_STAGES, options=RESIDUAL | STACKED),
    ],
    "wide_resnet": [
        Network("wrn_16_4", 256, fields={"depth": 10}, options=DROPOUT | RESIDUAL | STACKED),
        Network("wide_resnet50_2", 2048, fields=ONE_BLOCK, options=RESNET),
    ],
    "shake_shake": [
        Network(
            "shakeshake_26_2x32d",
            128,
            fields=THREE_STAGES,
            options=dict(level="batch", zero_init=True) | STACKED,
        ),
    ],
    "pyramidnet": [
        Network(
            "pyramidnet_110_a48",
            64,
            fields={"depth": 8},
            options=dict(shake_drop=0.5, zero_init=True, remat=True) | RESIDUAL,
        ),
    ],
    "resnet_in_resnet": [Network("rir_18", 64, fields=THREE_STAGES, options=STACKED)],
    "densenet": [
        Network("densenet121", 68, 29, ONE_BLOCK, DENSENET),
        Network("densenet_40_12", 52, 4, {"depth": 7}, DENSENET),
    ],
    "sparsenet": [
        Network("sparsenet_40_24", 120, 4, {"depth": 7}, DENSENET),
        Network("sparsenet_sum_164", 256, fields={"depth": 11}, options=dict(remat=True)),
    ],
    "sparse_densenet": [
        Network("sparse_densenet_abc", 36, 4, THREE_STAGES, DENSENET),
    ],
    "fractalnet": [
        Network(
            "fractalnet_20",
            512,
            fields={"columns": 2},
            options=dict(dropout=(0.3,) * 5, momentum=0.5) | RESIDUAL,
        ),
    ],
    "googlenet": [
        Network(
            "googlenet_tv_aux",
            16,
            15,
            {"table": _TABLE},
            dict(dropout=0.3, aux_dropout=0.3),
            ("aux1", "aux2"),
        ),
        Network(
            "googlenet_2014_aux",
            16,
            31,
            {"table": _TABLE},
            dict(dropout=0.3, aux_dropout=0.3),
            ("aux1", "aux2"),
        ),
    ],
    "inception_v3": [
        Network(
            "inception_v3",
            2048,
            75,
            {"pool_projs": (32,), "widths": (128,)},
            dict(dropout=0.3, momentum=0.5),
            ("aux1",),
        ),
    ],
    "inception_v4": [
        Network("inception_v4", 1536, 75, THREE_STAGES, DROPOUT | STACKED),
    ],
    "inception_resnet": [
        Network(
            "inception_resnet_v2", 1536, 75, THREE_STAGES, dict(dropout=0.3, momentum=0.5) | STACKED
        ),
    ],
    "efficientnet": [
        Network(
            "efficientnet_b0",
            1280,
            fields={"depth_mult": 0.1},
            options=RESNET | {"padding": "same"},
        ),
    ],
    "simpnet": [
        Network("simpnet_5m", 432, 4, options=dict(dropout=0.3, saf_rate=0.5, momentum=0.5)),
    ],
    "vgg": [
        Network("vgg11", 4096, 32, options=DROPOUT),
        Network("cifar_vgg11_bn", 512, 32, options=DROPOUT),
    ],
    "squeezenet": [
        Network("squeezenet1_0", 512, 21, options=DROPOUT),
        Network("squeezenet1_1", 512, 17, options=DROPOUT),
        Network("cifar_squeezenet1_1", 512, 8, options=DROPOUT),
    ],
    "xception": [
        Network(
            "xception",
            2048,
            7,
            {"depth": 1},
            dict(dropout=0.3, zero_init=True, padding="same") | STACKED | NORM,
        ),
    ],
    "mobilenet_v1": [
        Network(
            "mobilenet_v1_100",
            1024,
            fields={"depths": (1, 1, 1, 1, 1)},
            options=dict(dropout=0.3, padding="same") | STACKED | NORM,
        ),
    ],
    "mobilenet_v2": [
        Network(
            "mobilenet_v2",
            1280,
            fields={"table": ((1, 16, 1, 1), (6, 24, 2, 2))},
            options=RESNET | {"padding": "same"},
        ),
    ],
    "mobilenet_v3": [
        Network(
            "mobilenet_v3_small",
            1024,
            options=dict(dropout=0.3, zero_init=True, remat=True, padding="same") | RESIDUAL | NORM,
        ),
    ],
    "nas": [Network("nas_v1", 48)],
    "nas_bench_201": [
        Network("nas_bench_201_resnet", 64, fields=THREE_STAGES, options=dict(remat=True)),
    ],
    "nasnet": [
        Network("nasnet_a_mobile", 96, 19, _CELLS, NASNET, ("aux1",)),
        Network("nasnet_a_6_768", 96, 3, _CELLS, NASNET, ("aux1",)),
    ],
    "pnasnet": [
        Network("pnasnet5_large", 80, 19, _CELLS | {"depths": (1, 0)}, NASNET, ("aux1",)),
    ],
    "deck_cnn": [Network("deck003_cifar100_example", 512, 18)],
    "nin": [
        Network("nin_cifar10", 192, 4, options=DROPOUT),
        Network("nin_imagenet", 1024, 39, options=DROPOUT),
    ],
    "all_cnn": [Network("all_cnn_c", 192, 9, options=dict(input_dropout=0.3, dropout=0.25))],
    "dsn": [Network("dsn", 192, 4, options=DROPOUT, aux=("aux1", "aux2", "aux3"))],
    "highway": [Network("highway_19", 100, options=DROPOUT)],
    "airbench": [
        Network("airbench94", 16, 9, dict(widths=(8, 12, 16)), dict(momentum=0.9, epsilon=0.01))
    ],
    "convnext": [
        Network("convnext_atto", 320, 32, ONE_BLOCK, RESIDUAL | STACKED | dict(epsilon=0.01)),
    ],
    "vit": [  # takes only images of its input_size
        Network(
            "vit_tiny_patch16_224",
            192,
            8,
            {"patch": 4, "depth": 2},
            dict(dropout=0.3, epsilon=0.01) | RESIDUAL | STACKED,
        ),
    ],
}
