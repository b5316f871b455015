"""Rules that carry another library's tensors into our trees: names, leaves, layouts.

A rule is `(regex over the source's module, our module)`, or with a third part that says how its
kernels are laid out. The first regex that matches the whole name decides. Our module is a path that
may use the regex's groups, a function of the match, or `UNUSED`. For what is no layer's kernel,
scale, bias or statistic (`class_token`), the regex is over the tensor's whole name, and the path is
that of our leaf.

The rules are not `tree.rules.decide`'s, which refuses a rule that decides nothing: a table serves
all variants of a family, of which each has a part of the layers. A mistyped rule is caught all the
same: `apply` refuses a tensor that no rule knows, and `fit` a leaf of ours without a tensor.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.tree.rules import find_first_match
from flax_cnns.weights import wrappers

UNUSED = None  # a rule that leaves tensors out, and says so

Path = str | Callable[[re.Match], str] | None
Layout = Callable[[np.ndarray], np.ndarray]
Rules = Iterable[tuple[str, Path] | tuple[str, Path, Layout]]

# The source's leaf -> ours: the first of them that our module has.
_TORCH_LEAVES = {
    "weight": ("params/{}/kernel", "params/{}/scale"),
    "bias": ("params/{}/bias",),
    "running_mean": ("batch_stats/{}/mean",),
    "running_var": ("batch_stats/{}/var",),
    "num_batches_tracked": UNUSED,
}
_KERAS_LEAVES = {
    "kernel": ("params/{}/kernel",),
    "depthwise_kernel": ("params/{}/depthwise/kernel",),  # SeparableConv2D's
    "pointwise_kernel": ("params/{}/pointwise/kernel",),
    "bias": ("params/{}/bias",),
    "gamma": ("params/{}/scale",),
    "beta": ("params/{}/bias",),
    "moving_mean": ("batch_stats/{}/mean",),
    "moving_variance": ("batch_stats/{}/var",),
}


def flattened(channels: int) -> Layout:
    """Of a PyTorch dense layer behind flattened maps [C H W]: ours are flattened as [H W C]."""

    def layout(kernel: np.ndarray) -> np.ndarray:  # [out C*H*W] -> [H*W*C out]
        out = kernel.reshape(len(kernel), channels, -1).transpose(2, 1, 0)
        return out.reshape(-1, len(kernel))

    return layout


def _torch_layout(kernel: np.ndarray) -> np.ndarray:
    """[out in kh kw] -> [kh kw in out], [out in] -> [in out]."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}
    return kernel.transpose(axes[kernel.ndim]) if kernel.ndim in axes else kernel


def _array(tensor: Any) -> np.ndarray:
    """Of NumPy, JAX, Keras or PyTorch, a parameter or bfloat16 included."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
    return np.asarray(tensor)


def keras_depthwise(kernel: np.ndarray) -> np.ndarray:
    """Keras's depthwise layers: [kh kw in depth_multiplier] -> [kh kw 1 in*depth_multiplier]."""
    return kernel.reshape(*kernel.shape[:2], 1, -1)


def keras_dense(kernel: np.ndarray) -> np.ndarray:
    """Keras's 1x1 convolutions that stand for dense layers: [1 1 in out] -> [in out]."""
    return kernel[0, 0]


def _keras_layout(kernel: np.ndarray) -> np.ndarray:
    return kernel


def renumber(names: Iterable[str]) -> dict[str, str]:
    """Keras's names -> the same with automatic numbers from 0 in the order of creation.

    A second network of a session has `conv2d_94` where the first had `conv2d`: -> `conv2d_0`.
    """
    kinds = "conv2d|depthwise_conv2d|separable_conv2d|dense|batch_normalization|layer_normalization"
    automatic = {}
    for name in names:
        module, _, leaf = name.rpartition("/")
        if match := re.fullmatch(rf"({kinds})(?:_(\d+))?", module):
            automatic[name] = (match[1], int(match[2] or 0), leaf)
    numbers = defaultdict(set)
    for kind, number, _ in automatic.values():
        numbers[kind].add(number)
    order = {kind: {n: i for i, n in enumerate(sorted(found))} for kind, found in numbers.items()}
    new = {name: f"{k}_{order[k][n]}/{leaf}" for name, (k, n, leaf) in automatic.items()}
    return {name: new.get(name, name) for name in names}


_STYLES = {  # source: (what is between module and leaf, leaves, layout of kernels)
    "torchvision": (".", _TORCH_LEAVES, _torch_layout),
    "timm": (".", _TORCH_LEAVES, _torch_layout),
    "efficientnet_lite": (".", _TORCH_LEAVES, _torch_layout),
    "keras": ("/", _KERAS_LEAVES, _keras_layout),
}


_HOW = {
    "torchvision": "model.state_dict()",
    "timm": "model.state_dict()",
    "efficientnet_lite": "model.state_dict()",
    "keras": "{w.path: w.numpy() for w in model.weights}",
}


def apply(
    rules: Rules,
    tensors: Mapping[str, Any],
    source: str,
    paths: Iterable[str],
    what: str,
    *,
    headless: bool = False,
    optional_head: bool = False,
    notes: list[str] | None = None,
) -> dict[str, np.ndarray]:
    """{our path: array in our layout} of all tensors that are used; `paths` are all of ours.

    `headless` leaves out all heads, `optional_head` those that are not one layer. A
    head inside another module (`fc.1`) is taken as the head. `notes` gets what was done about
    heads. Raises `UserError`, beginning with `what`, where no rule knows a tensor, where it has no
    place, where two have the same one, or where numbers are not real.
    """
    notes = [] if notes is None else notes
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise UserError(
            f"{what}: expected a mapping of names to arrays ({_HOW[source]}), "
            f"got {type(tensors).__name__}"
        )
    paths, rules = set(paths), list(rules)
    dot, leaves, default = _STYLES[source]
    names = renumber(tensors) if source == "keras" else {name: name for name in tensors}
    if source != "keras":
        names = _find_head(rules, names, headless, optional_head, what, notes)
    found: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    strangers = []
    for original, name in names.items():
        module, _, leaf = name.rpartition(dot)
        match, rule = _first(rules, module)
        if rule is not None and rule[1] is UNUSED:
            continue
        templates = leaves.get(leaf, ("params/{}",))
        if leaf not in leaves:  # a parameter of no layer: the rule has its whole name
            match, rule = _first(rules, name)
        if rule is None:
            strangers.append(original)
            continue
        if templates is UNUSED:
            continue
        ours = rule[1](match) if callable(rule[1]) else match.expand(rule[1])
        if headless and ours.startswith(("head", "aux")):
            continue
        places = [place.format(ours) for place in templates]
        place = next((place for place in places if place in paths), None)
        if place is None:
            near = did_you_mean(places[0], paths)
            raise UserError(
                f"{what}: {original!r} belongs at {places[0]!r}, which is not there{near}"
            )
        if place in found:
            raise UserError(f"{what}: {origin[place]!r} and {original!r} both belong at {place!r}")
        array = _array(tensors[original])
        if array.dtype.kind not in "fiub" and not _is_small_float(array.dtype):
            raise UserError(f"{what}: {original!r} is of {array.dtype}; expected real numbers")
        layout = rule[2] if len(rule) > 2 else default
        layout = keras_depthwise if leaf == "depthwise_kernel" else layout
        try:
            found[place] = layout(array) if array.ndim > 1 else array
        except ValueError:
            raise UserError(
                f"{what}: wrong shapes: {original!r} is {array.shape}, which is none for {place!r}"
            ) from None
        origin[place] = original
    if strangers:
        hint = ""
        if source == "keras" and not any("/" in name for name in tensors):
            hint = f"; expected {_HOW[source]}"
        raise UserError(f"{what}: no place for {some(strangers)}{hint}")
    return found


def _is_small_float(dtype: np.dtype) -> bool:
    """Whether it is bfloat16 or a float8, which NumPy does not know itself."""
    return dtype.kind == "V" and dtype.names is None and hasattr(ml_dtypes, dtype.name)


def _find_head(
    rules: list,
    names: Mapping[str, str],
    headless: bool,
    optional: bool,
    what: str,
    notes: list[str],
) -> dict[str, str]:
    """{PyTorch's name: the same with the head's own module}: a head may have another name, or lie
    inside another module.

    `torch.nn.Sequential(dropout, linear)` in place of `fc` has `fc.1.weight`; a training script may
    have its own `classifier` behind a `backbone`.
    """
    inner: dict[str, str] = {}  # of a stranger -> of the head that it lies in, "" if unknown
    own = next((rule[0].replace("\\", "") for rule in rules if rule[1] == "head"), "")
    own = own if re.fullmatch(r"[\w.]+", own) else ""
    for original, name in names.items():
        module = name.rpartition(".")[0]
        if _first(rules, module)[1] is None and _first(rules, name)[1] is None:
            parents = [module[:i] for i, sign in enumerate(module) if sign == "."]
            if any(_is_head(rules, parent) for parent in parents):
                inner[original] = next(p for p in parents if _is_head(rules, p))
            elif module.partition(".")[0] in wrappers.HEADS:
                inner[original] = own
    modules = sorted({name.rpartition(".")[0] for name in inner})
    if not modules:
        return dict(names)
    heads = set(inner.values())
    free = not any(_is_head(rules, name.rpartition(".")[0]) for name in names)
    if len(modules) == len(heads) == 1 and all(heads) and free and not headless:
        notes.append(f"took {modules[0]!r} as the head {heads.pop()!r}")
        return {
            o: f"{inner[o]}.{n.rpartition('.')[2]}" if o in inner else n for o, n in names.items()
        }
    if not headless and not optional:
        raise UserError(
            f"{what}: the head is not one layer but {some(modules)}:"
            " num_classes=None (convert --nohead) leaves it out"
        )
    notes.append(f"left out the head, {some(modules)}")
    return {original: name for original, name in names.items() if original not in inner}


def _is_head(rules: list, module: str) -> bool:
    return any(rule[1] == "head" and re.fullmatch(rule[0], module) for rule in rules)


def _first(rules: list, name: str) -> tuple[re.Match, tuple] | tuple[None, None]:
    """The first rule that matches the whole name, and how."""
    found = find_first_match(rules, name)
    return (found[1], rules[found[0]]) if found else (None, None)


def fit(found: Mapping[str, np.ndarray], shapes: Mapping[str, Any], what: str) -> pytree.PyTree:
    """The tree of what was found, of the shapes and dtypes expected.

    Raises `UserError` where something is missing or has another shape.
    """
    if missing := sorted(set(shapes) - set(found)):
        raise UserError(f"{what}: no tensor was given for {some(missing)}")
    wrong = [
        f"{path} {tuple(array.shape)} in place of {tuple(shapes[path].shape)}"
        for path, array in found.items()
        if array.shape != shapes[path].shape
    ]
    if wrong:
        raise UserError(f"{what}: wrong shapes: {some(wrong)}")
    tree = pytree.unflatten(
        {path: np.ascontiguousarray(array, shapes[path].dtype) for path, array in found.items()}
    )
    return {"params": tree["params"], "batch_stats": tree.get("batch_stats", {})}


def some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
