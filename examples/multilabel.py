"""Several classes per image, with a loss and a metric of your own: which digits are in a pair?

    python examples/multilabel.py

The best checkpoint is the one with the highest macro F1 on the validation split.
"""

import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import flax_cnns


def make_pairs(seed=0):
    """Makes a data set of images u8 [N 8 16 1] of two digits; labels [N 10] are 1 for both."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(images))

    def draw_pairs(rows, count):
        left, right = rng.choice(rows, (2, count))
        pair_labels = np.maximum(np.eye(10)[labels[left]], np.eye(10)[labels[right]])
        return np.concatenate([images[left], images[right]], axis=2), pair_labels

    return flax_cnns.Dataset.from_arrays(  # no image of a digit is in two splits
        train=draw_pairs(rows[:1000], 3000),
        validation=draw_pairs(rows[1000:1400], 500),
        test=draw_pairs(rows[1400:], 500),
        task="multilabel",
        name="pairs",
    )


def focal_loss(logits, labels, gamma=2.0):
    """Focal loss (Lin et al. 2017, https://arxiv.org/abs/1708.02002): [N K], [N K] -> [N]."""
    return optax.sigmoid_focal_loss(logits, labels, gamma=gamma).sum(-1)


def macro_f1(logits, labels, mask):
    """Macro F1, the mean over classes: returns sums [K] and counts [K], one ratio per class."""
    predicted = (logits > 0) * mask[:, None]
    hits = jnp.sum(predicted * labels, axis=0)
    return 2 * hits, jnp.sum(predicted + labels * mask[:, None], axis=0)


CONFIG = {
    "model": {"name": "cifar_resnet20", "depths": (1, 1, 1), "widths": (8, 16, 32)},
    "data": {"name": "multilabel:make_pairs"},
    "optimizer": {"name": "adam"},
    "schedule": {"learning_rate": 5e-3},
    "train": {
        "duration": "10 epochs",
        "loss": "multilabel:focal_loss",
        "metrics": ("multilabel:macro_f1",),
        "best_by": "validation/macro_f1",
        "best_mode": "max",
        "test_on": "best",
    },
    "own": {"focal_loss": {"gamma": 1.0}},
}

if __name__ == "__main__":
    summary = flax_cnns.run(CONFIG, "runs/multilabel")
    print(f"test macro F1 {summary['test/macro_f1']:.3f}")
    print(f"label accuracy {summary['test/label_accuracy']:.3f}")
