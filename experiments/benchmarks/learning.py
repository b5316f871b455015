"""Checks that networks learn in a few hundred steps on scikit-learn's digits (`learn`)."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmarks.flags import parse_positive_int
from experiments.benchmarks.report import Bars, BenchmarkReport
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.models import nas


class LearningCase(NamedTuple):
    """How a network is trained: by Adam, with a rate that falls to 0 by a cosine."""

    size: int  # of the images: one channel, enlarged from 8x8
    steps: int
    rate: float = 1e-3  # at the start
    fields: dict[str, Any] = {}  # noqa: RUF012 - fields that make the network train in a minute


_GOOGLENET = (  # table 1 with four of its nine modules, among them those with auxiliary heads
    ("mixed3a", (64, 96, 128, 16, 32, 32)),
    ("pool3", None),
    ("mixed4a", (192, 96, 208, 16, 48, 64)),
    ("mixed4d", (112, 144, 288, 32, 64, 64)),
    ("pool4", None),
    ("mixed5b", (384, 192, 384, 48, 128, 128)),
)
CASES = {  # one variant of each family
    "lenet5": LearningCase(32, 200, 2e-3),
    "lenet5_original": LearningCase(32, 200, 2e-3),
    "alexnet_2gpu": LearningCase(67, 200, 3e-4, dict(hidden=256)),
    "zfnet_fig3": LearningCase(64, 200, 3e-4, dict(hidden=256)),
    # pool=1, because the last maps are 1x1: by default, fc6 would see 49 copies of them.
    "vgg11_bn": LearningCase(
        32, 150, 1e-3, dict(widths=(16, 32, 64, 128, 128), pool=1, hidden=(256, 256))
    ),
    "nin_cifar10": LearningCase(16, 300, 3e-4),
    "all_cnn_c": LearningCase(16, 300, 3e-4),
    "dsn": LearningCase(16, 300, 3e-4),
    "highway_19": LearningCase(16, 250, 1e-3),
    "airbench94": LearningCase(16, 150, 1e-2, dict(widths=(16, 32, 32))),
    "simpnet_slim_300k": LearningCase(16, 100, fields=dict(momentum=0.9)),
    "googlenet_tv_aux": LearningCase(64, 100, fields=dict(table=_GOOGLENET)),
    "inception_v3": LearningCase(75, 80, fields=dict(pool_projs=(32,), widths=(128,))),
    "inception_v4": LearningCase(75, 80, fields=dict(depths=(1, 1, 1))),
    "inception_resnet_v2": LearningCase(75, 80, fields=dict(depths=(1, 1, 1))),
    "squeezenet1_1_c10": LearningCase(64, 150, 3e-4),
    "deck003_cifar100_example": LearningCase(32, 150),
    "fractalnet_20_droppath": LearningCase(
        16, 300, 4e-3, fields=dict(widths=(16, 32, 64), dropout=(0, 0.1, 0.2))
    ),
    "convnext_tiny": LearningCase(32, 150, fields=dict(depths=(1, 1, 2), width=24, drop_path=0.1)),
    "vit_b_16": LearningCase(
        16, 400, fields=dict(patch=4, width=96, depth=3, heads=3, dropout=0.1, drop_path=0.1)
    ),
    "cifar_resnet20": LearningCase(16, 100),
    "shakeshake_26_2x32d": LearningCase(16, 100, fields=dict(depths=(2, 2, 2), width=16)),
    "pyramidnet_110_a270_shakedrop": LearningCase(16, 200, fields=dict(depth=20, alpha=48)),
    "rir_18": LearningCase(16, 100),
    "resnet18": LearningCase(64, 80, fields=dict(width=16)),
    "efficientnet_b0": LearningCase(
        16, 150, 2e-3, dict(width_mult=0.5, depth_mult=0.5, strides=(1, 1, 2, 1, 2, 1, 1, 1))
    ),
    "resnext29_8x64d": LearningCase(16, 80, fields=dict(depths=(1, 1, 1), width=16)),
    "seresnet50": LearningCase(64, 80, fields=dict(depths=(1, 1, 1, 1), width=16)),
    "resnetv2_50": LearningCase(64, 80, fields=dict(depths=(1, 1, 1, 1), width=16)),
    "cifar_preact110": LearningCase(16, 100, fields=dict(depths=(3, 3, 3))),
    "wrn_16_4": LearningCase(16, 100, fields=dict(width_mult=2, dropout=0.3)),
    "densenet_bc_100_12": LearningCase(16, 120, 5e-3, dict(depth=22)),
    "sparsenet_40_24": LearningCase(16, 120, 5e-3, dict(depth=16, growth_rate=12)),
    "xception": LearningCase(
        32, 100, fields=dict(stem=(8, 16), entry=(16, 32, 64), depth=2, exit=(64, 96), top=(128,))
    ),
    "mobilenet_v1_025": LearningCase(32, 100, 2e-3, dict(depths=(1, 1, 1, 3, 1))),
    "mobilenet_v2_025": LearningCase(
        32, 100, 2e-3, dict(table=((1, 16, 1, 1), (6, 24, 2, 2), (6, 64, 2, 2), (6, 160, 1, 2)))
    ),
    "mobilenet_v3_small": LearningCase(
        32, 100, 2e-3, dict(width_mult=0.5, hidden=128, momentum=0.9)
    ),
    "nas_v1": LearningCase(16, 100, fields=dict(table=nas.FIGURE_7[:6])),
    "nas_bench_201_conv3x3": LearningCase(16, 100, fields=dict(depths=(1, 1, 1))),
    "nasnet_a_6_768": LearningCase(
        16, 100, fields=dict(depths=(1, 1, 1), width=8, stem_width=24, drop_path=0.1)
    ),
    "pnasnet5large": LearningCase(48, 100, fields=dict(depths=(1, 0), width=16, stem_width=16)),
    "sparse_densenet_abc": LearningCase(16, 120, 5e-3, dict(depths=(3, 4, 5), growth_rate=8)),
}
WINDOW_STEPS = 5  # steps over which a loss is averaged
MAX_LOSS_RATIO = 0.5  # last loss / first loss, and last loss / log 10, the loss of a guess

COLUMNS = (
    *("network", "fields", "parameters", "image", "steps", "first loss", "last loss"),
    *("validation accuracy", "statistics moved", "evaluations equal", "seconds"),
)


def add_learn_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default=",".join(CASES), help="networks, separated by commas")
    parser.add_argument("--batch", type=parse_positive_int, default=32, help="images per step")
    parser.add_argument(
        "--steps", type=int, default=0, help="number of steps; 0: each network's own"
    )
    parser.add_argument(
        "--size", type=int, default=0, help="image height and width; 0: each network's own"
    )
    parser.add_argument(
        "--rate", type=float, default=0, help="first learning rate; 0: each network's own"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of initial values, data order and dropout"
    )


def measure_learning(args: argparse.Namespace, report: BenchmarkReport) -> int:
    """Trains each network on the digits with the steps of a run.

    Reports the loss (means over the first and the last steps), the accuracy on the validation
    images, whether every running statistic changed, and whether two evaluations agree bit for bit.
    Returns exit code 1 if the last loss of a network is not below half of the first loss and half
    of the loss of a guess, if a statistic did not change, if two evaluations differ, or if a step
    was not finite.
    """
    names = args.models.split(",")
    for name in names:
        if name not in CASES:
            raise UserError(f"--models: unknown {name!r}{did_you_mean(name, CASES)}")
    failed = []
    for name in names:
        report.print_line(f"{name}: compiling")
        row = train_on_digits(name, CASES[name], args)
        moved = row["statistics_moved"]
        report.add(
            row,
            (
                name,
                ", ".join(f"{field}={_short(value)}" for field, value in row["fields"].items()),
                f"{row['params']:,}",
                "x".join(map(str, row["input_size"])),
                str(row["steps"]),
                f"{row['first_loss']:.3f}",
                f"{row['last_loss']:.3f}",
                f"{row['accuracy']:.1%}",
                "none" if moved is None else "all" if moved else "NO",
                "yes" if row["deterministic"] else "NO",
                f"{row['seconds']:.0f}",
            ),
        )
        if not row["learned"]:
            failed.append(name)
        jax.clear_caches()
    report.summary.append(
        f"losses are means over {WINDOW_STEPS} steps; networks that did not learn:"
        f" {', '.join(failed) or 'none'}"
    )
    report.bars = Bars(
        [row["model"] for row in report.rows],
        {
            "first": [row["first_loss"] for row in report.rows],
            "last": [row["last_loss"] for row in report.rows],
        },
        "loss of the first and the last steps",
    )
    return int(bool(failed))


def _short(value: Any) -> str:
    return str(value) if len(str(value)) < 40 else f"({len(value)} rows)"


def train_on_digits(name: str, case: LearningCase, args: argparse.Namespace) -> dict[str, Any]:
    """Trains a network as in `case`; returns its row of the report."""
    # Only this command needs what a run imports.
    from configs import common
    from flax_cnns.data import pipeline
    from flax_cnns.evaluation.exact import summarize
    from flax_cnns.runs import build
    from flax_cnns.train import optimizers, parallel, schedules
    from flax_cnns.train.state import TrainState

    began = time.perf_counter()
    flags = {field: getattr(args, field) for field in ("steps", "size", "rate")}
    case = case._replace(**{field: value for field, value in flags.items() if value})
    steps = case.steps
    config = common.get_config()
    config.seed = args.seed
    config.model.update(name=name, **case.fields)
    config.data.update(name="digits", image_size=case.size, channels=1, batch_size=args.batch)
    config.data.eval_batch_size = 120  # of 360
    config.optimizer.name = "adam"
    config.schedule.learning_rate = case.rate

    components = build.build_components(config)
    epoch = len(components.dataset.splits["train"]) / args.batch
    variables = components.init_variables()
    schedule = schedules.make_schedule(config.schedule, total_steps=steps, steps_per_epoch=epoch)
    optimizer = optimizers.make_optimizer(config.optimizer, variables["params"], schedule)
    state = TrainState.create(variables, optimizer.init(variables["params"]))
    state = parallel.replicate(state, components.mesh)
    key = parallel.replicate(jax.random.fold_in(jax.random.key(args.seed), 1), components.mesh)
    step = build.make_train_step(components, optimizer, epoch)
    start = jax.device_get(state.batch_stats)  # the state is donated

    sums = []
    batches = pipeline.train_batches(components.dataset, config.data, seed=args.seed)
    with contextlib.closing(batches):
        for batch in itertools.islice(batches, steps):
            state, step_sums = step(state, components.shard(batch), key)
            sums.append(jax.device_get(step_sums))
    losses = [float(s["loss"] / s["count"]) for s in sums]
    first, last = np.mean(losses[:WINDOW_STEPS]), np.mean(losses[-WINDOW_STEPS:])

    evaluations = [components.evaluate(state.variables, "validation") for _ in range(2)]
    deterministic = evaluations[0] == evaluations[1]
    before, after = pytree.flatten(start), pytree.flatten(jax.device_get(state.batch_stats))
    moved = all((before[path] != after[path]).any() for path in before) if before else None
    fell = last < MAX_LOSS_RATIO * min(first, np.log(components.dataset.num_classes))
    bad = int(sum(s["bad"] for s in sums))
    return {
        "model": name,
        "fields": case.fields,
        "params": pytree.count(variables["params"]),
        "input_size": list(components.dataset.image_shape),
        "batch": args.batch,
        "steps": steps,
        "rate": case.rate,
        "seed": args.seed,
        "losses": losses,
        "first_loss": float(first),
        "last_loss": float(last),
        "bad_steps": bad,
        "accuracy": summarize(evaluations[0])["accuracy"],
        "validation_loss": summarize(evaluations[0])["loss"],
        "statistics": len(before),
        "statistics_moved": moved,
        "deterministic": deterministic,
        "learned": bool(fell and moved is not False and deterministic and not bad),
        "seconds": time.perf_counter() - began,
    }
