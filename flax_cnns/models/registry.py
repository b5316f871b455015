"""Networks by name: every family's table `VARIANTS` in one."""

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
        "nasnet",
        "pnasnet",
        "deck_cnn",
        "nin",
        "all_cnn",
        "dsn",
        "highway",
        "convnext",
        "vit",
    )
)
MAX_FUSED_LEAVES = 1000  # that are initialized by one program: more take long to compile


class ModelInfo(NamedTuple):
    """What `model_info` says about a network."""

    name: str
    family: str  # the file of flax_cnns.models
    paper: Any  # a flax_cnns.types.Paper: title, authors, year, url
    input_size: tuple[int, int, int]  # (H, W, C)
    num_classes: int
    params: int  # trainable numbers, without running statistics
    sources: tuple[str, ...]  # whose tensors `weights.convert` takes: torchvision, timm, keras ...


def merge_variants(families: Sequence[ModuleType]) -> dict[str, tuple[partial, ModuleType]]:
    """`{name: (variant, its family)}` of all families; a name in two of them raises ValueError."""
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
            near = "; a network of your own is 'package.module:Name'"
        raise UserError(f"unknown model {name!r}{near}")
    return _MODELS[name]


def create_model(name: str, **fields: Any) -> nn.Module:
    """The network `name` with some of its fields set: `create_model("resnet50", num_classes=10)`.

    `dtype` and `param_dtype` may be texts ("bfloat16"). `num_classes=None` gives what the head
    would see: pooled features f32 [N C], in training behind the last dropout. `init` is another
    name of `kernel_init`: "paper" for the paper's own first values. Raises `UserError` for an
    unknown name, field or dtype, or for senseless values.
    """
    variant, _ = _find(name)
    if "init" in fields:  # no field of the module's: it would hide its method `init`
        fields["kernel_init"] = fields.pop("init")
    known = {field.name for field in dataclasses.fields(variant.func)} - {"name", "parent"}
    for field in fields:
        if field not in known:
            near = did_you_mean(field, known)
            takes = f"it takes {', '.join(sorted(known))}"
            hint = f"{near} ({takes})" if near.startswith("; did you mean") else f"; {takes}"
            raise UserError(f"{name} has no field {field!r}{hint}")
    return variant(**check_values(name, variant.func, fields))


def list_models(pattern: str = "*") -> list[str]:
    """The names that match a shell pattern, sorted, `resnet18` before `resnet101`."""
    names = (name for name in _MODELS if fnmatchcase(name, pattern))
    return sorted(names, key=_natural_key)


def _natural_key(name: str) -> list[str | int]:
    """Text and numbers in turn, by which `sorted` compares numbers as such."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@cache
def model_info(name: str) -> ModelInfo:
    """Family, paper, input size, classes and parameter count; computes shapes only.

    Raises `UserError` for an unknown name.
    """
    model, (_, family) = create_model(name), _find(name)
    # Tracing the random numbers of all kernels would take almost half of the time.
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
    """`{"params": ..., "batch_stats": ...}` and nothing else; batch_stats may be {}.

    `images_shape` is [N H W C], by default one image of `model.input_size`. The values are those of
    `model.init(key, images)` up to float32 rounding. Raises `UserError` where the network cannot
    take such images.
    """
    shape = (1, *model.input_size) if images_shape is None else tuple(images_shape)

    def kept(variables: dict[str, Any]) -> dict[str, Any]:
        variables = nn.unbox(variables)  # a user's network may say how they are partitioned
        return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

    def init(key: jax.Array) -> dict[str, Any]:
        return kept(model.init(key, jnp.zeros(shape), train=False))

    if isinstance(key, jax.core.Tracer):  # inside the caller's own jit or eval_shape
        return init(key)
    traced = jax.jit(init).trace(key)
    if len(jax.tree.leaves(traced.out_info)) > MAX_FUSED_LEAVES:  # one program for each shape
        return kept(model.lazy_init(key, jax.ShapeDtypeStruct(shape, jnp.float32), train=False))
    # Compiling the random numbers of all kernels is what takes time on a CPU: ten times less at
    # this level, for a function that runs once.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return traced.lower().compile(compiler_options=options)(key)
