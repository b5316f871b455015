"""A network of one convolution with BatchNorm, dropout and an auxiliary head, fast to compile."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs.common import get_config
from flax_cnns.data.augment import make_augment, make_normalize
from flax_cnns.data.mix import make_mix
from flax_cnns.train import evaluation_step, optimizers, parallel, regularizers, schedules, steps
from flax_cnns.train.state import TrainState

SHAPE, CLASSES = (8, 8, 1), 7


class Tiny(nn.Module):
    axis_name: str | None = None
    dropout: float = 0.0
    aux: bool = False

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        x = nn.Conv(4, (3, 3), name="conv")(images)
        x = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, axis_name=self.axis_name, name="norm"
        )(x)
        x = nn.relu(x).mean((1, 2))
        if self.aux:
            aux = nn.Dense(CLASSES, name="aux_head")(x)
            if train:
                self.sow("aux_logits", "head1", aux)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(CLASSES, name="head")(x)


def examples(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n).astype(np.int32)
    images = (
        rng.integers(0, 40, (n, *SHAPE)).astype(np.uint8)
        + (30 * labels).astype(np.uint8)[:, None, None, None]
    )
    return {"image": images, "label": labels}


def config(**changes) -> ConfigDict:
    """Returns the config of configs/common.py with changes such as {"optimizer.name": "adam"}."""
    config = get_config()
    config.schedule.name = "constant"
    with config.unlocked():
        for path, value in changes.items():
            config.update_from_flattened_dict({path: value})
    return config


def setup(
    config: ConfigDict,
    *,
    devices: int = 1,
    mode: str = "shard_map",
    model: nn.Module | None = None,
    augment=None,
    own=None,
    factory=None,
    factory_fields=None,
    **parts,
):
    """Returns (state, train_step, eval_step, mesh) as in a run, on the first devices.

    `own`: objects with hooks by name; `parts`: loss, metrics, task.
    """
    mesh = parallel.make_mesh(jax.devices()[:devices])
    sync = "batch" if config.train.sync_batchnorm else None
    model = Tiny(axis_name=sync) if model is None else model
    variables = model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    variables = {k: variables[k] for k in ("params", "batch_stats")}
    schedule = schedules.make_schedule(config.schedule, total_steps=100, steps_per_epoch=10.0)
    optimizer = optimizers.make_optimizer(
        config.optimizer,
        variables["params"],
        schedule,
        batch_stats=variables["batch_stats"],
        own_regularizers={
            name: regularizers.make_regularizer(name, one) for name, one in (own or {}).items()
        },
        factory=factory,
        factory_fields=factory_fields or {},
    )
    opt_state = optimizer.init(variables["params"])
    state = TrainState.create(variables, opt_state, ema=config.train.ema > 0)
    stats = dict(mean=(0.5,), std=(0.25,))
    step = steps.make_train_step(
        model.apply,
        optimizer,
        augment=augment or make_augment(config.data.augment, image_shape=SHAPE, **stats),
        mix=make_mix(config.mix, CLASSES, task=parts.get("task", "classes")),
        **parts,
        aux_weights=[(".*", schedules.constant(0.3))],
        ema_decay=config.train.ema,
        ema_warmup=config.train.ema_warmup,
        accumulate=config.train.accumulate,
    )
    evaluation = evaluation_step.make_eval_step(
        model.apply,
        normalize=make_normalize(config.data.augment, **stats),
        num_classes=CLASSES,
        confusion=parts.get("task") != "multilabel",
        **parts,
    )
    return (
        parallel.replicate(state, mesh),
        parallel.parallelize(step, mesh, mode=mode),
        parallel.parallelize(evaluation, mesh, mode=mode, donate=False),
        mesh,
    )


class _Training:
    """Takes steps on fixed batches, compiled once, and keeps the state after each step."""

    def __init__(self, config: ConfigDict, batch: int, **kwargs):
        self._batch, self._mode = batch, kwargs.get("mode", "shard_map")
        self._state, self._step, _, self._mesh = setup(config, **kwargs)
        self._key = parallel.replicate(jax.random.key(5), self._mesh)
        self._after = [(jax.device_get(self._state), None)]

    def after(self, n: int):
        while len(self._after) <= n:
            i = len(self._after) - 1
            data = parallel.shard_batch(examples(self._batch, i), self._mesh, self._mode)
            self._state, sums = self._step(self._state, data, self._key)
            self._after.append(jax.device_get((self._state, sums)))
        return self._after[n]


_trainings: dict[tuple, _Training] = {}


def train(config: ConfigDict, n: int = 3, batch: int = 8, **kwargs):
    """Returns the state and the last sums after n steps on fixed batches; for n=0, the initial
    state and None. Tests in one process share equal trainings."""
    given = config.to_json_best_effort(sort_keys=True), batch, tuple(sorted(kwargs.items()))
    if given not in _trainings:
        _trainings[given] = _Training(config, batch, **kwargs)
    return _trainings[given].after(n)
