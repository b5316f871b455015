"""Trains a network of the package in a loop of your own: Optax, BatchNorm, random streams, jit.

Run it by `python examples/plain_optax_loop.py`.
"""

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import flax_cnns

BATCH, EPOCHS = 64, 8

network = flax_cnns.create_model(
    "cifar_resnet20", depths=(2, 2, 2), widths=(8, 16, 32), input_size=(8, 8, 1), drop_path=0.1
)
tx = optax.adamw(5e-3, weight_decay=1e-2)


def loss_of(params, batch_stats, images, labels, key):
    logits, updates = network.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],  # BatchNorm's running statistics
        rngs={"shared": key, "dropout": key},  # drop_path uses "shared"
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, updates["batch_stats"]


@jax.jit
def step(params, batch_stats, opt_state, images, labels, key):
    gradient = jax.value_and_grad(loss_of, has_aux=True)
    (loss, batch_stats), grads = gradient(params, batch_stats, images, labels, key)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), batch_stats, opt_state, loss


@jax.jit
def predict(params, batch_stats, images):
    variables = {"params": params, "batch_stats": batch_stats}
    return network.apply(variables, images, train=False).argmax(-1)


if __name__ == "__main__":
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    images, test_images, labels, test_labels = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=0
    )
    key = jax.random.key(0)
    variables = flax_cnns.init_variables(network, key)
    params, batch_stats = variables["params"], variables["batch_stats"]
    opt_state = tx.init(params)
    for epoch in range(EPOCHS):
        order = np.random.default_rng(epoch).permutation(len(images))
        for i in range(len(images) // BATCH):
            rows = order[i * BATCH : (i + 1) * BATCH]
            step_key = jax.random.fold_in(key, epoch * len(images) + i)
            params, batch_stats, opt_state, loss = step(
                params, batch_stats, opt_state, images[rows], labels[rows], step_key
            )
        print(f"epoch {epoch + 1}, loss {loss:.3f}")
    accuracy = np.mean(predict(params, batch_stats, test_images) == test_labels)
    print(f"test accuracy {accuracy:.3f}")
