"""Name rules that place another library's tensors in our trees: names, leaves, layouts.

A rule is `(regex, target)` or `(regex, target, layout)`. The regex matches the whole name of a
module in the source; the first rule that matches decides. The target is the path of our module
(groups of the regex may be used), a function of the match that returns the path, or `UNUSED`. The
layout is a function that changes the module's kernels to our layout. Parameters that belong to no
layer (`class_token`) are matched by the tensor's full name, and the target is the path of our leaf.

`tree.rules.decide` is not used here, because it refuses a rule that decides nothing: one table
serves all variants of a family, and each variant has only some of the layers. A mistyped rule is
still noticed: `apply_rules` refuses a tensor that no rule matches, and `make_tree` refuses a leaf
without a tensor.
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
from flax_cnns.types import PyTree
from flax_cnns.weights import wrappers

UNUSED = None  # target of a rule that leaves tensors out

Target = str | Callable[[re.Match], str] | None
Layout = Callable[[np.ndarray], np.ndarray]
Rule = tuple[str, Target] | tuple[str, Target, Layout]
Rules = list[Rule]
Leaves = dict[str, tuple[str, ...] | None]

# Leaf in the source -> our candidates; the first one that our module has is taken.
_TORCH_LEAVES: Leaves = {
    "weight": ("params/{}/kernel", "params/{}/scale"),
    "bias": ("params/{}/bias",),
    "running_mean": ("batch_stats/{}/mean",),
    "running_var": ("batch_stats/{}/var",),
    "num_batches_tracked": UNUSED,
}
_KERAS_LEAVES: Leaves = {
    "kernel": ("params/{}/kernel",),
    "depthwise_kernel": ("params/{}/depthwise/kernel",),  # SeparableConv2D's
    "pointwise_kernel": ("params/{}/pointwise/kernel",),
    "bias": ("params/{}/bias",),
    "gamma": ("params/{}/scale",),
    "beta": ("params/{}/bias",),
    "moving_mean": ("batch_stats/{}/mean",),
    "moving_variance": ("batch_stats/{}/var",),
}


def dense_after_flatten(channels: int) -> Layout:
    """Layout of a PyTorch dense layer on flattened maps of `channels` channels.

    PyTorch flattens maps as [C H W]; ours are flattened as [H W C].
    """

    def layout(kernel: np.ndarray) -> np.ndarray:  # [out C*H*W] -> [H*W*C out]
        out = kernel.reshape(len(kernel), channels, -1).transpose(2, 1, 0)
        return out.reshape(-1, len(kernel))

    return layout


def _torch_layout(kernel: np.ndarray) -> np.ndarray:
    """[out in kh kw] -> [kh kw in out], [out in] -> [in out]."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}
    return kernel.transpose(axes[kernel.ndim]) if kernel.ndim in axes else kernel


def _array(tensor: Any) -> np.ndarray:
    """A NumPy array from a tensor of NumPy, JAX, Keras or PyTorch, also a parameter or bfloat16."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
    return np.asarray(tensor)


def keras_depthwise(kernel: np.ndarray) -> np.ndarray:
    """Keras's depthwise kernel: [kh kw in depth_multiplier] -> [kh kw 1 in*depth_multiplier]."""
    return kernel.reshape(*kernel.shape[:2], 1, -1)


def keras_dense(kernel: np.ndarray) -> np.ndarray:
    """Keras's 1x1 convolution in place of a dense layer: [1 1 in out] -> [in out]."""
    return kernel[0, 0]


def _keras_layout(kernel: np.ndarray) -> np.ndarray:
    return kernel


def renumber_keras_names(names: Iterable[str]) -> dict[str, str]:
    """{Keras's name: the same name with automatic numbers from 0, in the order of creation}.

    The first network of a session has `conv2d` where the second has `conv2d_94`: both become
    `conv2d_0`.
    """
    kinds = "conv2d|depthwise_conv2d|separable_conv2d|dense|batch_normalization|layer_normalization"
    automatic = {}
    for name in names:
        module, _, leaf = name.rpartition("/")
        if match := re.fullmatch(rf"({kinds})(?:_(\d+))?", module):
            automatic[name] = (match[1], int(match[2] or 0), leaf)
    numbers: defaultdict[str, set[int]] = defaultdict(set)
    for kind, number, _ in automatic.values():
        numbers[kind].add(number)
    order = {kind: {n: i for i, n in enumerate(sorted(used))} for kind, used in numbers.items()}
    new = {name: f"{k}_{order[k][n]}/{leaf}" for name, (k, n, leaf) in automatic.items()}
    return {name: new.get(name, name) for name in names}


# source: (separator between module and leaf, leaves, layout of kernels)
_STYLES: dict[str, tuple[str, Leaves, Layout]] = {
    "torchvision": (".", _TORCH_LEAVES, _torch_layout),
    "timm": (".", _TORCH_LEAVES, _torch_layout),
    "efficientnet_lite": (".", _TORCH_LEAVES, _torch_layout),
    "keras": ("/", _KERAS_LEAVES, _keras_layout),
}


_EXPECTED = {  # the Python expression that makes the tensors of a source
    "torchvision": "model.state_dict()",
    "timm": "model.state_dict()",
    "efficientnet_lite": "model.state_dict()",
    "keras": "{w.path: w.numpy() for w in model.weights}",
}


def apply_rules(
    rules: Iterable[Rule],
    tensors: Mapping[str, Any],
    source: str,
    paths: Iterable[str],
    what: str,
    *,
    headless: bool = False,
    optional_head: bool = False,
    notes: list[str] | None = None,
) -> dict[str, np.ndarray]:
    """Returns `{our path: array in our layout}` of all tensors that are used.

    `paths` are the paths of all leaves of our network. `headless` leaves out all heads,
    `optional_head` a head of several layers. A head inside another module (`fc.1`) is taken as the
    head. `notes` gets a line on what was done about heads.

    Raises `UserError` if no rule matches a tensor, if our network lacks the leaf for a tensor, if
    two tensors belong to one leaf, and if a tensor does not hold real numbers. Messages begin with
    `what`.
    """
    notes = [] if notes is None else notes
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise UserError(
            f"{what}: expected a mapping of names to arrays ({_EXPECTED[source]}), "
            f"got {type(tensors).__name__}"
        )
    paths, rules = set(paths), list(rules)
    separator, leaves, default = _STYLES[source]
    names = renumber_keras_names(tensors) if source == "keras" else {name: name for name in tensors}
    if source != "keras":
        names = _find_head(rules, names, headless, optional_head, what, notes)
    arrays: dict[str, np.ndarray] = {}
    origins: dict[str, str] = {}  # our path -> name of the tensor
    unmatched = []
    for original, name in names.items():
        module, _, leaf = name.rpartition(separator)
        decision = _first_rule(rules, module)
        if decision and decision[1][1] is UNUSED:
            continue
        templates = leaves.get(leaf, ("params/{}",))
        if leaf not in leaves:  # the parameter belongs to no layer
            decision = _first_rule(rules, name)
        if decision is None:
            unmatched.append(original)
            continue
        match, rule = decision
        target = rule[1]
        if templates is UNUSED or target is UNUSED:
            continue
        ours = target(match) if callable(target) else match.expand(target)
        if headless and ours.startswith(("head", "aux")):
            continue
        candidates = [template.format(ours) for template in templates]
        path = next((path for path in candidates if path in paths), None)
        if path is None:
            near = did_you_mean(candidates[0], paths)
            raise UserError(
                f"{what}: {original!r} belongs at {candidates[0]!r}, which the network lacks{near}"
            )
        if path in arrays:
            raise UserError(f"{what}: {origins[path]!r} and {original!r} both belong at {path!r}")
        array = _array(tensors[original])
        if array.dtype.kind not in "fiub" and not _is_small_float(array.dtype):
            raise UserError(f"{what}: {original!r} holds {array.dtype}; expected real numbers")
        layout = rule[2] if len(rule) > 2 else default
        layout = keras_depthwise if leaf == "depthwise_kernel" else layout
        try:
            arrays[path] = layout(array) if array.ndim > 1 else array
        except ValueError:
            raise UserError(
                f"{what}: wrong shapes: {original!r} has shape {array.shape}, which does not fit"
                f" {path!r}"
            ) from None
        origins[path] = original
    if unmatched:
        hint = ""
        if source == "keras" and not any("/" in name for name in tensors):
            hint = f"; expected {_EXPECTED[source]}"
        raise UserError(f"{what}: the network has no place for {list_some(unmatched)}{hint}")
    return arrays


def _is_small_float(dtype: np.dtype) -> bool:
    """Whether `dtype` is bfloat16 or a float8, which ml_dtypes adds to NumPy."""
    return dtype.kind == "V" and dtype.names is None and hasattr(ml_dtypes, dtype.name)


def _find_head(
    rules: Rules,
    names: Mapping[str, str],
    headless: bool,
    optional: bool,
    what: str,
    notes: list[str],
) -> dict[str, str]:
    """{PyTorch's name: the same name with the head under the name that the rules know}.

    A head may have another name, or lie inside another module: `torch.nn.Sequential(dropout,
    linear)` in place of `fc` has `fc.1.weight`, and a training script may have a `classifier` of
    its own after a `backbone`.
    """
    # Name that no rule matches -> module of the head that it belongs to, "" if unknown.
    inner: dict[str, str] = {}
    usual = next((rule[0].replace("\\", "") for rule in rules if rule[1] == "head"), "")
    usual = usual if re.fullmatch(r"[\w.]+", usual) else ""
    for original, name in names.items():
        module = name.rpartition(".")[0]
        if _first_rule(rules, module) is None and _first_rule(rules, name) is None:
            parents = [module[:i] for i, sign in enumerate(module) if sign == "."]
            if any(_is_head(rules, parent) for parent in parents):
                inner[original] = next(p for p in parents if _is_head(rules, p))
            elif module.partition(".")[0] in wrappers.HEADS:
                inner[original] = usual
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
            f"{what}: the head is not one layer but {list_some(modules)};"
            " num_classes=None (convert --no-head) leaves it out"
        )
    notes.append(f"left out the head, {list_some(modules)}")
    return {original: name for original, name in names.items() if original not in inner}


def _is_head(rules: Rules, module: str) -> bool:
    """Whether `module` is the head in the source."""
    return any(rule[1] == "head" and re.fullmatch(rule[0], module) for rule in rules)


def _first_rule(rules: Rules, name: str) -> tuple[re.Match, Rule] | None:
    """(match, rule) of the first rule that matches the whole name; None if none does."""
    decision = find_first_match(rules, name)
    return (decision[1], rules[decision[0]]) if decision else None


def make_tree(
    arrays: Mapping[str, np.ndarray], shapes: Mapping[str, Any], what: str
) -> dict[str, PyTree]:
    """`{"params": ..., "batch_stats": ...}` of `arrays` by path, with the dtypes of `shapes`.

    Raises `UserError` if an array is missing or has another shape than in `shapes`.
    """
    if missing := sorted(set(shapes) - set(arrays)):
        raise UserError(f"{what}: no tensor was given for {list_some(missing)}")
    wrong = [
        f"{path} has shape {tuple(array.shape)}, expected {tuple(shapes[path].shape)}"
        for path, array in arrays.items()
        if array.shape != shapes[path].shape
    ]
    if wrong:
        raise UserError(f"{what}: wrong shapes: {list_some(wrong)}")
    tree = pytree.unflatten(
        {path: np.ascontiguousarray(array, shapes[path].dtype) for path, array in arrays.items()}
    )
    return {"params": tree["params"], "batch_stats": tree.get("batch_stats", {})}


def list_some(names: list[str], most: int = 5) -> str:
    """At most `most` of the names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
