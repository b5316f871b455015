"""Networks as NNX modules, and their values from linen's variables and back, to the bit.

    model = create_model("cifar_resnet20")
    network = to_nnx(model, init_variables(model, key), nnx.Rngs(dropout=0, shared=1))
    logits = network(images, train=True, mutable=["batch_stats"])  # BatchNorm moves
    variables = to_linen(network)  # as checkpoints, `load_weights` and `graft` have them

`flax.nnx.bridge.ToNNX` calls the linen module; here is what goes in and comes out. Params are
`nnx.Param`, running statistics are `nnx.BatchStat`, and a part is had by its linen path:
`network.stage1["block2"]["conv1"]["kernel"]`.

A module holds named blocks, as checkpoints do, whether its network scans (`scan=True`) or not: the
scan stacks them in passing. Random numbers come from streams called "dropout" and "shared", those
of `apply(..., rngs=)`; each call takes the next key of every stream, evaluation too.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import unfreeze

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.types import Array, PyTree


def to_nnx(
    model: nn.Module, variables: Mapping[str, PyTree], rngs: nnx.Rngs | None = None
) -> nnx.bridge.ToNNX:
    """The linen network as an NNX module with the values of `variables`.

    `variables`: `{"params": ..., "batch_stats": ...}` of arrays, JAX's or NumPy's, blocks named or
    stacked, boxes (`nn.Partitioned`) opened; further collections become Variables of their names.
    `rngs` is forked; networks that draw random numbers in training need its streams "dropout" and
    "shared". The module takes the network's arguments and `mutable`, as in the example above.
    Raises `UserError` for variables without "params", or rngs of another kind.
    """
    if rngs is not None and not isinstance(rngs, nnx.Rngs):
        raise UserError(
            f"rngs: expected nnx.Rngs(dropout=0, shared=1) or None, got {type(rngs).__name__}"
        )
    network = nnx.bridge.ToNNX(model, rngs)
    for name, value in to_state(variables).raw_mapping.items():
        setattr(network, name, nnx.data(value))
    return network


def to_state(variables: Mapping[str, PyTree]) -> nnx.State:
    """The values as a State, for `nnx.update(network, to_state(variables))`: what
    `nnx.state(to_nnx(model, variables), (nnx.Param, nnx.BatchStat))` is."""
    if not isinstance(variables, Mapping) or "params" not in variables:
        given = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise UserError(f'variables: expected {{"params": ..., "batch_stats": ...}}, got {given}')
    flat: dict[tuple[str, ...], nnx.Variable] = {}
    for collection, tree in variables.items():
        kind = nnx.variable_type_from_name(collection, allow_register=True)
        named = pytree.unstack_blocks(unfreeze(nn.unbox(tree)))
        for path, leaf in pytree.flatten(named).items():
            # NumPy's are copied: JAX on a CPU would share their memory, which may change.
            value = leaf if isinstance(leaf, jax.Array) else jnp.array(leaf)
            flat[tuple(path.split("/"))] = kind(value)
    return nnx.from_flat_state(flat)


def to_linen(network: nnx.Module | nnx.State) -> dict[str, PyTree]:
    """`{"params": ..., "batch_stats": ...}` of an NNX module or a State, blocks named.

    The inverse of `to_nnx` and `to_state`; batch_stats may be {}, further collections follow. A
    module around the network gives its own parts too, by their attributes' names. Keys of random
    streams and what the network has sown are left out.
    """
    state = network if isinstance(network, nnx.State) else nnx.state(network)
    found: dict[str, dict] = {"params": {}, "batch_stats": {}}
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        if isinstance(variable, nnx.RngState | nnx.Intermediate) or isinstance(value, tuple):
            continue
        collection = nnx.variable_name_from_type(type(variable))
        found.setdefault(collection, {})["/".join(map(str, path))] = value
    return {name: pytree.merge(pytree.unflatten(flat)) for name, flat in found.items()}


def pop_aux_logits(network: nnx.Module) -> list[Array]:
    """The auxiliary heads' logits, f32 [N K] each, of the last call with
    `mutable=["batch_stats", "aux_logits"]`, in the order of the heads' names.

    Takes them out of the module: the next call would append its own, and `nnx.jit` compile again.
    """
    kind = nnx.variable_type_from_name("aux_logits", allow_register=True)
    return jax.tree.leaves(nnx.to_pure_dict(nnx.pop(network, kind)))
