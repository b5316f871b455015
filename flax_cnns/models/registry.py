"""Finds networks by name, in the tables `VARIANTS` of all families."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.models.fields import check_values

FAMILIES = tuple(
    import_module(f"flax_cnns.models.{name}")
    for name in (
        "lenet",
        "alexnet",
        "zfnet",
        "cifar_resnet",
        "resnet",
        "resnext",
        "senet",
        "preact_resnet",
        "cifar_preact",
        "wide_resnet",
        "shake_shake",
        "pyramidnet",
        "resnet_in_resnet",
        "densenet",
        "sparsenet",
        "sparse_densenet",
        "fractalnet",
        "googlenet",
        "inception_v3",
        "inception_v4",
        "inception_resnet",
        "efficientnet",
        "simpnet",
        "vgg",
        "squeezenet",
        "xception",
        "mobilenet_v1",
        "mobilenet_v2",
        "mobilenet_v3",
        "nas",
        "nas_bench_201",
        "nasnet",
        "pnasnet",
        "deck_cnn",
        "nin",
        "all_cnn",
        "dsn",
        "highway",
        "airbench",
        "convnext",
        "vit",
    )
)
MAX_FUSED_LEAVES = 1000  # arrays that one program initializes; more take long to compile


class ModelInfo(NamedTuple):
    """Facts about a network: what `model_info` returns."""

    name: str
    family: str  # its file in flax_cnns/models, without ".py"
    paper: Any  # a flax_cnns.types.Paper: title, authors, year, url
    input_size: tuple[int, int, int]  # (H, W, C)
    num_classes: int
    params: int  # number of trainable parameters; running statistics do not count
    sources: tuple[str, ...]  # libraries whose weights `weights.convert` takes: "timm" ...


def merge_variants(families: Sequence[ModuleType]) -> dict[str, tuple[partial, ModuleType]]:
    """Returns `{name: (variant, its family)}`; raises ValueError if two families share a name."""
    table: dict[str, tuple[partial, ModuleType]] = {}
    for family in families:
        for name, variant in family.VARIANTS.items():
            if name in table:
                raise ValueError(f"{name!r} is in {table[name][1].__name__} and {family.__name__}")
            table[name] = (variant, family)
    return table


_MODELS = merge_variants(FAMILIES)


def _find(name: str) -> tuple[partial, ModuleType]:
    if name not in _MODELS:
        near = did_you_mean(name, _MODELS)
        if set(name) & set(":./"):
            near = "; name a network of your own as 'package.module:Name'"
        raise UserError(f"unknown model {name!r}{near}")
    return _MODELS[name]


def create_model(name: str, **fields: Any) -> nn.Module:
    """Creates the network `name` with the given fields: `create_model("resnet50", num_classes=10)`.

    `dtype` and `param_dtype` may be strings ("bfloat16"). With `num_classes=None` the network
    returns the input of its head: pooled features f32 [N C], in training after the last dropout.
    `init` is another name for `kernel_init`; "paper" selects the paper's own initialization. Raises
    `UserError` for an unknown name, field or dtype, and for an invalid value.
    """
    variant, _ = _find(name)
    if "init" in fields:  # cannot be a field: it would hide the module's method `init`
        fields["kernel_init"] = fields.pop("init")
    network: Any = variant.func  # a dataclass, as every linen module
    known = {field.name for field in dataclasses.fields(network)} - {"name", "parent"}
    for field in fields:
        if field not in known:
            near = did_you_mean(field, known)
            takes = f"it takes {', '.join(sorted(known))}"
            hint = f"{near} ({takes})" if near.startswith("; did you mean") else f"; {takes}"
            raise UserError(f"{name} has no field {field!r}{hint}")
    return variant(**check_values(name, network, fields))


def list_models(pattern: str = "*") -> list[str]:
    """Lists the names that match a shell pattern; `resnet18` comes before `resnet101`."""
    names = (name for name in _MODELS if fnmatchcase(name, pattern))
    return sorted(names, key=_natural_key)


def _natural_key(name: str) -> list[str | int]:
    """Splits a name into text and numbers, so that `sorted` compares the numbers by value."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@cache
def model_info(name: str) -> ModelInfo:
    """Returns family, paper, input size, classes and parameter count; computes only shapes.

    Raises `UserError` for an unknown name.
    """
    model, (_, family) = create_model(name), _find(name)
    # Zero kernels, since tracing their random numbers takes almost half of the time.
    blank = model.clone(kernel_init=nn.initializers.zeros)
    shapes = jax.eval_shape(lambda: init_variables(blank, jax.random.key(0)))
    return ModelInfo(
        name=name,
        family=family.__name__.rpartition(".")[2],
        paper=family.PAPER,
        input_size=model.input_size,
        num_classes=model.num_classes,
        params=sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])),
        sources=getattr(family, "SOURCES", {}).get(name, ()),
    )


def init_variables(
    model: nn.Module, key: jax.Array, images_shape: Sequence[int] | None = None
) -> dict[str, Any]:
    """Returns `{"params": ..., "batch_stats": ...}` and nothing else; batch_stats may be {}.

    `images_shape` is [N H W C], by default one image of `model.input_size`. The values equal those
    of `model.init(key, images)` up to float32 rounding. Raises `UserError` if the network cannot
    take images of this shape.
    """
    shape = (1, *model.input_size) if images_shape is None else tuple(images_shape)

    def keep_state(variables: Any) -> dict[str, Any]:
        variables = nn.unbox(variables)  # a user's network may annotate how they are partitioned
        return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

    def init(key: jax.Array) -> dict[str, Any]:
        return keep_state(model.init(key, jnp.zeros(shape), train=False))

    if isinstance(key, jax.core.Tracer):  # inside the caller's jit or eval_shape
        return init(key)
    traced = jax.jit(init).trace(key)
    if len(jax.tree.leaves(traced.out_info)) > MAX_FUSED_LEAVES:  # one program per shape
        return keep_state(
            model.lazy_init(key, jax.ShapeDtypeStruct(shape, jnp.float32), train=False)
        )
    # On a CPU, compiling the random numbers of all kernels takes most of the time. At optimization
    # level 0 it takes a tenth, and slower code does not matter for a function that runs once.
    (device, *_) = key.devices()
    options = {"xla_backend_optimization_level": 0} if device.platform == "cpu" else None
    return traced.lower().compile(compiler_options=options)(key)
