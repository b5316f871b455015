"""PyTorch's side of the comparisons, and `vs-torch`. Imports PyTorch only when it is used."""

from __future__ import annotations

import argparse
import functools
import importlib.util
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
from flax_cnns.models.registry import init_variables

INSTALL = 'PyTorch is not installed: pip install -e ".[bench]" brings torch, torchvision and timm'


def find_torch() -> Any | None:
    """Returns PyTorch, configured for speed; None if it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    torch.backends.cudnn.benchmark = True
    # As XLA does: float32 matrix products in TF32 on the tensor cores.
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    return torch


def import_torch() -> Any:
    """Returns PyTorch. Raises `UserError` if it is not installed."""
    torch = find_torch()
    if torch is None:
        raise UserError(INSTALL)
    return torch


def find_torch_device(torch: Any) -> str:
    """Returns PyTorch's name of JAX's device. Raises `UserError` if PyTorch cannot use it."""
    if jax.default_backend() == "cpu":
        return "cpu"
    if jax.default_backend() == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise UserError(
        f"JAX runs on {jax.default_backend()}, which this PyTorch ({torch.__version__}) cannot "
        "use; add --device=cpu to compare them on the CPU"
    )


def make_wait(torch: Any, device: str) -> Callable[[], None]:
    """Returns the function that `timing.time_candidates` calls to wait for the device."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


@functools.cache  # operators can be declared only once
def import_torchvision() -> Any:
    """Imports torchvision, even if its compiled operators do not load with a CPU build of torch.

    torchvision's classification networks do not use the operators, but its import needs two of them
    to be declared. Raises `UserError` if torchvision is not installed.
    """
    torch = import_torch()
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise UserError(f"torchvision is not installed; {INSTALL.partition(': ')[2]}")
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except (OSError, RuntimeError):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)  # the declarations live as long as the library
    import torchvision

    return torchvision


_DECLARED: list[Any] = []


def create_torch_network(name: str, classes: int) -> Any:
    """Returns torchvision's network `name`, or timm's. Raises `UserError` if neither has it."""
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
    """Returns a call of `conv2d` in channels_last; `passes` is "forward" or "gradient"."""
    device = find_torch_device(torch)

    def tensor(array: np.ndarray, order: tuple[int, ...]) -> Any:
        tensor = torch.from_numpy(np.ascontiguousarray(array.transpose(order)))
        return tensor.to(device, getattr(torch, dtype), memory_format=torch.channels_last)

    kernel, images, cotangent = make_arrays(shape)
    w, x, y = tensor(kernel, (3, 2, 0, 1)), *(tensor(a, (0, 3, 1, 2)) for a in (images, cotangent))
    options = dict(stride=shape.stride, padding=shape.padding, groups=shape.groups)
    wait = make_wait(torch, device)

    def forward() -> Callable[[], None]:
        with torch.no_grad():
            torch.nn.functional.conv2d(x, w, **options)
        return wait

    def gradient() -> Callable[[], None]:
        out = torch.nn.functional.conv2d(x.requires_grad_(), w.requires_grad_(), **options)
        torch.autograd.grad(out, (x, w), y)
        return wait

    return {"forward": forward, "gradient": gradient}[passes]


# ---------------------------------------------------------------------------- vs-torch

OTHERS = ("torch", "compiled", "nn.Conv")
COLUMNS = ("network", "batch", "ours", *(c for name in OTHERS for c in (name, f"ours / {name}")))


def add_vs_torch_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="resnet18", help="names of networks, separated by commas"
    )
    parser.add_argument("--batch", type=parse_positive_int, default=32)
    parser.add_argument(
        "--size", type=int, default=0, help="image height and width; 0: the network's"
    )
    text = "bfloat16 (AMP) or float32; if not given, bfloat16 on a GPU and float32 on a CPU"
    parser.add_argument("--dtype", type=parse_dtype, help=text)
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile")
    parser.add_argument(
        "--compile-mode", default="default", help="mode of torch.compile, such as max-autotune"
    )
    parser.add_argument(
        "--stock", action="store_true", help="also measure our network with nn.Conv"
    )


def compare_with_torch(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Times our training step against that of torchvision's or timm's network of the same name.

    Both use SGD with momentum, cross-entropy, and the same batch of uint8 images, which is on the
    device and is normalized there. PyTorch uses channels_last, and autocast if the dtype is
    bfloat16.
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
                f"{name} has {ours_count:,} parameters here and {their_count:,} in PyTorch, so the "
                "networks differ"
            )
        report.print_line(f"{name}: compiling")
        trainee = training.Trainee(model, args.batch, devices=jax.devices()[:1])
        batch = training.make_examples(args.batch, model.input_size, model.num_classes)
        candidates = {
            "ours": trainee.make_train_call(),
            "torch": make_torch_step(torch, theirs, batch, device, args.dtype),
        }
        if args.compile:
            compiled = torch.compile(
                create_torch_network(name, model.num_classes), mode=args.compile_mode
            )
            candidates["compiled"] = make_torch_step(torch, compiled, batch, device, args.dtype)
        if args.stock:
            with training.replace_convolution():
                stock = training.Trainee(model, args.batch, devices=jax.devices()[:1])
                candidates["nn.Conv"] = stock.make_train_call(stock.compile()[0])
        times = time_candidates(
            candidates, rounds=args.rounds, warmup=args.warmup, at_least=args.at_least
        )
        others = [other for other in candidates if other != "ours"]
        ratios = {other: times.ratio("ours", other) for other in others}
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
            **times.as_dict(),
        }
        cells = [
            name,
            f"{args.batch} x {model.input_size[0]}",
            format_milliseconds(times.median("ours")),
        ]
        for other in OTHERS:
            present = other in ratios
            cells += (
                [format_milliseconds(times.median(other)), str(ratios[other])]
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
        f"training, images per second, {args.dtype} on {device}",
    )


def make_torch_step(
    torch: Any, model: Any, batch: dict[str, np.ndarray], device: str, dtype: str
) -> Callable[[], Any]:
    """Returns a call of a training step like `training.Trainee`'s, in channels_last.

    It uses autocast if the dtype is bfloat16.
    """
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
            logits = getattr(logits, "logits", logits)  # Inception also returns auxiliary logits
            loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        return wait

    return step


def make_torch_inference(
    torch: Any, model: Any, batch: dict[str, np.ndarray], device: str
) -> Callable[[], Any]:
    """Returns a call of the forward pass in evaluation mode, in channels_last and float32."""
    model = model.to(device, memory_format=torch.channels_last).eval()
    images = torch.from_numpy(np.ascontiguousarray(batch["image"].transpose(0, 3, 1, 2)))
    images = images.to(device, memory_format=torch.channels_last)
    wait = make_wait(torch, device)

    def infer() -> Callable[[], None]:
        with torch.no_grad():
            model(images.float() / 255)
        return wait

    return infer
