"""ResNeXt has the names of ResNet."""

from flax_cnns.weights.resnet import torch_rules

TABLES = {"torchvision": torch_rules, "timm": torch_rules}
