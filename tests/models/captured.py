"""What every module of a network gives, by shapes alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flax_cnns import create_model, pytree


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
