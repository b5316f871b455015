"""Networks of other libraries, saved in each of their formats, give the same logits here."""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest

from flax_cnns import create_model
from flax_cnns.weights import load_weights
from tests.models import foreign

pytestmark = pytest.mark.oracle

SAVED = {  # by PyTorch
    "zip.pth": lambda tensors, path: torch_save(tensors, path),
    "stream.pth": lambda tensors, path: torch_save(tensors, path, zipped=False),
    "checkpoint.pth": lambda tensors, path: torch_save({"model": tensors, "epoch": 3}, path),
    "x.safetensors": lambda tensors, path: safetensors_save(tensors, path),
    "x.npz": lambda tensors, path: np.savez(path, **{k: v.numpy() for k, v in tensors.items()}),
}


def torch_save(tensors, path, zipped=True):
    import torch

    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)


def safetensors_save(tensors, path):
    from safetensors.torch import save_file

    save_file(tensors, path)


def check(name, source, size, save, paths):
    """Saves the network with new random weights and compares our logits with its logits."""
    live = foreign.load(foreign.build(name, source), source, foreign.gain(name))
    x = foreign.images(2, size)
    theirs = foreign.logits(live, x, source)
    apply = jax.jit(create_model(name).apply)
    save(live.model)
    for path in paths:
        ours = np.asarray(apply(load_weights(name, source, path), x))
        assert np.abs(ours - theirs).max() < 1e-4 * theirs.std(), path


@pytest.mark.parametrize(
    ("name", "source", "size"), [("resnet18", "torchvision", 64), ("resnet18d", "timm", 64)]
)
def test_formats_of_pytorch(tmp_path, name, source, size):
    pytest.importorskip("torch")

    def save(model):
        for file, write in SAVED.items():
            write(model.state_dict(), tmp_path / file)

    check(name, source, size, save, [tmp_path / file for file in SAVED])


@pytest.mark.parametrize(
    ("name", "size"), [("keras_mobilenetv2", 224), ("keras_inception_v3", 299)]
)
def test_formats_of_keras(tmp_path, name, size):
    """One network with names of its own; one with automatic names and norms without scale."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    pytest.importorskip("keras")
    paths = [tmp_path / file for file in ("x.weights.h5", "x.h5", "x.keras")]

    def save(model):
        model.save_weights(paths[0])
        for path in paths[1:]:
            model.save(path)

    check(name, "keras", size, save, paths)
