"""What a visualization makes large: a channel, a neuron, a logit, a direction."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.types import Array

Kind = Literal["channel", "neuron", "direction"]


@struct.dataclass
class Objective:
    """A number for each image, computed from the output of the module `path`.

    "channel": the mean of channel `unit` over all positions. For path "", the network's output,
    this is a logit. "neuron": that channel in the middle of the map; if the side is even, at the
    position after the middle. "direction": the mean of the product with `vector`, f32 [C].
    Objectives that differ in `unit` or `vector` alone share a compiled program.
    """

    path: str = struct.field(pytree_node=False)
    unit: int | Array = 0
    kind: Kind = struct.field(pytree_node=False, default="channel")
    vector: Any = ()

    def measure(self, output: Array) -> Array:
        """Returns f32 [N] of an output [N h w C] or [N C]."""
        if self.kind == "direction":
            chosen = output.astype(jnp.float32) @ jnp.asarray(self.vector, jnp.float32)
        else:
            chosen = output[..., self.unit].astype(jnp.float32)
        if self.kind == "neuron" and chosen.ndim == 3:
            return chosen[:, chosen.shape[1] // 2, chosen.shape[2] // 2]
        return chosen.reshape(len(chosen), -1).mean(1)

    def check(self, output: jax.ShapeDtypeStruct) -> None:
        """Raises `UserError` for an unknown kind, and if the module's output lacks the unit, has
        other channels, or has no positions to choose a neuron from."""
        channels = output.shape[-1]
        name = repr(self.path) if self.path else "the network's output"
        if self.kind not in get_args(Kind):
            raise UserError(
                f"unknown objective {self.kind!r}{did_you_mean(self.kind, get_args(Kind))}"
            )
        if self.kind == "neuron" and len(output.shape) != 4:
            raise UserError(f"{name} has no maps, so a neuron is a channel: take channel")
        if self.kind == "direction" and len(self.vector) != channels:
            raise UserError(f"{name} has {channels} channels, the direction has {len(self.vector)}")
        if self.kind != "direction" and not 0 <= self.unit < channels:
            raise UserError(
                f"unit {self.unit} is out of range: {name} has {channels} channels,"
                f" 0 to {channels - 1}"
            )


def diversity(output: Array) -> Array:
    """Returns the mean cosine similarity of the Gram matrices of different images' maps [N h w C]
    (Olah et al. 2017, "diversity"); 0 for one image. Lucid's value is N - 1 times as large."""
    maps = output.reshape(len(output), -1, output.shape[-1]).astype(jnp.float32)
    grams = jnp.einsum("npc,npd->ncd", maps, maps).reshape(len(maps), -1)
    grams /= jnp.linalg.norm(grams, axis=1, keepdims=True) + 1e-8
    alike = grams @ grams.T
    count = len(maps)
    return (alike.sum() - jnp.trace(alike)) / max(count * (count - 1), 1)
