"""The networks that are compared with a second forward pass in NumPy, and the comparison."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from flax_cnns import create_model, init_variables
from flax_cnns import tree as pytree
from flax_cnns.models.lenet import make_rbf_codes
from flax_cnns.models.sparse_densenet import farthest_and_nearest
from tests.models import foreign
from tests.models.straight import (
    airbench,
    alexnet,
    all_cnn,
    cifar_resnet,
    deck_cnn,
    densenet,
    dsn,
    fractalnet,
    googlenet,
    highway,
    lenet,
    nas,
    nas_bench_201,
    nasnet,
    nin,
    pnasnet,
    preact_resnet,
    pyramidnet,
    resnet,
    resnet_in_resnet,
    resnext,
    shake_shake,
    simpnet,
    sparse_densenet,
    sparsenet,
    squeezenet,
    vgg,
    wide_resnet,
    zfnet,
)


class Case(NamedTuple):
    """A network and its forward pass in NumPy."""

    name: str
    straight: Callable
    size: int  # of images: small, but with last maps above 1x1 (except LeNet's, as in the paper)
    fields: Mapping[str, Any] = {}
    strength: float = 1.0  # scale of the images; response normalization hardly changes weak ones
    slow: bool = False  # if the family has a quick case, too


NARROW = {"hidden": 32, "num_classes": 10}
WIDTHS = {"widths": (16, 24, 32, 40, 48)}
SHORT = {"hidden": (32, 32), "num_classes": 10} | WIDTHS
CELLS = {"width": 8, "stem_width": 7, "num_classes": 10}

# Residual networks have first blocks with stride 1 and 2, and a block that is not the first.
DEPTHS = (2, 1, 2)
SHALLOW = {"depths": DEPTHS, "widths": (8, 12, 16)}
DEPTHS_IMAGENET = (1, 2, 1, 1)
SHALLOW_IMAGENET = {"depths": DEPTHS_IMAGENET, "width": 8, "num_classes": 10}
GROUPS = {"depths": DEPTHS, "width": 8, "base_width": 32, "groups": 4}
PYRAMID = {"depth": 14, "alpha": 10}  # 5/3 of a channel a block, rounded down
PYRAMID_272 = {"depth": 20, "alpha": 10}
SPARSE = (8, 2, 3)  # layer 8 takes the block's input, which is eight maps before it
PLAIN, BC = {"layer": densenet.plain}, {"layer": densenet.bottleneck}
PATH = {"links": partial(farthest_and_nearest, path=4), "growth_rate": 5, "stem_width": 7}

# 227 for AlexNet gives the paper's maps without padding. The sizes for networks whose 3x3 pooling
# with stride 2 rounds up are chosen so that rounding down would give other sizes.
CASES = [
    Case("lenet5", lenet.lenet5, 32),
    Case("lenet5_original", lenet.lenet5_original, 32),
    Case("alexnet_2gpu", alexnet.alexnet_2gpu, 227, NARROW, 30),
    Case("alexnet_single_tower", alexnet.alexnet_single_tower, 227, NARROW, 30, slow=True),
    Case("zfnet_fig3", zfnet.zfnet, 224, NARROW, 30),
    Case("zfnet_big", zfnet.zfnet, 112, NARROW, 30, slow=True),
    Case("vgg11_lrn", vgg.vgg11_lrn, 64, SHORT, 30),
    Case("vgg16_c", vgg.vgg16_c, 64, SHORT),
    Case("vgg16_c_bn", vgg.vgg16_c_bn, 64, SHORT),
    Case("cifar_vgg11_bn", vgg.cifar_vgg11_bn, 64, WIDTHS),
    Case("googlenet_2014", googlenet.googlenet_2014, 64, {"num_classes": 10}, 30, slow=True),
    Case("googlenet_bn_5x5", googlenet.googlenet_bn_5x5, 80, {"num_classes": 10}, slow=True),
    Case(
        "squeezenet1_0_bypass", squeezenet.squeezenet1_0_bypass, 69, {"num_classes": 10}, slow=True
    ),
    Case("cifar_squeezenet1_1", squeezenet.cifar_squeezenet1_1, 20),
    Case("deck003_cifar100_example", deck_cnn.deck003_cifar100_example, 32),
    # Sizes that keep maps above 1x1.
    Case("nin_cifar10", nin.nin_cifar10, 20),
    Case("nin_imagenet", nin.nin_imagenet, 71),
    Case("all_cnn_a", all_cnn.all_cnn_a, 20),
    Case("all_cnn_b", all_cnn.all_cnn_b, 20),
    Case("all_cnn_c", all_cnn.all_cnn_c, 20),
    Case("dsn", dsn.dsn, 20),
    Case("airbench94", airbench.airbench94, 28, {"widths": (4, 6, 8)}),
    Case("highway_19", highway.highway_19, 12),
    Case("highway_32", highway.highway_32, 12, slow=True),
    Case("simpnet_5m", simpnet.simpnet, 12, slow=True),
    Case("simpnet_slim_300k", simpnet.simpnet, 12),
    # Odd sizes show which pixels stride 2 leaves out.
    Case("cifar_resnet20", partial(cifar_resnet.option_a, depths=DEPTHS), 13, SHALLOW),
    Case(
        "cifar_resnet110_optB",
        partial(cifar_resnet.option_b, depths=DEPTHS),
        13,
        SHALLOW,
        slow=True,
    ),
    Case("cifar_resnet110_sd", partial(cifar_resnet.halved, depths=DEPTHS), 16, SHALLOW),
    Case("cifar_plain20", partial(cifar_resnet.plain, depths=DEPTHS), 13, SHALLOW),
    Case("resnet50_v1", partial(resnet.v1, depths=DEPTHS_IMAGENET), 37, SHALLOW_IMAGENET),
    Case("resnet34_optA", partial(resnet.option_a, depths=DEPTHS_IMAGENET), 37, SHALLOW_IMAGENET),
    Case(
        "resnet34_optC",
        partial(resnet.option_c, depths=DEPTHS_IMAGENET),
        37,
        SHALLOW_IMAGENET,
        slow=True,
    ),
    Case("plain18", partial(resnet.plain, depths=DEPTHS_IMAGENET), 37, SHALLOW_IMAGENET),
    Case("resnext29_8x64d", partial(resnext.cifar, depths=DEPTHS, cardinality=4), 13, GROUPS),
    Case("wrn_16_4", partial(wide_resnet.wide_resnet, depth=16), 12, {"width_mult": 1}),
    Case("cifar_preact164", partial(preact_resnet.full, depths=DEPTHS), 13, SHALLOW),
    Case(
        "shakeshake_26_2x32d",
        partial(shake_shake.shake_shake, depths=DEPTHS),
        13,
        {"depths": DEPTHS, "width": 8},
    ),
    Case(
        "pyramidnet_110_a48",
        partial(pyramidnet.pyramidnet, residual=pyramidnet.basic, depth=2),
        12,
        PYRAMID,
    ),
    Case(
        "pyramidnet_110_a270_shakedrop",
        partial(pyramidnet.pyramidnet, residual=pyramidnet.basic, depth=2, last_survival=0.5),
        12,
        PYRAMID,
        slow=True,
    ),
    Case("nas_v1", nas.v1, 9),
    # 7 pixels: the residual block rounds up.
    Case(
        "nas_bench_201_resnet",
        nas_bench_201.network,
        7,
        {"cell": nas_bench_201.CELL, "depths": (1, 1), "widths": (6, 8)},
    ),
    # 14 and 7 pixels; 34, 17 and 9: with stride 2, padding on both sides and on one side.
    Case(
        "nasnet_a_6_768",
        partial(nasnet.cifar, depths=(1, 2)),
        14,
        {"depths": (1, 2)} | CELLS,
        slow=True,
    ),
    Case("nasnet_a_mobile", partial(nasnet.imagenet, depths=(1,)), 69, {"depths": (1,)} | CELLS),
    Case(
        "densenet_40_12",
        partial(densenet.densenet, layer=densenet.plain, depth=2),
        13,
        {"depth": 10, "growth_rate": 6},
    ),
    Case(  # 25 and 27 maps to halve
        "densenet_bc_100_12",
        partial(densenet.densenet, layer=densenet.bottleneck, depth=3),
        13,
        {"depth": 22, "growth_rate": 5},
        slow=True,
    ),
    Case("fractalnet_20", partial(fractalnet.fractalnet, blocks=3), 20, {"widths": (8, 12, 16)}),
    Case("rir_18_wide", partial(resnet_in_resnet.rir, depths=DEPTHS), 13, SHALLOW, slow=True),
    Case("resnet_init_18_wide", partial(resnet_in_resnet.resnet_init, depths=DEPTHS), 13, SHALLOW),
    Case(
        "sparsenet_100_16_32_64",
        partial(sparsenet.cifar, **PLAIN, depths=SPARSE),
        13,
        {"depth": None, "depths": SPARSE, "growth_rate": (4, 5, 6), "stem_width": 7},
    ),
    Case(
        "sparsenet_bc_100_24",
        partial(sparsenet.cifar, **BC, depths=(4, 4, 4)),
        13,
        {"depth": 28, "growth_rate": 5},
        slow=True,
    ),
    Case(
        "sparsenet121",
        partial(sparsenet.imagenet, **BC, depths=(2, 5, 1, 2)),
        69,
        {"depths": (2, 5, 1, 2), "growth_rate": 5, "num_classes": 10},
        slow=True,
    ),
    Case(
        "sparsenet_sum_164",
        partial(sparsenet.summed, depth=4),
        13,
        {"depth": 38, "widths": (4, 5, 6)},
        slow=True,
    ),
    Case(
        "sparse_densenet",
        partial(sparse_densenet.sparse_densenet, **PLAIN, depths=(12, 2, 3), path=10),
        13,
        {"depths": (12, 2, 3), "growth_rate": 5, "stem_width": 7},
    ),
    Case(
        "sparse_densenet_bc",
        partial(sparse_densenet.sparse_densenet, **BC, depths=(6, 2, 4), path=4),
        13,
        {"depths": (6, 2, 4)} | PATH,
    ),
    Case(
        "sparse_densenet_abc",
        partial(
            sparse_densenet.sparse_densenet,
            layer=sparse_densenet.attended,
            depths=(6, 1, 2),
            path=4,
        ),
        13,
        {"depths": (6, 1, 2)} | PATH,
        slow=True,
    ),
]

# Variants that differ only in sizes or training from a case above, or from a network of another
# library. Only `tests.parity --all` compares them.
MORE = [
    Case("nin_cifar100", nin.nin_cifar10, 20),
    Case("all_cnn_c_c100", all_cnn.all_cnn_c, 20),
    Case("simpnet_9m", simpnet.simpnet, 12),
    Case("squeezenet1_1_c10", squeezenet.squeezenet1_1, 33),
    Case("simpnet_slim_600k", simpnet.simpnet, 12),
    *(
        Case(name, partial(vgg.cifar_vgg, depths=depths), 64, WIDTHS)
        for column, depths in {
            "vgg11": (1, 1, 2, 2, 2),  # A
            "vgg13": (2, 2, 2, 2, 2),  # B
            "vgg16": (2, 2, 3, 3, 3),  # D
            "vgg19": (2, 2, 4, 4, 4),  # E
        }.items()
        for name in (f"cifar_{column}", f"cifar_{column}_bn")
        if name != "cifar_vgg11_bn"
    ),
    Case("googlenet_2014_aux", googlenet.googlenet_2014, 64, {}, 30),
    Case("googlenet_bn_5x5_aux", googlenet.googlenet_bn_5x5, 80),
    Case("nas_v1_dense", nas.dense, 9),
    Case("nas_v1_no_skips", nas.no_skips, 9),
    Case(
        "nasnet_a_large",
        partial(nasnet.imagenet, depths=(2, 1), skip_reduction=True),
        69,
        {"depths": (2, 1)} | CELLS,
    ),
    Case("pnasnet5_large", partial(pnasnet.pnasnet, depths=(1, 1)), 37, {"depths": (1, 1)} | CELLS),
    # Whole networks.
    Case("nasnet_a_6_768", partial(nasnet.cifar, depths=(6, 6, 6)), 14),
    Case("nasnet_a_mobile", partial(nasnet.imagenet, depths=(4, 4, 4)), 69),
    Case("nasnet_a_7_2304", partial(nasnet.cifar, depths=(7, 7, 7)), 14),
    Case("cifar_resnet56", partial(cifar_resnet.option_a, depths=(9, 9, 9)), 13),
    Case("cifar_resnet110", partial(cifar_resnet.option_a, depths=(18, 18, 18)), 13),
    Case("cifar_preact110", partial(preact_resnet.full, depths=(18, 18, 18)), 13),
    Case("wrn_40_1", partial(wide_resnet.wide_resnet, depth=40), 13),
    Case("resnet101_v1", partial(resnet.v1, depths=(3, 4, 23, 3)), 65),
    Case("densenet_bc_100_12", partial(densenet.densenet, layer=densenet.bottleneck, depth=16), 13),
    *(
        Case(f"shakeshake_26_2x{width}d", partial(shake_shake.shake_shake, depths=(4, 4, 4)), 9)
        for width in (32, 64)
    ),
    Case(
        "pyramidnet_110_a84",
        partial(pyramidnet.pyramidnet, residual=pyramidnet.basic, depth=5),
        12,
        {"depth": 32},
    ),
    *(
        Case(
            name,
            partial(
                pyramidnet.pyramidnet, residual=pyramidnet.bottleneck, depth=2, last_survival=last
            ),
            12,
            PYRAMID_272,
        )
        for name, last in {
            "pyramidnet_272_a200": 1,
            "pyramidnet_272_a200_rounded": 1,
            "pyramidnet_272_a200_shakedrop": 0.5,
        }.items()
    ),
]


def redrawn(case: Case) -> tuple[Any, dict[str, np.ndarray], np.ndarray]:
    """Returns (model, {path: array}, images [4 H W C]) with random values in all tensors.

    Biases of transform gates are about -2, the authors' initial value. With biases about 0, thirty
    layers would pass on so little that the logits would hardly vary over the images.
    """
    channels = create_model(case.name).input_size[-1]
    model = create_model(case.name, input_size=(case.size, case.size, channels), **case.fields)
    blank = model.clone(kernel_init=nn.initializers.zeros)  # quicker to trace
    shapes = jax.eval_shape(lambda key: init_variables(blank, key), jax.random.key(0))
    leaves = pytree.flatten(shapes).items()
    tensors = {
        path: foreign.redraw(path, leaf.shape, "keras", foreign.gain(case.name))
        for path, leaf in leaves
    }
    for path in tensors:
        if path.endswith("gate/bias"):
            tensors[path] -= 2
    return model, tensors, case.strength * foreign.images(4, case.size, channels)


def in_numpy(
    straight: Callable, tensors: Mapping[str, np.ndarray], images: np.ndarray, **given: Any
) -> Any:
    """Runs `straight` in float64; adds LeNet-5's bitmaps, which are constants, to the tensors."""
    tensors = {**tensors, "codes": make_rbf_codes(10)}
    tensors = {path: np.asarray(value, np.float64) for path, value in tensors.items()}
    return straight(tensors, images.astype(np.float64), **given)
