"""Networks by name: every family's table `VARIANTS` in one."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import cache, partial
from numbers import Integral, Real
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.models import (
    alexnet,
    all_cnn,
    cifar_preact,
    cifar_resnet,
    convnext,
    deck_cnn,
    densenet,
    dsn,
    efficientnet,
    fractalnet,
    googlenet,
    highway,
    inception_resnet,
    inception_v3,
    inception_v4,
    lenet,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3,
    nas,
    nasnet,
    nin,
    pnasnet,
    preact_resnet,
    pyramidnet,
    resnet,
    resnet_in_resnet,
    resnext,
    senet,
    shake_shake,
    simpnet,
    sparse_densenet,
    sparsenet,
    squeezenet,
    vgg,
    vit,
    wide_resnet,
    xception,
    zfnet,
)

FAMILIES = (
    lenet,
    alexnet,
    zfnet,
    cifar_resnet,
    resnet,
    resnext,
    senet,
    preact_resnet,
    cifar_preact,
    wide_resnet,
    shake_shake,
    pyramidnet,
    resnet_in_resnet,
    densenet,
    sparsenet,
    sparse_densenet,
    fractalnet,
    googlenet,
    inception_v3,
    inception_v4,
    inception_resnet,
    efficientnet,
    simpnet,
    vgg,
    squeezenet,
    xception,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3,
    nas,
    nasnet,
    pnasnet,
    deck_cnn,
    nin,
    all_cnn,
    dsn,
    highway,
    convnext,
    vit,
)
DTYPES = ("float32", "bfloat16", "float16")
MOST_LEAVES = 1000  # that are initialised by one program: more take long to compile


class ModelInfo(NamedTuple):
    """What `model_info` says about a network."""

    name: str
    family: str  # the file of flax_cnns.models
    paper: Any  # a flax_cnns.types.Paper: title, authors, year, url
    input_size: tuple[int, int, int]  # (H, W, C)
    num_classes: int
    params: int  # trainable numbers, without running statistics
    sources: tuple[str, ...]  # whose tensors `weights.convert` takes: torchvision, timm, keras ...


def merge(families: Sequence[ModuleType]) -> dict[str, tuple[partial, ModuleType]]:
    """`{name: (variant, its family)}` of all families; a name in two of them raises ValueError."""
    table: dict[str, tuple[partial, ModuleType]] = {}
    for family in families:
        for name, variant in family.VARIANTS.items():
            if name in table:
                raise ValueError(f"{name!r} is in {table[name][1].__name__} and {family.__name__}")
            table[name] = (variant, family)
    return table


_MODELS = merge(FAMILIES)


def _find(name: str) -> tuple[partial, ModuleType]:
    if name not in _MODELS:
        raise UserError(f"unknown model {name!r}{did_you_mean(name, _MODELS)}")
    return _MODELS[name]


def _dtype(field: str, value: Any) -> jnp.dtype:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES:
        raise UserError(f"unknown {field} {value!r}{did_you_mean(str(value), DTYPES)}")
    return dtype


# What a field's annotation asks for, and whether a value is that.
_NUMBERS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", lambda v: isinstance(v, Integral)),
    "float": ("a number", lambda v: isinstance(v, Real)),
    "bool": ("True or False", lambda v: isinstance(v, bool)),
    "str": ("a text", lambda v: isinstance(v, str)),
}
_NUMBERS["Callable"] = _NUMBERS["ModuleDef"] = ("a function or a module", callable)
_RATES = (
    "dropout",
    "drop_path",
    "shake_drop",
    "saf_rate",
    "momentum",
)  # at the end of a field's name
_ABOVE_ZERO = ("_mult", "epsilon")


def _check_field(
    name: str, field: str, value: Any, annotation: str, may_be_zero: Sequence[str]
) -> None:
    """Raises `UserError` where a field of a plain kind has no such value, or a senseless one.

    `may_be_zero`: whole numbers that count something which may be absent.
    """
    annotation, optional = annotation.removesuffix(" | None"), annotation.endswith(" | None")
    if optional and value is None:
        return
    several = re.fullmatch(
        r"(?:(int|float) \| )?Sequence\[(int|float)\]|tuple\[(int), \.\.\.\]", annotation
    )
    either = bool(several and several[1])  # one, or a sequence
    kind = several[2] or several[3] if several else annotation
    if kind not in _NUMBERS:
        return
    what, fits = _NUMBERS[kind]
    values = value if isinstance(value, tuple) else (value,)
    fine = either or isinstance(value, tuple) == bool(several)
    fine &= all(fits(v) and (kind == "bool" or not isinstance(v, bool)) for v in values)
    if field.endswith(_RATES):
        what, fine = f"{what} from 0 to below 1", fine and all(0 <= v < 1 for v in values)
    elif kind == "int" and field in may_be_zero:
        what, fine = f"{what} from 0", fine and all(v >= 0 for v in values)
    elif kind == "int" or field.endswith(_ABOVE_ZERO):
        what, fine = f"{what} above 0", fine and all(0 < v < math.inf for v in values)
    elif kind == "float":
        fine = fine and all(map(math.isfinite, values))
    if not fine:
        expected = f"a sequence, each {what}" if several else what
        expected = f"{what}, or {expected}" if either else expected
        raise UserError(f"{name}: {field} is {expected}, got {value!r}")


def _checked(name: str, field: str, value: Any, annotation: str, may_be_zero: Sequence[str]) -> Any:
    """The value of a field as the module wants it; raises `UserError` where it makes no sense."""
    if isinstance(value, list):  # from a config's JSON; a module's fields must be hashable
        value = tuple(value)
    if field in ("dtype", "param_dtype"):
        return _dtype(field, value)
    if field == "num_classes" and value is not None and (type(value) is not int or value < 1):
        raise UserError(f"{name}: num_classes is a positive number or None, got {value!r}")
    if field == "input_size" and (
        not isinstance(value, tuple)
        or len(value) != 3
        or any(type(n) is not int or n < 1 for n in value)
    ):
        raise UserError(f"{name}: input_size is (height, width, channels), got {value!r}")
    _check_field(name, field, value, annotation, may_be_zero)
    return value


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
    known = {field.name: str(field.type) for field in dataclasses.fields(variant.func)}
    del known["name"], known["parent"]
    for field in fields:
        if field not in known:
            near = did_you_mean(field, known)
            takes = f"it takes {', '.join(sorted(known))}"
            hint = f"{near} ({takes})" if near.startswith("; did you mean") else f"; {takes}"
            raise UserError(f"{name} has no field {field!r}{hint}")
    zero = getattr(variant.func, "may_be_zero", ())
    return variant(**{f: _checked(name, f, v, known[f], zero) for f, v in fields.items()})


def list_models(pattern: str = "*") -> list[str]:
    """The names that match a shell pattern, sorted: `list_models("*resnet5*")`."""
    return sorted(name for name in _MODELS if fnmatchcase(name, pattern))


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
        return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

    def init(key: jax.Array) -> dict[str, Any]:
        return kept(model.init(key, jnp.zeros(shape), train=False))

    if isinstance(key, jax.core.Tracer):  # inside the caller's own jit or eval_shape
        return init(key)
    traced = jax.jit(init).trace(key)
    if len(jax.tree.leaves(traced.out_info)) > MOST_LEAVES:  # one program for each shape
        return kept(model.lazy_init(key, jax.ShapeDtypeStruct(shape, jnp.float32), train=False))
    # Compiling the random numbers of all kernels is what takes time on a CPU: ten times less at
    # this level, for a function that runs once.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return traced.lower().compile(compiler_options=options)(key)
