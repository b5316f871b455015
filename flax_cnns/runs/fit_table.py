"""A table of recipes and accelerators: which batch fits, and what a step costs."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from flax_cnns import files, recipes
from flax_cnns.runs import target_table
from flax_cnns.runs.fits import FitReport, find_fit
from flax_cnns.runtime.topologies import GIB, CompileTarget

# Recipes of several sizes; `write_table` starts with the fastest to compile.
RECIPES = (
    *("digits_resnet20", "fashion_mnist_resnet20", "cifar10_resnet110"),
    *("cifar10_wrn28_10", "cifar100_resnet50", "imagenet_resnet50:modern"),
)
COLUMNS = (
    *("recipe", "topology", "dtype", "batch", "fits", "gib_per_device", "share_of_memory"),
    *("parameters_gib", "optimizer_gib", "ema_gib", "activations_gib"),
    *("largest_batch", "gib_fixed", "mib_per_image", "collectives", "collective_mib"),
    *("tflop_per_device", "flop_per_byte", "bound_ms", "bound_by", "compile_seconds"),
    *("jax", "compiler"),
)


def write_table(
    path: str, target: CompileTarget, names: Sequence[str], *, cache: pathlib.Path
) -> None:
    """Adds a row for each recipe on `target` to a CSV file, after each recipe.

    Other rows of the file stay; a row of the same recipe and topology is replaced. Finished
    compilations are read from `cache`. Raises UserError if the file is not such a table.
    """
    target_table.read_rows(path, COLUMNS, "recipe")  # refuses another file before it compiles
    files.check_writable(path)
    for number, name in enumerate(names, 1):
        print(f"{number} of {len(names)}: {name} on {target.name}", flush=True)
        report = find_fit(load_recipe(name), target, cache=cache)
        target_table.add_row(path, COLUMNS, "recipe", make_row(name, report))
    print(f"written: {path}")


def load_recipe(name: str) -> Any:
    """Returns the config of a recipe, such as "imagenet_resnet50:modern"."""
    file, _, mode = name.partition(":")
    return recipes.load(recipes.find(file)).get_config(*([mode] if mode else []))


def make_row(name: str, report: FitReport) -> dict[str, str]:
    """Returns the row of a report."""
    compiled, parts = report.compiled, report.parts
    collectives = compiled.collectives.values()
    line, bound = report.model, report.bound
    values = {
        "recipe": name,
        "topology": report.target.name,
        "dtype": report.step.config.model.dtype,
        "batch": report.batch_size,
        "fits": "yes" if report.fits else "no",
        "gib_per_device": f"{report.total / GIB:.3f}",
        "share_of_memory": f"{report.total / report.target.memory:.3f}",
        "parameters_gib": f"{parts['parameters'] / GIB:.4f}",
        "optimizer_gib": f"{parts['optimizer'] / GIB:.4f}",
        "ema_gib": f"{parts['ema'] / GIB:.4f}",
        "activations_gib": f"{parts['temporaries'] / GIB:.3f}",
        "largest_batch": "" if report.largest is None else report.largest,
        "gib_fixed": f"{line.fixed / GIB:.3f}" if line else "",
        "mib_per_image": f"{line.per_image / 2**20:.3f}" if line else "",
        "collectives": sum(count for count, _ in collectives),
        "collective_mib": f"{sum(size for _, size in collectives) / 2**20:.2f}",
        "tflop_per_device": f"{compiled.flops / 1e12:.4f}",
        "flop_per_byte": f"{compiled.flops / max(1, compiled.traffic):.1f}",
        "bound_ms": f"{1e3 * bound.seconds:.3f}" if bound else "",
        "bound_by": bound.limit if bound else "",
        "compile_seconds": f"{sum(one.seconds for one in report.compilations):.0f}",
        "jax": jax.__version__,
        "compiler": report.compiler,
    }
    return {column: str(values[column]) for column in COLUMNS}
