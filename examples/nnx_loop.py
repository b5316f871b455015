"""Trains a network of the package as a Flax NNX module, and converts it back to linen variables.

Run it by `python examples/nnx_loop.py`.
"""

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import flax_cnns
from flax_cnns.interop.nnx import to_linen, to_nnx

BATCH, EPOCHS = 64, 8


@nnx.jit
def step(network, optimizer, images, labels):
    def loss_of(network):
        # This call also updates BatchNorm's statistics.
        logits = network(images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = nnx.value_and_grad(loss_of)(network)
    optimizer.update(network, grads)
    return loss


if __name__ == "__main__":
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    images, test_images, labels, test_labels = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=0
    )
    model = flax_cnns.create_model(
        "cifar_resnet20", depths=(2, 2, 2), widths=(8, 16, 32), input_size=(8, 8, 1), drop_path=0.1
    )
    variables = flax_cnns.init_variables(model, jax.random.key(0))
    network = to_nnx(model, variables, nnx.Rngs(dropout=0, shared=1))
    optimizer = nnx.Optimizer(network, optax.adamw(5e-3, weight_decay=1e-2), wrt=nnx.Param)
    for epoch in range(EPOCHS):
        order = np.random.default_rng(epoch).permutation(len(images))
        for i in range(len(images) // BATCH):
            rows = order[i * BATCH : (i + 1) * BATCH]
            loss = step(network, optimizer, images[rows], labels[rows])
        print(f"epoch {epoch + 1}, loss {loss:.3f}")

    variables = to_linen(network)  # in the form of checkpoints, load_weights and graft
    logits = jax.jit(model.apply)(variables, test_images)
    print(f"test accuracy {np.mean(np.argmax(logits, -1) == test_labels):.3f}")
