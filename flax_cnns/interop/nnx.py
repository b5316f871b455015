"""Networks as NNX modules; their values convert from and to linen variables, bit for bit.

    model = create_model("cifar_resnet20")
    network = to_nnx(model, init_variables(model, key), nnx.Rngs(dropout=0, shared=1))
    logits = network(images, train=True, mutable=["batch_stats"])  # updates BatchNorm's statistics
    variables = to_linen(network)  # in the form of checkpoints, `load_weights` and `graft`

`flax.nnx.bridge.ToNNX` calls the linen module; this file converts values. Params are `nnx.Param`,
running statistics are `nnx.BatchStat`, and the linen path leads to each leaf:
`network.stage1["block2"]["conv1"]["kernel"]`.

A module holds named blocks, as checkpoints do, also for a network with `scan=True`, which stacks
the blocks during a call. Random numbers come from the streams "dropout" and "shared", as in
`apply(..., rngs=)`. Each call takes the next key of each stream, in evaluation too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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

    `variables`: `{"params": ..., "batch_stats": ...}` of JAX or NumPy arrays. Blocks may be named
    or stacked, and boxes (`nn.Partitioned`) are opened. Other collections become Variables of types
    named after them. `rngs` is forked; networks that draw random numbers in training need its
    streams "dropout" and "shared". The module takes the arguments of the network and `mutable`, as
    in the example above. Raises `UserError` for variables without "params", or rngs of another
    type.
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
    """The values as a State, for `nnx.update(network, to_state(variables))`.

    The State equals `nnx.state(to_nnx(model, variables), (nnx.Param, nnx.BatchStat))`.
    """
    if not isinstance(variables, Mapping) or "params" not in variables:
        given = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise UserError(f'variables: expected {{"params": ..., "batch_stats": ...}}, got {given}')
    flat: dict[Any, Any] = {}  # path -> Variable, which nnx's types refuse
    for collection, tree in variables.items():
        kind = nnx.variable_type_from_name(collection, allow_register=True)
        named = pytree.unstack_blocks(unfreeze(nn.unbox(tree)))
        for path, leaf in pytree.flatten(named).items():
            # NumPy arrays are copied: on a CPU, JAX would share their memory, which may change.
            value = leaf if isinstance(leaf, jax.Array) else jnp.array(leaf)
            flat[tuple(path.split("/"))] = kind(value)
    return nnx.from_flat_state(flat)


def to_linen(network: nnx.Module | nnx.State) -> dict[str, PyTree]:
    """`{"params": ..., "batch_stats": ...}` of an NNX module or a State, with named blocks.

    The inverse of `to_nnx` and `to_state`. batch_stats may be {}; other collections are included.
    If the network is part of another module, the parts of that module are included by the names of
    their attributes. Keys of random streams and sown values are left out.
    """
    state = network if isinstance(network, nnx.State) else nnx.state(network)
    collections: dict[str, dict] = {"params": {}, "batch_stats": {}}
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        if isinstance(variable, nnx.RngState | nnx.Intermediate) or isinstance(value, tuple):
            continue
        collection = nnx.variable_name_from_type(type(variable))
        collections.setdefault(collection, {})["/".join(map(str, path))] = value
    return {name: pytree.merge(pytree.unflatten(flat)) for name, flat in collections.items()}


def pop_aux_logits(network: nnx.Module) -> list[Array]:
    """Removes the auxiliary logits of the last call from the module and returns them.

    Returns one f32 [N K] per auxiliary head, in the order of the heads' names. The call must have
    `mutable=["batch_stats", "aux_logits"]`. If the logits stayed in the module, the next call would
    append its own, and `nnx.jit` would compile again.
    """
    kind = nnx.variable_type_from_name("aux_logits", allow_register=True)
    return jax.tree.leaves(nnx.to_pure_dict(nnx.pop(network, kind)))
