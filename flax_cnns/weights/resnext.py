"""ResNeXt: the names are ResNet's."""

from flax_cnns.weights.resnet import torch

TABLES = {"torchvision": torch, "timm": torch}
