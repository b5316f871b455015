"""The other libraries' networks, under weights by a rule: what they compute, in our terms.

A rule on names and shapes gives every tensor, so that whoever has the rule has the weights, on
either side of a comparison and without the library. `build` needs the library; the rest does not.
"""

from __future__ import annotations

import os
import re
import zlib
from typing import Any, NamedTuple

import numpy as np

from flax_cnns import model_info
from flax_cnns.models import mobilenet_v2, senet

# Of kernels: their variance times their fan-in, by the family of ours. 2 keeps what passes through
# ReLUs as large as it was; where branches are added up, each block would double it, and nobody
# would see a bias behind fifty blocks.
# Where one number does not serve, (pattern, number) by the names of kernels, theirs and ours: what
# blocks with shortcuts add up grows, and what passes those without fades.
_MBCONV = (
    (
        r"features\.\d\.[1-9]\d*\.block\.[23]\.0\.weight"
        r"|blocks\.\d\.[1-9]\d*\.conv_pwl\.weight|blocks\.0\.[1-9]\d*\.conv_pw\.weight"
        r"|block\d[b-z]_project_conv/kernel|block([2-9]|\d\d)/project/kernel",
        0.03,
    ),
    (
        r"features\.\d\.0\.block\.[23]\.0\.weight"
        r"|blocks\.\d\.0\.conv_pwl\.weight|blocks\.0\.0\.conv_pw\.weight"
        r"|block\da_project_conv/kernel|block1/project/kernel",
        2.5,
    ),
    ("", 2.0),
)
GAIN = {
    "cifar_preact": 1.0,
    "cifar_resnet": 1.0,
    "convnext": 1.0,
    "efficientnet": _MBCONV,
    "mobilenet_v2": 1.3,
    "mobilenet_v3": 1.65,
    "nasnet": 1.0,
    "pnasnet": 1.0,
    "preact_resnet": 1.0,
    "pyramidnet": 1.0,
    "resnet": 1.0,
    "resnet_in_resnet": 1.0,
    "resnext": 1.0,
    "senet": 1.0,
    "shake_shake": 1.0,
    "vit": 1.0,
    "wide_resnet": 1.0,
    "xception": 1.0,
}


Gain = float | tuple[tuple[str, float], ...]


def gain(model_name: str) -> Gain:
    return GAIN.get(model_info(model_name).family, 2.0)


def redraw(name: str, shape: tuple[int, ...], source: str, gain: Gain = 2.0) -> np.ndarray:
    """f32 of `shape`: scales and variances from 0.5 to 1.5, kernels of variance gain / fan-in,
    biases and means of standard deviation 0.1; nothing zero, nothing constant."""
    # RandomState: NumPy froze its stream for good, where default_rng's may change.
    random = np.random.RandomState(zlib.crc32(name.encode()))
    leaf = name.replace("/", ".").rpartition(".")[2]
    scales = ("scale", "var", "gamma", "moving_variance", "running_var")  # ours, Keras's, torch's
    if leaf in scales or (leaf == "weight" and len(shape) == 1):
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) > 1:
        fan_in = np.prod(shape[:-1] if source == "keras" else shape[1:])
        if source == "keras" and len(shape) == 4 and shape[-1] == 1:  # depthwise: [kh kw in 1]
            fan_in = shape[0] * shape[1]
        if not isinstance(gain, float):
            gain = next(g for pattern, g in gain if re.search(pattern, name))
        return (np.sqrt(gain / fan_in) * random.standard_normal(shape)).astype(np.float32)
    return (0.1 * random.standard_normal(shape)).astype(np.float32)


def images(n: int, size: int, channels: int = 3) -> np.ndarray:
    """f32 [n size size channels], each another: noise on waves of another length and strength."""
    random = np.random.RandomState(zlib.crc32(b"images"))
    place = np.arange(size) / size
    out = []
    for i in range(n):
        wave = np.sin(2 * np.pi * (i + 1) * (place[:, None] + (i % 2) * place[None, :]))
        colour = random.standard_normal(channels)
        noise = random.standard_normal((size, size, channels))
        out.append((0.5 + i / n) * (wave[..., None] * colour + noise))
    return np.stack(out).astype(np.float32)


class Live(NamedTuple):
    """Another library's network with its redrawn tensors."""

    model: Any
    tensors: dict[str, np.ndarray]  # in the library's order, under its names


# Names of ours that are another one there, and how it is built.
TIMM = {
    "inception_v3_noaux": "inception_v3",
    **senet.ALIASES,
    **mobilenet_v2.ALIASES,
    "mobilenet_v1_100": "mobilenetv1_100",
    "xception": "legacy_xception",
    "preact_resnet50": "resnetv2_50",
    "preact_resnet101": "resnetv2_101",
    "preact_resnet152": "resnetv2_152",
    "vit_tiny16": "vit_tiny_patch16_224",
    "vit_small16": "vit_small_patch16_224",
}
KERAS = {
    "vgg16": "VGG16",
    "vgg19": "VGG19",
    **{
        f"convnext_{size}": f"ConvNeXt{there}"
        for size, there in [
            *(("tiny", "Tiny"), ("small", "Small"), ("base", "Base"), ("large", "Large")),
            ("xlarge", "XLarge"),
        ]
    },
    **{f"keras_densenet{n}": f"DenseNet{n}" for n in (121, 169, 201)},
    "keras_inception_v3": "InceptionV3",
    "keras_inception_resnet_v2": "InceptionResNetV2",
    **{f"keras_resnet{n}": f"ResNet{n}" for n in (50, 101, 152)},
    **{f"keras_efficientnetb{n}": f"EfficientNetB{n}" for n in range(8)},
    "keras_mobilenet": "MobileNet",
    "keras_mobilenetv2": "MobileNetV2",
    "keras_mobilenetv3large": "MobileNetV3Large",
    "keras_mobilenetv3small": "MobileNetV3Small",
    "keras_nasnetlarge": "NASNetLarge",
    "keras_nasnetmobile": "NASNetMobile",
    "keras_xception": "Xception",
    "keras_resnet50v2": "ResNet50V2",
    "keras_resnet101v2": "ResNet101V2",
    "keras_resnet152v2": "ResNet152V2",
}
TORCHVISION = {
    "googlenet_tv_aux": "googlenet",
    "inception_v3_noaux": "inception_v3",
}


def build(name: str, source: str, size: int | None = None) -> Any:
    """The published network whose tensors `convert(name, ..., source)` takes, untrained.

    `size`: of the images in pixels, which Keras wants to know; by default the network's own.
    """
    if source == "keras":
        os.environ.setdefault("KERAS_BACKEND", "jax")
        import keras

        build, family = getattr(keras.applications, KERAS[name]), model_info(name).family
        raw = {"include_preprocessing": False} if family in ("convnext", "mobilenet_v3") else {}
        shape = {} if size is None else {"input_shape": (size, size, 3)}
        model = build(weights=None, classifier_activation=None, **shape, **raw)
        if family == "efficientnet":
            model = keras.Model(model.get_layer("stem_conv_pad").input, model.output)
        return model
    if source == "timm":
        torchvision()  # timm imports it, and it needs help
        import timm

        classes = model_info(name).num_classes  # some were published without a head
        return timm.create_model(TIMM.get(name, name), pretrained=False, num_classes=classes)
    theirs = TORCHVISION.get(name, name)
    slow = dict(init_weights=False) if theirs in ("googlenet", "inception_v3") else {}
    return getattr(torchvision().models, theirs)(weights=None, **slow)


def torchvision() -> Any:
    from experiments.benchmarks.torch_side import import_torchvision

    return import_torchvision()


def load(model: Any, source: str, gain: Gain = 2.0) -> Live:
    """`model` with every tensor redrawn."""
    if source == "keras":
        tensors = {w.path: redraw(w.path, tuple(w.shape), source, gain) for w in model.weights}
        for weight in model.weights:
            weight.assign(tensors[weight.path])
        return Live(model, tensors)
    import torch

    tensors = {}
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            tensors[key] = redraw(key, tuple(value.shape), source, gain)
        else:
            tensors[key] = value.numpy()
    model.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()})
    return Live(model, tensors)


def _torch_images(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def logits(live: Live, x: np.ndarray, source: str) -> np.ndarray:
    """In evaluation, [N K] of images [N H W C]."""
    if source == "keras":
        return np.asarray(live.model(x, training=False))
    import torch

    with torch.no_grad():
        return live.model.eval()(_torch_images(x)).numpy()


def train_step(live: Live, x: np.ndarray, labels: np.ndarray, aux_weight: float) -> dict[str, Any]:
    """Of a PyTorch network without its dropout: loss, gradients and statistics after one forward.

    "tensors" has, under the network's own names, the gradient of each parameter, and of each
    statistic the value afterwards, variances as Flax keeps them (biased); zeros where the loss does
    not reach a parameter.
    """
    import torch
    from torch.nn import functional

    model = live.model.train()
    seen = {}  # numbers behind each statistic: PyTorch keeps n / (n - 1) times the variance

    def note(norm, args, output):
        seen[norm] = args[0].numel() // args[0].shape[1]

    handles = []
    for module in model.modules():
        if "Dropout" in type(module).__name__:
            module.p = 0.0
        if isinstance(module, torch.nn.BatchNorm2d):
            handles.append(module.register_forward_hook(note))
    out = model(_torch_images(x))
    targets = torch.from_numpy(labels)
    out, *aux = out if isinstance(out, tuple) else (out,)
    loss = functional.cross_entropy(out, targets)
    for head in aux:
        if head is not None:
            loss = loss + aux_weight * functional.cross_entropy(head, targets)
    loss.backward()
    for handle in handles:
        handle.remove()
    result = {}
    for name, value in model.named_parameters():
        result[name] = (torch.zeros_like(value) if value.grad is None else value.grad).numpy()
    for name, value in model.named_buffers():
        value = value.numpy()
        if name.endswith("running_var"):
            norm = model.get_submodule(name.rpartition(".")[0])
            keep, n = 1 - norm.momentum, seen[norm]
            value = keep * live.tensors[name] + (value - keep * live.tensors[name]) * (n - 1) / n
        result[name] = value
    order = {name: result[name] for name in live.tensors}
    return {"loss": float(loss.detach()), "tensors": order}
