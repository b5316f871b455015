"""ResNets for CIFAR-10, section 4.2: 6n + 2 layers of widths 16, 32, 64, with ResNet-18's block.

The paper's networks use option A, shortcuts without weights. The paper leaves open where the zeros
go when the shortcut widens; ours come after the existing channels. Where maps shrink, the shortcut
takes every second pixel ("stride of 2"). Other variants in this file:

- the paper's plain networks, and option B
- CIFAR-100, which comes from He et al. 2016
- stochastic depth as in Huang et al. 2016, https://arxiv.org/abs/1603.09382, with p_L = 0.5 and
  with their shortcut, which takes 2x2 means
- ShakeDrop, as in `pyramidnet`
- `norm="fixup"`: the networks without normalization of Zhang et al. 2019,
  https://arxiv.org/abs/1901.09321, section 4.1. Before the first convolution, their rule asks for a
  scalar; our code has it, theirs does not. Their code adds a block's scalar to a shortcut that
  changes shape; ours does not.
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
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Deep Residual Learning for Image Recognition",
    authors="He, Zhang, Ren, Sun",
    year=2015,
    url="https://arxiv.org/abs/1512.03385",
)


class CifarResNet(nn.Module):
    """ResNet for CIFAR: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N C] if `num_classes` is None. Takes any H and W. Raises
    `UserError` if the images have other channels than `input_size`, or if fields contradict each
    other.
    """

    # architecture
    depths: Counts  # blocks per stage; the first stage keeps the size, the others halve it
    widths: Counts = (16, 32, 64)
    shortcut: str = "A"  # one of models.resnet.SHORTCUTS
    input_size: ImageSize = (32, 32, 3)
    norm: str = "batch"  # or another of layers.make_norm's, or "fixup"
    # head
    num_classes: Classes | None = 10
    # regularization
    drop_path: Rate = 0.0  # rate of the last block, 1 - p_L: layers.make_drop_paths
    drop_path_mode: str = "batch"
    drop_path_schedule: str = "linear"
    shake_drop: Rate = 0.0  # rate of the last block: layers.make_shake_drops
    shake_drop_level: str = "image"  # or "batch", "channel", "pixel"
    shake_drop_alpha: tuple[float, float] = (-1.0, 1.0)
    shake_drop_beta: tuple[float, float] = (0.0, 1.0)
    # numerics
    kernel_init: str | Callable = "he"
    zero_init: bool = False  # each block starts as the identity: its last norm is 0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm
    # compilation
    scan: bool = False  # run a stage's identical blocks under nn.scan: layers.Stage
    remat: bool = False  # recompute the inside of each block in the backward pass

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
        layers.check_stages(self.depths, self.widths)
        use_fixup = self.norm == "fixup"
        needs = {"drop_path": self.drop_path, "shake_drop": self.shake_drop}
        needs['norm="fixup"'] = use_fixup
        if self.shortcut == "none" and any(needs.values()):
            field = next(name for name, is_on in needs.items() if is_on)
            raise UserError(
                f"{field} needs a shortcut, since it can set a branch to zero; got shortcut='none'"
            )
        conv, norm = layers.building_blocks(self, train, norm="none" if use_fixup else self.norm)
        head: ModuleDef = layers.make_head(self)
        if use_fixup:
            assert isinstance(conv, partial)
            assert isinstance(head, partial)
            depth = BasicBlock.branch_depth
            conv, norm, head = layers.fixup(conv, head, branches=sum(self.depths), depth=depth)
        x = layers.CifarStem(self.widths[0], conv, norm, name="stem")(images)
        drops = layers.make_drop_paths(self, self.depths, train)
        shake_drops = layers.make_shake_drops(self, self.depths, train)
        stage = partial(layers.Stage, scan=self.scan, remat=self.remat)
        for i, (depth, width) in enumerate(zip(self.depths, self.widths)):
            block = partial(
                BasicBlock,
                width,
                norm=norm,
                shortcut=self.shortcut,
                zero_init=self.zero_init,
            )
            stride = 1 if i == 0 else 2
            run_stage = stage(block, conv, depth, stride, name=f"stage{i + 1}")
            x = run_stage(x, drops[i], shake_drops[i])
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
