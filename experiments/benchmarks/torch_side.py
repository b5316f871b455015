"""PyTorch's side of the comparisons, and `vs-torch`. PyTorch is imported only where it is used."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import unittest.mock
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import training
from experiments.benchmarks.flags import parse_dtype, parse_positive_int
from experiments.benchmarks.report import Bars, BenchmarkReport, format_milliseconds
from experiments.benchmarks.shapes import ConvShape, make_arrays
from flax_cnns import tree as pytree
from flax_cnns.analysis.timing import time_candidates
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.layers.conv import module as conv_module
from flax_cnns.models.registry import init_variables

INSTALL = 'PyTorch is not installed: pip install -e ".[bench]" brings torch, torchvision and timm'


def find_torch() -> Any | None:
    """PyTorch, set up as fast as it goes, or None where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    torch.backends.cudnn.benchmark = True
    # As XLA does: float32 products on the tensor cores in TF32.
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    return torch


def import_torch() -> Any:
    torch = find_torch()
    if torch is None:
        raise UserError(INSTALL)
    return torch


def find_torch_device(torch: Any) -> str:
    """PyTorch's name of the device that JAX uses. Raises `UserError` where it cannot."""
    if jax.default_backend() == "cpu":
        return "cpu"
    if jax.default_backend() == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise UserError(
        f"JAX runs on {jax.default_backend()}, which this PyTorch ({torch.__version__}) cannot "
        "use; --device=cpu compares the two on the CPU"
    )


def make_wait(torch: Any, device: str) -> Callable[[], None]:
    """What `timing.compare` waits with."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


@functools.cache  # what it declares can be declared once
def import_torchvision() -> Any:
    """torchvision, beside a CPU build of torch too, where its compiled operators do not load.

    Its classification networks use none of them, but importing it asks for two. Raises `UserError`
    where it is not installed.
    """
    torch = import_torch()
    found = importlib.util.find_spec("torchvision")
    if found is None:
        raise UserError(f"torchvision is not installed; {INSTALL.partition(': ')[2]}")
    try:
        for library in Path(found.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except (OSError, RuntimeError):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)  # the declarations go when it does
    import torchvision

    return torchvision


_DECLARED: list[Any] = []


def create_torch_network(name: str, classes: int) -> Any:
    """torchvision's network of that name, else timm's. Raises `UserError` where neither has it."""
    models = import_torchvision().models
    if name in models.list_models(module=models):
        return models.get_model(name, weights=None, num_classes=classes)
    known = set(models.list_models(module=models))
    if importlib.util.find_spec("timm") is not None:
        import timm

        if timm.is_model(name):
            return timm.create_model(name, num_classes=classes)
        known |= set(timm.list_models())
    raise UserError(f"neither torchvision nor timm has {name!r}{did_you_mean(name, known)}")


# ---------------------------------------------------------------------------- one convolution


def make_torch_convolution(
    torch: Any, shape: ConvShape, dtype: str, passes: str
) -> Callable[[], Any]:
    """`conv2d` in channels_last, without or with the gradients to input and kernel."""
    device = find_torch_device(torch)

    def tensor(array: np.ndarray, order: tuple[int, ...]) -> Any:
        tensor = torch.from_numpy(np.ascontiguousarray(array.transpose(order)))
        return tensor.to(device, getattr(torch, dtype), memory_format=torch.channels_last)

    kernel, images, cotangent = make_arrays(shape)
    w, x, y = tensor(kernel, (3, 2, 0, 1)), *(tensor(a, (0, 3, 1, 2)) for a in (images, cotangent))
    given = dict(stride=shape.stride, padding=shape.padding, groups=shape.groups)
    wait = make_wait(torch, device)

    def forward() -> Callable[[], None]:
        with torch.no_grad():
            torch.nn.functional.conv2d(x, w, **given)
        return wait

    def gradient() -> Callable[[], None]:
        out = torch.nn.functional.conv2d(x.requires_grad_(), w.requires_grad_(), **given)
        torch.autograd.grad(out, (x, w), y)
        return wait

    return {"forward": forward, "gradient": gradient}[passes]


# ---------------------------------------------------------------------------- vs-torch

OTHERS = ("torch", "compiled", "nn.Conv")
COLUMNS = ("network", "batch", "ours", *(c for name in OTHERS for c in (name, f"ours / {name}")))


def add_vs_torch_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet18", help="registered networks, by commas")
    parser.add_argument("--batch", type=parse_positive_int, default=32)
    parser.add_argument("--size", type=int, default=0, help="height and width; 0: the network's")
    text = "bfloat16 (AMP) or float32; if not given, the former on a GPU, the latter on a CPU"
    parser.add_argument("--dtype", type=parse_dtype, help=text)
    parser.add_argument("--compile", action="store_true", help="torch.compile, beside eager")
    parser.add_argument("--compile-mode", default="default", help="of torch.compile: max-autotune")
    parser.add_argument("--stock", action="store_true", help="our network on nn.Conv, beside it")


def compare_with_torch(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Our training step against torchvision's or timm's network of the same name, in turn.

    Both: the same batch of uint8 images on the device, normalized there, SGD with momentum,
    cross-entropy. PyTorch: channels_last, autocast where the dtype is bfloat16.
    """
    torch = import_torch()
    device = find_torch_device(torch)
    args.dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    for name in args.model.split(","):
        model = training.make_network(name, args)
        theirs = create_torch_network(name, model.num_classes)
        shapes = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
        ours_count = pytree.count(shapes["params"])
        their_count = sum(parameter.numel() for parameter in theirs.parameters())
        if ours_count != their_count:
            raise UserError(
                f"{name} has {ours_count:,} parameters here and {their_count:,} in PyTorch: they "
                "are not the same network"
            )
        report.print_line(f"{name}: compiling")
        trainee = training.Trainee(model, args.batch, devices=jax.devices()[:1])
        batch = training.make_examples(args.batch, model.input_size, model.num_classes)
        candidates = {
            "ours": trainee.make_train_call(),
            "torch": _torch_step(torch, theirs, batch, device, args.dtype),
        }
        if args.compile:
            compiled = torch.compile(
                create_torch_network(name, model.num_classes), mode=args.compile_mode
            )
            candidates["compiled"] = _torch_step(torch, compiled, batch, device, args.dtype)
        if args.stock:  # what nn.Conv calls, in the place of ours, while the step is traced
            library = jax.lax.conv_general_dilated
            with unittest.mock.patch.object(conv_module, "conv_general_dilated", library):
                stock = training.Trainee(model, args.batch, devices=jax.devices()[:1])
                candidates["nn.Conv"] = stock.make_train_call(stock.compile()[0])
        found = time_candidates(
            candidates, rounds=args.rounds, warmup=args.warmup, at_least=args.at_least
        )
        others = [other for other in candidates if other != "ours"]
        ratios = {other: found.ratio("ours", other) for other in others}
        row = {
            "model": name,
            "batch": args.batch,
            "input_size": list(model.input_size),
            "dtype": args.dtype,
            "device": device,
            "torch_threads": torch.get_num_threads(),
            "params": ours_count,
            "compile_mode": args.compile_mode if args.compile else None,
            "ratios": {other: ratio._asdict() for other, ratio in ratios.items()},
            **found.as_dict(),
        }
        cells = [
            name,
            f"{args.batch} x {model.input_size[0]}",
            format_milliseconds(found.median("ours")),
        ]
        for other in OTHERS:
            present = other in ratios
            cells += (
                [format_milliseconds(found.median(other)), str(ratios[other])]
                if present
                else ["", ""]
            )
        report.add(row, tuple(cells))
    report.bars = Bars(
        [row["model"] for row in report.rows],
        {
            label: [
                row["batch"] / row[name]["median"] if name in row else None for row in report.rows
            ]
            for name, label in (
                *(("ours", "flax_cnns"), ("torch", "PyTorch eager")),
                *(("compiled", "torch.compile"), ("nn.Conv", "flax_cnns on nn.Conv")),
            )
        },
        f"training, images a second, {args.dtype} on {device}",
    )


def _torch_step(
    torch: Any, model: Any, batch: dict[str, np.ndarray], device: str, dtype: str
) -> Callable[[], Any]:
    model = model.to(device, memory_format=torch.channels_last).train()
    images = torch.from_numpy(np.ascontiguousarray(batch["image"].transpose(0, 3, 1, 2)))
    images = images.to(device, memory_format=torch.channels_last)
    labels = torch.from_numpy(batch["label"]).long().to(device)
    channels = images.shape[1]

    def per_channel(values: tuple[float, ...]) -> Any:
        return torch.tensor(values[:channels], device=device).view(1, -1, 1, 1) * 255

    mean, std = per_channel(training.MEAN), per_channel(training.STD)
    optimizer = torch.optim.SGD(
        model.parameters(), training.RATE, training.MOMENTUM, fused=device == "cuda"
    )
    amp = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    wait = make_wait(torch, device)

    def step() -> Callable[[], None]:
        x = (images.float() - mean) / std
        optimizer.zero_grad(set_to_none=True)
        with amp:
            logits = model(x)
            logits = getattr(logits, "logits", logits)  # Inception's come with auxiliary ones
            loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        return wait

    return step
