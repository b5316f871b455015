"""Metrics travel as sums and counts, are added over steps and devices, and divided once."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from flax_cnns.types import Array


def sums(
    losses: Array, logits: Array, labels: Array, mask: Array | None = None
) -> dict[str, Array]:
    """losses [N], logits [N K], labels i32 [N], mask f32 [N] -> {"loss", "correct", "count"} sums.

    With more than five classes also "correct5": how often the label is among the five highest.
    """
    mask = jnp.ones_like(losses) if mask is None else mask
    # A masked row may hold anything, a NaN too, and 0 * NaN is NaN.
    total = {"loss": jnp.sum(jnp.where(mask > 0, losses, 0.0)), "count": jnp.sum(mask)}
    total["correct"] = jnp.sum(mask * (jnp.argmax(logits, -1) == labels))
    if logits.shape[-1] > 5:
        # lax.top_k breaks ties towards the lower class, as argmax does.
        _, top = jax.lax.top_k(logits.astype(jnp.float32), 5)
        total["correct5"] = jnp.sum(mask * jnp.any(top == labels[:, None], axis=-1))
    return total


def add(total: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """Sums of two parts, as Python floats (float64), so that many small ones lose nothing."""
    return {name: total.get(name, 0.0) + float(value) for name, value in more.items()}


def compute(total: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """Sums -> {"loss", "accuracy", "top5"} per example; NaN where nothing was counted."""
    count = float(total.get("count", 0.0))
    names = {"loss": "loss", "correct": "accuracy", "correct5": "top5"}
    return {
        prefix + name: float(total[key]) / count if count else float("nan")
        for key, name in names.items()
        if key in total
    }
