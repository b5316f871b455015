"""Optimizers made of Optax transformations of the trainable leaves.

Rules (regex, value) set the values that differ between parameters. The learning rate is a function
of `state.step`, which the training step passes to the optimizer. The schedule "plateau" multiplies
the rate by a scale in the optimizer's state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.train import batchnorm_modes, checks, regularizers
from flax_cnns.train.hooks import Regularizer
from flax_cnns.train.lamb_and_muon import make_muon, scale_by_trust_ratio
from flax_cnns.train.schedules import Schedule
from flax_cnns.types import Array, PyTree

OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop", "lamb", "muon")

OptimizerFactory = Callable[..., optax.GradientTransformation]  # (learning_rate_schedule, **fields)


class Optimizer(NamedTuple):
    """An Optax transformation of the trainable leaves, and what else a training step needs."""

    # Transforms the trainable leaves; its update takes `step` and, for gradient noise, `key`.
    tx: optax.GradientTransformationExtraArgs
    trainable: PyTree  # a bool for each leaf of params
    learning_rate: Callable[[Array, PyTree], Array]  # (step, opt_state) -> that step's rate
    batchnorm_modes: Mapping[str, str]  # BatchNorm layer -> its mode (batchnorm_modes.MODES)
    regularizers: Mapping[str, Regularizer] = {}  # the active ones, by name

    def init(self, params: PyTree) -> PyTree:
        """Returns the optimizer's state for `params`; frozen leaves take no memory."""
        return self.tx.init(pytree.partition(params, self.trainable)[0])

    def update(
        self, weights: PyTree, grads: PyTree, opt_state: PyTree, *, step: Array, key: Array
    ) -> tuple[PyTree, PyTree]:
        """Returns (weights, opt_state) after a step.

        `weights` are the trainable leaves; `grads` are gradients of the loss with its penalties.
        """
        updates, opt_state = self.tx.update(grads, opt_state, weights, step=step, key=key)
        weights = optax.apply_updates(weights, updates)
        return regularizers.constrain(self.regularizers, weights), opt_state


class PlateauState(NamedTuple):
    """The state of the schedule "plateau", as arrays that checkpoints hold."""

    best: Array  # f32: the lowest validation error
    wait: Array  # i32: validations since the lowest one
    scale: Array  # f32: factor on the learning rate


def _scale_by_rate(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    def init(params: PyTree) -> PlateauState:
        del params
        return PlateauState(jnp.float32(jnp.inf), jnp.int32(0), jnp.float32(1.0))

    def update(updates: PyTree, state: PlateauState, params: Any = None, *, step: Array, **_: Any):
        del params
        rate = -schedule(step) * state.scale
        return jax.tree.map(lambda u: rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


class OwnOptimizerState(NamedTuple):
    """The state of a user's optimizer, and that of the schedule "plateau"."""

    rate: PlateauState
    inner: PyTree  # the state of the user's optax transformation


def _own_optimizer(
    factory: OptimizerFactory, fields: Mapping[str, Any], schedule: Schedule
) -> optax.GradientTransformationExtraArgs:
    """Wraps a user's optimizer so that its learning rate follows `step` and the plateau.

    Optax counts updates by itself, so it knows neither rejected steps nor the plateau. Therefore
    the optimizer is built again in each update, with a schedule that returns the step's rate for
    any count. The user's optimizer always sees every block under its own name, even if the network
    scans its blocks.
    """
    what = f"optimizer.name: {checks.name_of(factory)}"
    checks.check_arguments(what, factory, ("learning_rate_schedule",), fields)

    def make_with(rate: Schedule) -> optax.GradientTransformationExtraArgs:
        making = True

        def learning_rate(count: Array) -> Array:
            if making:
                raise UserError(
                    f"{what} calls the schedule while the optimizer is made, so it gets the rate of"
                    " one step only; pass the schedule to Optax, as in"
                    " optax.sgd(learning_rate_schedule)"
                )
            return rate(count)

        tx = factory(learning_rate, **fields)
        making = False
        if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
            raise UserError(
                f"{what}: expected an optax.GradientTransformation, got {checks.describe(tx)}"
            )
        return optax.with_extra_args_support(tx)

    def init(params: PyTree) -> OwnOptimizerState:
        start = PlateauState(jnp.float32(jnp.inf), jnp.int32(0), jnp.float32(1.0))
        inner = make_with(schedule).init(pytree.unstack_blocks(params))
        # A copy: the state may hold the weights themselves, and a buffer can be donated only once.
        return OwnOptimizerState(start, jax.tree.map(jnp.copy, inner))

    def update(updates: PyTree, state: Any, params: PyTree = None, *, step: Array, **_: Any):
        rate = schedule(step) * state.rate.scale
        grads, named = (pytree.unstack_blocks(tree) for tree in (updates, params))
        try:
            changes, inner = make_with(lambda count: rate).update(grads, state.inner, named)
        except TypeError as error:
            if "required keyword-only" in str(error):
                raise UserError(
                    f"{what}: its update gets only gradients, state and params: {error}"
                ) from None
            raise
        changes = checks.check_tree_like(f"{what}, updates", changes, grads)
        inner = checks.check_tree_like(f"{what}, state", inner, state.inner)
        return checks.restack(changes, updates), OwnOptimizerState(state.rate, inner)

    make_with(schedule)  # reports mistakes now, before the data is loaded
    return optax.GradientTransformationExtraArgs(init, update)


def _add_decoupled(
    chain: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Adds to the updates what `chain` returns for gradients of zero: decoupled weight decay."""

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any):
        zeros = jax.tree.map(jnp.zeros_like, updates)
        decay, state = chain.update(zeros, state, params, **extra)
        return jax.tree.map(jnp.add, updates, decay), state

    return optax.GradientTransformationExtraArgs(chain.init, update)


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
    """Returns `opt_state` updated by a validation error.

    After `patience` errors in a row that are not below the best error by the fraction `min_delta`,
    the learning rate is multiplied by `factor`. The last of these errors already lowers the rate.
    PyTorch's ReduceLROnPlateau waits for one more error: its `patience=4` is 5 here.

    `signed`: errors may be negative, as 1 - value is for a metric above 1.
    """

    def step(state: PlateauState) -> PlateauState:
        share: Array | float = 1.0 - min_delta
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


# The layer of each module for `layer_decay`: rules (regex of the start of the path, layer). The
# first match decides. A layer is "head", any other name, or "below" or "above": the layer of the
# next module on that side. A network's own rules, `layer_groups`, come before these.
_GROUPS = (
    (r"head\w*|aux\w*", "head"),
    (r"norm", "head"),  # after the last block: as in BEiT, and in timm's ConvNeXt and DenseNet
    (r"transition\w*", "below"),  # DenseNet
    (r"downsample\w*", "above"),  # ConvNeXt
    (r"stem\w*|patches|", "stem"),  # "": parameters of the network itself, such as positions
    (r"[^/]+/(?:block|layer|normal|highway)\d+|[^/]+", r"\g<0>"),
)


def layer_exponents(order: Sequence[str], groups: Sequence[tuple[str, str]] = ()) -> dict[str, int]:
    """Returns {path of a module: exponent of `layer_decay`}: 0 for the head, 1 for the layer below.

    `order`: paths of modules in the order in which images pass them.
    """
    layer_of: dict[str, str] = {}  # module -> its layer, in that order
    for path in order:
        for regex, layer in (*groups, *_GROUPS):
            if match := re.match(rf"(?:{regex})(?=/|$)", path):
                layer_of.setdefault(match[0], match.expand(layer))
                break
    modules = list(layer_of)
    for step, side, inward in ((-1, "below", modules), (1, "above", modules[::-1])):
        for module in inward:
            if layer_of[module] == side:
                at = modules.index(module) + step
                layer_of[module] = layer_of[modules[at]] if 0 <= at < len(modules) else module
    layers = list(dict.fromkeys(layer for layer in layer_of.values() if layer != "head"))
    return {
        module: 0 if layer == "head" else len(layers) - layers.index(layer)
        for module, layer in layer_of.items()
    }


def layer_decay(
    order: Sequence[str], decay: float, groups: Sequence[tuple[str, str]] = ()
) -> list[tuple[str, float]]:
    """Returns rules for `lr_mult`: 1 for the head, decay^n for the n-th layer below it.

    Transformers are grouped as in BEiT (Bao et al. 2021, https://arxiv.org/abs/2106.08254,
    get_num_layer_for_vit in its optim_factory.py): a block is a layer; patches, class token and
    positions are one layer; the last norm belongs to the head. Convolutional networks are grouped
    as in timm (`group_matcher`): the stem is one layer, ConvNeXt's downsampling belongs to the
    block above it, DenseNet's transition to the layer below it. In networks that timm lacks, each
    remaining module is a layer. Auxiliary heads learn at the head's rate.

    `order`: paths of modules in the order in which images pass them,
    `[layer.path for layer in analysis.cost.cost(model).layers]`. `groups`: a network's own rules,
    its `layer_groups`.
    """
    exponents = layer_exponents(order, groups)
    # Deeper modules first: "stage1/block1" before the rest of "stage1".
    return [
        (
            f"params/{re.escape(module)}/.*" if module else "params/[^/]+",
            1.0 if exponents[module] == 0 else decay ** exponents[module],
        )
        for module in sorted(exponents, key=lambda module: -module.count("/"))
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
    """Makes the optimizer that `config`, the section `config.optimizer`, describes.

    Args:
      config: the section `config.optimizer`.
      params: the network's parameters.
      schedule: the learning rate.
      batch_stats: the network's running statistics, for `config.bn`.
      order: the paths of the network's layers from the input on, for `layer_decay`.
      groups: the network's `layer_groups`, for `layer_decay`.
      own_regularizers: a user's regularizers by name; they act after the built-in ones.
      factory: a user's optimizer in place of `config.name`, called as
        `factory(learning_rate_schedule, **factory_fields)`. Its gradients are clipped and include
        coupled weight decay ("auto" is coupled). Its updates are multiplied by `lr_mult`.
        Decoupled weight decay is added to them.
      factory_fields: the fields of `factory`.

    Decoupled weight decay is multiplied by the learning rate, as in Optax and PyTorch, and does not
    enter the momentum. (Loshchilov & Hutter 2019 multiply it by the schedule alone.) Gradient noise
    is added after clipping, so clipping does not change its size.

    lamb scales the update of every leaf by the leaf's trust ratio and does not clip by itself.
    timm's Lamb uses the ratio only for leaves with weight decay (`always_adapt=False`), and first
    clips the gradient to a global norm of 1 (`max_grad_norm`, our `clip_norm`).

    muon takes convolution kernels as matrices; all other leaves learn by sgd with the same
    momentum, at the same rate: `lr_mult` gives them another.

    rmsprop is TensorFlow's, which trained EfficientNet and Inception v3: the mean of squares starts
    at 1, epsilon is inside the root, and the learning rate is inside the momentum.

    Raises `UserError` for rules that are invalid or freeze everything, an unknown optimizer, an
    invalid factory, or a user's regularizer whose name is taken.
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
    frozen = batchnorm_modes.has_mode(params, modes, "frozen")
    trainable = jax.tree.map(lambda learns, frozen: learns and not frozen, trainable, frozen)
    if not any(jax.tree.leaves(trainable)):
        raise UserError("optimizer.trainable: every parameter is frozen; set True for at least one")

    def over_trainable(spec: tuple, field: str, default: float) -> PyTree:
        tree = pytree.expand_per_parameter(spec, params, what=f"optimizer.{field}", default=default)
        return pytree.partition(tree, trainable)[0]

    decay = over_trainable(config.weight_decay, "weight_decay", 0.0)
    factors = over_trainable(config.lr_mult, "lr_mult", 1.0)
    if config.layer_decay:
        rules = layer_decay(order, config.layer_decay, groups)
        decays = over_trainable(tuple(rules), "layer_decay", 1.0)
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
        case "muon":
            before, after = [make_muon(config.momentum, config.nesterov, momentum)], scaled
        case "adam" | "adamw":
            before, after = [adam], scaled
        case "lamb":
            before, after = [adam], [scale_by_trust_ratio(), *scaled]
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
    elif factory is not None or config.name == "rmsprop":  # rate inside, or momentum last
        chain = [*before, *after, _add_decoupled(optax.chain(add_decay, *scaled))]
    else:
        chain = [*before, add_decay, *after]
    regularizers.check_names(own_regularizers)
    regularizing = regularizers.make_built_in_regularizers(config, params, trainable) | dict(
        own_regularizers
    )
    chain = [*regularizers.make_transformations(regularizing), *chain]
    if config.clip_norm:
        chain.insert(0, optax.clip_by_global_norm(config.clip_norm))

    def learning_rate(step: Array, opt_state: PyTree) -> Array:
        plateau, *_ = _plateau_states(opt_state)  # if there are several, they are equal
        return schedule(step) * plateau.scale

    tx = optax.with_extra_args_support(optax.chain(*chain))
    return Optimizer(tx, trainable, learning_rate, modes, regularizing)
