"""Wide ResNets for ImageNet. torchvision has them, with the names of its ResNets."""

from __future__ import annotations

from flax_cnns.weights import resnet

TABLES = {"torchvision": resnet.TABLES["torchvision"]}
