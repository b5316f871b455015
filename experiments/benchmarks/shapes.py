"""The convolutions that are timed in flax_cnns, stock Flax and PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class ConvShape(NamedTuple):
    """The shape of a convolution: images [n size size inputs] and a window of k x k."""

    name: str
    n: int
    size: int
    inputs: int
    outputs: int
    groups: int
    k: int
    stride: int

    def __str__(self) -> str:
        groups = f" /{self.groups}" if self.groups > 1 else ""
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        window = f"{self.k}x{self.k}{stride}{groups}"
        return f"{self.n}x{self.size}x{self.size} {self.inputs}>{self.outputs} {window}"

    @property
    def padding(self) -> int:
        """Padding of each side; 0 for patches that do not overlap, as in ConvNeXt's stem."""
        return 0 if self.stride >= self.k else self.k // 2

    @property
    def out_size(self) -> int:
        """Height and width of the output."""
        return (self.size + 2 * self.padding - self.k) // self.stride + 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole batch."""
        window = self.k**2 * self.inputs // self.groups
        return self.n * self.out_size**2 * window * self.outputs


SHAPES = tuple(
    ConvShape(*row)
    for row in (
        # name                    n  size   in  out  groups k stride
        ("resnext", 16, 28, 128, 128, 32, 3, 1),
        ("depthwise", 16, 56, 144, 144, 144, 3, 1),
        # ImageNet stems
        ("stem7-224", 8, 224, 3, 64, 1, 7, 2),
        ("stem7-64", 32, 64, 3, 64, 1, 7, 2),
        ("stem3-224", 8, 224, 3, 32, 1, 3, 2),
        ("stem3-112", 8, 112, 32, 64, 1, 3, 1),  # ResNet-D, Inception
        ("stem4-224", 8, 224, 3, 96, 1, 4, 4),
        ("stem11-224", 8, 224, 3, 64, 1, 11, 4),  # AlexNet
        # ResNet-18 at 224: stages, and the strided convolutions between them
        ("resnet18-224-1", 8, 56, 64, 64, 1, 3, 1),
        ("resnet18-224-2", 8, 28, 128, 128, 1, 3, 1),
        ("resnet18-224-3", 8, 14, 256, 256, 1, 3, 1),
        ("resnet18-224-4", 8, 7, 512, 512, 1, 3, 1),
        ("resnet18-224-2-down", 8, 56, 64, 128, 1, 3, 2),
        ("resnet18-224-3-down", 8, 28, 128, 256, 1, 3, 2),
        ("resnet18-224-4-down", 8, 14, 256, 512, 1, 3, 2),
        ("resnet18-224-2-project", 8, 56, 64, 128, 1, 1, 2),
        # ResNet-18 at 64: down to 2x2
        ("resnet18-64-1", 32, 16, 64, 64, 1, 3, 1),
        ("resnet18-64-2", 32, 8, 128, 128, 1, 3, 1),
        ("resnet18-64-3", 32, 4, 256, 256, 1, 3, 1),
        ("resnet18-64-4", 32, 2, 512, 512, 1, 3, 1),
        ("resnet18-64-2-down", 32, 16, 64, 128, 1, 3, 2),
        ("resnet18-64-4-down", 32, 4, 256, 512, 1, 3, 2),
        ("resnet18-32-4", 32, 1, 512, 512, 1, 3, 1),
        # ResNet-50: the 1x1 convolutions of its bottlenecks
        ("resnet50-224-1-narrow", 8, 56, 256, 64, 1, 1, 1),
        ("resnet50-224-1-widen", 8, 56, 64, 256, 1, 1, 1),
        ("resnet50-224-3-narrow", 8, 14, 1024, 256, 1, 1, 1),
        ("resnet50-224-4-widen", 8, 7, 512, 2048, 1, 1, 1),
        ("resnet50-224-3-project", 8, 28, 512, 1024, 1, 1, 2),
        # CIFAR: ResNet, wide ResNet, VGG
        ("cifar-stem", 128, 32, 3, 16, 1, 3, 1),
        ("cifar-resnet-1", 128, 32, 16, 16, 1, 3, 1),
        ("cifar-resnet-2", 128, 16, 32, 32, 1, 3, 1),
        ("cifar-resnet-3", 128, 8, 64, 64, 1, 3, 1),
        ("cifar-resnet-2-down", 128, 32, 16, 32, 1, 3, 2),
        ("wide-resnet-1", 16, 32, 160, 160, 1, 3, 1),
        ("wide-resnet-3", 16, 8, 640, 640, 1, 3, 1),
        ("vgg-cifar-5", 64, 2, 512, 512, 1, 3, 1),
        # LeNet and DenseNet
        ("lenet-c1", 64, 32, 1, 6, 1, 5, 1),
        ("lenet-c3", 64, 14, 6, 16, 1, 5, 1),
        ("densenet-3x3", 16, 14, 128, 32, 1, 3, 1),
        ("densenet-1x1", 16, 14, 512, 128, 1, 1, 1),
        # ResNeXt-50 32x4d
        ("resnext-96-1", 8, 24, 128, 128, 32, 3, 1),
        ("resnext-96-3", 8, 6, 512, 512, 32, 3, 1),
        ("resnext-96-4", 8, 3, 1024, 1024, 32, 3, 1),
        ("resnext-96-3-down", 8, 12, 512, 512, 32, 3, 2),
        ("groups2-alexnet", 8, 27, 96, 256, 2, 5, 1),  # AlexNet's second layer
        # MobileNet, EfficientNet: depthwise, and the 1x1 convolutions around it
        ("depthwise-112-down", 8, 112, 96, 96, 96, 3, 2),
        ("depthwise-14", 16, 14, 384, 384, 384, 3, 1),
        ("depthwise-7", 16, 7, 960, 960, 960, 3, 1),
        ("depthwise-3", 16, 3, 960, 960, 960, 3, 1),
        ("depthwise5-28", 8, 28, 240, 240, 240, 5, 1),
        ("depthwise5-14", 8, 14, 672, 672, 672, 5, 1),
        ("depthwise5-14-down", 8, 14, 672, 672, 672, 5, 2),
        ("depthwise7-14", 4, 14, 384, 384, 384, 7, 1),  # ConvNeXt
        ("mobilenet-expand", 16, 14, 64, 384, 1, 1, 1),
        ("mobilenet-project", 16, 14, 384, 64, 1, 1, 1),
    )
)


def make_arrays(shape: ConvShape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns random (kernel [k k inputs/groups outputs], images, cotangent of the output)."""
    rng = np.random.default_rng(0)
    n, k = shape.n, shape.k
    sizes = (
        (k, k, shape.inputs // shape.groups, shape.outputs),
        (n, shape.size, shape.size, shape.inputs),
        (n, shape.out_size, shape.out_size, shape.outputs),
    )
    kernel, images, cotangent = (rng.standard_normal(size, np.float32) for size in sizes)
    return kernel, images, cotangent
