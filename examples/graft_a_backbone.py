"""Loads the backbone of a trained network into a network of your own, for other classes.

    python examples/graft_a_backbone.py

A ResNet learns to classify ten digits. Its backbone then becomes part of another network, which
predicts whether a digit is odd. Only the head of this network is trained, on 40 images.
"""

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import flax_cnns

SMALL = {"depths": (1, 1, 1), "widths": (8, 16, 32)}
RULES = [  # (path in the new network, path in the checkpoint); the first rule that matches decides
    (r"(params|batch_stats)/backbone/(.*)", r"\1/\2"),
    (r"params/head/.*", flax_cnns.FRESH),
]


class Net(nn.Module):
    backbone: nn.Module

    @nn.compact
    def __call__(self, images, *, train=False):
        features = self.backbone(images, train=train)  # [N 32]
        return nn.Dense(2, name="head")(features)


def train_head(network, variables, images, labels, steps=300):
    """Returns the variables after training the head with Adam; the backbone is not trained."""
    tx, params = optax.adam(1e-2), variables["params"]

    def loss(head):
        logits = network.apply({**variables, "params": {**params, "head": head}}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(head, state):
        updates, state = tx.update(jax.grad(loss)(head), state)
        return optax.apply_updates(head, updates), state

    head, state = params["head"], tx.init(params["head"])
    for _ in range(steps):
        head, state = step(head, state)
    return {**variables, "params": {**params, "head": head}}


if __name__ == "__main__":
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    config = {
        "model": {"name": "cifar_resnet20", **SMALL},
        "optimizer": {"name": "adam"},
        "schedule": {"learning_rate": 5e-3},
        "train": {"duration": "10 epochs"},
    }
    data = flax_cnns.Dataset.from_arrays(train=(images[:1200], labels[:1200]))
    flax_cnns.run(config, "runs/backbone", data=data)

    backbone = flax_cnns.create_model(
        "cifar_resnet20", num_classes=None, input_size=(8, 8, 1), **SMALL
    )
    network = Net(backbone)
    fresh = flax_cnns.init_variables(network, jax.random.key(0), (1, 8, 8, 1))
    grafted, report = flax_cnns.graft("runs/backbone", fresh, RULES)
    print(report)
    images = flax_cnns.load_run("runs/backbone").preprocessing(images)
    odd = labels % 2
    for name, variables in {"fresh": fresh, "grafted": grafted}.items():
        trained = train_head(network, variables, images[:40], odd[:40])
        accuracy = np.mean(network.apply(trained, images[1200:]).argmax(-1) == odd[1200:])
        print(f"{name} backbone: accuracy {accuracy:.3f}")
