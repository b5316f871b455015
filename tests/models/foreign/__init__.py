"""Networks of other libraries, with weights that a rule makes from names and shapes of tensors.

Since a rule gives every tensor, both sides of a comparison can make the same weights, without the
library. Only `build`, `load`, `logits` and `train_step` need the library.

The file with the name of a family holds what is special about it; nearly all of this is optional:

- CASE: the recorded comparison.
- TORCHVISION, TIMM, KERAS: {our name: the library's name} where they differ. TORCHVISION_FIELDS,
  KERAS_FIELDS: arguments for all networks of the family. `without_preprocessing(model)`: removes
  Keras's preprocessing.
- KERAS_SHAPES: Keras networks with recorded names and shapes of tensors.
- GAIN: argument of `redraw`.
"""

from __future__ import annotations

import os
import re
import zlib
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from flax_cnns import create_model
from tests.models.foreign.builders import Case, torchvision
from tests.models.shapes import FAMILY_OF

__all__ = ["CASES", "KERAS", "KERAS_SHAPES", "TIMM", "TORCHVISION", "Case", "torchvision"]

FILES: dict[str, ModuleType] = {
    family: import_module(f"{__name__}.{family}")
    for family in sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    if family not in ("__init__", "builders")
}
CASES: dict[str, Case] = {family: file.CASE for family, file in FILES.items()}
KERAS_SHAPES = tuple(name for f in FILES.values() for name in getattr(f, "KERAS_SHAPES", ()))
# {our name: the library's name} where they differ.
TIMM, KERAS, TORCHVISION = (
    {ours: name for file in FILES.values() for ours, name in getattr(file, source, {}).items()}
    for source in ("TIMM", "KERAS", "TORCHVISION")
)

# The variance of a kernel times its fan-in, by our family. 2 keeps the scale of features through
# convolutions with ReLU. Where branches are added up, each block would double it, and after fifty
# blocks the comparison would no longer notice a bias; these families have 1.
# A family may need (pattern, number) pairs, matched with the names of kernels, theirs and ours.
Gain = float | tuple[tuple[str, float], ...]
# For families that no other library has.
GAINS = dict.fromkeys(
    (
        *("cifar_preact", "cifar_resnet", "nas_bench_201", "pyramidnet", "resnet_in_resnet"),
        "shake_shake",
    ),
    1.0,
)


def gain(model_name: str) -> Gain:
    family = FAMILY_OF[model_name]
    return getattr(FILES.get(family), "GAIN", GAINS.get(family, 2.0))


def redraw(name: str, shape: tuple[int, ...], source: str, gain: Gain = 2.0) -> np.ndarray:
    """Draws a tensor, f32 of `shape`, without zeros; its name determines the values.

    Scales and variances are from 0.5 to 1.5, kernels have the variance gain / fan-in, biases and
    means the standard deviation 0.1.
    """
    # NumPy promises that the numbers of RandomState never change; those of default_rng may.
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
    """Makes different images, f32 [n size size channels]: noise and waves of various lengths."""
    random = np.random.RandomState(zlib.crc32(b"images"))
    place = np.arange(size) / size
    out = []
    for i in range(n):
        wave = np.sin(2 * np.pi * (i + 1) * (place[:, None] + (i % 2) * place[None, :]))
        color = random.standard_normal(channels)
        noise = random.standard_normal((size, size, channels))
        out.append((0.5 + i / n) * (wave[..., None] * color + noise))
    return np.stack(out).astype(np.float32)


class Live(NamedTuple):
    """Another library's network with its redrawn tensors."""

    model: Any
    tensors: dict[str, np.ndarray]  # in the library's order, under its names


def build(name: str, source: str, size: int | None = None) -> Any:
    """Builds the published network whose tensors `convert(name, ..., source)` takes, untrained.

    `size` is the height and width of images, which Keras needs; by default the network's own.
    """
    file = FILES[FAMILY_OF[name]]
    if source == "keras":
        os.environ.setdefault("KERAS_BACKEND", "jax")
        import keras

        given = {} if size is None else {"input_shape": (size, size, 3)}
        given |= getattr(file, "KERAS_FIELDS", {})
        build = getattr(keras.applications, KERAS[name])
        model = build(weights=None, classifier_activation=None, **given)
        return getattr(file, "without_preprocessing", lambda model: model)(model)
    if source == "timm":
        torchvision()  # timm imports torchvision, which must be imported this way first
        import timm

        classes = create_model(name).num_classes  # some were published without a head
        return timm.create_model(TIMM.get(name, name), pretrained=False, num_classes=classes)
    theirs = TORCHVISION.get(name, name)
    given = getattr(file, "TORCHVISION_FIELDS", {})
    return getattr(torchvision().models, theirs)(weights=None, **given)


def load(model: Any, source: str, gain: Gain = 2.0) -> Live:
    """Redraws every tensor of `model`."""
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
    """Evaluates images [N H W C] and returns logits [N K]."""
    if source == "keras":
        return np.asarray(live.model(x, training=False))
    import torch

    with torch.no_grad():
        return live.model.eval()(_torch_images(x)).numpy()


def train_step(live: Live, x: np.ndarray, labels: np.ndarray, aux_weight: float) -> dict[str, Any]:
    """Runs a training step of a PyTorch network without dropout; returns "loss" and "tensors".

    "tensors" holds, under the network's names, the gradient of each parameter (zeros if the loss
    does not depend on it) and each statistic after the step, with biased variances as in Flax.
    """
    import torch
    from torch.nn import functional

    model = live.model.train()
    counts = {}  # values per statistic, n: PyTorch keeps n / (n - 1) times the variance

    def note(norm, args, output):
        counts[norm] = args[0].numel() // args[0].shape[1]

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
            keep, n = 1 - norm.momentum, counts[norm]
            value = keep * live.tensors[name] + (value - keep * live.tensors[name]) * (n - 1) / n
        result[name] = value
    order = {name: result[name] for name in live.tensors}
    return {"loss": float(loss.detach()), "tensors": order}
