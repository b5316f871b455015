"""graft and load_weights fit weights to images of other channels or of another size."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import create_model, graft, init_variables
from flax_cnns.errors import UserError
from flax_cnns.tree import flatten
from flax_cnns.weights import adapt, load_weights
from tests.models import cases, foreign

EVERYTHING = [(r"(.*)", r"\1")]


def network(channels):
    fields = dict(depths=(1,), widths=(4,), num_classes=3, input_size=(8, 8, channels))
    return create_model("cifar_resnet20", **fields)


def fresh(model, seed=0):
    """Random variables of a network, made without compiling a program."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    draw = lambda leaf: random.uniform(0.1, 1, leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, shapes)


@pytest.mark.parametrize(("came", "channels"), [(3, 1), (1, 3)])
def test_a_gray_image_has_the_same_logits_behind_an_adapted_stem(came, channels):
    """Random images of one channel, and the same images with three equal channels."""
    source, model = network(came), network(channels)
    variables = fresh(source, 1)
    adapted, report = graft(variables, fresh(model), EVERYTHING, adapt_stem=True)
    gray = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))
    theirs = source.apply(variables, jnp.tile(gray, came))
    ours = model.apply(adapted, jnp.tile(gray, channels))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    how = {1: "summed", 3: "repeated, cut and multiplied by 1/3"}[channels]
    said = f"{came} input channels adapted to {channels}: {how}"
    assert report.as_dict()["adapted"] == {"params/stem/conv/kernel": said}
    assert f"note: params/stem/conv/kernel: {said}" in str(report)


@pytest.mark.parametrize(("came", "channels"), [(3, 1), (1, 4), (3, 2), (3, 4), (3, 12)])
def test_channels_are_repeated_as_timm_does(came, channels):
    kernel = np.random.default_rng(0).normal(size=(2, 2, came, 5)).astype(np.float32)
    ours = adapt.adapt_channels(kernel, channels)
    expected = kernel.sum(2, keepdims=True)
    if channels > 1:
        order = [i % came for i in range(channels)]
        expected = kernel[:, :, order] * came / channels
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_only_kernels_that_see_images_are_stems():
    assert adapt.is_stem((3, 3, 1, 8), (3, 3, 3, 8))
    assert not adapt.is_stem((3, 3, 1, 64), (3, 3, 64, 64))  # a depthwise kernel
    assert adapt.is_stem((3, 3, 12, 64), (3, 3, 3, 64), first=True)
    assert not adapt.is_stem((3, 3, 1, 8), (3, 3, 3, 9))
    assert not adapt.is_stem((3, 3, 3, 8), (3, 3, 3, 8))
    plan = adapt.make_plan("stem/kernel", (3, 3, 3, 8), (3, 3, 4, 8), stem=True, positions=False)
    assert plan.adapt is None
    assert plan.description == "a stem with 4 input channels can only be adapted to 1 channel"


@pytest.mark.oracle
def test_timm_adapts_channels_and_positions_alike():
    torch = pytest.importorskip("torch")
    foreign.torchvision()
    from timm.layers.pos_embed import resample_abs_pos_embed
    from timm.models._manipulate import adapt_input_conv

    random = np.random.default_rng(0)
    kernel = random.normal(size=(2, 3, 3, 5)).astype(np.float32)
    theirs = torch.from_numpy(kernel.transpose(3, 2, 0, 1))
    for channels in (1, 2, 4, 7):
        expected = adapt_input_conv(channels, theirs).numpy().transpose(2, 3, 1, 0)
        np.testing.assert_allclose(adapt.adapt_channels(kernel, channels), expected, rtol=1e-5)
    positions = random.normal(size=(1, 1 + 14 * 14, 8)).astype(np.float32)
    for side in (6, 14, 24):
        expected = resample_abs_pos_embed(torch.from_numpy(positions), [side, side])
        ours = adapt.resize_positions(positions, 1 + side * side)
        np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5)


@pytest.fixture(scope="module")
def vit():
    fields = dict(width=8, depth=1, heads=1, num_classes=3)
    make = lambda size: create_model("vit_tiny_patch16_224", input_size=(size, size, 3), **fields)  # noqa: E731
    return fresh(make(64), 1), fresh(make(32))


def test_positions_are_resized_where_that_is_asked_for(vit):
    source, target = vit
    path = "params/position_embedding"
    with pytest.raises(UserError, match=r"graft\.resize_positions=True resizes the grid to 2x2"):
        graft(source, target, EVERYTHING)
    found, report = graft(source, target, EVERYTHING, resize_positions=True)
    ours, theirs = flatten(found)[path], flatten(source)[path]
    np.testing.assert_array_equal(ours[:, 0], theirs[:, 0])  # of the class token
    assert ours.shape == (1, 5, 8)
    assert report.adapted == {path: "positions of 4x4 patches resized bicubically to 2x2"}


def test_the_advice_for_positions_works(vit):
    source, target = vit
    with pytest.raises(
        UserError, match=r"or leave the layer fresh: .*\('params/position_embedding', None"
    ):
        graft(source, target, EVERYTHING)
    rules = [("params/position_embedding", None), *EVERYTHING]
    found, report = graft(source, target, rules)
    assert report.fresh == ("params/position_embedding",)
    assert "fresh layers below loaded layers: position_embedding;" in str(report)
    np.testing.assert_array_equal(
        found["params"]["patches"]["kernel"], source["params"]["patches"]["kernel"]
    )


def test_the_error_names_the_option_that_would_fit_a_stem():
    shapes = r"kernel is \[3, 3, 1, 4\] in the network and \[3, 3, 3, 4\] in the source"
    advice = r"graft\.adapt_stem=True adapts the kernels: summed"
    with pytest.raises(UserError, match=f"{shapes}; {advice}") as raised:
        graft(fresh(network(3)), fresh(network(1)), EVERYTHING)
    assert "('params/stem/conv/.*', None)" in str(raised.value)


# ---- files of other libraries


@pytest.fixture(scope="module")
def tensors():
    """Tensors of torchvision's SqueezeNet with ten classes."""
    return cases.load(cases.FOLDER / "squeezenet.npz", "torchvision")[0]


def squeezenet(path, tensors, **options):
    np.savez(path, **tensors)
    return load_weights("squeezenet1_1", "torchvision", path, **options)


def test_a_file_with_a_stem_of_its_own_is_taken_as_it_is(tensors, tmp_path):
    said, kernel = [], tensors["features.0.weight"]
    gray = tensors | {"features.0.weight": kernel.sum(1, keepdims=True)}
    found = squeezenet(tmp_path / "gray.npz", gray, say=said.append)
    assert found["params"]["conv1"]["conv"]["kernel"].shape == (3, 3, 1, 64)
    assert said == ["note: the weights are for images [224 224 1]"]
    target = fresh(create_model("squeezenet1_1", input_size=(64, 64, 1)))
    rules = [("params/head/.*", None), *EVERYTHING]
    source = f"torchvision:squeezenet1_1={tmp_path / 'gray.npz'}"
    ours, report = graft(source, target, rules)
    np.testing.assert_array_equal(
        ours["params"]["conv1"]["conv"]["kernel"], found["params"]["conv1"]["conv"]["kernel"]
    )
    assert not report.adapted
    assert "the weights are for images [224 224 1]" in report.notes


@pytest.mark.slow
def test_the_command_names_its_flag_that_would_fit_a_stem(tensors, tmp_path):
    np.savez(tmp_path / "x.npz", **tensors)
    flags = ["--model=squeezenet1_1", "--source=torchvision", "--channels=1"]
    flags += [f"--path={tmp_path}/x.npz", f"--out={tmp_path}/out"]
    command = [sys.executable, "-m", "experiments.convert", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "; --adapt-stem adapts the kernels: summed" in done.stderr


def test_load_weights_fits_a_stem_where_that_is_asked_for(tensors, tmp_path):
    size, said = (64, 64, 1), []
    with pytest.raises(UserError, match=r"; adapt_stem=True adapts the kernels: summed"):
        squeezenet(tmp_path / "x.npz", tensors, input_size=size)
    found = squeezenet(
        tmp_path / "x.npz", tensors, input_size=size, adapt_stem=True, say=said.append
    )
    expected = tensors["features.0.weight"].transpose(2, 3, 1, 0).sum(2, keepdims=True)
    np.testing.assert_allclose(found["params"]["conv1"]["conv"]["kernel"], expected, rtol=1e-5)
    assert said == ["note: params/conv1/conv/kernel: 3 input channels adapted to 1: summed"]
