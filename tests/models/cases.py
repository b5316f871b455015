"""The comparisons that are recorded, one a family: small, always run, and without the library.

    python -m tests.models.make_reference [FAMILY ...]     # needs torchvision, timm or Keras

writes `reference/FAMILY.npz`: the other network's names and shapes of tensors (their values follow
by rule), its logits, and of a training step the loss and for each of our leaves the gradient's (or
the new statistic's) norm and its product with a random direction.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns import create_model
from flax_cnns import tree as pytree
from flax_cnns.models import googlenet, mobilenet_v2, mobilenet_v3
from flax_cnns.weights import convert
from tests.models import foreign

FOLDER = Path(__file__).parent / "reference"
AUX_WEIGHT = 0.3


class Case(NamedTuple):
    name: str  # ours
    source: str
    size: int  # of the images
    fields: Mapping[str, Any] = {}  # ours: what makes the network short
    build: Callable[[], Any] | None = None  # theirs, as short; None: the published network
    train: bool = False  # a training step too


def _identity(model: Any, *modules: str) -> Any:
    """Without these blocks, which keep the shape."""
    from torch import nn

    for path in modules:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    return model


def _torchvision(name: str, *without: str, **given: Any) -> Callable[[], Any]:
    def build() -> Any:
        models = foreign.torchvision().models
        return _identity(getattr(models, name)(num_classes=10, **given), *without)

    return build


def _timm(name: str, *without: str) -> Callable[[], Any]:
    def build() -> Any:
        foreign.torchvision()  # timm imports it, and it needs help
        import timm

        return _identity(timm.create_model(name, num_classes=10), *without)

    return build


def _inception_v4() -> Any:
    """The stem and each block once."""
    from torch import nn

    model = _timm("inception_v4")()
    once = (0, 1, 2, 3, 4, 5, 6, 10, 11, 18, 19)
    model.features = nn.Sequential(*(model.features[i] for i in once))
    return model


def _narrow(model: Any, first: int, hidden: int = 64) -> Any:
    """AlexNet or VGG with other fully connected layers."""
    from torch import nn

    widths = iter([(first, hidden), (hidden, hidden), (hidden, 10)])
    for i, module in enumerate(model.classifier):
        if isinstance(module, nn.Linear):
            model.classifier[i] = nn.Linear(*next(widths))
    return model


def _alexnet() -> Any:
    return _narrow(foreign.torchvision().models.alexnet(), 256 * 6 * 6)


def _densenet() -> Any:
    return foreign.torchvision().models.DenseNet(
        growth_rate=8, block_config=(2, 3, 2, 2), num_init_features=16, num_classes=10
    )


def _vgg11_bn() -> Any:
    vgg = foreign.torchvision().models.vgg
    layers = [8, "M", 16, "M", 24, 24, "M", 32, 32, "M", 32, 32, "M"]
    features = vgg.make_layers(layers, batch_norm=True)
    return _narrow(vgg.VGG(features, init_weights=False), 32 * 7 * 7)


def _two_stages(model: Any, head: str) -> Any:
    """A ResNet of bottlenecks up to its second stage."""
    from torch import nn

    setattr(model, head, nn.Linear(512, 10))
    return _identity(model, "layer3", "layer4")


def _resnext() -> Any:
    resnet = foreign.torchvision().models.resnet
    groups = dict(groups=32, width_per_group=4)
    return _two_stages(resnet.ResNet(resnet.Bottleneck, (2, 2, 1, 1), **groups), "fc")


def _wide_resnet() -> Any:
    resnet = foreign.torchvision().models.resnet
    return _two_stages(resnet.ResNet(resnet.Bottleneck, (2, 2, 1, 1), width_per_group=128), "fc")


def _preact_resnet() -> Any:
    """Narrow and short."""
    foreign.torchvision()
    from timm.layers import BatchNormAct2d, create_conv2d
    from timm.models.resnetv2 import ResNetV2

    layers = dict(conv_layer=create_conv2d, norm_layer=BatchNormAct2d)
    return ResNetV2((1, 2), channels=(64, 128), stem_chs=16, num_classes=10, **layers)


def _senet() -> Any:
    foreign.torchvision()
    from timm.models import senet

    projection = dict(downsample_kernel_size=3, downsample_padding=1)
    stem = dict(inplanes=128, input_3x3=True)
    model = senet.SENet(senet.SEBottleneck, (1, 2, 1, 1), 64, 16, drop_rate=0, **projection, **stem)
    return _two_stages(model, "last_linear")


def _convnext() -> Any:
    """Two narrow stages."""
    convnext = foreign.torchvision().models.convnext
    stages = [convnext.CNBlockConfig(16, 32, 2), convnext.CNBlockConfig(32, None, 1)]
    return convnext.ConvNeXt(stages, num_classes=10)


def _vit() -> Any:
    """Two narrow blocks."""
    vit = foreign.torchvision().models.VisionTransformer
    return vit(32, 8, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=192, num_classes=10)


def _mobilenet_v1() -> Any:
    """Narrow, the longest stage short."""
    foreign.torchvision()
    from timm.models.efficientnet import _gen_mobilenet_v1

    model = _gen_mobilenet_v1("mobilenetv1_100", 0.25, num_classes=10)
    return _identity(model, *(f"blocks.3.{i}" for i in range(2, 6)))


_V2 = (mobilenet_v2.Row(1, 16, 1, 1), mobilenet_v2.Row(6, 24, 2, 2), mobilenet_v2.Row(6, 96, 2, 2))
_V3 = mobilenet_v3.SMALL[:5]


def _mobilenet_v2() -> Any:
    return foreign.torchvision().models.MobileNetV2(
        num_classes=10, width_mult=0.5, inverted_residual_setting=[list(row) for row in _V2]
    )


def _mobilenet_v3() -> Any:
    theirs = foreign.torchvision().models.mobilenetv3
    entering = [mobilenet_v3.STEM, *(row.width for row in _V3)]
    rows = []
    for row, width in zip(_V3, entering):
        name = "HS" if row.activation is mobilenet_v3.HS else "RE"
        given = (width, row.kernel, row.inner, row.width, row.se, name, row.stride, 1, 1.0)
        rows.append(theirs.InvertedResidualConfig(*given))
    return theirs.MobileNetV3(rows, last_channel=64, num_classes=10)


def _xception() -> Any:
    """One block in the middle, and all that follows the stem narrow."""
    foreign.torchvision()
    from timm.models.xception import Block, SeparableConv2d, Xception
    from torch import nn

    model = Xception(num_classes=10)
    model.block1 = Block(64, 24, 2, 2, start_with_relu=False)
    model.block2, model.block3 = Block(24, 32, 2, 2), Block(32, 48, 2, 2)
    model.block4 = Block(48, 48, 3, 1)
    model.block5 = Block(48, 64, 2, 2, grow_first=False)
    model.conv3, model.bn3 = SeparableConv2d(64, 72, 3, 1, 1), nn.BatchNorm2d(72)
    model.conv4, model.bn4 = SeparableConv2d(72, 80, 3, 1, 1), nn.BatchNorm2d(80)
    model.fc = nn.Linear(80, 10)
    return _identity(model, *(f"block{i}" for i in range(6, 13)))


def _nasnet() -> Any:
    """Two stages of two cells, narrow."""
    foreign.torchvision()
    from timm.models.nasnet import NASNetALarge
    from torch import nn
    from torch.nn import functional

    model = NASNetALarge(num_classes=10, stem_size=8, num_features=24 * 8)
    kept = [getattr(model, f"cell_{i}") for i in (0, 1, 6, 7)]
    for i in range(18):
        delattr(model, f"cell_{i}")
    for i, cell in enumerate(kept):
        setattr(model, f"cell_{i}", cell)
    del model.reduction_cell_1
    model.last_linear = nn.Linear(12 * 8, 10)

    def features(x):
        first = model.conv0(x)
        p = model.cell_stem_0(first)
        x = model.cell_stem_1(first, p)
        for i, cell in enumerate(kept):
            if i == 2:
                x = model.reduction_cell_0(x, p)
            x, p = cell(x, p), x
        return functional.relu(x)

    model.forward_features = features
    return model


def _pnasnet() -> Any:
    """The stem and two cells."""
    from torch import nn
    from torch.nn import functional

    model = _timm("pnasnet5large")()
    for i in range(2, 12):
        delattr(model, f"cell_{i}")
    model.last_linear = nn.Linear(1080, 10)

    def features(x):
        first = model.conv_0(x)
        second = model.cell_stem_0(first)
        third = model.cell_stem_1(first, second)
        last = model.cell_0(second, third)
        return functional.relu(model.cell_1(third, last))

    model.forward_features = features
    return model


def _efficientnet() -> Any:
    """A fourth as wide, half as deep; no branch is dropped."""
    theirs = foreign.torchvision().models.efficientnet
    rows, _ = theirs._efficientnet_conf("efficientnet_b0", width_mult=0.25, depth_mult=0.5)
    return theirs.EfficientNet(rows, dropout=0.2, stochastic_depth_prob=0.0, num_classes=10)


_SHORT = dict(aux_logits=True, init_weights=False)
_REPEATED = ("mixed4b", "mixed4c", "mixed5a")
CASES = {  # family: case
    "alexnet": Case("alexnet", "torchvision", 127, dict(hidden=64), _alexnet),
    "vgg": Case(
        "vgg11_bn",
        "torchvision",
        64,
        dict(widths=(8, 16, 24, 32, 32), hidden=(64, 64)),
        _vgg11_bn,
        train=True,
    ),
    "squeezenet": Case("squeezenet1_1", "torchvision", 33, build=_torchvision("squeezenet1_1")),
    "densenet": Case(
        "densenet121",
        "torchvision",
        64,
        dict(depths=(2, 3, 2, 2), growth_rate=8),
        _densenet,
        train=True,
    ),
    "googlenet": Case(
        "googlenet_tv_aux",
        "torchvision",
        33,
        dict(table=[row for row in googlenet.TABLE if row[0] not in _REPEATED]),
        _torchvision("googlenet", "inception4b", "inception4c", "inception5a", **_SHORT),
        train=True,
    ),
    "inception_v3": Case(
        "inception_v3",
        "torchvision",
        75,
        dict(pool_projs=(32, 64), widths=(128,)),
        _torchvision("inception_v3", "Mixed_5d", "Mixed_6c", "Mixed_6d", "Mixed_6e", **_SHORT),
    ),
    "inception_v4": Case(
        "inception_v4",
        "timm",
        75,
        dict(depths=(1, 1, 1)),
        _inception_v4,
    ),
    "inception_resnet": Case(
        "inception_resnet_v2",
        "timm",
        75,
        dict(depths=(1, 1, 1)),
        _timm(
            "inception_resnet_v2",
            *(f"repeat.{i}" for i in range(1, 10)),
            *(f"repeat_1.{i}" for i in range(1, 20)),
            *(f"repeat_2.{i}" for i in range(1, 9)),
        ),
    ),
    "efficientnet": Case(
        "efficientnet_b0",
        "torchvision",
        64,
        dict(width_mult=0.25, depth_mult=0.5, drop_path=0.0),
        _efficientnet,
        train=True,
    ),
    "resnext": Case(
        "resnext50_32x4d", "torchvision", 48, dict(depths=(2, 2)), _resnext, train=True
    ),
    "preact_resnet": Case(
        "resnetv2_50", "timm", 64, dict(depths=(1, 2), width=16), _preact_resnet, train=True
    ),
    "wide_resnet": Case(
        "wide_resnet50_2", "torchvision", 48, dict(depths=(2, 2)), _wide_resnet, train=True
    ),
    "senet": Case("legacy_senet154", "timm", 48, dict(depths=(1, 2)), _senet, train=True),
    "convnext": Case(
        "convnext_tiny", "torchvision", 36, dict(depths=(2, 1), width=16), _convnext, train=True
    ),
    "vit": Case(
        "vit_b_16",
        "torchvision",
        32,
        dict(patch=8, depth=2, width=48, heads=3, input_size=(32, 32, 3)),
        _vit,
        train=True,
    ),
    "mobilenet_v1": Case(
        "mobilenet_v1_100",
        "timm",
        64,
        dict(width_mult=0.25, depths=(1, 2, 2, 2, 2)),
        _mobilenet_v1,
        train=True,
    ),
    "mobilenet_v2": Case(
        "mobilenet_v2",
        "torchvision",
        48,
        dict(width_mult=0.5, table=_V2),
        _mobilenet_v2,
        train=True,
    ),
    "mobilenet_v3": Case(
        "mobilenet_v3_small",
        "torchvision",
        48,
        dict(table=_V3, hidden=64),
        _mobilenet_v3,
        train=True,
    ),
    "xception": Case(
        "xception",
        "timm",
        80,
        dict(entry=(24, 32, 48), depth=1, exit=(48, 64), top=(72, 80)),
        _xception,
        train=True,
    ),
    "nasnet": Case("nasnetalarge", "timm", 64, dict(depths=(2, 2), width=8, stem_width=8), _nasnet),
    "pnasnet": Case("pnasnet5large", "timm", 64, dict(depths=(2,)), _pnasnet),
    "resnet": Case("resnet18", "torchvision", 64, build=_torchvision("resnet18"), train=True),
}


# Keras's networks cannot be shortened: their names and shapes are recorded, and nothing else.
KERAS = (
    "vgg16",
    "convnext_tiny",
    "keras_resnet50",
    "keras_resnet50v2",
    "keras_densenet121",
    "keras_efficientnetb0",
    "keras_inception_v3",
    "keras_inception_resnet_v2",
    "keras_mobilenet",
    "keras_mobilenetv2",
    "keras_mobilenetv3small",
    "keras_nasnetmobile",
    "keras_xception",
)


class Outputs(NamedTuple):
    """What both sides compute. Leaves are in the order of our sorted paths."""

    logits: np.ndarray  # [N K], in evaluation
    loss: float | None = None  # of a training step without dropout
    leaves: np.ndarray | None = None  # [leaves 2]: of gradient or statistic (norm, product)


def _measures(tree: dict[str, dict]) -> np.ndarray:
    rows = []
    for path, leaf in sorted(pytree.flatten(tree).items()):
        random = np.random.RandomState(zlib.crc32(path.encode()))
        leaf = np.asarray(leaf, np.float64)
        rows.append((np.linalg.norm(leaf), np.vdot(leaf, random.standard_normal(leaf.shape))))
    return np.array(rows)


def _batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    channels = create_model(case.name).input_size[-1]
    return foreign.images(4, case.size, channels), np.array([1, 0, 3, 2])


def theirs(case: Case) -> tuple[dict[str, np.ndarray], Outputs]:
    """The tensors and what the live network makes of them."""
    model = foreign.build(case.name, case.source) if case.build is None else case.build()
    live = foreign.load(model, case.source, foreign.gain(case.name))
    x, labels = _batch(case)
    logits = foreign.logits(live, x, case.source)
    if not case.train:
        return live.tensors, Outputs(logits)
    step = foreign.train_step(live, x, labels, AUX_WEIGHT)
    tree = convert(case.name, step["tensors"], case.source, **case.fields)
    return live.tensors, Outputs(logits, step["loss"], _measures(tree))


def ours(case: Case, tensors: Mapping[str, np.ndarray]) -> tuple[Outputs, Callable]:
    """What we compute, and the function that gave the logits: variables -> [N K]."""
    variables, (x, labels) = convert(case.name, tensors, case.source, **case.fields), _batch(case)
    classes = variables["params"]["head"]["kernel"].shape[-1]
    model = create_model(case.name, **case.fields, num_classes=classes)
    # Nearly all of the time is the compiler's.
    options = {"xla_backend_optimization_level": 0}
    apply = jax.jit(lambda v: model.apply(v, x), compiler_options=options)
    logits = np.asarray(apply(variables))
    if not case.train:
        return Outputs(logits), apply
    still = model.clone(**{f: 0.0 for f in ("dropout", "aux_dropout") if hasattr(model, f)})

    def loss_fn(params):
        out, state = still.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            x,
            train=True,
            mutable=["batch_stats", "aux_logits"],
        )
        heads = [(1.0, out), *((AUX_WEIGHT, v) for v in jax.tree.leaves(state.get("aux_logits")))]
        loss = 0.0
        for weight, each in heads:
            picked = jnp.take_along_axis(jax.nn.log_softmax(each), labels[:, None], 1)
            loss -= weight * jnp.mean(picked)
        return loss, state["batch_stats"]

    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), compiler_options=options)
    (loss, stats), grads = step(variables["params"])
    tree = {"params": grads, "batch_stats": stats}
    return Outputs(logits, float(loss), _measures(tree)), apply


def check(got: Outputs, wanted: Outputs) -> None:
    """Raises AssertionError unless both are the same network's."""
    spread = np.sqrt(np.mean(np.var(wanted.logits, axis=0)))
    assert spread > 1e-3 * np.sqrt(np.mean(wanted.logits**2)), "a constant output proves nothing"
    assert np.abs(got.logits - wanted.logits).max() <= 1e-4 * spread
    if wanted.loss is None:
        return
    np.testing.assert_allclose(got.loss, wanted.loss, rtol=1e-4)
    norms = wanted.leaves[:, 0]
    assert (norms > 0).all(), "a leaf without a gradient proves nothing"
    # Small gradients of large sums: a difference counts against the larger of both.
    error = np.abs(got.leaves - wanted.leaves).max(1)
    assert (error <= 2e-3 * norms + 1e-6 * np.linalg.norm(norms)).all()


def save(path: Path, tensors: Mapping[str, np.ndarray], outputs: Outputs) -> None:
    shapes = {name: array.shape for name, array in tensors.items()}
    step = {} if outputs.loss is None else dict(loss=outputs.loss, leaves=outputs.leaves)
    np.savez_compressed(path, shapes=json.dumps(shapes), logits=outputs.logits, **step)


def load(path: Path, source: str, gain: float = 2.0) -> tuple[dict[str, np.ndarray], Outputs]:
    with np.load(path) as kept:
        shapes = json.loads(str(kept["shapes"]))
        step = (float(kept["loss"]), kept["leaves"]) if "loss" in kept else ()
        outputs = Outputs(kept["logits"], *step)
    return {
        n: foreign.redraw(n, tuple(shape), source, gain) for n, shape in shapes.items()
    }, outputs
