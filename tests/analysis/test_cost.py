"""Counts of parameters and MACs, against published ones and sums by hand."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import pytest

from flax_cnns import layers
from flax_cnns.analysis.cost import LayerCost, cost
from flax_cnns.models.registry import create_model, model_info


@pytest.mark.parametrize(
    ("name", "gmacs"),
    # https://docs.pytorch.org/vision/stable/models.html, column GFLOPS (multiply-adds): 1.81, 3.66,
    # 4.09, 7.80.
    [
        ("resnet18", 1.814),
        ("resnet34", 3.664),
        ("resnet50", 4.089),
        ("resnet101", 7.801),
    ],
)
def test_torchvisions_published_counts(name, gmacs):
    found = cost(create_model(name))
    assert round(found.macs / 1e9, 3) == gmacs
    assert found.params == model_info(name).params


def test_lenet_by_hand():
    found = cost(create_model("lenet5"), (2, 32, 32, 1))
    assert found.layers == (  # two images; output positions x window x inputs x outputs
        LayerCost("c1", "Conv", (2, 28, 28, 6), 25 * 6 + 6, 2 * 28 * 28 * 25 * 1 * 6),
        LayerCost("c3", "Conv", (2, 10, 10, 16), 25 * 6 * 16 + 16, 2 * 10 * 10 * 25 * 6 * 16),
        LayerCost("c5", "Conv", (2, 1, 1, 120), 25 * 16 * 120 + 120, 2 * 25 * 16 * 120),
        LayerCost("f6", "Dense", (2, 84), 120 * 84 + 84, 2 * 120 * 84),
        LayerCost("head", "Dense", (2, 10), 84 * 10 + 10, 2 * 84 * 10),
    )
    assert found.params == 61_706


def test_cifar_resnet20_by_hand():
    # 32x32: stem 27x16, six 3x3 of 16x16; 16x16: 16x32 and five of 32x32; 8x8: 32x64 and five of
    # 64x64; dense 64x10.
    stem_and_first = 32**2 * 9 * (3 * 16 + 6 * 16 * 16)
    second = 16**2 * 9 * (16 * 32 + 5 * 32 * 32)
    third = 8**2 * 9 * (32 * 64 + 5 * 64 * 64)
    expected = stem_and_first + second + third + 640
    found = cost(create_model("cifar_resnet20"))
    assert found.macs == expected == 40_551_040  # published: 41 M
    norms = [layer for layer in found.layers if layer.kind == "BatchNorm"]
    assert len(norms) == 19
    assert all(layer.macs == 0 and layer.params > 0 for layer in norms)


@pytest.mark.parametrize("conv", [nn.Conv, layers.Conv])
def test_grouped_and_depthwise(conv):
    def macs(features, **fields):
        module = conv(features, (3, 3), use_bias=False, **fields)
        return cost(module, (1, 14, 14, 64)).macs

    assert macs(128) == 14 * 14 * 9 * 64 * 128
    assert macs(128, feature_group_count=32) == 14 * 14 * 9 * (64 // 32) * 128
    assert macs(64, feature_group_count=64) == 14 * 14 * 9 * 64
    assert macs(64, feature_group_count=64, strides=2) == 7 * 7 * 9 * 64
    assert macs(128, padding="VALID", kernel_dilation=2) == 10 * 10 * 9 * 64 * 128


def test_other_layers_with_kernels():
    assert cost(nn.ConvTranspose(5, (2, 2), strides=(2, 2)), (1, 4, 4, 3)).macs == 16 * 4 * 3 * 5
    assert cost(nn.ConvLocal(5, (3, 3), padding="VALID"), (1, 4, 4, 3)).macs == 4 * 9 * 3 * 5
    assert cost(nn.DenseGeneral((2, 5), axis=(-2, -1)), (1, 4, 4, 3)).macs == 4 * (4 * 3) * (2 * 5)
    assert cost(nn.BatchNorm(use_running_average=True), (1, 4, 4, 3)).macs == 0


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = layers.Conv(x.shape[-1], (3, 3), use_bias=False, name="conv")(x)
        return nn.BatchNorm(use_running_average=True, name="norm")(x), None


ONE = 8 * 8 * 9 * 4 * 4  # MACs of a block on 8x8 with 4 channels
PARAMS = 9 * 4 * 4 + 2 * 4


class Repeats(nn.Module):
    how: str

    @nn.compact
    def __call__(self, x):
        stacked = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
        shared = dict(variable_broadcast=("params", "batch_stats"), split_rngs={"params": False})
        scan = dict(length=5, in_axes=nn.broadcast)
        match self.how:
            case "scan":
                return nn.scan(Block, **stacked, **scan)(name="blocks")(x, None)
            case "scan, remat":
                return nn.scan(nn.remat(Block), **stacked, **scan)(name="blocks")(x, None)
            case "scan, unrolled":
                return nn.scan(Block, **stacked, **scan, unroll=2)(name="blocks")(x, None)
            case "scan, shared":
                return nn.scan(Block, **shared, **scan)(name="blocks")(x, None)
            case "scan in scan":

                class Inner(nn.Module):
                    @nn.compact
                    def __call__(self, x, _):
                        return nn.scan(Block, **stacked, **scan)(name="inner")(x, None)

                return nn.scan(Inner, **stacked, **(scan | {"length": 2}))(name="outer")(x, None)
            case "vmap":
                x = jnp.stack([x, x, x])
                return nn.vmap(Block, **stacked)(name="ensemble")(x)
            case "vmap, shared":
                axes = {"params": None, "batch_stats": None}
                return nn.vmap(Block, axes, split_rngs={"params": False})(name="one")(
                    jnp.stack([x, x, x])
                )
            case "remat":
                return nn.remat(Block)(name="block")(x)
            case "jit":
                block = nn.jit(Block)(name="block")
                return block(block(x)[0])
            case "twice":
                block = Block(name="block")
                return block(block(x)[0])
            case "cond":
                block = Block(name="block")
                if self.is_initializing():
                    return block(x)[0]
                return nn.cond(x.sum() > 0, lambda _, x: block(x)[0], lambda _, x: x, self, x)


@pytest.mark.parametrize(
    ("how", "runs", "copies"),
    [
        ("scan", 5, 5),
        ("scan, remat", 5, 5),
        ("scan, unrolled", 5, 5),
        ("scan, shared", 5, 1),
        ("scan in scan", 10, 10),
        ("vmap", 3, 3),
        ("vmap, shared", 3, 1),
        ("remat", 1, 1),
        ("jit", 2, 1),
        ("twice", 2, 1),
        ("cond", 1, 1),
    ],
)
def test_a_layer_counts_as_often_as_it_runs(how, runs, copies):
    found = cost(Repeats(how), (1, 8, 8, 4))
    assert found.macs == runs * ONE
    assert found.params == copies * PARAMS
    assert [layer.kind for layer in found.layers] == ["Conv", "BatchNorm"]
    assert found.layers[0].output_shape == (1, 8, 8, 4)


def test_a_stacked_network_has_the_rows_of_the_unrolled_one():
    stacked, unrolled = (cost(create_model("cifar_resnet20", scan=scan)) for scan in (True, False))
    assert str(stacked) == str(unrolled)
    assert stacked == unrolled


def test_share_scope_counts_each_parameter_once():
    class Lora(nn.Module):
        def setup(self):
            self.base = nn.Dense(8)
            nn.share_scope(self, self.base)

        @nn.compact
        def __call__(self, x):
            a = self.param("a", nn.initializers.ones, (x.shape[-1], 2))
            b = self.param("b", nn.initializers.ones, (2, 8))
            return self.base(x) + x @ a @ b

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Lora(name="lora")(x)

    (row,) = cost(Network(), (3, 4)).layers
    assert row == LayerCost("lora", "Dense", (3, 8), 4 * 8 + 8 + 4 * 2 + 2 * 8, 3 * 4 * 8)


def test_a_subclass_that_calls_its_parent_counts_once():
    class Scaled(layers.Conv):
        @nn.compact
        def __call__(self, x):
            return 2 * super().__call__(x)

    found = cost(Scaled(4, (3, 3), use_bias=False), (1, 8, 8, 4))
    assert (found.macs, found.layers[0].kind) == (ONE, "Scaled")


def test_what_only_training_runs_has_parameters_and_no_macs():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, *, train: bool = False):
            if train or self.is_initializing():
                self.sow("aux_logits", "head1", nn.Dense(7, name="aux")(x))
            return nn.Dense(3, name="head")(x)

    found = cost(Network(), (1, 4))
    head, aux = found.layers
    assert head == LayerCost("head", "Dense", (1, 3), 15, 12)
    assert aux == LayerCost("aux", "Dense", None, 35, 0)
    assert cost(Network(), (1, 4), train=True).macs == 12 + 28


def test_the_batch_multiplies_and_dtype_changes_nothing():
    model = create_model("lenet5", dtype="bfloat16")
    # Only shapes: such a batch would not fit into memory.
    assert cost(model, (10**6, 32, 32, 1)).macs == 10**6 * 416_520


def test_the_text_is_a_table():
    text = str(cost(create_model("lenet5")))
    header, *rows, total = text.splitlines()
    assert header.split() == ["layer", "kind", "output", "parameters", "MACs"]
    assert rows[0].split() == ["c1", "Conv", "[1", "28", "28", "6]", "156", "117,600"]
    assert total.split() == ["total", "61,706", "416,520"]
    assert len({len(line) for line in (header, *rows, total)}) == 1
