"""Runs that take several steps in one call: `train.steps_per_call`."""

from __future__ import annotations

import itertools

import chex
import jax
import numpy as np
import pytest

from flax_cnns import run
from flax_cnns.errors import UserError
from flax_cnns.runs.build import build_components, make_train_call, train_calls
from flax_cnns.runs.plan import RunPlan
from flax_cnns.runtime.preemption import Preempted, Signals
from flax_cnns.train import parallel, step_calls
from tests.tiny_runs import arrays, records

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def config(config):
    config.train.steps_per_call = 5  # of 12 steps: the last call has two
    config.log.every = config.train.eval_every = config.checkpoint.every = "5 steps"
    return config


@pytest.mark.parametrize("mode", ["shard_map", pytest.param("pmap", marks=pytest.mark.slow)])
def test_calls_train_as_single_steps_do_and_resume_to_the_bit(
    finished, config, tmp_path, mode, monkeypatch
):
    asked = []
    monkeypatch.setattr(Signals, "should_stop", lambda _, count: asked.append(count) is not None)
    config.train.parallel = mode
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ticks = []
    run(
        config, whole, callbacks=[type("Ticks", (), {"on_step": lambda _, n, x: ticks.append(n)})()]
    )
    assert ticks == list(range(1, 13))
    assert asked == [1, 2, 3]  # without gaps, or several processes would not stop
    ours, theirs = arrays(whole), arrays(finished[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    for ours_leaf, leaf in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        if not np.array_equal(ours_leaf, leaf):  # the plateau schedule's best value is infinite
            assert np.linalg.norm(ours_leaf - leaf) <= 1e-5 * np.linalg.norm(leaf)
    assert [r["step"] for r in records(whole) if "train/loss" in r] == [5, 10, 12]
    validations = [
        [r["validation/loss"] for r in records(workdir) if "validation/loss" in r]
        for workdir in (whole, finished[0])
    ]
    np.testing.assert_allclose(*validations, rtol=1e-5)

    with pytest.raises(Preempted):
        run(config, parts, stop_when=lambda step, metrics: step == 5)
    run(config, parts)
    chex.assert_trees_all_equal(arrays(parts), ours)


def test_convolutions_know_that_they_are_in_a_loop(config):
    """On a CPU, XLA's own convolution is many times slower in a loop."""
    components = build_components(config)
    plan = RunPlan(components)
    state = plan.make_abstract_state()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    optimizer = plan.make_optimizer(variables)
    call = make_train_call(components, optimizer, plan.steps_per_epoch)
    batch = next(train_calls(components, 0, 5))
    text = call.lower(state, batch, jax.random.key(0)).as_text()
    assert "stablehlo.while" in text
    assert "stablehlo.convolution" not in text


def test_rows_of_a_call_are_the_batches_of_its_steps(config):
    mesh = parallel.make_mesh(jax.devices()[:2])
    rows = np.arange(12, dtype=np.int32).reshape(3, 4)
    images, labels = np.arange(24.0).reshape(12, 2), np.arange(12)

    def step(state, batch, key):
        return state + 1, {"images": batch["image"], "first": batch["label"][:1]}

    for mode in ("shard_map", "pmap"):
        mapped = parallel.parallelize(
            lambda state, batch, key: jax.tree.map(
                lambda x: jax.lax.all_gather(x, "batch"),
                step_calls.loop_steps(step)(state, batch, key),
            ),
            mesh,
            mode=mode,
            donate=False,
            axes=step_calls.list_axes(),
        )
        (call,) = step_calls.yield_calls(images, labels, [{"rows": rows}], mesh, mode=mode)
        state, sums = mapped(parallel.replicate(np.int32(0), mesh), call, jax.random.key(0))
        np.testing.assert_array_equal(state, [3, 3])
        np.testing.assert_array_equal(sums["first"], [[[0], [4], [8]], [[2], [6], [10]]])
        np.testing.assert_array_equal(sums["images"][1, 2], images[[10, 11]])


def test_what_calls_cannot_do_is_refused(config):
    components = build_components(config)

    def plan(**changes):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        return RunPlan(components._replace(config=changed))

    assert plan().periods.log == 5
    with pytest.raises(UserError, match=r"5 does not divide log\.every \(7 steps\); .*=1, or"):
        plan(**{"log.every": "7 steps"})
    never = {"log.every": "0 steps", "train.eval_every": "12 steps", "checkpoint.every": "18 steps"}
    with pytest.raises(UserError, match=r"eval_every \(12 steps\), .* \(18 steps\); .*call=6, or"):
        plan(**never)
    with pytest.raises(UserError, match="the host augments the images"):
        plan(**{"data.augment.where": "loader"})
    from_factory = components.dataset.from_batches(
        lambda *_: itertools.repeat(None),
        num_classes=10,
        image_shape=(28, 28, 1),
        sizes={"train": 99, "test": 9},
    )
    with pytest.raises(UserError, match=r"is not in memory; set train\.steps_per_call=1"):
        RunPlan(components._replace(dataset=from_factory))
    with pytest.raises(UserError, match=r"steps_per_call=5.*no parts of their own; profile with"):
        run(config, "never", profile="1:5")
