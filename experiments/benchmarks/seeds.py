"""Times several seeds in one program against the same seeds one after another (`seeds`)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.flags import parse_positive_int
from experiments.benchmarks.report import Bars, BenchmarkReport, format_milliseconds
from experiments.benchmarks.training import MIX, RATE, SGD, make_examples
from flax_cnns.analysis.timing import time_candidates
from flax_cnns.data.mix import make_mix
from flax_cnns.models.registry import create_model, init_variables
from flax_cnns.train import optimizers, parallel, schedules, steps
from flax_cnns.train.state import TrainState

COLUMNS = ("model", "seeds", "how", "step of all seeds", "against one by one")


def add_seed_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="lenet5,cifar_resnet8", help="networks, separated by commas"
    )
    parser.add_argument("--batch", type=parse_positive_int, default=64)
    parser.add_argument("--seeds", type=parse_positive_int, default=8)


def measure_seeds(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Times a training step of `--seeds` networks: one by one, and under `jax.vmap`.

    All train on the same batch, on one device.
    """
    for name in args.model.split(","):
        report.print_line(f"{name}: compiling")
        candidates = make_candidates(create_network(name), args.batch, args.seeds)
        timing = dict(rounds=args.rounds, warmup=args.warmup, at_least=args.at_least)
        times = time_candidates(candidates, **timing)
        for how, timed in times.as_dict().items():
            ratio = times.ratio(how, "one by one")
            row = {"model": name, "seeds": args.seeds, "how": how, "seconds": timed["median"]}
            cells = (name, str(args.seeds), how, format_milliseconds(timed["median"]), str(ratio))
            report.add(row | {"ratio": ratio._asdict(), "rounds": timed["rounds"]}, cells)
    together = [row for row in report.rows if row["how"] == "vmap"]
    report.bars = Bars(
        [row["model"] for row in together],
        {f"{args.seeds} seeds under vmap": [row["ratio"]["median"] for row in together]},
        "step time relative to one by one",
        reference=1,
    )


def create_network(name: str) -> Any:
    """Makes a network by name; `cifar_resnet8` is ResNet-20 with one block in each stage."""
    if name == "cifar_resnet8":
        return create_model("cifar_resnet20", depths=(1, 1, 1))
    return create_model(name)


def make_candidates(model: Any, batch: int, seeds: int) -> dict[str, Callable[[], Any]]:
    """Returns {how: a function that takes one training step of all seeds}."""
    mesh = parallel.make_mesh(jax.devices()[:1])
    examples = parallel.shard_batch(make_examples(batch, model.input_size, model.num_classes), mesh)
    variables = [
        init_variables(model, jax.random.key(seed), (1, *model.input_size)) for seed in range(seeds)
    ]
    optimizer = optimizers.make_optimizer(
        SimpleNamespace(**vars(SGD)),
        variables[0]["params"],
        schedules.constant(RATE),
        batch_stats=variables[0].get("batch_stats"),
    )
    step = steps.make_train_step(
        model.apply,
        optimizer,
        augment=lambda images, keys: images.astype(jnp.float32) / 255,
        mix=make_mix(MIX, model.num_classes),
    )
    states = [TrainState.create(v, optimizer.init(v["params"])) for v in variables]
    keys = [parallel.replicate(jax.random.key(seed), mesh) for seed in range(seeds)]
    stacked = parallel.replicate(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), mesh)
    states = [parallel.replicate(state, mesh) for state in states]
    all_keys = parallel.replicate(jnp.stack(keys), mesh)
    one = parallel.parallelize(step, mesh)
    together = parallel.parallelize(jax.vmap(step, in_axes=(0, None, 0)), mesh)

    def take_one_by_one() -> Any:
        for seed in range(seeds):
            states[seed], _ = one(states[seed], examples, keys[seed])
        return states

    def take_together() -> Any:
        nonlocal stacked
        stacked, _ = together(stacked, examples, all_keys)
        return stacked

    return {"one by one": take_one_by_one, "vmap": take_together}
