"""ImageNet-C's and CIFAR-C's corruptions of images, at five severities, as functions of JAX."""
