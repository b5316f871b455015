"""Times our convolution against Flax's and PyTorch's (`conv`), and inside `nn.cond` (`cond`)."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import flags, torch_side
from experiments.benchmarks.report import Bars, BenchmarkReport, format_milliseconds
from experiments.benchmarks.shapes import SHAPES, ConvShape, make_arrays
from flax_cnns import layers
from flax_cnns.analysis.timing import Comparison, geometric_mean, time_candidates
from flax_cnns.errors import UserError

MAX_TIME_RATIO = 1.05  # time relative to nn.Conv; a slower shape is measured again

OURS, STOCK, TORCH = "ours", "nn.Conv", "torch"
COLUMNS = (
    *("shape", "pass", "ours", "GFLOP/s", STOCK, f"ours / {STOCK}"),
    *(TORCH, f"ours / {TORCH}"),
)


def add_conv_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stage", default="*", help="names of shapes, separated by commas; * and ? are wildcards"
    )
    parser.add_argument(
        "--dtype", type=flags.parse_dtype, default="float32", help="float32 or bfloat16"
    )
    parser.add_argument("--no-torch", action="store_true", help="do not measure PyTorch")


def measure_convolutions(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Times the forward pass, with and without gradients, for shapes of networks.

    Gradients are those with respect to input and kernel. PyTorch (channels_last) is measured if it
    is installed. A shape that takes more than 1.05 times as long as nn.Conv is measured twice more,
    and the measurement with the median ratio counts.
    """
    shapes = select_shapes(args.stage)
    torch = None if args.no_torch else torch_side.find_torch()
    if torch is None and not args.no_torch:
        report.print_line("PyTorch is not installed, so it is left out")
    timing = dict(rounds=args.rounds, warmup=args.warmup, at_least=args.at_least)
    for shape in shapes:
        for passes in ("forward", "gradient"):
            candidates = {
                OURS: make_jax_convolution(layers.Conv, shape, args.dtype, passes),
                STOCK: make_jax_convolution(nn.Conv, shape, args.dtype, passes),
            }
            if torch is not None:
                candidates[TORCH] = torch_side.make_torch_convolution(
                    torch, shape, args.dtype, passes
                )
            runs = [time_candidates(candidates, **timing)]
            if runs[0].ratio(OURS, STOCK).median > MAX_TIME_RATIO:
                runs += [time_candidates(candidates, **timing) for _ in range(2)]
            _add(report, shape, passes, runs, args.dtype)
    _summarize(report)


def select_shapes(names: str) -> list[ConvShape]:
    """Returns the shapes whose name matches a pattern in `names`.

    Raises `UserError` if a pattern matches no shape.
    """
    patterns = names.split(",")
    for pattern in patterns:
        if not any(fnmatchcase(shape.name, pattern) for shape in SHAPES):
            known = ", ".join(shape.name for shape in SHAPES)
            raise UserError(f"--stage: no shape matches {pattern!r}; the shapes are {known}")
    return [s for s in SHAPES if any(fnmatchcase(s.name, pattern) for pattern in patterns)]


def make_jax_convolution(
    kind: type[nn.Module], shape: ConvShape, dtype: str, passes: str
) -> Callable[[], Any]:
    """Returns a call of the convolution layer `kind`; `passes` is "forward" or "gradient"."""
    module = kind(
        shape.outputs,
        (shape.k, shape.k),
        strides=shape.stride,
        padding=shape.padding,
        feature_group_count=shape.groups,
        use_bias=False,
        dtype=dtype,
    )
    kernel, x, cotangent = (jnp.asarray(a, dtype) for a in make_arrays(shape))

    def forward(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return module.apply({"params": {"kernel": kernel}}, x)

    def gradient(kernel: jax.Array, x: jax.Array) -> Any:
        y, backward = jax.vjp(forward, kernel, x)
        return y, backward(cotangent)

    function = jax.jit({"forward": forward, "gradient": gradient}[passes])
    return lambda: function(kernel, x)


def _add(
    report: BenchmarkReport, shape: ConvShape, passes: str, runs: list[Comparison], dtype: str
) -> None:
    # Of three runs, the one with the median ratio.
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
    cells = [shape.name, passes, format_milliseconds(middle.median(OURS))]
    cells.append(f"{flops / middle.median(OURS) / 1e9:,.0f}")
    for name in (STOCK, TORCH):
        present = name in ratios
        cells += (
            [format_milliseconds(middle.median(name)), str(ratios[name])] if present else ["", ""]
        )
    report.add(row, (f"{shape.name}: {shape}", *cells[1:]))


def _summarize(report: BenchmarkReport) -> None:
    for other in (STOCK, TORCH):
        for passes in ("forward", "gradient"):
            ratios = {
                row["name"]: row["ratios"][other]["median"]
                for row in report.rows
                if row["pass"] == passes and other in row["ratios"]
            }
            if not ratios:
                continue
            slower = sum(ratio > MAX_TIME_RATIO for ratio in ratios.values())
            worst, best = max(ratios, key=ratios.__getitem__), min(ratios, key=ratios.__getitem__)
            report.summary.append(
                f"{passes}, ours / {other}: geometric mean "
                f"{geometric_mean(list(ratios.values())):.2f}, "
                f"{slower} of {len(ratios)} slower than {MAX_TIME_RATIO}, "
                f"worst {ratios[worst]:.2f} ({worst}), best {ratios[best]:.3f} ({best})"
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
        "forward and gradient: ratio of times (below 1: ours is faster)",
        reference=1.0,
    )


# ---------------------------------------------------------------------------- cond

COND_COLUMNS = ("branches", "skipped under nn.cond", "computed and masked", "ratio")


def add_cond_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=flags.parse_positive_int, default=32)
    parser.add_argument(
        "--size", type=flags.parse_positive_int, default=16, help="height and width of the maps"
    )
    parser.add_argument("--channels", type=flags.parse_positive_int, default=128)
    parser.add_argument("--branches", type=flags.parse_positive_int, default=12)


class Branches(nn.Module):
    """Residual 3x3 convolutions; branch i is added if gates[i] is 1: x [N H W C] -> [N H W C]."""

    count: int
    skip: bool  # skip branches by nn.cond, or compute them and multiply by the gate

    @nn.compact
    def __call__(self, x: jax.Array, gates: jax.Array) -> jax.Array:
        for i in range(self.count):
            conv = layers.Conv(
                x.shape[-1],
                (3, 3),
                padding=1,
                use_bias=False,
                name=f"conv{i + 1}",
            )
            if not self.skip:
                x = x + gates[i] * nn.relu(conv(x))
            elif self.is_initializing():
                conv(x)
            else:

                def add(_: nn.Module, x: jax.Array, conv: nn.Module = conv) -> jax.Array:
                    with layers.inside_control_flow():
                        return x + nn.relu(conv(x))

                x = nn.cond(gates[i] > 0, add, lambda _, x: x, self, x)
        return x


def measure_cond(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Times stochastic depth per batch at rate 0.5: branches skipped by nn.cond, or masked.

    A gradient step is timed. In each call, a random half of the gates is open, so that all rounds
    do the same amount of work.
    """
    shape = (args.batch, args.size, args.size, args.channels)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(shape, np.float32))
    half = np.arange(args.branches) % 2.0
    gates = [jnp.asarray(rng.permutation(half), jnp.float32) for _ in range(args.rounds)]
    variables = Branches(args.branches, skip=False).init(jax.random.key(0), x, gates[0])

    def candidate(skip: bool) -> Callable[[], Any]:
        model, counter = Branches(args.branches, skip), itertools.count(1)

        def loss(variables: Any, x: jax.Array, gates: jax.Array) -> jax.Array:
            return jnp.mean(model.apply(variables, x, gates) ** 2)

        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

        def call() -> Any:
            return gradient(variables, x, gates[next(counter) % len(gates)])

        return call

    candidates = {"skipped": candidate(True), "masked": candidate(False)}
    times = time_candidates(
        candidates, rounds=args.rounds, warmup=args.warmup, at_least=args.at_least
    )
    ratio = times.ratio("skipped", "masked")
    row = {"shape": shape, "branches": args.branches, "rate": 0.5, "ratio": ratio._asdict()}
    name = f"{args.branches} of {args.batch}x{args.size}x{args.size}x{args.channels}"
    report.add(
        row | times.as_dict(),
        (
            name,
            format_milliseconds(times.median("skipped")),
            format_milliseconds(times.median("masked")),
            str(ratio),
        ),
    )
    report.bars = Bars(
        ["skipped under nn.cond", "computed and masked"],
        {"": [1e3 * times.median("skipped"), 1e3 * times.median("masked")]},
        "milliseconds per gradient step",
    )
