"""Data of your own, in every way that a run takes them: arrays, a .npz file, and batches.

    python examples/own_data.py [arrays npz grain torch tf ...]

Batches come from any loader. A function yields the rows that this process has of each global batch:
of "train" without end, from the step `start_step` on; of other splits once, in order, with a short
last batch. A run that was killed goes on exactly if the loader does.
"""

import importlib.util
import itertools
import sys

import numpy as np
from sklearn.datasets import load_digits

import flax_cnns

SIZE = {"train": 64, "test": 256}  # of a global batch: data.batch_size and data.eval_batch_size
IMAGES = (load_digits().images[..., None] * (255 / 16)).astype(np.uint8)  # [1797 8 8 1]
LABELS = load_digits().target
SPLITS = {"train": (IMAGES[:1400], LABELS[:1400]), "test": (IMAGES[1400:], LABELS[1400:])}


def rows_of(split, process_index, process_count):
    """The rows of a global batch that a process has."""
    n = SIZE[split] // process_count
    return slice(process_index * n, (process_index + 1) * n)


def arrays():
    return flax_cnns.Dataset.from_arrays(SPLITS["train"], SPLITS["test"])


def grain_batches(split, start_step, process_index, process_count):
    import grain

    images, labels = SPLITS[split]
    examples = grain.MapDataset.range(len(images))
    if split == "train":
        examples = examples.seed(0).shuffle().repeat()  # another order in each epoch
    batches = examples.batch(SIZE[split])
    for step in itertools.count(start_step) if split == "train" else range(len(batches)):
        rows = batches[step][rows_of(split, process_index, process_count)]
        yield {"image": images[rows], "label": labels[rows]}


def torch_batches(split, start_step, process_index, process_count):
    import torch
    from torch.utils.data import BatchSampler, DataLoader, TensorDataset

    data = TensorDataset(*map(torch.from_numpy, SPLITS[split]))
    order = range(len(data))
    if split == "train":
        seeds = (torch.Generator().manual_seed(epoch) for epoch in itertools.count())
        epochs = (torch.randperm(len(data), generator=seed).tolist() for seed in seeds)
        first = start_step * SIZE["train"]
        order = itertools.islice(itertools.chain.from_iterable(epochs), first, None)
    mine = rows_of(split, process_index, process_count)
    batches = (rows[mine] for rows in BatchSampler(order, SIZE[split], drop_last=False))
    for images, labels in DataLoader(data, batch_sampler=filter(None, batches)):
        yield {"image": images.numpy(), "label": labels.numpy()}


def tf_batches(split, start_step, process_index, process_count):
    import tensorflow as tf

    images, labels = SPLITS[split]
    data = tf.data.Dataset.from_tensor_slices({"image": images, "label": labels})
    if split == "train":
        data = data.shuffle(len(images), seed=0).repeat()
    mine = rows_of(split, process_index, process_count)
    for batch in data.batch(SIZE[split]).skip(start_step).as_numpy_iterator():
        yield {name: rows[mine] for name, rows in batch.items()}


def from_batches(factory):
    return flax_cnns.Dataset.from_batches(
        factory,
        sizes={split: len(labels) for split, (_, labels) in SPLITS.items()},
        image_shape=(8, 8, 1),
        num_classes=10,
        mean=(0.3,),
        std=(0.38,),
    )


FACTORIES = {"grain": grain_batches, "torch": torch_batches, "tf": tf_batches}
NEEDS = {"torch": "torch", "tf": "tensorflow"}
CONFIG = {
    "model": {"name": "cifar_resnet20", "depths": (1, 1, 1), "widths": (8, 16, 32)},
    "data": {"validation": 0},
    "optimizer": {"name": "adam"},
    "schedule": {"learning_rate": 5e-3},
    "train": {"duration": "150 steps", "eval_every": "0 steps"},
}

if __name__ == "__main__":
    for way in sys.argv[1:] or ["arrays", "npz", *FACTORIES]:
        config, data = CONFIG, None
        if way in NEEDS and not importlib.util.find_spec(NEEDS[way]):
            print(f"{way}: {NEEDS[way]} is not installed")
            continue
        if way == "arrays":
            data = arrays()
        elif way == "npz":  # a file is named by the config
            (x, y), (x_test, y_test) = SPLITS["train"], SPLITS["test"]
            np.savez("digits.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
            config = {**CONFIG, "data": {"name": "digits.npz", "validation": 0}}
        else:
            data = from_batches(FACTORIES[way])
        summary = flax_cnns.run(config, f"runs/own_data_{way}", data=data)
        print(f"{way}: test accuracy {summary['test/accuracy']:.3f}")
