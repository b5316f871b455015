"""A network of your own, with stochastic depth, dropout and an auxiliary head.

    python examples/own_network.py

A run only needs `__call__(images, *, train) -> logits`. config.model sets the fields. The config
names the network ("own_network:Net") instead of passing it as an object, so that another process
can load the run.
"""

import flax.linen as nn
import numpy as np
from sklearn.datasets import load_digits

import flax_cnns
from flax_cnns import layers
from flax_cnns.types import ModuleDef


class Block(nn.Module):
    norm: ModuleDef

    @nn.compact
    def __call__(self, x, drop):
        def branch(block, x):  # creates its layers with `block`, not `self`
            x = nn.relu(block.norm(name="norm1")(x))
            x = layers.Conv(x.shape[-1], (3, 3), use_bias=False, name="conv1")(x)
            x = nn.relu(block.norm(name="norm2")(x))
            return layers.Conv(x.shape[-1], (3, 3), use_bias=False, name="conv2")(x)

        return layers.residual(x, branch, self, x, drop)


class AuxHead(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, train):
        logits = nn.Dense(self.num_classes, name="head")(layers.global_avg_pool(x))
        if train:  # config.train.aux_weight is the weight of its loss
            self.sow("aux_logits", "logits", logits)


class Net(nn.Module):
    num_classes: int = 10  # a run sets the number of classes of the data
    width: int = 16
    depth: int = 4
    dropout: float = 0.0  # uses the random stream "dropout"
    drop_path: float = 0.0  # rate of the last block; uses the random stream "shared"
    drop_path_mode: str = "batch"
    drop_path_schedule: str = "linear"

    @nn.compact
    def __call__(self, images, *, train):
        norm = layers.make_norm("batch", train=train)
        (drops,) = layers.make_drop_paths(self, [self.depth], train)
        x = layers.Conv(self.width, (3, 3), name="stem")(images)
        for i in range(self.depth):
            x = Block(norm, name=f"block{i + 1}")(x, layers.for_block(drops, i))
            if i + 1 == self.depth // 2:
                AuxHead(self.num_classes, name="aux1")(x, train)
        x = nn.Dropout(self.dropout, deterministic=not train)(layers.global_avg_pool(x))
        return nn.Dense(self.num_classes, name="head")(x)


CONFIG = {
    "model": {"name": "own_network:Net", "width": 24, "dropout": 0.1, "drop_path": 0.1},
    "data": {"name": "digits", "image_size": 8},
    "optimizer": {"name": "adam"},
    "schedule": {"learning_rate": 5e-3},
    "train": {"duration": "10 epochs", "aux_weight": (0.3,)},
}

if __name__ == "__main__":
    summary = flax_cnns.run(CONFIG, "runs/own_network")
    print(f"test accuracy {summary['test/accuracy']:.3f}, {summary['params']:,} parameters")

    loaded = flax_cnns.load_run("runs/own_network", trust=True)  # allows the import of own_network
    images = (load_digits().images[:100, ..., None] * (255 / 16)).astype(np.uint8)
    logits = loaded.network.apply(loaded.variables, loaded.preprocessing(images), train=False)
    accuracy = np.mean(np.argmax(logits, -1) == load_digits().target[:100])
    print(f"accuracy of the loaded network on 100 images {accuracy:.2f}")
