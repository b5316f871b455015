"""The ResNets for CIFAR-10, section 4.2: 6n + 2 layers of widths 16, 32, 64, of ResNet-18's block.

The paper's are option A, no weight in a shortcut, which leaves open where the zeros of the wider
one go: ours are behind the channels that there are. Where maps shrink the shortcut takes every
second pixel ("stride of 2"). Beside them: the paper's plain networks; option B; CIFAR-100, which is
He et al. 2016's; stochastic depth as in Huang et al. 2016, https://arxiv.org/abs/1603.09382, with
p_L = 0.5, and with their shortcut, which takes means of 2x2; ShakeDrop, as `pyramidnet` has it; and
by `norm="fixup"` Zhang et al. 2019's without normalization, https://arxiv.org/abs/1901.09321,
section 4.1. Their code has no scalar in front of the first convolution, where the rule and we have
one, and adds that of a block to a shortcut that changes shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.errors import UserError
from flax_cnns.models.fields import Classes, Counts, ImageSize, Rate
from flax_cnns.models.resnet import BasicBlock
from flax_cnns.types import Array, Dtype, Paper

PAPER = Paper(
    title="Deep Residual Learning for Image Recognition",
    authors="He, Zhang, Ren, Sun",
    year=2015,
    url="https://arxiv.org/abs/1512.03385",
)


class CifarResNet(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; pooled features [N C] if it is None.

    Any H and W. Raises `UserError` where C is not that of `input_size`, or where fields do not go
    together.
    """

    # architecture
    depths: Counts  # blocks per stage; the first stage keeps the size, the others halve it
    widths: Counts = (16, 32, 64)
    shortcut: str = "A"  # one of models.resnet.SHORTCUTS
    input_size: ImageSize = (32, 32, 3)
    norm: str = "batch"  # or any of layers.make_norm's, or "fixup"
    # head
    num_classes: Classes | None = 10
    # regularization
    drop_path: Rate = 0.0  # the last block's rate of dropping, 1 - p_L: layers.make_drop_paths
    drop_path_mode: str = "batch"
    drop_path_schedule: str = "linear"
    shake_drop: Rate = 0.0  # ShakeDrop's rate in the last block: layers.make_shake_drops
    shake_drop_level: str = "image"  # or "batch", "channel", "pixel"
    shake_drop_alpha: tuple[float, float] = (-1.0, 1.0)
    shake_drop_beta: tuple[float, float] = (0.0, 1.0)
    # numerics
    kernel_init: str | Callable = "he"
    zero_init: bool = False  # the last norm of each branch starts at 0: the block is the identity
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronised BatchNorm
    # compilation
    scan: bool = False  # the repeats of a stage as one block under nn.scan: layers.Stage
    remat: bool = False  # compute the inside of each block again in the backward pass

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
        layers.check_stages(self.depths, self.widths)
        needs = {"drop_path": self.drop_path, "shake_drop": self.shake_drop}
        needs['norm="fixup"'] = self.norm == "fixup"
        if self.shortcut == "none" and any(needs.values()):
            given = next(name for name, on in needs.items() if on)
            raise UserError(f"{given} needs a shortcut: without, nothing is left of a block")
        fixup = self.norm == "fixup"
        conv, norm = layers.building_blocks(self, train, norm="none" if fixup else self.norm)
        head = layers.make_head(self)
        if fixup:
            depth = BasicBlock.branch_depth
            conv, norm, head = layers.fixup(conv, head, branches=sum(self.depths), depth=depth)
        x = layers.CifarStem(self.widths[0], conv, norm, name="stem")(images)
        drops = layers.make_drop_paths(self, self.depths, train)
        shake_drops = layers.make_shake_drops(self, self.depths, train)
        stage = partial(layers.Stage, scan=self.scan, remat=self.remat)
        given = dict(norm=norm, shortcut=self.shortcut, zero_init=self.zero_init)
        for i, (depth, width) in enumerate(zip(self.depths, self.widths)):
            block = partial(BasicBlock, width, **given)
            stride = 1 if i == 0 else 2
            this = stage(block, conv, depth, stride, name=f"stage{i + 1}")
            x = this(x, drops[i], shake_drops[i])
        return layers.classify(self, x, head=head)


_20, _32, _44, _56, _110, _1202 = (  # 6n + 2 layers, n blocks a stage
    partial(CifarResNet, depths=(n, n, n)) for n in (3, 5, 7, 9, 18, 200)
)
VARIANTS = {
    "cifar_resnet20": _20,
    "cifar_resnet32": _32,
    "cifar_resnet44": _44,
    "cifar_resnet56": _56,
    "cifar_resnet110": _110,
    "cifar_resnet1202": _1202,
    "cifar_plain20": partial(_20, shortcut="none"),
    "cifar_plain32": partial(_32, shortcut="none"),
    "cifar_plain44": partial(_44, shortcut="none"),
    "cifar_plain56": partial(_56, shortcut="none"),
    "cifar_resnet110_optB": partial(_110, shortcut="B"),
    "cifar_resnet110_c100": partial(_110, num_classes=100),
    "cifar_resnet110_sd": partial(_110, shortcut="A-mean", drop_path=0.5),
    "cifar_resnet1202_sd": partial(_1202, shortcut="A-mean", drop_path=0.5),
}
