"""Compares regularizers of your own in an ablation, with two seeds per row.

    python examples/own_regularizer_in_an_ablation.py

In this folder, the following command does the same and takes more options:

    python -m experiments.ablate --config=own_regularizer_in_an_ablation.py --workdir=runs/ablation

Each run is a separate process, which imports the regularizers by name.
"""

import jax
import jax.numpy as jnp

from flax_cnns import config as configs

HERE = "own_regularizer_in_an_ablation"


class Orthogonal:
    """Adds rate * sum of ||W^T W - 1||^2 to the loss, over all kernels W as matrices [in out]."""

    def __init__(self, rate=0.0):  # a regularizer is off if its first field is 0
        self.rate = rate

    def penalty(self, params, step):
        kernels = [w.reshape(-1, w.shape[-1]) for w in jax.tree.leaves(params) if w.ndim > 1]
        return self.rate * sum(jnp.sum((w.T @ w - jnp.eye(w.shape[1])) ** 2) for w in kernels)


class Noise:
    """Adds normal noise to the training images, drawn anew for each image and step."""

    def __init__(self, std=0.0):
        self.std = std

    def augment(self, images, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)
        return images + self.std * noise


def get_config():
    return configs.complete(
        {
            "model": {"name": "cifar_resnet20", "depths": (1, 1, 1), "widths": (8, 16, 32)},
            "data": {"image_size": 8, "fraction": 0.2},
            "schedule": {"learning_rate": 0.05},
            "train": {
                "duration": "200 steps",
                "eval_every": "0 steps",
                "regularizers": (f"{HERE}:Orthogonal", f"{HERE}:Noise"),
            },
            "log": {"tensorboard": False},
        }
    )


def sweep():
    yield "plain", {}
    yield "orthogonal", {"own.Orthogonal.rate": 1e-3}
    yield "noise", {"own.Noise.std": 0.5}


if __name__ == "__main__":
    from flax_cnns.studies.ablation.ablate import ablate

    ablate(get_config(), sweep(), "runs/ablation", seeds=2, jobs=2)
    with open("runs/ablation/report.md") as report:
        print(report.read())
