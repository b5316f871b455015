"""The wide ResNets for ImageNet: torchvision's, named as its ResNets."""

from __future__ import annotations

from flax_cnns.weights import resnet

TABLES = {"torchvision": resnet.TABLES["torchvision"]}
