"""AlexNet. torchvision numbers the layers (`features.3`, `classifier.1`); ours have names."""

from __future__ import annotations

from flax_cnns.weights.name_maps import dense_after_flatten

TORCHVISION = [
    (r"features\.0", "conv1/conv"),
    (r"features\.3", "conv2/conv"),
    (r"features\.6", "conv3/conv"),
    (r"features\.8", "conv4/conv"),
    (r"features\.10", "conv5/conv"),
    (r"classifier\.1", "fc6", dense_after_flatten(256)),
    (r"classifier\.4", "fc7"),
    (r"classifier\.6", "head"),
]
TABLES = {"torchvision": TORCHVISION}
