"""A part of a trained network in a network of your own, for other classes.

    python examples/graft_a_backbone.py

A ResNet learns the digits 0 to 4. Its backbone then serves a network that tells 5 to 9 apart, of
which only the head learns, from ten images a class.
"""

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import flax_cnns

SMALL = {"depths": (1, 1, 1), "widths": (16, 32, 64)}
RULES = [  # path in the network -> path in the checkpoint
    (r"(params|batch_stats)/backbone/(.*)", r"\1/\2"),
    (r"params/head/.*", flax_cnns.FRESH),
]


class Net(nn.Module):
    backbone: nn.Module
    num_classes: int = 5

    @nn.compact
    def __call__(self, images, *, train=False):
        features = self.backbone(images, train=train)  # [N 64]
        return nn.Dense(self.num_classes, name="head")(features)


def digits(low, high):
    """Images u8 [N 8 8 1] and labels from 0, of the digits low to high."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    chosen = (labels >= low) & (labels <= high)
    return images[chosen], labels[chosen] - low


def train_head(network, variables, images, labels, steps=200):
    """The variables after some steps of Adam on the head; the backbone stays as it is."""
    tx = optax.adam(1e-2)

    def loss(head):
        params = {**variables["params"], "head": head}
        logits = network.apply({**variables, "params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(head, state):
        updates, state = tx.update(jax.grad(loss)(head), state)
        return optax.apply_updates(head, updates), state

    head = variables["params"]["head"]
    state = tx.init(head)
    for _ in range(steps):
        head, state = step(head, state)
    return {**variables, "params": {**variables["params"], "head": head}}


if __name__ == "__main__":
    config = {
        "model": {"name": "cifar_resnet20", **SMALL},
        "optimizer": {"name": "adam"},
        "schedule": {"learning_rate": 5e-3},
        "train": {"duration": "10 epochs"},
    }
    data = flax_cnns.Dataset.from_arrays(digits(0, 4), name="digits_0_to_4")
    flax_cnns.run(config, "runs/backbone", data=data)

    prepare = flax_cnns.load_run("runs/backbone").preprocessing
    images, labels = digits(5, 9)
    images = prepare(images)
    few = np.concatenate([np.flatnonzero(labels == k)[:10] for k in range(5)])
    rest = np.setdiff1d(np.arange(len(labels)), few)

    backbone = flax_cnns.create_model(
        "cifar_resnet20", num_classes=None, input_size=(8, 8, 1), **SMALL
    )
    network = Net(backbone)
    fresh = flax_cnns.init_variables(network, jax.random.key(0), (1, 8, 8, 1))
    grafted, report = flax_cnns.graft("runs/backbone", fresh, RULES)
    print(report)
    for name, variables in {"fresh": fresh, "grafted": grafted}.items():
        trained = train_head(network, variables, images[few], labels[few])
        logits = network.apply(trained, images[rest])
        print(f"{name} backbone: accuracy {np.mean(np.argmax(logits, -1) == labels[rest]):.3f}")
