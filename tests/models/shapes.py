"""Traces networks for the output shapes of their modules, without computing anything."""

from __future__ import annotations

from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cnns import create_model, init_variables
from flax_cnns import tree as pytree
from flax_cnns.analysis.cost import Cost, cost
from flax_cnns.models import registry

FAMILY_OF = {
    name: family.__name__.rpartition(".")[2]
    for family in registry.FAMILIES
    for name in family.VARIANTS
}


def blank_model(name: str, **fields: Any) -> nn.Module:
    """Creates the network with zero kernels: tracing random numbers takes half of the time."""
    model = create_model(name, **fields)
    has_own_init = {"init", "kernel_init"} & set(fields)
    return model if has_own_init else model.clone(kernel_init=nn.initializers.zeros)


def capture_shapes(name: str, height: int, width: int | None = None, /, **fields: Any) -> tuple:
    """Returns the output's shape and dtype, and {path: shape of the module's output}.

    For two images of `height` x `width`, by default square. Includes auxiliary heads.
    """
    model = blank_model(name, **fields)
    shape = (2, height, height if width is None else width, 3)

    def run(key):
        given = dict(mutable=True, capture_intermediates=True)
        return model.init_with_output(key, jnp.zeros(shape), **given)

    out, state = jax.eval_shape(run, jax.random.key(0))
    flat = pytree.flatten(state["intermediates"])
    return out, {path.removesuffix("/__call__/0"): leaf.shape for path, leaf in flat.items()}


def variable_shapes(name: str, **fields: Any) -> dict[str, Any]:
    """Returns the shapes of a network's "params" and "batch_stats"."""
    model = blank_model(name, **fields)
    return jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))


def capture_modules(
    name: str, size: int, /, train: bool = False, **fields: Any
) -> dict[str, nn.Module]:
    """Returns {path: module} of all modules that are called for two images."""
    model, modules = blank_model(name, **fields), {}

    def note(call, args, kwargs, context):
        if context.method_name == "__call__":
            modules["/".join(context.module.path)] = context.module
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        images = jax.ShapeDtypeStruct((2, size, size, model.input_size[-1]), jnp.float32)
        key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
        rngs = dict.fromkeys(("params", "dropout", "shared"), key)
        jax.eval_shape(lambda rngs, images: model.init(rngs, images, train=train), rngs, images)
    return modules


def norms_starting_at_zero(modules: dict[str, nn.Module]) -> set[str]:
    """Returns the paths of the BatchNorms in `modules` whose scales start at 0."""
    norms = {path: m for path, m in modules.items() if isinstance(m, nn.BatchNorm)}
    return {path for path, norm in norms.items() if norm.scale_init is nn.initializers.zeros}


@cache
def cost_of(name: str, **fields: Any) -> Cost:
    """Returns the `cost` of a network, which is traced once per process."""
    return cost(blank_model(name, **fields))
