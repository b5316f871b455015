"""The plain families, GoogLeNet and SqueezeNet beside second forward passes in NumPy, written from
the papers (and, where they are silent, from what Caffe and torchvision released) alone."""

import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import flax_cnns
from flax_cnns import create_model, pytree
from flax_cnns.models.lenet import rbf_codes
from tests.models import foreign
from tests.models.straight import alexnet, deck_cnn, googlenet, lenet, squeezenet, vgg, zfnet
from tests.models.straight.numpy_layers import local_response_norm
from tests.parity import LIMIT, difference, disturb, spread


class Case(NamedTuple):
    name: str
    straight: Callable
    size: int  # of the images: small, but last maps are not 1x1 (LeNet's are, in the paper)
    fields: Mapping[str, Any] = {}
    strength: float = 1.0  # of the images: response normalisation hardly changes weak ones


NARROW = {"hidden": 32, "num_classes": 10}
WIDTHS = {"widths": (16, 24, 32, 40, 48)}
SHORT = {"hidden": (32, 32), "num_classes": 10} | WIDTHS

# 227 for AlexNet: the paper's maps, to which nothing needs to be added. Elsewhere, where poolings
# of 3x3 with stride 2 round up, rounding down would give other sizes.
CASES = [
    Case("lenet5_original", lenet.lenet5_original, 32),
    Case("alexnet_2gpu", alexnet.alexnet_2gpu, 227, NARROW, 30),
    Case("alexnet_single_tower", alexnet.alexnet_single_tower, 227, NARROW, 30),
    Case("zfnet_fig3", zfnet.zfnet, 224, NARROW, 30),
    Case("zfnet_big", zfnet.zfnet, 112, NARROW, 30),
    Case("vgg11_lrn", vgg.vgg11_lrn, 64, SHORT, 30),
    Case("vgg16_c", vgg.vgg16_c, 64, SHORT),
    Case("vgg16_c_bn", vgg.vgg16_c_bn, 64, SHORT),
    Case("cifar_vgg11_bn", vgg.cifar_vgg11_bn, 64, WIDTHS),
    Case("googlenet_2014", googlenet.googlenet_2014, 64, {"num_classes": 10}, 30),
    Case("googlenet_bn_5x5", googlenet.googlenet_bn_5x5, 80, {"num_classes": 10}),
    Case("squeezenet1_0_bypass", squeezenet.squeezenet1_0_bypass, 69, {"num_classes": 10}),
    Case("cifar_squeezenet1_1", squeezenet.cifar_squeezenet1_1, 32),
    Case("deck003_cifar100_example", deck_cnn.deck003_cifar100_example, 32),
]


def redrawn(case):
    """(model, {path: array}, images): no tensor zero, none constant."""
    channels = create_model(case.name).input_size[-1]
    model = create_model(case.name, input_size=(case.size, case.size, channels), **case.fields)
    shapes = jax.eval_shape(lambda key: flax_cnns.init_variables(model, key), jax.random.key(0))
    leaves = pytree.flatten(shapes).items()
    tensors = {path: foreign.redraw(path, leaf.shape, "keras") for path, leaf in leaves}
    return model, tensors, case.strength * foreign.images(4, case.size, channels)


def in_numpy(case, tensors, images):
    """Logits f64; LeNet-5's bitmaps are constants of the network, not tensors."""
    tensors = {**tensors, "codes": rbf_codes(10)}
    return case.straight(
        {path: np.asarray(value, np.float64) for path, value in tensors.items()},
        images.astype(np.float64),
    )


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_logits(case):
    model, tensors, images = redrawn(case)
    apply = jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": 0})
    ours = apply(pytree.unflatten(tensors), images)
    theirs = in_numpy(case, tensors, images)
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    assert spread(theirs) > 1e-2 * np.sqrt(np.mean(theirs**2))
    assert difference(np.asarray(ours), theirs) <= LIMIT
    victim = list(tensors)[zlib.crc32(case.name.encode()) % len(tensors)]
    wrong = apply(pytree.unflatten(disturb(tensors, victim, "keras")), images)
    assert difference(np.asarray(wrong), theirs) > LIMIT


NORMALISED = [case for case in CASES if case.strength > 1]


@pytest.mark.parametrize("case", NORMALISED, ids=[case.name for case in NORMALISED])
def test_response_normalisation_is_seen(case, monkeypatch):
    """The comparison would tell Caffe's alpha, which it divides by the 5 maps, from the paper's."""
    _, tensors, images = redrawn(case)
    right = in_numpy(case, tensors, images)
    monkeypatch.setattr(
        sys.modules[case.straight.__module__],
        "local_response_norm",
        lambda x, alpha, **constants: local_response_norm(x, alpha=alpha / 5, **constants),
    )
    assert difference(in_numpy(case, tensors, images), right) > 1000 * LIMIT
