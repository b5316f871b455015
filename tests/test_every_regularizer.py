"""Every regularizer that is a config field: off, on, and all of them together.

Off must equal the plain run, on must change it. The training step's compiled program is compared:
if the programs are equal, the numbers are equal.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ablations
from configs.ablations import regularizers
from flax_cnns import config as configs
from flax_cnns.config import effects
from flax_cnns.runs import build
from flax_cnns.studies.ablation import plan
from flax_cnns.train import optimizers, parallel, schedules
from flax_cnns.train.state import TrainState

REGULARIZERS = {name: field for name, field in configs.FIELDS.items() if field.regularizer}
# Fields that only say how a regularizer works have no effect while it is off.
HOW = {
    "data.augment.alternate_flip": True,
    "optimizer.weight_decay_mode": "decoupled",
    "optimizer.grad_noise_decay": 0.9,
    "train.dropout_mode": "channel",
    "train.ema_warmup": False,
}
# (0.0,) if possible: the default () and 0 for every parameter or module both mean off.
OFF = {
    name: field.default if field.check((0.0,)) else (0.0,) for name, field in REGULARIZERS.items()
}
OFF |= HOW | {
    "train.dropout": ((r".*", 0.0),),
    "train.aux_weight": (0.7,),  # for heads that the network does not have
    "model.drop_path": 0.0,
    "model.drop_path_mode": "sample",
    "model.shake_drop": 0.0,
    "model.shake_drop_level": "pixel",
}
ON = {name: row for name, row in regularizers.sweep() if row and name != "early_stopping"}
ON |= {
    "l2": {"optimizer.l2": (5e-4,)},
    "decoupled": regularizers.DECAY | {"optimizer.weight_decay_mode": "decoupled"},
    "drop_path": {"model.drop_path": 0.2, "model.drop_path_mode": "sample"},
    "layer_norm": {"model.norm": "layer"},
    "no_norm": {"model.norm": "none"},
}


def make_config(digits_dir, *changes):
    config = ablations.small("smoke")
    config.data.dir = digits_dir
    config.model.depths, config.model.widths = (1,), (4,)
    overrides = functools.reduce(lambda a, b: a | b, changes, {})
    return plan.apply_overrides(config, overrides)


def make_step(config):
    """Returns (components, optimizer, the training step of a run)."""
    components = build.build_components(config)
    variables = jax.eval_shape(components.init_variables)
    optimizer = optimizers.make_optimizer(
        config.optimizer,
        variables["params"],
        schedules.constant(0.05),
        batch_stats=variables["batch_stats"],
    )
    return components, optimizer, build.make_train_step(components, optimizer, 10.0)


def make_state(config, optimizer, variables):
    return TrainState.create(
        variables, optimizer.init(variables["params"]), ema=config.train.ema > 0
    )


def program(config):
    components, optimizer, step = make_step(config)
    make = functools.partial(make_state, config, optimizer)
    state = jax.eval_shape(make, jax.eval_shape(components.init_variables))
    n = config.data.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((n, *components.dataset.image_shape), jnp.uint8),
        "label": jax.ShapeDtypeStruct((n,), jnp.int32),
    }
    text = str(step.trace(state, batch, jax.random.key(0)).jaxpr)
    return re.sub(r"0x[0-9a-f]+", "", text)


@pytest.fixture(scope="module")
def plain(digits_dir):
    return program(make_config(digits_dir))


def test_every_field_of_the_table_that_regularizes_is_tried():
    assert HOW.keys() == {n for n, row in effects.EFFECTS.items() if row.needs in REGULARIZERS}
    rows = dict(regularizers.sweep()) | ON
    assert REGULARIZERS.keys() <= set().union(*rows.values())


def test_off_is_exactly_the_plain_run(digits_dir, plain):
    assert program(make_config(digits_dir, OFF)) == plain


@pytest.mark.parametrize("name", ON)
def test_on_is_another_run(digits_dir, plain, name):
    assert program(make_config(digits_dir, ON[name])) != plain


TOGETHER = (*ON.values(), {"model.norm": "batch", "data.augment.randaugment": (1, 9)})


def test_all_together_are_one_step(digits_dir, plain):
    assert program(make_config(digits_dir, *TOGETHER)) != plain


@pytest.mark.slow
def test_all_together_train(digits_dir):
    """Trains for a few steps on four devices."""
    config = make_config(digits_dir, *TOGETHER)
    components, optimizer, step = make_step(config)
    state = make_state(config, optimizer, components.init_variables())
    before = jax.device_get(state.params)
    state = parallel.replicate(state, components.mesh)
    key = parallel.replicate(jax.random.key(0), components.mesh)
    train = components.dataset.splits["train"]
    bad, n = 0.0, config.data.batch_size
    for i in range(4):
        rows = slice(i * n, (i + 1) * n)
        batch = components.shard({"image": train.images[rows], "label": train.labels[rows]})
        if i == 0:  # without optimizations, the step compiles in a third of the time
            quick = {"xla_backend_optimization_level": 0}
            step = step.lower(state, batch, key).compile(compiler_options=quick)
        state, sums = step(state, batch, key)
        bad += float(sums["bad"])
        assert np.isfinite(float(sums["loss"]))
    assert bad == 0
    after = jax.device_get(state.params)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
    assert all(jax.tree.leaves(changed))
