"""A stage: blocks in a row, unrolled, or as one compiled block that runs over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from flax_cnns.errors import UserError
from flax_cnns.layers.conv import inside_control_flow
from flax_cnns.tree import stack_blocks, unstack_blocks
from flax_cnns.types import Array, ModuleDef, PyTree


class Stage(nn.Module):
    """`depth` blocks, the first with the stride: [N H W C] -> [N H/stride W/stride C'].

    Blocks of a transformer have neither convolution nor stride: [N T C] -> [N T C], both None.

    Whatever changes from block to block is an argument of the call: `stage(x, rates, keys)` calls
    `block(x, rates[i], keys[i])`, where each is an array (or a tree of them) with `depth` in front,
    or None. What is the same for all blocks, `train` included, is in the partial. Random keys are
    among the former: `jax.random.split(self.make_rng("dropout"), depth)`, made by the network and
    used as `nn.Dropout(rate)(x, rng=key)`; `make_rng` inside a block raises under `scan`, since its
    numbers would depend on the block's name.

    `scan`: block2 to the last, which must be alike, run under `nn.scan`: what is compiled does not
    grow with depth, the results are the same. Variables may be stacked (`tree.stack_blocks`), as
    in a run, or named; those are stacked in passing, which takes
    compile time for each leaf. Initialization, and
    features by name (a mutable "intermediates"), are always unrolled; for features the variables
    must be named, or `UserError` says so. Of what a block sows, only batch_stats outlive the scan:
    a family with auxiliary heads inside its blocks must not offer it.

    `remat`: the backward pass computes the inside of a block again in place of keeping it. On a CPU
    only together with `scan` does the compiler let it save memory, ResNet-110 on 32 images 0.14
    in place of 0.47 GB:
    python -m experiments.benchmark step --model=cifar_resnet110 --scan --remat
    """

    block: ModuleDef  # without conv, stride and name
    conv: ModuleDef | None
    depth: int
    stride: int | None = 1  # None: the blocks have no such field
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, *each: PyTree) -> Array:
        def run(block: nn.Module, x: Array, own: PyTree) -> Array:
            return block(x, *own)

        if self.remat:
            run = nn.remat(run)
        own = [jax.tree.map(lambda a, i=i: a[i], each) for i in range(self.depth)]
        conv = {} if self.conv is None else {"conv": self.conv}
        stride = {} if self.stride is None else {"stride": self.stride}
        x = run(self.block(**conv, **stride, name="block1"), x, own[0])
        name = f"block2-{self.depth}"
        stacked = self.has_variable("params", name)
        unrolled = self.is_initializing() or self.is_mutable_collection("intermediates")
        if stacked and unrolled:
            raise UserError(
                f"{name} is a stack, and features are had by name: "
                "apply the network to flax_cnns.tree.unstack_blocks(variables)"
            )
        if unrolled or self.depth < 3 or not (self.scan or stacked):
            for i in range(1, self.depth):
                x = run(self.block(**conv, name=f"block{i + 1}"), x, own[i])
            return x

        def scanned(stage: Stage, x: Array, each: PyTree) -> Array:
            def body(block: nn.Module, x: Array, own: PyTree) -> tuple[Array, None]:
                with inside_control_flow():
                    return run(block, x, own), None

            block = stage.block(**conv, name=name)
            x, _ = nn.scan(
                body,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"layer_dropout": True},  # train/dropout.py's
                length=stage.depth - 1,
            )(block, x, each)
            return x

        if not stacked:
            as_stack: Any = partial(nn.map_variables, trans_in_fn=stack_blocks)
            scanned = as_stack(scanned, "params")
            scanned = as_stack(scanned, "batch_stats", trans_out_fn=unstack_blocks, mutable=True)
        return scanned(self, x, jax.tree.map(lambda a: a[1:], each))


def split_by_stage(tree: PyTree, depths: Sequence[int]) -> list[PyTree]:
    """One tree for each stage of `depths` blocks, of a tree of arrays [all blocks ...]."""
    ends = np.cumsum(depths)
    return [
        jax.tree.map(lambda a, i=end - depth, j=end: a[i:j], tree)
        for depth, end in zip(depths, ends)
    ]
