"""Trains the recipe of a config by flax_cnns, and the same recipe by PyTorch without its compiler.

The network is airbench94, with whitening, identity filters, alternating flips, shifts, label
smoothing, Muon and a cosine schedule. PyTorch's Muon is the author's form
(https://kellerjordan.github.io/posts/muon): its momentum is not corrected for its start at 0, as
Optax's is.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns import layers
from flax_cnns.evaluation.exact import summarize
from flax_cnns.runs import build
from flax_cnns.runs.plan import RunPlan
from flax_cnns.runs.start import MAX_WHITEN_IMAGES, make_initial_variables
from flax_cnns.train import loop, parallel
from flax_cnns.train.state import TrainState


class Epoch(NamedTuple):
    """The state of a run after an epoch."""

    accuracy: float  # of the test split
    seconds: float  # of training so far, without evaluations and compilation
    compilation: float  # seconds of the first call of the training step; 0 for PyTorch


def train_ours(config: Any, epochs: int) -> Iterator[Epoch]:
    """Trains by flax_cnns; yields after each epoch. `config.train.duration` must be `epochs`."""
    plan = RunPlan(build.build_components(config))
    components = plan.components
    variables = components.stack_if_scanned(make_initial_variables(plan)[0])
    optimizer = plan.make_optimizer(variables)
    state = TrainState.create(variables, optimizer.init(variables["params"]))
    state = parallel.replicate(state, components.mesh)
    key = parallel.replicate(build.make_training_key(config), components.mesh)
    step = build.make_train_step(components, optimizer, plan.steps_per_epoch)
    steps, seconds = plan.total_steps // epochs, 0.0
    with contextlib.closing(build.train_batches(components)) as batches:
        first = next(batches)
        began = time.perf_counter()
        jax.block_until_ready(step(jax.tree.map(jnp.copy, state), first, key))
        compilation = time.perf_counter() - began
    with contextlib.closing(loop.prefetch(build.train_batches(components))) as batches:
        for _ in range(epochs):
            began = time.perf_counter()
            for _ in range(steps):
                state, _ = step(state, next(batches), key)
            jax.block_until_ready(state)
            seconds += time.perf_counter() - began
            accuracy = summarize(components.evaluate(state.variables, "test"))["accuracy"]
            yield Epoch(float(accuracy), seconds, compilation)


def train_torch(config: Any, epochs: int, threads: int = 2) -> Iterator[Epoch]:
    """Trains by PyTorch in eager mode, channels_last, on `threads` threads; yields after each
    epoch."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    dataset = build.build_components(config).dataset
    train, test = dataset.splits["train"], dataset.splits["test"]
    mean, std = (np.asarray(v, np.float32) for v in (dataset.mean, dataset.std))
    shift, scale = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))

    def normalize(images: Any) -> Any:  # u8 [n H W C] -> f32 [n C H W]
        images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
        return (images / 255 - shift) / scale

    images, test_images = (torch.tensor(np.asarray(s.images[:])) for s in (train, test))
    labels, test_labels = (torch.tensor(np.asarray(s.labels)).long() for s in (train, test))
    order = torch.randperm(len(images))[:MAX_WHITEN_IMAGES]
    whitened = (images[order].numpy() / np.float32(255) - mean) / std
    kernel = layers.make_whitening_kernel(whitened.astype(np.float32))
    net = make_torch_network(
        config.model.widths, dataset.image_shape[-1], dataset.num_classes, kernel
    )
    update = make_torch_optimizer(net, config.optimizer.momentum)
    pad, size = config.data.augment.pad_crop, config.data.batch_size
    padded = torch.nn.functional.pad(images, (0, 0, pad, pad, pad, pad))
    height, width = images.shape[1:3]
    mirrored = torch.rand(len(images)) < 0.5  # in the first epoch; then each image alternates
    steps, seconds = len(images) // size, 0.0
    for epoch in range(epochs):
        began = time.perf_counter()
        net.train()
        order = torch.randperm(len(images))
        for step in range(steps):
            rows = order[step * size : (step + 1) * size]
            top, left = torch.randint(0, 2 * pad + 1, (2, size, 1))
            ys, xs = top + torch.arange(height), left + torch.arange(width)
            batch = padded[rows[:, None, None], ys[:, :, None], xs[:, None, :]]
            flips = (mirrored[rows] ^ bool(epoch % 2)).view(-1, 1, 1, 1)
            batch = normalize(torch.where(flips, batch.flip(2), batch))
            loss = torch.nn.functional.cross_entropy(
                net(batch), labels[rows], label_smoothing=config.mix.label_smoothing
            )
            net.zero_grad()
            loss.backward()
            share = (epoch * steps + step) / (epochs * steps)
            update(config.schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * share)))
        seconds += time.perf_counter() - began
        net.eval()
        right = 0
        with torch.inference_mode():
            for start in range(0, len(test_images), 1000):
                batch = normalize(test_images[start : start + 1000])
                probabilities = (net(batch).softmax(1) + net(batch.flip(3)).softmax(1)) / 2
                right += int((probabilities.argmax(1) == test_labels[start : start + 1000]).sum())
        yield Epoch(right / len(test_images), seconds, 0.0)


SIDES: dict[str, Callable[[Any, int], Iterator[Epoch]]] = {
    "flax_cnns": train_ours,
    "PyTorch": train_torch,
}


def make_torch_network(widths: Any, channels: int, classes: int, kernel: np.ndarray) -> Any:
    """Returns airbench94 as a PyTorch module, with `kernel` [2 2 C 8C] frozen in its first
    layer."""
    import torch
    from torch import nn

    def conv(inputs: int, outputs: int) -> Any:
        layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        with torch.no_grad():
            nn.init.dirac_(layer.weight[:inputs])
        return layer

    def norm(width: int) -> Any:
        layer = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
        layer.weight.requires_grad_(False)
        return layer

    whiten = nn.Conv2d(channels, kernel.shape[-1], 2)
    with torch.no_grad():
        whiten.weight.copy_(torch.tensor(kernel.transpose(3, 2, 0, 1)))
    whiten.weight.requires_grad_(False)
    parts, inputs = [whiten, nn.GELU()], kernel.shape[-1]
    for width in widths:
        parts += [conv(inputs, width), nn.MaxPool2d(2), norm(width), nn.GELU()]
        parts += [conv(width, width), norm(width), nn.GELU()]
        inputs = width

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(inputs, classes, bias=False)

        def forward(self, x: Any) -> Any:
            return self.linear(x.amax((2, 3))) / 9

    return nn.Sequential(*parts, Head()).to(memory_format=torch.channels_last)


def make_torch_optimizer(net: Any, momentum: float) -> Callable[[float], None]:
    """Returns `update(rate)`: Muon for convolution kernels, SGD for the rest, both Nesterov."""
    import torch

    learning = [p for p in net.parameters() if p.requires_grad]
    buffers = [torch.zeros_like(p) for p in learning]

    @torch.no_grad()
    def update(rate: float) -> None:
        for weight, buffer in zip(learning, buffers):
            buffer.mul_(momentum).add_(weight.grad)
            change = weight.grad.add(buffer, alpha=momentum)
            if weight.ndim == 4:
                matrix = orthogonalize(change.reshape(len(change), -1))
                matrix *= max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
                change = matrix.view_as(weight)
            weight.add_(change, alpha=-rate)

    return update


def orthogonalize(matrix: Any, steps: int = 5) -> Any:
    """Newton-Schulz iteration of Muon on a PyTorch matrix: its singular values become about 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    high = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if high else matrix
    x = x / (x.norm() + 1e-8)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if high else x
