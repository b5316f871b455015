"""Rules and layouts of other libraries' weights, and what convert refuses."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models import registry
from flax_cnns.models.registry import model_info
from flax_cnns.weights import convert, name_maps
from tests.models import cases, foreign


@pytest.fixture(scope="module")
def case():
    return foreign.CASES["squeezenet"]


@pytest.fixture(scope="module")
def tensors(case):
    return cases.load(cases.FOLDER / "squeezenet.npz", case.source)[0]


def test_convolutions_go_from_oihw_to_hwio_and_the_head_has_as_many_classes(tensors):
    flat = pytree.flatten(convert("squeezenet1_1", tensors, "torchvision"))
    for ours, theirs in [
        ("conv1/conv", "features.0"),
        ("fire2/expand3x3/conv", "features.3.expand3x3"),
    ]:
        expected = tensors[f"{theirs}.weight"].transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(flat[f"params/{ours}/kernel"], expected)
        np.testing.assert_array_equal(flat[f"params/{ours}/bias"], tensors[f"{theirs}.bias"])
    assert flat["params/head/kernel"].shape == (1, 1, 512, 10)
    assert all(leaf.flags.c_contiguous and leaf.dtype == np.float32 for leaf in flat.values())


def test_without_classes_the_head_is_left_out(tensors):
    variables = convert("squeezenet1_1", tensors, "torchvision", num_classes=None)
    assert "head" not in variables["params"]
    assert len(variables["params"]) == 9


@pytest.mark.oracle
def test_tensors_of_pytorch_that_need_a_gradient_or_are_bfloat16(tensors):
    torch = pytest.importorskip("torch")
    live = {k: torch.nn.Parameter(torch.from_numpy(v).bfloat16()) for k, v in tensors.items()}
    flat = pytree.flatten(convert("squeezenet1_1", live, "torchvision"))
    expected = pytree.flatten(convert("squeezenet1_1", tensors, "torchvision"))
    for path, leaf in flat.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=0.01, err_msg=path)


def test_a_dense_layer_of_other_maps():
    given = {"fc.weight": np.zeros((7, 61))}
    with pytest.raises(UserError, match=r"'fc.weight' has shape \(7, 61\), which does not fit"):
        name_maps.apply_rules(
            [("fc", "fc6", name_maps.dense_after_flatten(5))],
            given,
            "timm",
            ["params/fc6/kernel"],
            "net",
        )


def test_a_dense_layer_behind_flattened_maps():
    maps = np.random.RandomState(0).randn(2, 3, 4, 5)  # [N H W C]
    kernel = np.random.RandomState(1).randn(7, 5 * 3 * 4)  # for a layer whose input was [C H W]
    theirs = maps.transpose(0, 3, 1, 2).reshape(2, -1) @ kernel.T
    ours = maps.reshape(2, -1) @ name_maps.dense_after_flatten(5)(kernel)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_keras_counts_on_from_network_to_network():
    names = ["conv2d_94/kernel", "block1_conv1/bias", "conv2d_96/bias", "batch_normalization/beta"]
    names += ["conv2d_95/kernel", "batch_normalization_1/beta"]
    assert name_maps.renumber_keras_names(names) == {
        "conv2d_94/kernel": "conv2d_0/kernel",
        "block1_conv1/bias": "block1_conv1/bias",
        "conv2d_96/bias": "conv2d_2/bias",
        "batch_normalization/beta": "batch_normalization_0/beta",
        "conv2d_95/kernel": "conv2d_1/kernel",
        "batch_normalization_1/beta": "batch_normalization_1/beta",
    }


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("vgg16", {"block3_conv2/kernel": "stage3/conv2/kernel", "fc1/bias": "fc6/bias"}),
        (
            "keras_efficientnetb0",
            {
                "block1a_dwconv/kernel": "stage1/block1/depthwise/kernel",
                "block6d_se_reduce/bias": "stage6/block4/se/reduce/bias",
                "block2b_project_bn/gamma": "stage2/block2/project_norm/scale",
            },
        ),
        (
            "keras_inception_v3",
            {
                "conv2d_3/kernel": "conv3b/conv/kernel",
                "batch_normalization_11/beta": "mixed5b/branch_pool/norm/bias",
                "conv2d_93/kernel": "mixed7c/branch_pool/conv/kernel",
            },
        ),
        (
            "keras_inception_resnet_v2",
            {
                "conv2d_0/kernel": "stem/entry/conv1/kernel",
                "block35_1_conv/kernel": "inception_resnet_a/block1/linear/kernel",
                "conv_7b/kernel": "conv_7b/conv1/kernel",
            },
        ),
        (
            "convnext_tiny",
            {
                "convnext_tiny_stage_2_block_8_pointwise_conv_2/kernel": (
                    "stage3/block9/project/kernel"
                ),
                "convnext_tiny_stage_0_block_1_layer_scale/variable_1": (
                    "stage1/block2/layer_scale"
                ),
            },
        ),
        (
            "keras_xception",
            {
                "block13_sepconv2/depthwise_kernel": "exit/conv2/depthwise/kernel",
                "block14_sepconv1/pointwise_kernel": "top1/conv/pointwise/kernel",
                "conv2d_3/kernel": "exit/projection/kernel",
                "batch_normalization_0/beta": "entry1/projection_norm/bias",
            },
        ),
        (
            "keras_mobilenet",
            {
                "conv_dw_7/kernel": "stage4/block2/depthwise/kernel",
                "conv_preds/kernel": "head/kernel",
            },
        ),
        (
            "keras_mobilenetv2",
            {
                "block_12_project_BN/gamma": "stage5/block3/project_norm/scale",
                "expanded_conv_depthwise/kernel": "stage1/block1/depthwise/kernel",
            },
        ),
        (
            "keras_mobilenetv3small",
            {
                "expanded_conv_10_squeeze_excite_conv_1/bias": "block11/se/expand/bias",
                "conv_2/kernel": "hidden_layer/kernel",
            },
        ),
    ],
)
@pytest.mark.parametrize("first", [pytest.param(0, marks=pytest.mark.slow), 94])
def test_every_tensor_of_keras_has_its_place(name, pairs, first):
    """Keras may start its numbers anywhere. Each tensor is filled with its own number."""
    with np.load(cases.FOLDER / f"{name}.npz") as kept:
        shapes = json.loads(str(kept["shapes"]))
    numbers = name_maps.renumber_keras_names(shapes)

    def moved(original):  # `conv2d_5/kernel` in a network that is built after others
        renumbered = numbers[original]
        if renumbered == original and not renumbered.startswith(("conv2d_", "batch_norm")):
            return original
        kind, number, leaf = re.fullmatch(r"(\w+)_(\d+)/(\w+)", renumbered).groups()
        return f"{kind}_{int(number) + first}/{leaf}" if int(number) + first else f"{kind}/{leaf}"

    tensors = {
        moved(key): np.broadcast_to(np.float32(i), shape)
        for i, (key, shape) in enumerate(shapes.items())
    }
    flat = pytree.flatten(convert(name, tensors, "keras"))
    marks = {path: int(leaf.flat[0]) for path, leaf in flat.items()}
    assert sorted(marks.values()) == list(range(len(shapes)))
    order = [numbers[key] for key in shapes]
    for theirs, ours in pairs.items():
        assert order[marks[f"params/{ours}"]] == theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"extra.weight": np.zeros(3)}, "no place for extra.weight"),
        (lambda t: t | {"features.0.beta": np.zeros(3)}, "no place for features.0.beta"),
        (
            lambda t: t | {"features.0.running_var": np.ones(64)},
            "belongs at 'batch_stats/conv1/conv/",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != "features.0.bias"},
            "for params/conv1/conv/bias",
        ),
        (
            lambda t: t | {"features.0.bias": np.zeros(3)},
            r"wrong shapes: params/conv1/conv/bias has shape \(3,\), expected \(64,\)",
        ),
        (
            lambda t: t | {"features.0.weight": np.zeros((64, 3, 3))},
            r"wrong shapes: params/conv1/conv/kernel has shape \(64, 3, 3\), expected \(3, 3, ",
        ),
        (lambda t: list(t), r"mapping of names to arrays \(model.state_dict\(\)\), got list"),
        (lambda t: {}, "no tensor was given for params/conv1/conv/bias, .* and 47 more"),
    ],
)
def test_tensors_that_do_not_fit(tensors, change, message):
    with pytest.raises(UserError, match=f"squeezenet1_1 from torchvision: .*{message}"):
        convert("squeezenet1_1", change(tensors), "torchvision")


def test_two_tensors_of_one_place():
    table, given = [(r"a|b", "head")], {"a.bias": np.zeros(1), "b.bias": np.zeros(1)}
    with pytest.raises(UserError, match="both belong at 'params/head/bias'"):
        name_maps.apply_rules(table, given, "timm", ["params/head/bias"], "net")


def test_unused_tensors_are_named_so():
    table = [(r"aux\..*", name_maps.UNUSED), (r"fc", "head")]
    given = {"aux.fc.weight": np.zeros((2, 2)), "fc.bias": np.ones(1), "fc.num_batches_tracked": 0}
    found = name_maps.apply_rules(table, given, "timm", ["params/head/bias"], "net")
    assert list(found) == ["params/head/bias"]


def test_unknown_sources():
    with pytest.raises(
        UserError, match=r"vgg16 from timm: expected torchvision or keras as the source"
    ):
        convert("vgg16", {}, "timm")
    with pytest.raises(UserError, match="lenet5 from keras: no other library has"):
        convert("lenet5", {}, "keras")
    with pytest.raises(UserError, match="unknown model 'vgg61'; did you mean"):
        convert("vgg61", {}, "keras")


def test_sources_are_said_of_networks_that_exist():
    for family in registry.FAMILIES:
        for name, sources in getattr(family, "SOURCES", {}).items():
            assert name in family.VARIANTS
            assert set(sources) <= {"torchvision", "timm", "keras", "efficientnet_lite"}
    assert model_info("resnet50").sources == ("torchvision",)
    assert model_info("lenet5").sources == ()
