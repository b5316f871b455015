"""Our convolution against stock Flax's and PyTorch's (`conv`), and inside `nn.cond` (`cond`)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import flags, torch_side
from experiments.benchmarks.report import Bars, Report, milliseconds
from flax_cnns import layers
from flax_cnns.analysis.timing import Comparison, compare, geometric_mean
from flax_cnns.errors import UserError

SLOWER = 1.05  # of stock nn.Conv's time: above it a shape is measured again


class Shape(NamedTuple):
    """Of a convolution: images [n size size inputs] and a window of k x k."""

    name: str
    n: int
    size: int
    inputs: int
    outputs: int
    groups: int
    k: int
    stride: int

    def __str__(self) -> str:
        groups = f" /{self.groups}" if self.groups > 1 else ""
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        window = f"{self.k}x{self.k}{stride}{groups}"
        return f"{self.n}x{self.size}x{self.size} {self.inputs}>{self.outputs} {window}"

    @property
    def padding(self) -> int:
        """On each side; patches side by side, as in ConvNeXt's stem, have none."""
        return 0 if self.stride >= self.k else self.k // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.k) // self.stride + 1

    @property
    def macs(self) -> int:
        window = self.k**2 * self.inputs // self.groups
        return self.n * self.out_size**2 * window * self.outputs


SHAPES = tuple(
    Shape(*row)
    for row in (
        # name                    n  size   in  out  groups k stride
        ("resnext", 16, 28, 128, 128, 32, 3, 1),
        ("depthwise", 16, 56, 144, 144, 144, 3, 1),
        # ImageNet stems
        ("stem7-224", 8, 224, 3, 64, 1, 7, 2),
        ("stem7-64", 32, 64, 3, 64, 1, 7, 2),
        ("stem3-224", 8, 224, 3, 32, 1, 3, 2),
        ("stem3-112", 8, 112, 32, 64, 1, 3, 1),  # ResNet-D, Inception
        ("stem4-224", 8, 224, 3, 96, 1, 4, 4),
        ("stem11-224", 8, 224, 3, 64, 1, 11, 4),  # AlexNet
        # ResNet-18 at 224: stages, and where they shrink
        ("resnet18-224-1", 8, 56, 64, 64, 1, 3, 1),
        ("resnet18-224-2", 8, 28, 128, 128, 1, 3, 1),
        ("resnet18-224-3", 8, 14, 256, 256, 1, 3, 1),
        ("resnet18-224-4", 8, 7, 512, 512, 1, 3, 1),
        ("resnet18-224-2-down", 8, 56, 64, 128, 1, 3, 2),
        ("resnet18-224-3-down", 8, 28, 128, 256, 1, 3, 2),
        ("resnet18-224-4-down", 8, 14, 256, 512, 1, 3, 2),
        ("resnet18-224-2-project", 8, 56, 64, 128, 1, 1, 2),
        # ResNet-18 at 64: down to maps of 2x2
        ("resnet18-64-1", 32, 16, 64, 64, 1, 3, 1),
        ("resnet18-64-2", 32, 8, 128, 128, 1, 3, 1),
        ("resnet18-64-3", 32, 4, 256, 256, 1, 3, 1),
        ("resnet18-64-4", 32, 2, 512, 512, 1, 3, 1),
        ("resnet18-64-2-down", 32, 16, 64, 128, 1, 3, 2),
        ("resnet18-64-4-down", 32, 4, 256, 512, 1, 3, 2),
        ("resnet18-32-4", 32, 1, 512, 512, 1, 3, 1),
        # ResNet-50: the 1x1 of its bottlenecks
        ("resnet50-224-1-narrow", 8, 56, 256, 64, 1, 1, 1),
        ("resnet50-224-1-widen", 8, 56, 64, 256, 1, 1, 1),
        ("resnet50-224-3-narrow", 8, 14, 1024, 256, 1, 1, 1),
        ("resnet50-224-4-widen", 8, 7, 512, 2048, 1, 1, 1),
        ("resnet50-224-3-project", 8, 28, 512, 1024, 1, 1, 2),
        # CIFAR: ResNet, wide ResNet, VGG
        ("cifar-stem", 128, 32, 3, 16, 1, 3, 1),
        ("cifar-resnet-1", 128, 32, 16, 16, 1, 3, 1),
        ("cifar-resnet-2", 128, 16, 32, 32, 1, 3, 1),
        ("cifar-resnet-3", 128, 8, 64, 64, 1, 3, 1),
        ("cifar-resnet-2-down", 128, 32, 16, 32, 1, 3, 2),
        ("wide-resnet-1", 16, 32, 160, 160, 1, 3, 1),
        ("wide-resnet-3", 16, 8, 640, 640, 1, 3, 1),
        ("vgg-cifar-5", 64, 2, 512, 512, 1, 3, 1),
        # LeNet and DenseNet
        ("lenet-c1", 64, 32, 1, 6, 1, 5, 1),
        ("lenet-c3", 64, 14, 6, 16, 1, 5, 1),
        ("densenet-3x3", 16, 14, 128, 32, 1, 3, 1),
        ("densenet-1x1", 16, 14, 512, 128, 1, 1, 1),
        # ResNeXt-50 32x4d
        ("resnext-96-1", 8, 24, 128, 128, 32, 3, 1),
        ("resnext-96-3", 8, 6, 512, 512, 32, 3, 1),
        ("resnext-96-4", 8, 3, 1024, 1024, 32, 3, 1),
        ("resnext-96-3-down", 8, 12, 512, 512, 32, 3, 2),
        ("groups2-alexnet", 8, 27, 96, 256, 2, 5, 1),  # AlexNet's second layer
        # MobileNet, EfficientNet: depthwise, and the 1x1 around it
        ("depthwise-112-down", 8, 112, 96, 96, 96, 3, 2),
        ("depthwise-14", 16, 14, 384, 384, 384, 3, 1),
        ("depthwise-7", 16, 7, 960, 960, 960, 3, 1),
        ("depthwise-3", 16, 3, 960, 960, 960, 3, 1),
        ("depthwise5-28", 8, 28, 240, 240, 240, 5, 1),
        ("depthwise5-14", 8, 14, 672, 672, 672, 5, 1),
        ("depthwise5-14-down", 8, 14, 672, 672, 672, 5, 2),
        ("depthwise7-14", 4, 14, 384, 384, 384, 7, 1),  # ConvNeXt
        ("mobilenet-expand", 16, 14, 64, 384, 1, 1, 1),
        ("mobilenet-project", 16, 14, 384, 64, 1, 1, 1),
    )
)

OURS, STOCK, TORCH = "ours", "nn.Conv", "torch"
COLUMNS = (
    *("shape", "pass", "ours", "GFLOP/s", STOCK, f"ours / {STOCK}"),
    *(TORCH, f"ours / {TORCH}"),
)


def add_conv(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", default="*", help="names of shapes, by commas; * and ? match")
    parser.add_argument("--dtype", type=flags.dtype, default="float32", help="or bfloat16")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")


def conv(args: argparse.Namespace, report: Report) -> None:
    """Forward, and forward with the gradients to input and kernel, over the shapes of networks.

    PyTorch (channels_last) takes part where it is installed. What is slower than 1.05 of nn.Conv is
    measured twice again and counts as slower if it is so in two of the three.
    """
    shapes = chosen(args.stage)
    torch = None if args.no_torch else torch_side.find_torch()
    if torch is None and not args.no_torch:
        report.say("PyTorch is not installed: without it")
    timing = dict(rounds=args.rounds, warmup=args.warmup, at_least=args.at_least)
    for shape in shapes:
        for passes in ("forward", "gradient"):
            candidates = {
                OURS: jax_conv(layers.Conv, shape, args.dtype, passes),
                STOCK: jax_conv(nn.Conv, shape, args.dtype, passes),
            }
            if torch is not None:
                candidates[TORCH] = torch_side.convolution(torch, shape, args.dtype, passes)
            runs = [compare(candidates, **timing)]
            if runs[0].ratio(OURS, STOCK).median > SLOWER:
                runs += [compare(candidates, **timing) for _ in range(2)]
            _add(report, shape, passes, runs, args.dtype)
    _summarize(report)


def chosen(names: str) -> list[Shape]:
    """The shapes whose names match one of `names`. Raises `UserError` where none does."""
    patterns = names.split(",")
    for pattern in patterns:
        if not any(fnmatchcase(shape.name, pattern) for shape in SHAPES):
            known = ", ".join(shape.name for shape in SHAPES)
            raise UserError(f"--stage: no shape is called {pattern!r}; there are {known}")
    return [s for s in SHAPES if any(fnmatchcase(s.name, pattern) for pattern in patterns)]


def jax_conv(kind: type[nn.Module], shape: Shape, dtype: str, passes: str) -> Callable[[], Any]:
    module = kind(
        shape.outputs,
        (shape.k, shape.k),
        strides=shape.stride,
        padding=shape.padding,
        feature_group_count=shape.groups,
        use_bias=False,
        dtype=dtype,
    )
    kernel, x, cotangent = (jnp.asarray(a, dtype) for a in arrays(shape))

    def forward(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return module.apply({"params": {"kernel": kernel}}, x)

    def gradient(kernel: jax.Array, x: jax.Array) -> Any:
        y, pull = jax.vjp(forward, kernel, x)
        return y, pull(cotangent)

    function = jax.jit({"forward": forward, "gradient": gradient}[passes])
    return lambda: function(kernel, x)


def arrays(shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kernel [k k inputs/groups outputs], images and the output's cotangent [n size size c]."""
    rng = np.random.default_rng(0)
    n, k = shape.n, shape.k
    sizes = (
        (k, k, shape.inputs // shape.groups, shape.outputs),
        (n, shape.size, shape.size, shape.inputs),
        (n, shape.out_size, shape.out_size, shape.outputs),
    )
    return tuple(rng.standard_normal(size, np.float32) for size in sizes)


def _add(report: Report, shape: Shape, passes: str, runs: list[Comparison], dtype: str) -> None:
    # The middle run by its ratio, where there are three.
    middle = sorted(runs, key=lambda run: run.ratio(OURS, STOCK).median)[len(runs) // 2]
    names = list(middle.seconds)
    ratios = {name: middle.ratio(OURS, name) for name in names[1:]}
    flops = 2 * shape.macs * (1 if passes == "forward" else 3)
    row = {
        **shape._asdict(),
        "dtype": dtype,
        "pass": passes,
        "seconds": {name: middle.median(name) for name in names},
        "ratios": {name: ratio._asdict() for name, ratio in ratios.items()},
        "runs": [run.as_dict() for run in runs],
    }
    cells = [shape.name, passes, milliseconds(middle.median(OURS))]
    cells.append(f"{flops / middle.median(OURS) / 1e9:,.0f}")
    for name in (STOCK, TORCH):
        present = name in ratios
        cells += [milliseconds(middle.median(name)), str(ratios[name])] if present else ["", ""]
    report.add(row, (f"{shape.name}: {shape}", *cells[1:]))


def _summarize(report: Report) -> None:
    for other in (STOCK, TORCH):
        for passes in ("forward", "gradient"):
            found = {
                row["name"]: row["ratios"][other]["median"]
                for row in report.rows
                if row["pass"] == passes and other in row["ratios"]
            }
            if not found:
                continue
            slower = sum(ratio > SLOWER for ratio in found.values())
            worst, best = max(found, key=found.get), min(found, key=found.get)
            report.summary.append(
                f"{passes}, ours / {other}: geometric mean "
                f"{geometric_mean(list(found.values())):.2f}, "
                f"{slower} of {len(found)} slower than {SLOWER}, "
                f"worst {found[worst]:.2f} ({worst}), best {found[best]:.3f} ({best})"
            )
    rows = [row for row in report.rows if row["pass"] == "gradient"]
    report.bars = Bars(
        [row["name"] for row in rows],
        {
            f"ours / {other}": [
                row["ratios"][other]["median"] if other in row["ratios"] else None for row in rows
            ]
            for other in (STOCK, TORCH)
        },
        "forward and gradient: ratio of times, below 1 is faster",
        reference=1.0,
    )


# ---------------------------------------------------------------------------- cond

COND_COLUMNS = ("branches", "skipped under nn.cond", "computed and masked", "ratio")


def add_cond(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=flags.positive, default=32)
    parser.add_argument(
        "--size", type=flags.positive, default=16, help="height and width of the maps"
    )
    parser.add_argument("--channels", type=flags.positive, default=128)
    parser.add_argument("--branches", type=flags.positive, default=12)


class Branches(nn.Module):
    """Residual 3x3 convolutions; branch i counts where gates[i]: x [N H W C] -> [N H W C]."""

    count: int
    skip: bool  # under nn.cond; else computed and multiplied by the gate

    @nn.compact
    def __call__(self, x: jax.Array, gates: jax.Array) -> jax.Array:
        for i in range(self.count):
            conv = layers.Conv(
                x.shape[-1],
                (3, 3),
                padding=1,
                use_bias=False,
                control_flow=self.skip,
                name=f"conv{i + 1}",
            )
            if not self.skip:
                x = x + gates[i] * nn.relu(conv(x))
            elif self.is_initializing():
                conv(x)
            else:
                x = nn.cond(
                    gates[i] > 0,
                    lambda _, x, conv=conv: x + nn.relu(conv(x)),
                    lambda _, x: x,
                    self,
                    x,
                )
        return x


def cond(args: argparse.Namespace, report: Report) -> None:
    """Stochastic depth per batch at rate 0.5, gradient step: branches skipped under nn.cond against
    branches computed and masked.

    Half of the gates are open in each call, another half every time, so that rounds are alike.
    """
    shape = (args.batch, args.size, args.size, args.channels)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(shape, np.float32))
    gates = np.arange(args.branches) % 2.0
    gates = [jnp.asarray(rng.permutation(gates), jnp.float32) for _ in range(args.rounds)]
    variables = Branches(args.branches, skip=False).init(jax.random.key(0), x, gates[0])

    def candidate(skip: bool) -> Callable[[], Any]:
        model, called = Branches(args.branches, skip), [0]

        def loss(variables: Any, x: jax.Array, gates: jax.Array) -> jax.Array:
            return jnp.mean(model.apply(variables, x, gates) ** 2)

        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

        def call() -> Any:
            called[0] += 1
            return gradient(variables, x, gates[called[0] % len(gates)])

        return call

    candidates = {"skipped": candidate(True), "masked": candidate(False)}
    found = compare(candidates, rounds=args.rounds, warmup=args.warmup, at_least=args.at_least)
    ratio = found.ratio("skipped", "masked")
    row = {"shape": shape, "branches": args.branches, "rate": 0.5, "ratio": ratio._asdict()}
    name = f"{args.branches} of {args.batch}x{args.size}x{args.size}x{args.channels}"
    report.add(
        row | found.as_dict(),
        (
            name,
            milliseconds(found.median("skipped")),
            milliseconds(found.median("masked")),
            str(ratio),
        ),
    )
    report.bars = Bars(
        ["skipped under nn.cond", "computed and masked"],
        {"": [1e3 * found.median("skipped"), 1e3 * found.median("masked")]},
        "milliseconds of a gradient step",
    )
