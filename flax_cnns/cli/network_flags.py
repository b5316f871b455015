"""The check of --workdir, --model and --weights, which several commands take."""

from __future__ import annotations

from flax_cnns.errors import UserError


def check_network_flags(workdir: str, model: str, weights: str, prefix: str = "") -> None:
    """Raises UserError unless the flags name a run, or a network with its published weights.

    `prefix` begins the message.
    """
    if bool(workdir) == bool(model or weights):
        raise UserError(f"{prefix}expected --model=NAME --weights=SOURCE, or --workdir=RUN")
    if bool(model) != bool(weights):
        raise UserError(f"{prefix}expected both --model=NAME and --weights=SOURCE, got one of them")
