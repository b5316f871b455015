"""What every module of a network gives, by shapes alone."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cnns import create_model
from flax_cnns import tree as pytree


def captured(name: str, height: int, width: int | None = None, /, **fields: Any) -> tuple:
    """(the output's shape and dtype, {path: shape of what the module there gives}) for two images
    of `height` by `width`, square without it."""
    model = create_model(name, **fields)

    def run():
        images = jnp.zeros((2, height, height if width is None else width, 3))
        variables = model.init(jax.random.key(0), images)
        return model.apply(variables, images, capture_intermediates=True, mutable="intermediates")

    out, state = jax.eval_shape(run)
    flat = pytree.flatten(state["intermediates"])
    return out, {path.removesuffix("/__call__/0"): leaf.shape for path, leaf in flat.items()}


def called(name: str, size: int, /, train: bool = False, **fields: Any) -> dict[str, nn.Module]:
    """{path: the module that was called there, with its fields} for two images."""
    model, found = create_model(name, **fields), {}

    def note(call, args, kwargs, context):
        if context.method_name == "__call__":
            found["/".join(context.module.path)] = context.module
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        images = jax.ShapeDtypeStruct((2, size, size, model.input_size[-1]), jnp.float32)
        key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
        rngs = dict.fromkeys(("params", "dropout", "shared"), key)
        jax.eval_shape(lambda rngs, images: model.init(rngs, images, train=train), rngs, images)
    return found


def starting_at_zero(modules: dict[str, nn.Module]) -> set[str]:
    """Paths of the BatchNorms among `called`'s whose scales start at 0."""
    norms = {path: m for path, m in modules.items() if isinstance(m, nn.BatchNorm)}
    return {path for path, norm in norms.items() if norm.scale_init is nn.initializers.zeros}
