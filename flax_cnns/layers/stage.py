"""A stage of blocks: unrolled, or under a scan that compiles the repeated block once."""

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
    """`depth` blocks; only the first has the stride: [N H W C] -> [N H/stride W/stride C'].

    For blocks of a transformer, [N T C] -> [N T C], `conv` and `stride` are None.

    Values that differ between blocks are arguments of the call: `stage(x, rates, keys)` calls
    `block(x, rates[i], keys[i])`. Each argument is an array with a leading axis of `depth`, a tree
    of such arrays, or None. Values that all blocks share, such as `train`, belong in the partial
    `block`. Random keys differ between blocks: the network makes them by
    `jax.random.split(self.make_rng("dropout"), depth)`, and a block uses its key by
    `nn.Dropout(rate)(x, rng=key)`. Under `scan`, `make_rng` inside a block raises an error, because
    its numbers would depend on the block's name.

    `scan`: the blocks from block2 on, which must be alike, run under `nn.scan`. The results are the
    same, and the size of the compiled program does not grow with depth. The variables may be
    stacked (`tree.stack_blocks`), as in a run, or named. Named variables are stacked inside the
    program, which takes compile time for each leaf. Initialization, and features by name (a mutable
    collection "intermediates"), are always unrolled. Features need named variables; stacked ones
    raise `UserError`. Only batch_stats are collected from scanned blocks, not the variables that
    a block sows. So a family with auxiliary heads in its blocks must not offer `scan`.

    `remat`: the backward pass recomputes the activations inside a block instead of storing them. On
    a CPU, this saves memory only together with `scan`: ResNet-110 on 32 images needs 0.14 GB
    instead of 0.47 GB, measured by
    python -m experiments.benchmark step --model=cifar_resnet110 --scan --remat
    """

    block: ModuleDef  # a partial without conv, stride and name
    conv: ModuleDef | None
    depth: int
    stride: int | None = 1  # None: the blocks have no such field
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, *stage_args: PyTree) -> Array:
        def run(block: nn.Module, x: Array, args: PyTree) -> Array:
            return block(x, *args)

        if self.remat:
            run = nn.remat(run)
        block_args = [jax.tree.map(lambda a, i=i: a[i], stage_args) for i in range(self.depth)]
        conv = {} if self.conv is None else {"conv": self.conv}
        stride = {} if self.stride is None else {"stride": self.stride}
        x = run(self.block(**conv, **stride, name="block1"), x, block_args[0])
        name = f"block2-{self.depth}"
        stacked = self.has_variable("params", name)
        unrolled = self.is_initializing() or self.is_mutable_collection("intermediates")
        if stacked and unrolled:
            raise UserError(
                f"features by name need named blocks, but {name} is stacked: "
                "apply the network to flax_cnns.tree.unstack_blocks(variables)"
            )
        if unrolled or self.depth < 3 or not (self.scan or stacked):
            for i in range(1, self.depth):
                x = run(self.block(**conv, name=f"block{i + 1}"), x, block_args[i])
            return x

        def run_scan(stage: Stage, x: Array, args: PyTree) -> Array:
            def body(block: nn.Module, x: Array, args: PyTree) -> tuple[Array, None]:
                with inside_control_flow():
                    return run(block, x, args), None

            block = stage.block(**conv, name=name)
            x, _ = nn.scan(
                body,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"layer_dropout": True},  # the stream of train/dropout.py
                length=stage.depth - 1,
            )(block, x, args)
            return x

        if not stacked:
            as_stack: Any = partial(nn.map_variables, trans_in_fn=stack_blocks)
            run_scan = as_stack(run_scan, "params")
            run_scan = as_stack(run_scan, "batch_stats", trans_out_fn=unstack_blocks, mutable=True)
        return run_scan(self, x, jax.tree.map(lambda a: a[1:], stage_args))


def split_by_stage(tree: PyTree, depths: Sequence[int]) -> list[PyTree]:
    """Splits a tree of arrays [all blocks ...] into one tree for each stage of `depths` blocks."""
    ends = np.cumsum(depths)
    return [
        jax.tree.map(lambda a, i=end - depth, j=end: a[i:j], tree)
        for depth, end in zip(depths, ends)
    ]
