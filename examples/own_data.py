"""Data of your own, in each form that a run accepts: arrays, a .npz file, and batches.

    python examples/own_data.py [arrays npz grain torch tf ...]

Batches come from a loader of your choice. A function yields this process's rows of each global
batch. For "train" it yields batches without end, starting at step `start_step`. For other splits it
yields all examples once, in order, and the last batch may be short. A killed run resumes exactly if
the loader can start exactly at a step.
"""

import importlib.util
import itertools
import sys

import numpy as np
from sklearn.datasets import load_digits

import flax_cnns

# Sizes of global batches: data.batch_size and data.eval_batch_size.
BATCH_SIZE = {"train": 64, "test": 256}
IMAGES = (load_digits().images[..., None] * (255 / 16)).astype(np.uint8)  # [1797 8 8 1]
LABELS = load_digits().target
SPLITS = {"train": (IMAGES[:1400], LABELS[:1400]), "test": (IMAGES[1400:], LABELS[1400:])}


def process_rows(split, process_index, process_count):
    """The slice of a global batch that belongs to a process."""
    n = BATCH_SIZE[split] // process_count
    return slice(process_index * n, (process_index + 1) * n)


def make_arrays():
    return flax_cnns.Dataset.from_arrays(SPLITS["train"], SPLITS["test"])


def grain_batches(split, start_step, process_index, process_count):
    import grain

    images, labels = SPLITS[split]
    examples = grain.MapDataset.range(len(images))
    if split == "train":
        examples = examples.seed(0).shuffle().repeat()  # a new order in each epoch
    batches = examples.batch(BATCH_SIZE[split])
    for step in itertools.count(start_step) if split == "train" else range(len(batches)):
        rows = batches[step][process_rows(split, process_index, process_count)]
        yield {"image": images[rows], "label": labels[rows]}


def torch_batches(split, start_step, process_index, process_count):
    import torch
    from torch.utils.data import BatchSampler, DataLoader, TensorDataset

    data = TensorDataset(*map(torch.from_numpy, SPLITS[split]))
    order = range(len(data))
    if split == "train":
        seeds = (torch.Generator().manual_seed(epoch) for epoch in itertools.count())
        epochs = (torch.randperm(len(data), generator=seed).tolist() for seed in seeds)
        first = start_step * BATCH_SIZE["train"]
        order = itertools.islice(itertools.chain.from_iterable(epochs), first, None)
    own_rows = process_rows(split, process_index, process_count)
    batches = (rows[own_rows] for rows in BatchSampler(order, BATCH_SIZE[split], drop_last=False))
    for images, labels in DataLoader(data, batch_sampler=filter(None, batches)):
        yield {"image": images.numpy(), "label": labels.numpy()}


def tf_batches(split, start_step, process_index, process_count):
    import tensorflow as tf

    images, labels = SPLITS[split]
    data = tf.data.Dataset.from_tensor_slices({"image": images, "label": labels})
    if split == "train":
        data = data.shuffle(len(images), seed=0).repeat()
    own_rows = process_rows(split, process_index, process_count)
    for batch in data.batch(BATCH_SIZE[split]).skip(start_step).as_numpy_iterator():
        yield {name: rows[own_rows] for name, rows in batch.items()}


def make_dataset(factory):
    return flax_cnns.Dataset.from_batches(
        factory,
        sizes={split: len(labels) for split, (_, labels) in SPLITS.items()},
        image_shape=(8, 8, 1),
        num_classes=10,
        mean=(0.3,),
        std=(0.38,),
    )


FACTORIES = {"grain": grain_batches, "torch": torch_batches, "tf": tf_batches}
OPTIONAL_PACKAGES = {"torch": "torch", "tf": "tensorflow"}
CONFIG = {
    "model": {"name": "cifar_resnet20", "depths": (1, 1, 1), "widths": (8, 16, 32)},
    "data": {"validation": 0},
    "optimizer": {"name": "adam"},
    "schedule": {"learning_rate": 5e-3},
    "train": {"duration": "150 steps", "eval_every": "0 steps"},
}

if __name__ == "__main__":
    for form in sys.argv[1:] or ["arrays", "npz", *FACTORIES]:
        config, data = CONFIG, None
        if form in OPTIONAL_PACKAGES and not importlib.util.find_spec(OPTIONAL_PACKAGES[form]):
            print(f"{form}: {OPTIONAL_PACKAGES[form]} is not installed")
            continue
        if form == "arrays":
            data = make_arrays()
        elif form == "npz":  # the config names the file
            (x, y), (x_test, y_test) = SPLITS["train"], SPLITS["test"]
            np.savez("digits.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
            config = {**CONFIG, "data": {"name": "digits.npz", "validation": 0}}
        else:
            data = make_dataset(FACTORIES[form])
        summary = flax_cnns.run(config, f"runs/own_data_{form}", data=data)
        print(f"{form}: test accuracy {summary['test/accuracy']:.3f}")
