"""`model.init = "lsuv"`: what a run starts with."""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import Dataset, config, run
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.runs.build import build_components, host_batches
from flax_cnns.runs.own_parts import write_to_config
from flax_cnns.runs.plan import RunPlan
from flax_cnns.runs.start import make_initial_variables
from flax_cnns.runs.workdir import read_config
from tests.tiny_runs import arrays

IMAGES = np.random.default_rng(0).integers(0, 255, (64, 8, 8, 1), np.uint8)
LABELS = np.arange(64) % 3


def make_data():
    return Dataset.from_arrays(train=(IMAGES, LABELS), test=(IMAGES[:16], LABELS[:16]))


class Small(nn.Module):
    """No field kernel_init: lsuv needs none."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Conv(6, (3, 3), strides=2, kernel_init=nn.initializers.zeros, name="conv")(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.tanh(nn.Dense(5, bias_init=nn.initializers.ones, name="hidden")(x.mean((1, 2))))
        return nn.Dense(self.num_classes, name="head")(x)


def make_config(**fields):
    made = config.default_config()
    made.data.batch_size = made.data.eval_batch_size = 32
    made.train.duration = "4 steps"
    made.model.init = "lsuv"
    made.log.tensorboard = False
    with made.unlocked():
        made.model.update(fields)
    return made


def make_start(settings, model=Small, data=make_data):
    objects = write_to_config(settings, {"model": model, "data": data})
    plan = RunPlan(build_components(settings, objects))
    return plan, make_initial_variables(plan)[0]


def measure_variances(plan, variables, images, paths):
    """In training, where BatchNorm uses the statistics of the batch."""
    pixels = (images / 255 - plan.components.dataset.mean) / plan.components.dataset.std
    _, state = plan.components.model.apply(
        variables,
        jnp.asarray(pixels, jnp.float32),
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )
    found = state["intermediates"]
    return [float(jnp.var(found[path]["__call__"][0])) for path in paths]


@pytest.fixture(scope="module")
def start():
    return make_start(make_config())


def test_each_layer_has_unit_variance_over_the_first_batch(start):
    plan, variables = start
    batches = host_batches(plan.components)
    first = next(batches)["image"]
    batches.close()
    assert first.shape == (32, 8, 8, 1)
    found = measure_variances(plan, variables, first, ["conv", "hidden", "head"])
    np.testing.assert_allclose(found, 1, atol=0.1)
    assert not np.any(variables["params"]["hidden"]["bias"])
    kernel = np.reshape(variables["params"]["conv"]["kernel"], (9, 6))
    gram = kernel.T @ kernel
    np.testing.assert_allclose(gram, gram[0, 0] * np.eye(6), atol=1e-4)
    expected = jax.eval_shape(plan.components.init_variables)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), expected) == jax.tree.map(
        lambda x: (x.shape, x.dtype), variables
    )


@pytest.mark.slow
def test_it_depends_on_the_seed(start):
    again = make_start(make_config())[1]
    jax.tree.map(np.testing.assert_array_equal, start[1], again)
    settings = make_config()
    settings.seed = 1
    other = make_start(settings)[1]
    assert np.any(other["params"]["head"]["kernel"] != again["params"]["head"]["kernel"])


def test_a_constant_output_is_one_line():
    class Constant(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            return nn.Dense(3, name="head")(0 * images.mean((1, 2)))

    with pytest.raises(UserError, match=r"model\.init: lsuv: the output of .head. has"):
        make_start(make_config(), Constant)


@pytest.fixture(scope="module")
def finished_lsuv(tmp_path_factory):
    """A run whose learning rate is almost 0: its checkpoints hold what it started with."""
    settings = make_config()
    settings.schedule.learning_rate = 1e-30
    settings.train.ema = 0.9
    settings.checkpoint.every = "2 steps"
    workdir = tmp_path_factory.mktemp("runs") / "lsuv"
    run(settings, workdir, model=Small, data=make_data)
    return settings, workdir


@pytest.mark.slow
def test_a_run_starts_with_it_and_so_do_its_averaged_weights(finished_lsuv):
    settings, workdir = finished_lsuv
    assert read_config(workdir).model.init == "lsuv"
    saved = arrays(workdir)
    wanted = pytree.flatten(make_start(settings)[1])
    for path in (path for path in wanted if path.startswith("params/")):
        np.testing.assert_allclose(saved[path], wanted[path], rtol=0, atol=1e-20)
        np.testing.assert_allclose(saved[f"ema/{path}"], wanted[path], rtol=1e-6, atol=1e-20)


@pytest.mark.slow
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(no_pictures, tmp_path):
    settings = make_config()
    settings.checkpoint.every = "2 steps"
    settings.checkpoint.keep_latest = 5
    run(settings, tmp_path / "whole", model=Small, data=make_data)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut/summary.json").unlink()
    shutil.rmtree(tmp_path / "cut/checkpoints/4")
    run(settings, tmp_path / "cut", model=Small, data=make_data)
    whole, cut = arrays(tmp_path / "whole"), arrays(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    for path, leaf in whole.items():
        np.testing.assert_array_equal(cut[path], leaf)


@pytest.mark.slow
def test_grafted_layers_keep_their_weights_and_fresh_ones_are_scaled_behind_them(finished_lsuv):
    _, workdir = finished_lsuv
    settings = make_config()
    settings.seed = 7
    settings.graft.source = str(workdir)
    settings.graft.rules = ((r"params/head/.*", None), (r"(.*)", r"\1"))
    plan, variables = make_start(settings)
    source = arrays(workdir)
    for name in ("conv", "hidden"):
        kernel = variables["params"][name]["kernel"]
        np.testing.assert_array_equal(kernel, source[f"params/{name}/kernel"])
    head = variables["params"]["head"]["kernel"]
    assert np.any(head != source["params/head/kernel"])
    batches = host_batches(plan.components)
    first = next(batches)["image"]
    batches.close()
    np.testing.assert_allclose(measure_variances(plan, variables, first, ["head"]), 1, atol=0.1)


@pytest.mark.slow
def test_a_scanned_network_starts_with_the_values_of_the_plain_one():
    found = []
    for scan in (False, True):
        settings = make_config(depths=(3, 1, 1), widths=(4, 4, 4))
        settings.model.name, settings.model.scan = "cifar_resnet20", scan
        objects = write_to_config(settings, {"data": make_data})
        plan = RunPlan(build_components(settings, objects))
        found.append(make_initial_variables(plan)[0])
        assert plan.components.model.scan == scan
    jax.tree.map(np.testing.assert_array_equal, *found)
