"""Losses, one number an example, in float32 whatever the network computes in."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flax_cnns.types import Array


def cross_entropy(logits: Array, labels: Array) -> Array:
    """-sum_k labels_k log softmax(logits)_k: logits [N K], labels [N K] (rows sum to 1) -> [N]."""
    return -jnp.sum(labels * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
