"""Optimizers: Optax, over the trainable leaves only, with rules (regex, value) for what differs.

The learning rate is a function of `state.step`, which the step hands over, and is multiplied by a
scale in the optimizer's state when the schedule is "plateau".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.train import batchnorm_modes, checks, regularizers
from flax_cnns.train.hooks import Regularizer
from flax_cnns.train.schedules import Schedule
from flax_cnns.types import Array, PyTree

OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop", "lamb")

OptimizerFactory = Callable[..., optax.GradientTransformation]  # (learning_rate_schedule, **fields)


class Optimizer(NamedTuple):
    # Over the trainable leaves; update(..., step=, key=), the key being for gradient noise.
    tx: optax.GradientTransformationExtraArgs
    trainable: PyTree  # bools in the shape of params
    learning_rate: Callable[[Array, PyTree], Array]  # (step, opt_state) -> the rate of that step
    batchnorm_modes: Mapping[str, str]  # BatchNorm layer -> its mode (batchnorm_modes.MODES)
    regularizers: Mapping[str, Regularizer] = {}  # those that are on, by name

    def init(self, params: PyTree) -> PyTree:
        """The optimizer's state for `params`: frozen leaves take no memory."""
        return self.tx.init(pytree.partition(params, self.trainable)[0])

    def update(
        self, weights: PyTree, grads: PyTree, opt_state: PyTree, *, step: Array, key: Array
    ) -> tuple[PyTree, PyTree]:
        """(weights, opt_state) after a step, of the trainable leaves alone; `grads` are those of
        the whole loss, its penalties included."""
        updates, opt_state = self.tx.update(grads, opt_state, weights, step=step, key=key)
        weights = optax.apply_updates(weights, updates)
        return regularizers.constrain(self.regularizers, weights), opt_state


class PlateauState(NamedTuple):
    """ "Divide by ten when the validation error plateaus", as arrays that the checkpoint keeps."""

    best: Array  # f32, the lowest error seen
    wait: Array  # i32, validations since
    scale: Array  # f32, on the learning rate


def _scale_by_rate(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    def init(params: PyTree) -> PlateauState:
        del params
        return PlateauState(jnp.float32(jnp.inf), jnp.int32(0), jnp.float32(1.0))

    def update(updates, state, params=None, *, step, **_):
        del params
        rate = -schedule(step) * state.scale
        return jax.tree.map(lambda u: rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


class OwnOptimizerState(NamedTuple):
    """Of a user's optimizer."""

    rate: PlateauState
    inner: PyTree  # its own


def _own_optimizer(
    factory: OptimizerFactory, fields: Mapping[str, Any], schedule: Schedule
) -> optax.GradientTransformationExtraArgs:
    """A user's optimizer, whose learning rate is that of `step` and of the plateau.

    Optax counts updates by itself, and knows neither of rejected steps nor of the plateau: so it is
    made anew in each update, with a schedule that is the step's rate whatever count it is given.
    Every block has its own name in what it is given, and in its state, where the network scans too.
    """
    what = f"optimizer.name: {checks.name_of(factory)}"
    checks.check_arguments(what, factory, ("learning_rate_schedule",), fields)

    def make_with(rate: Schedule) -> optax.GradientTransformationExtraArgs:
        making = True

        def learning_rate(count: Array) -> Array:
            if making:
                raise UserError(
                    f"{what} asks for the learning rate as it is made, and so for one step's;"
                    " give the schedule itself to Optax, as in optax.sgd(learning_rate_schedule)"
                )
            return rate(count)

        tx = factory(learning_rate, **fields)
        making = False
        if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
            raise UserError(
                f"{what}: expected an optax.GradientTransformation, came {checks.describe(tx)}"
            )
        return optax.with_extra_args_support(tx)

    def init(params: PyTree) -> OwnOptimizerState:
        start = PlateauState(jnp.float32(jnp.inf), jnp.int32(0), jnp.float32(1.0))
        inner = make_with(schedule).init(pytree.unstack_blocks(params))
        # A copy: it may hold the weights themselves, and a step is given each buffer once.
        return OwnOptimizerState(start, jax.tree.map(jnp.copy, inner))

    def update(updates, state, params=None, *, step, **_):
        rate = schedule(step) * state.rate.scale
        grads, named = (pytree.unstack_blocks(tree) for tree in (updates, params))
        try:
            found, inner = make_with(lambda count: rate).update(grads, state.inner, named)
        except TypeError as error:
            if "required keyword-only" in str(error):
                raise UserError(
                    f"{what} is given gradients, state and params alone: {error}"
                ) from None
            raise
        found = checks.restack(checks.check_tree_like(f"{what}, updates", found, grads), updates)
        return found, OwnOptimizerState(
            state.rate, checks.check_tree_like(f"{what}, state", inner, state.inner)
        )

    make_with(schedule)  # what is wrong with it, before the data is loaded
    return optax.GradientTransformationExtraArgs(init, update)


def _beside(
    chain: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Adds what `chain` makes of no gradient at all to the updates that it is given."""

    def update(updates, state, params=None, **extra):
        nothing = jax.tree.map(jnp.zeros_like, updates)
        more, state = chain.update(nothing, state, params, **extra)
        return jax.tree.map(jnp.add, updates, more), state

    return optax.GradientTransformationExtraArgs(chain.init, update)


def _scale_by_trust_ratio() -> optax.GradientTransformation:
    """LAMB's, by the norms of each layer, of the layers in a stack too."""
    scale = optax.scale_by_trust_ratio()

    def one(path: tuple, update: Array, weight: Array) -> Array:
        ratio = lambda u, w: scale.update(u, optax.EmptyState(), w)[0]  # noqa: E731
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return (jax.vmap(ratio) if len(pytree.expand_stack(name)) > 1 else ratio)(update, weight)

    return optax.stateless(partial(jax.tree_util.tree_map_with_path, one))


def _plateau_states(opt_state: PyTree) -> list[PlateauState]:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, PlateauState))
    return [leaf for leaf in leaves if isinstance(leaf, PlateauState)]


def update_plateau(
    opt_state: PyTree,
    error: float,
    *,
    patience: int,
    factor: float,
    min_delta: float,
    signed: bool = False,
) -> PyTree:
    """The state after a validation error: after `patience` of them that were not better than the
    best by the share `min_delta`, the learning rate is multiplied by `factor`.

    `signed`: errors may be negative, as 1 - value is of a metric that exceeds 1.

    The last of these lowers the rate: PyTorch's ReduceLROnPlateau waits for one more, so that its
    `patience=4` is 5 here.
    """

    def step(state: PlateauState) -> PlateauState:
        share = 1.0 - min_delta
        if signed:
            share = jnp.where(state.best < 0, 1.0 + min_delta, share)
        better = error < state.best * share
        wait = jnp.where(better, 0, state.wait + 1)
        fall = wait >= patience
        return PlateauState(
            jnp.where(better, error, state.best).astype(jnp.float32),
            jnp.where(fall, 0, wait).astype(jnp.int32),
            jnp.where(fall, state.scale * factor, state.scale).astype(jnp.float32),
        )

    return jax.tree.map(
        lambda x: step(x) if isinstance(x, PlateauState) else x,
        opt_state,
        is_leaf=lambda x: isinstance(x, PlateauState),
    )


# The layer, for `layer_decay`, of each module: rules (regex over the beginning of its path, layer),
# of which the first that matches decides. A layer is any name, "head", or "below" or "above": the
# next layer on that side. A network's own rules, `layer_groups`, come before these.
_GROUPS = (
    (r"head\w*|aux\w*", "head"),
    (r"norm", "head"),  # behind the last block: BEiT's, and timm's of ConvNeXt and DenseNet
    (r"transition\w*", "below"),  # DenseNet's
    (r"downsample\w*", "above"),  # ConvNeXt's
    (r"stem\w*|patches|", "stem"),  # "": what is the network's own, such as positions
    (r"[^/]+/(?:block|layer|normal|highway)\d+|[^/]+", r"\g<0>"),
)


def layer_exponents(order: Sequence[str], groups: Sequence[tuple[str, str]] = ()) -> dict[str, int]:
    """{path of a part: exponent of `layer_decay`}: 0 for the head, 1 for the layer below it, ..."""
    parts: dict[str, str] = {}  # in the order of the images' way: part -> its layer
    for path in order:
        for regex, layer in (*groups, *_GROUPS):
            if found := re.match(rf"(?:{regex})(?=/|$)", path):
                parts.setdefault(found[0], found.expand(layer))
                break
    names = list(parts)
    for step, side, inward in ((-1, "below", names), (1, "above", names[::-1])):
        for part in inward:
            if parts[part] == side:
                at = names.index(part) + step
                parts[part] = parts[names[at]] if 0 <= at < len(names) else part
    layers = list(dict.fromkeys(layer for layer in parts.values() if layer != "head"))
    return {
        part: 0 if layer == "head" else len(layers) - layers.index(layer)
        for part, layer in parts.items()
    }


def layer_decay(
    order: Sequence[str], decay: float, groups: Sequence[tuple[str, str]] = ()
) -> list[tuple[str, float]]:
    """Rules for `lr_mult`: the head's rate whole, that of each layer below it `decay` times that of
    the one above.

    Transformers are grouped as in BEiT (Bao et al. 2021, https://arxiv.org/abs/2106.08254,
    get_num_layer_for_vit in its optim_factory.py): a block is a layer; patches, class token and
    positions are one layer; the last norm counts with the head. Convolutional networks are grouped
    as in timm (`group_matcher`): the stem is one layer, ConvNeXt's downsampling belongs to the
    block above it, DenseNet's transition to the layer below it. `groups` are a network's own rules,
    its `layer_groups`. In networks that timm lacks, whatever stands by itself is a layer.

    `order`: paths of modules as images pass them,
    `[layer.path for layer in analysis.cost.cost(model).layers]`. Auxiliary heads learn as the head
    does.
    """
    exponents = layer_exponents(order, groups)
    # What stands deeper in the tree first: "stage1/block1" before what else there is in "stage1".
    return [
        (
            f"params/{re.escape(part)}/.*" if part else "params/[^/]+",
            1.0 if exponents[part] == 0 else decay ** exponents[part],
        )
        for part in sorted(exponents, key=lambda part: -part.count("/"))
    ]


def make_optimizer(
    config: Any,
    params: PyTree,
    schedule: Schedule,
    *,
    batch_stats: PyTree | None = None,
    order: Sequence[str] = (),
    groups: Sequence[tuple[str, str]] = (),
    own_regularizers: Mapping[str, Regularizer] = {},
    factory: OptimizerFactory | None = None,
    factory_fields: Mapping[str, Any] = {},
) -> Optimizer:
    """The optimizer that `config.optimizer` describes, for the parameters `params`.

    `batch_stats` are the network's, for `config.optimizer.bn`; `order` its layers from below and
    `groups` its `layer_groups`, for `layer_decay`. `own_regularizers` are a user's, by name; they
    act behind the built-in ones. `factory(learning_rate_schedule, **factory_fields)`, if given, is
    a user's optimizer in place of the one that `config.name` names. Its gradients are clipped, and
    have the coupled weight decay ("auto" is coupled); its updates are multiplied by `lr_mult`;
    decoupled weight decay stands beside it.

    Decoupled weight decay is multiplied by the learning rate, as in optax and PyTorch (and not by
    the schedule alone, as Loshchilov & Hutter 2019 write it), and stays out of every momentum.
    Gradient noise follows clipping, so that its size is its own.

    lamb scales the update of every leaf by its trust ratio and clips nothing by itself; timm's Lamb
    does so only where there is weight decay (`always_adapt=False`), behind a global norm of 1
    (`max_grad_norm`, our `clip_norm`).

    rmsprop is TensorFlow's, which EfficientNet and Inception v3 were trained with: the mean of
    squares starts at 1, epsilon stands inside the root, and the rate inside the momentum.
    """
    trainable = pytree.expand_per_parameter(
        config.trainable, params, what="optimizer.trainable", default=True
    )
    for path, value in pytree.flatten(trainable).items():
        if isinstance(value, np.ndarray):
            raise UserError(
                f"optimizer.trainable: the rules freeze some blocks of the stack {path!r} and train"
                " others; let them agree, or set model.scan=False"
            )
    if bad := {type(v).__name__ for v in jax.tree.leaves(trainable)} - {"bool"}:
        raise UserError(f"optimizer.trainable: values are True or False, got {sorted(bad)}")
    modes = batchnorm_modes.decide_modes(config.bn, trainable, batch_stats or {})
    still = batchnorm_modes.has_mode(params, modes, "frozen")
    trainable = jax.tree.map(lambda learns, frozen: learns and not frozen, trainable, still)
    if not any(jax.tree.leaves(trainable)):
        raise UserError("optimizer.trainable: every parameter is frozen; let one rule say True")

    def over_trainable(spec: tuple, field: str, default: float) -> PyTree:
        tree = pytree.expand_per_parameter(spec, params, what=f"optimizer.{field}", default=default)
        return pytree.partition(tree, trainable)[0]

    decay = over_trainable(config.weight_decay, "weight_decay", 0.0)
    factors = over_trainable(config.lr_mult, "lr_mult", 1.0)
    if config.layer_decay:
        rules = layer_decay(order, config.layer_decay, groups)
        decays = over_trainable(rules, "layer_decay", 1.0)
        factors = jax.tree.map(lambda a, b: a * b, factors, decays)
    add_decay = optax.stateless(
        lambda updates, p: jax.tree.map(
            lambda u, w, d: u + jnp.asarray(d, w.dtype) * w if np.any(d) else u, updates, p, decay
        )
    )
    scale_parts = optax.stateless(
        lambda updates, _: jax.tree.map(
            lambda u, f: u * jnp.asarray(f, u.dtype) if np.any(f != 1) else u, updates, factors
        )
    )
    rate = _scale_by_rate(schedule)
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    momentum = (
        optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity()
    )
    scaled = [scale_parts, rate]
    match config.name:
        case _ if factory is not None:
            before, after = [_own_optimizer(factory, factory_fields, schedule)], [scale_parts]
        case "sgd":
            before, after = [momentum], scaled
        case "adam" | "adamw":
            before, after = [adam], scaled
        case "lamb":
            before, after = [adam], [_scale_by_trust_ratio(), *scaled]
        case "rmsprop":
            rms = optax.scale_by_rms(
                config.decay_rate, config.eps, initial_scale=1.0, eps_in_sqrt=True
            )
            before, after = [rms], [*scaled, momentum]
        case other:
            raise UserError(f"optimizer.name: unknown {other!r}{did_you_mean(other, OPTIMIZERS)}")
    mode = config.weight_decay_mode
    if mode == "auto":
        own_decay = factory is None and config.name in ("adamw", "lamb")
        mode = "decoupled" if own_decay else "coupled"
    if mode == "coupled":
        chain = [add_decay, *before, *after]
    elif factory is not None or config.name == "rmsprop":  # the rate is inside, or momentum behind
        chain = [*before, *after, _beside(optax.chain(add_decay, *scaled))]
    else:
        chain = [*before, add_decay, *after]
    regularizers.check_names(own_regularizers)
    regularizing = regularizers.make_regularizers(config, params, trainable) | dict(
        own_regularizers
    )
    chain = [*regularizers.make_transformations(regularizing), *chain]
    if config.clip_norm:
        chain.insert(0, optax.clip_by_global_norm(config.clip_norm))

    def learning_rate(step: Array, opt_state: PyTree) -> Array:
        plateau, *_ = _plateau_states(opt_state)  # a second one, if any, is the same
        return schedule(step) * plateau.scale

    tx = optax.with_extra_args_support(optax.chain(*chain))
    return Optimizer(tx, trainable, learning_rate, modes, regularizing)
