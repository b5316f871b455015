"""Published facts about data sets, by their names in TFDS: classes, class names, mean and std."""

from __future__ import annotations

from typing import NamedTuple


class KnownDataset(NamedTuple):
    """Published facts about a data set. `mean` and `std` are those of the training images, per
    channel in 0..1."""

    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    train: int = 0  # training images; 0: the data set is always at hand
    sizes_vary: bool = False  # False: all images are squares of one size


DIGIT_NAMES = tuple("0123456789")
_CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
IMAGENET = KnownDataset(
    1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), train=1281167, sizes_vary=True
)

KNOWN_DATASETS = {
    # tests/data/readers/test_digits.py computes mean and std.
    "digits": KnownDataset(10, (0.3054,), (0.3758,), DIGIT_NAMES),
    "mnist": KnownDataset(10, (0.1307,), (0.3081,), DIGIT_NAMES, 60000),
    "fashion_mnist": KnownDataset(10, (0.2860,), (0.3530,), _CLOTHES, 60000),
    "cifar10": KnownDataset(
        10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), _CIFAR10, 50000
    ),
    "cifar100": KnownDataset(100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), train=50000),
    "svhn_cropped": KnownDataset(
        10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), DIGIT_NAMES, 73257
    ),
    "imagenet2012": IMAGENET,
    "imagenet2012_subset": IMAGENET._replace(train=128116),  # of the config 10pct
}


def base_name(name: str) -> str:
    """Returns TFDS's name without config and version, such as imagenet2012_subset for
    imagenet2012_subset/10pct:5.0.0."""
    return name.split("/")[0].split(":")[0]
