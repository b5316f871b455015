"""Class activation maps: weighted sums of a module's feature maps.

Each function returns raw maps f32 [N h w], as small as the feature maps [N h w C]. `show_map`
applies the ReLU, resizes and scales them. The network is not changed: zeros are added to the maps,
and the gradient is taken with respect to these zeros.

`path` names the module whose output is taken. By default, the maps are those whose means over all
positions the network takes, as in CAM. In a pre-activation network, this is the last norm's output
after its ReLU, which no module returns. A network without global average pooling has no such maps:
there the default is the last module with spatial maps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.extend import core

from flax_cnns import tree as pytree
from flax_cnns.analysis import tracing
from flax_cnns.analysis.explain import features as tap
from flax_cnns.analysis.explain import programs
from flax_cnns.analysis.explain.features import Variables
from flax_cnns.analysis.explain.targets import Target, TargetLike, make_target
from flax_cnns.errors import UserError
from flax_cnns.types import Array


class MapsAndGradients(NamedTuple):
    maps: Array  # f32 [N h w C]
    gradients: Array  # of the target by them


def grad_cam(
    model: nn.Module,
    variables: Variables,
    images: Array,
    target: TargetLike = None,
    path: str | None = None,
) -> Array:
    """Returns Grad-CAM before its ReLU: sum_k mean_xy(dS / dA_k) A_k, where S is the logit.

    Selvaraju et al. 2017, arXiv 1610.02391, equations 1 and 2. Raises `UserError` if the path is
    unknown or has no spatial maps, and for the targets that `make_target` refuses.
    """
    maps, gradients = maps_and_gradients(model, variables, images, target, path)
    return (maps * gradients.mean((1, 2), keepdims=True)).sum(-1)


def grad_cam_plus_plus(
    model: nn.Module,
    variables: Variables,
    images: Array,
    target: TargetLike = None,
    path: str | None = None,
) -> Array:
    """Returns Grad-CAM++: Grad-CAM with the weights sum_xy alpha ReLU(g), where g = dS / dA and
    alpha = g^2 / (2 g^2 + sum_xy(A) g^3).

    Chattopadhay et al. 2018, arXiv 1710.11063, equations 10 and 19, for exp(S). As in
    pytorch-grad-cam, 1e-6 is added to the denominator. Raises `UserError` as `grad_cam` does.
    """
    maps, g = maps_and_gradients(model, variables, images, target, path)
    below = 2 * g**2 + maps.sum((1, 2), keepdims=True) * g**3
    alpha = jnp.where(g == 0, 0.0, g**2 / (below + 1e-6))
    weights = (alpha * nn.relu(g)).sum((1, 2), keepdims=True)
    return (maps * weights).sum(-1)


def layer_cam(
    model: nn.Module,
    variables: Variables,
    images: Array,
    target: TargetLike = None,
    path: str | None = None,
) -> Array:
    """Returns LayerCAM: sum_k ReLU(dS / dA_k) A_k, with a weight for each pixel.

    Jiang et al. 2021, IEEE TIP 30, equation 5. Raises `UserError` as `grad_cam` does.
    """
    maps, gradients = maps_and_gradients(model, variables, images, target, path)
    return (nn.relu(gradients) * maps).sum(-1)


def cam(model: nn.Module, variables: Variables, images: Array, target: TargetLike = None) -> Array:
    """Returns CAM: sum_k w_k A_k, where w are the weights of the class in the head.

    Zhou et al. 2016, arXiv 1512.04150, equation 2. The head must be one dense layer that reads the
    spatial means of maps A. A is the output of a module, or the ReLU of that output. Raises
    `UserError` for other networks, and for a target that is not a class.
    """
    goal = make_target(target, model, variables, images)
    if goal.function is not None:
        raise UserError("cam uses the head's weights of a class: the target must be a class")
    model, variables = tap.unroll(model, variables)
    maps, kernel = _find_pooled(model, variables, images)
    weights = kernel[:, goal.classes]  # [C N]
    if goal.against is not None:
        weights = weights - kernel[:, goal.against]
    return jnp.einsum("nhwc,cn->nhw", maps, weights, precision="highest")


def maps_and_gradients(
    model: nn.Module,
    variables: Variables,
    images: Array,
    target: TargetLike = None,
    path: str | None = None,
) -> MapsAndGradients:
    """Returns the output [N h w C] of the module `path`, and the target's gradient with respect to
    it. Without `path`, the maps are those that global average pooling reads, or else the output of
    `choose_path`. Raises `UserError` as `grad_cam` does."""
    goal = make_target(target, model, variables, images)
    model, variables = tap.unroll(model, variables)
    if path is None and _has_global_pool(model, variables, images):
        return _pooled_maps_and_gradients(model, variables, images, goal)
    path = choose_path(model, variables, images, path)
    return _maps_and_gradients(model, variables, images, goal, path)


def choose_path(
    model: nn.Module, variables: Variables, images: Array, path: str | None = None
) -> str:
    """Returns `path`, or the last module with spatial maps if `path` is None.

    Raises `UserError` if the module has no spatial maps, or if `path` is None and the network works
    with tokens after its last maps.
    """
    outputs = tap.list_outputs(model, variables, images)
    if path is not None:
        tap.check_path(path, outputs, spatial=True)
        return path
    spatial = [name for name, output in outputs.items() if tap.is_map(output)]
    after = list(outputs)[list(outputs).index(spatial[-1]) :] if spatial else []
    if tokens := [name for name in after if len(outputs[name].shape) == 3]:
        raise UserError(
            f"{type(model).__name__} has tokens after its last spatial maps ({tokens[-1]!r} gives"
            f" {list(outputs[tokens[-1]].shape)}): class activation maps need spatial maps; take"
            f" gradient, or name the path, such as {spatial[-1]!r}"
        )
    if not spatial:
        raise UserError(
            f"no module of {type(model).__name__} has spatial maps for images {list(images.shape)}"
        )
    return spatial[-1]


def show_map(maps: Array, size: Sequence[int]) -> Array:
    """Prepares raw maps [N h w] for a picture: ReLU, bilinear resize to `size`, division by each
    map's maximum. Returns f32 [N H W] in 0..1."""
    positive = jax.image.resize(nn.relu(maps), (len(maps), *size), "bilinear")
    return positive / jnp.maximum(positive.max((1, 2), keepdims=True), 1e-12)


@tracing.jit("path")
def _maps_and_gradients(
    model: nn.Module, variables: Variables, images: Array, target: Target, path: str
) -> MapsAndGradients:
    place, _, call = path.partition("[")
    wanted = int(call[:-1]) if call else 0

    def score(added: Array) -> tuple[Array, Array]:
        calls = itertools.count()

        def add(function, args, kwargs, context):
            out = function(*args, **kwargs)
            here = context.method_name == "__call__" and "/".join(context.module.path) == place
            return out + added if here and next(calls) == wanted else out

        with nn.intercept_methods(add):
            logits, captured = tap.run(model, variables, images, {place})
        return target.score(logits).sum(), captured[path]

    shape = jax.eval_shape(lambda: tap.capture(model, variables, images, {place})[path])
    gradients, maps = jax.grad(score, has_aux=True)(jnp.zeros(shape.shape, shape.dtype))
    return MapsAndGradients(maps.astype(jnp.float32), gradients.astype(jnp.float32))


@tracing.jit()
def _pooled_maps_and_gradients(
    model: nn.Module, variables: Variables, images: Array, target: Target
) -> MapsAndGradients:
    program = _trace(model, variables, images)
    place = _find_global_pool(program.jaxpr)
    assert place is not None  # `_has_global_pool`

    def score(added: Array) -> tuple[Array, Array]:
        jaxpr, maps = program.jaxpr, added
        values: dict[core.Var, Any] = dict(zip(jaxpr.constvars, program.consts))
        values |= dict(zip(jaxpr.invars, jax.tree.leaves((variables, images))))
        for number, eqn in enumerate(jaxpr.eqns):
            given = [x.val if isinstance(x, core.Literal) else values[x] for x in eqn.invars]
            if number == place:
                (maps,) = given
                given = [maps + added]
            values |= dict(zip(eqn.outvars, programs.evaluate_equation(eqn, given)))
        return target.score(values[jaxpr.outvars[0]]).sum(), maps

    summed: Any = program.jaxpr.eqns[place].invars[0].aval
    gradients, maps = jax.grad(score, has_aux=True)(jnp.zeros(summed.shape, summed.dtype))
    return MapsAndGradients(maps.astype(jnp.float32), gradients.astype(jnp.float32))


@tracing.once_per_shape
def _has_global_pool(model: nn.Module, variables: Variables, images: Any) -> bool:
    return _find_global_pool(_trace(model, variables, images).jaxpr) is not None


def _trace(model: nn.Module, variables: Variables, images: Any) -> core.ClosedJaxpr:
    def forward(variables: Variables, images: Array) -> Any:
        # With captured outputs, `layers.Stage` runs its blocks one by one, without a scan.
        return model.apply(variables, images, train=False, mutable=["intermediates"])[0]

    return programs.drop_unused(jax.make_jaxpr(forward)(variables, images))


def _find_global_pool(program: core.Jaxpr) -> int | None:
    """Returns the number of the equation that sums maps [N h w C] over all positions, and through
    which alone the logits depend on the images. None if there is no such equation."""
    images = program.invars[-1]
    for place in range(len(program.eqns) - 1, -1, -1):
        eqn = program.eqns[place]
        if eqn.primitive.name != "reduce_sum" or eqn.params["axes"] != (1, 2):
            continue
        aval: Any = eqn.invars[0].aval
        shape = aval.shape
        if len(shape) != 4 or shape[1] * shape[2] < 2:
            return None
        before = {images}  # what depends on the images, without the sum
        for number, each in enumerate(program.eqns):
            if number != place and not before.isdisjoint(_list_vars(each)):
                if number > place:
                    return None
                before |= set(each.outvars)
        return place
    return None


def _list_vars(eqn: core.JaxprEqn) -> list[core.Var]:
    return [atom for atom in eqn.invars if isinstance(atom, core.Var)]


def _find_pooled(model: nn.Module, variables: Variables, images: Array) -> tuple[Array, Array]:
    """Returns the maps [N h w C] whose spatial means the head reads, and the head's kernel [C K].
    Raises `UserError` if there are no such maps."""
    head, read = _find_head(model, variables, images)
    outputs = tap.list_outputs(model, variables, images)
    candidates = [
        name
        for name, output in outputs.items()
        if len(output.shape) == 4 and output.shape[-1] == read.shape[-1]
    ]
    for path in reversed(candidates):
        maps = tap.features(model, variables, images, [path])[path]
        # A mean in bfloat16 is rounded.
        rounding = max(jnp.finfo(each.dtype).eps for each in (maps, read))
        maps = maps.astype(jnp.float32)
        for found in (maps, nn.relu(maps)):
            scale = np.abs(read).max() + 1e-12
            if np.abs(found.mean((1, 2)) - read).max() < max(1e-4, 2 * rounding) * scale:
                return found, pytree.flatten(variables["params"])[f"{head}/kernel"]
    raise UserError(
        f"{type(model).__name__}: no module's output, nor its ReLU, has the means that the dense"
        f" layer {head!r} reads; cam needs global average pooling and one dense layer; take"
        " grad_cam"
    )


def _find_head(model: nn.Module, variables: Variables, images: Array) -> tuple[str, Array]:
    """Returns (path, input [N C]) of the dense layer whose output is the logits. Raises `UserError`
    if the logits come from something else."""
    logits, layers = _dense_layers(model, variables, images)
    for path, (read, out) in reversed(layers.items()):
        if read.ndim == 2 and out.shape == logits.shape and bool((out == logits).all()):
            return path, read
    raise UserError(
        f"the logits of {type(model).__name__} are not the output of a dense layer, as cam needs;"
        " take grad_cam"
    )


@tracing.jit()
def _dense_layers(
    model: nn.Module, variables: Variables, images: Array
) -> tuple[Array, dict[str, tuple[Array, Array]]]:
    """Returns the logits, and {path: (input, output)} of every dense layer."""

    def note(function, args, kwargs, context):
        out = function(*args, **kwargs)
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            # Sown values leave a rematerialized block too.
            context.module.sow("intermediates", "read", args[0])
            context.module.sow("intermediates", "given", out)
        return out

    with nn.intercept_methods(note):
        logits, state = model.apply(variables, images, train=False, mutable=["intermediates"])
    sown = flatten_dict(state.get("intermediates", {}), sep="/")
    found = {
        path.removesuffix("/read"): (calls[-1], sown[path.removesuffix("read") + "given"][-1])
        for path, calls in sown.items()
        if path.endswith("/read")
    }
    return logits, found
