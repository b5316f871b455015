"""Compares every network as an NNX module with itself in linen: program and numbers.

    python -m tests.nnx                        # every network: 43 minutes of a busy core
    python -m tests.nnx lenet5 cifar_resnet20 --numbers

A network evaluates two images of its own size, then trains on them: loss with auxiliary heads,
gradients, updated statistics. This is done once with `model.apply` and `jax.grad`, and once with
`interop.nnx.to_nnx` and `nnx.grad`. Program: both trace to the same equations and return the same
names, shapes and dtypes; nothing is computed. Numbers: both are computed, and the largest
difference of their results is reported. Numbers are compared for networks of few layers on small
images; --numbers compares them for the others too.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_cnns import create_model, init_variables, list_models
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.interop.nnx import pop_aux_logits, to_linen, to_nnx
from flax_cnns.types import Array, PyTree
from tests.models.shapes import blank_model

LIMIT = 1e-6  # on the difference of the numbers, which are of order 1
MAX_QUICK_LEAVES = 130  # networks with at most so many leaves compile within seconds
MUTABLE = ["batch_stats", "aux_logits"]

Keys = dict[str, Array]  # "dropout" and "shared"


class Result(NamedTuple):
    name: str
    leaves: int
    moving: int  # number of leaves of batch_stats
    heads: int  # number of auxiliary heads
    program: bool
    difference: float | None  # largest difference of the numbers
    seconds: float

    @property
    def passed(self) -> bool:
        return self.program and not (self.difference or 0) > LIMIT


def compute_loss(logits: Array, aux_logits: list[Array]) -> Array:
    """Returns the loss of logits [N K] and those of auxiliary heads, with class 0 as the label."""
    return sum(-jax.nn.log_softmax(found)[:, 0].mean() for found in (logits, *aux_logits))


def run_linen(model: nn.Module, variables: PyTree, keys: Keys, images: Array) -> dict[str, PyTree]:
    """Evaluates, then trains. Each takes the next keys of the streams, as NNX does."""
    rngs = nnx.Rngs(**keys).fork()
    draw = lambda: {name: stream() for name, stream in rngs.items()}  # noqa: E731
    logits, drawn = model.apply(variables, images, rngs=draw()), draw()

    def loss(params: PyTree) -> tuple[Array, PyTree]:
        out, updates = model.apply(
            {**variables, "params": params}, images, train=True, rngs=drawn, mutable=MUTABLE
        )
        heads = jax.tree.leaves(updates.get("aux_logits", {}))
        return compute_loss(out, heads), (heads, updates.get("batch_stats", {}))

    graded = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    (value, (heads, moved)), grads = graded
    return {"logits": logits, "loss": value, "heads": heads, "grads": grads, "batch_stats": moved}


def run_nnx(model: nn.Module, variables: PyTree, keys: Keys, images: Array) -> dict[str, PyTree]:
    """Does the same as `run_linen` through NNX."""
    network = to_nnx(model, variables, nnx.Rngs(**keys))
    logits = network(images)

    def loss(network: nnx.Module) -> tuple[Array, list[Array]]:
        out = network(images, train=True, mutable=MUTABLE)
        heads = pop_aux_logits(network)
        return compute_loss(out, heads), heads

    (value, heads), grads = nnx.value_and_grad(loss, has_aux=True)(network)
    moved = to_linen(network)["batch_stats"]
    grads = to_linen(grads)["params"]
    return {"logits": logits, "loss": value, "heads": heads, "grads": grads, "batch_stats": moved}


def trace(run: Callable, model: nn.Module, *args: PyTree) -> tuple[str, dict[str, Any]]:
    """Returns the equations as a string, and `{path: shape and dtype}` of their results."""
    program, out = jax.make_jaxpr(partial(run, model), return_shape=True)(*args)
    return re.sub(r" at 0x[0-9a-f]+", "", str(program)), pytree.flatten(out)


def make_keys(seed: int = 0) -> Keys:
    return {name: jax.random.key(2 * seed + i) for i, name in enumerate(("dropout", "shared"))}


def find_max_difference(ours: PyTree, theirs: PyTree) -> float:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs))
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def compare(name: str, numbers: bool = False) -> Result:
    began = time.perf_counter()
    model = blank_model(name)
    images = jax.ShapeDtypeStruct((2, *model.input_size), jnp.float32)
    shapes = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
    linen, returned = trace(run_linen, model, shapes, make_keys(), images)
    through_nnx, same = trace(run_nnx, model, shapes, make_keys(), images)
    few = model.input_size[0] <= 32 and len(jax.tree.leaves(shapes)) <= MAX_QUICK_LEAVES
    difference = None
    if numbers or few:
        variables = init_variables(create_model(name), jax.random.key(0))
        args = variables, make_keys(), jax.random.normal(jax.random.key(1), images.shape)
        options = {"xla_backend_optimization_level": 0}
        both = [
            jax.jit(partial(run, model), compiler_options=options)(*args)
            for run in (run_linen, run_nnx)
        ]
        difference = find_max_difference(*both)
    return Result(
        name=name,
        leaves=len(jax.tree.leaves(shapes)),
        moving=len(jax.tree.leaves(shapes["batch_stats"])),
        heads=len([path for path in returned if path.startswith("heads/")]),
        program=linen == through_nnx and returned == same,
        difference=difference,
        seconds=time.perf_counter() - began,
    )


def select_networks(names: list[str]) -> list[str]:
    """Returns the named networks, or all. A network with several names is returned once."""
    if names:
        return names
    return sorted({create_model(name): name for name in reversed(list_models())}.values())


HEAD = ("network", "leaves", "moving", "heads", "program", "difference", "seconds")


def format_row(r: Result) -> tuple[str, ...]:
    program = "same" if r.program else "ANOTHER"
    difference = "" if r.difference is None else f"{r.difference:.1e}"
    return (r.name, *map(str, r[1:4]), program, difference, f"{r.seconds:.1f}")


def print_row(cells: tuple[str, ...]) -> None:
    print("{:<36}{:>8}{:>8}{:>7}{:>9}{:>12}{:>9}".format(*cells), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.nnx", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", help="networks; without: all")
    parser.add_argument("--numbers", action="store_true", help="compute all of them")
    args = parser.parse_args(argv)
    try:
        names = select_networks(args.names)
        for name in names:
            create_model(name)
    except UserError as error:
        parser.error(str(error))
    print_row(HEAD)
    results = []
    for name in names:
        results.append(compare(name, args.numbers))
        print_row(format_row(results[-1]))
        jax.clear_caches()
    failed = [r.name for r in results if not r.passed]
    print(f"{len(results) - len(failed)} of {len(results)} pass (limit {LIMIT:g})")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
