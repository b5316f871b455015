"""Returns the output of any module of a network, by its path, without changing the network.

    features(model, variables, images, ["stem", "stage2/block1"])

A path is that of the parameters without the collection: `params/stage2/block1/conv1/kernel` belongs
to the module `stage2/block1/conv1`. The empty path is the network itself. Functions such as
`nn.relu` are not modules. So the output of a norm is the value before the activation, and the
output of a block is the value after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from flax_cnns import tree as pytree
from flax_cnns.analysis import tracing
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.types import Array, PyTree

Variables = Mapping[str, PyTree]
# The name under which flax keeps what a module's `__call__` returns.
_CALL = "__call__"


class Unrolled(NamedTuple):
    """A network that runs its blocks one by one, and its variables with named blocks."""

    model: nn.Module
    variables: Variables


def unroll(model: nn.Module, variables: Variables) -> Unrolled:
    """Returns the same network without `scan` and `remat`, and its variables with named blocks.

    A user's own network is not changed, because its fields `scan` and `remat` may mean something
    else. `layers.Stage` does not scan while outputs are captured.
    """
    ours = any(each.__module__.startswith("flax_cnns.models.") for each in type(model).__mro__)
    off: dict[str, Any] = {
        name: False for name in ("scan", "remat") if ours and getattr(model, name, None) is True
    }
    named = {name: pytree.unstack_blocks(nn.unbox(tree)) for name, tree in variables.items()}
    return Unrolled(model.clone(**off) if off else model, named)


def features(
    model: nn.Module, variables: Variables, images: Array, paths: Sequence[str]
) -> dict[str, Array]:
    """Returns {path: output of that module} in evaluation, for images [N H W C].

    A module that is called several times has its outputs under `path[0]`, `path[1]` and so on.
    Raises `UserError` for a path that the network does not call, or whose output is not an array.
    """
    model, variables = unroll(model, variables)
    shapes = list_outputs(model, variables, images)
    for path in paths:
        check_path(path, shapes)
    return _features(model, variables, images, tuple(paths))


def list_outputs(
    model: nn.Module, variables: Variables, images: Array | jax.ShapeDtypeStruct
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {path: shape and dtype of that module's output}, in the order in which the modules
    end.

    Nothing is computed but shapes, once per shape of the images. Outputs that are not arrays are
    left out.
    """
    return dict(_list_outputs(*unroll(model, variables), images)[1])


def list_calls(
    model: nn.Module, variables: Variables, images: Array | jax.ShapeDtypeStruct
) -> list[str]:
    """Returns the paths of all modules, each once, in the order in which they first end.

    The list includes modules inside a user's own scan, which `list_outputs` lacks.
    """
    return list(dict.fromkeys(_list_outputs(*unroll(model, variables), images)[0]))


@tracing.once_per_shape
def _list_outputs(
    model: nn.Module, variables: Variables, images: Any
) -> tuple[list[str], dict[str, jax.ShapeDtypeStruct]]:
    order: list[str] = []

    def note(
        function: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        out = function(*args, **kwargs)
        if context.method_name == _CALL:
            order.append("/".join(context.module.path))
        return out

    with nn.intercept_methods(note):
        captured = jax.eval_shape(partial(capture, model), variables, images)
    return order, {path: captured[path] for path in number_calls(order) if path in captured}


def check_path(
    path: str, outputs: Mapping[str, jax.ShapeDtypeStruct], *, spatial: bool = False
) -> None:
    """Raises `UserError` if `path` is not in `outputs`; with `spatial` also if that module's output
    is not a map [N H W C] of more than one pixel."""
    if path not in outputs:
        calls = [name for name in outputs if name.rpartition("[")[0] == path]
        if calls:
            raise UserError(
                f"{path!r} is called {len(calls)} times; choose a call: {', '.join(calls)}"
            )
        known = [name for name in outputs if name]  # "" is the network itself
        raise UserError(f"the network calls no module {path!r}{did_you_mean(path, known)}")
    if spatial and not is_map(outputs[path]):
        spatial_paths = [name for name, output in outputs.items() if is_map(output)]
        last = spatial_paths[-1] if spatial_paths else None
        hint = f"; the last module with spatial maps is {last!r}" if last else ""
        raise UserError(
            f"{path!r} has no spatial maps: its output is {list(outputs[path].shape)}, expected"
            f" [N H W C] of more than one pixel{hint}"
        )


def is_map(output: jax.ShapeDtypeStruct) -> bool:
    return len(output.shape) == 4 and output.shape[1] * output.shape[2] > 1


@tracing.jit("paths")
def _features(
    model: nn.Module, variables: Variables, images: Array, paths: tuple[str, ...]
) -> dict[str, Array]:
    captured = capture(model, variables, images, {path.partition("[")[0] for path in paths})
    return {path: captured[path] for path in paths}


def capture(
    model: nn.Module, variables: Variables, images: Array, paths: set[str] | None = None
) -> dict[str, Array]:
    """Returns {path: output} of the modules `paths` of an unrolled network; None: all modules."""
    return run(model, variables, images, paths)[1]


def run(
    model: nn.Module, variables: Variables, images: Array, paths: set[str] | None = None
) -> tuple[Any, dict[str, Array]]:
    """Returns the network's output and the result of `capture`.

    Within `batchnorm.use_statistics("batch")`, BatchNorm uses the statistics of the batch.
    """

    def is_asked(module: nn.Module, method: str) -> bool:
        return method == _CALL and (paths is None or "/".join(module.path) in paths)

    logits, state = model.apply(
        variables,
        images,
        train=False,
        capture_intermediates=is_asked,
        mutable=["intermediates", "batch_stats"],
    )
    captured: dict[str, Any] = {}
    for (*parts, name), calls in flatten_dict(state.get("intermediates", {})).items():
        if name == _CALL:
            captured |= dict(zip(number_calls(["/".join(parts)] * len(calls)), calls))
    return logits, {path: value for path, value in captured.items() if isinstance(value, jax.Array)}


def number_calls(paths: Sequence[str]) -> list[str]:
    """Returns a name for each call. If a path occurs several times, [0], [1] ... are added."""
    seen: dict[str, int] = {}
    names = []
    for path in paths:
        seen[path] = seen.get(path, -1) + 1
        names.append(path if paths.count(path) == 1 else f"{path}[{seen[path]}]")
    return names
