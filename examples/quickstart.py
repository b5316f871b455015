"""Trains a small ResNet on handwritten digits, loads the run and predicts with it.

    python examples/quickstart.py

The run is in runs/quickstart: curves.png, metrics.jsonl, summary.json, checkpoints. If the run is
killed, the same command resumes from the last checkpoint. If the run is complete, the command only
says so.
"""

import jax
import numpy as np
from sklearn.datasets import load_digits

import flax_cnns

CONFIG = {  # the fields that differ from the defaults; docs/config.md lists them all
    "model": {"name": "cifar_resnet20", "depths": (1, 1, 1), "widths": (8, 16, 32)},
    "data": {"name": "digits", "image_size": 8},
    "optimizer": {"name": "adam"},
    "schedule": {"learning_rate": 5e-3},
    "train": {"duration": "10 epochs"},
}

if __name__ == "__main__":
    summary = flax_cnns.run(CONFIG, "runs/quickstart")
    print(f"test accuracy {summary['test/accuracy']:.3f}")

    loaded = flax_cnns.load_run("runs/quickstart@best")
    images, labels = load_digits(return_X_y=True)
    images = (images[:10].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    logits = loaded.network.apply(loaded.variables, loaded.preprocessing(images), train=False)
    predicted = jax.numpy.argmax(logits, -1)
    print("predicted", *(loaded.class_names[k] for k in predicted))
    print("true     ", *labels[:10])
