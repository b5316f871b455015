"""The shifted test sets: papers, downloads, classes, and what their folders hold."""

from __future__ import annotations

from typing import NamedTuple

SEVERITIES = (1, 2, 3, 4, 5)
# The 15 corruptions of the mean corruption error, and the 4 that the authors kept for validation
# (Hendrycks & Dietterich 2019, section 4).
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
# ImageNet-C is published as five archives, which some keep as folders.
GROUPS = ("noise", "blur", "weather", "digital", "extra")


class SetRow(NamedTuple):
    """What is known of a set."""

    title: str
    source: str  # the paper
    url: str  # of the download
    expected: str  # what its folder holds
    classes: str  # "imagenet", "cifar10", "cifar100"; "": the folders name the classes
    num_images: int = 0  # of the whole set, of each corruption and severity; 0: any number
    num_classes: int = 0  # that occur in it; 0: any number
    chosen_among_own: bool = False  # the network chooses among the classes that occur in the set
    is_prepared: bool = False  # images are the network's input already: no resize, no crop


_WNIDS = "folders of images named by WordNet ids (n01440764)"
SETS: dict[str, SetRow] = {
    "folder": SetRow("a folder", "the user's own", "", "one folder of images per class", ""),
    "imagenet_v2": SetRow(
        "ImageNet-V2, matched frequency",
        "Recht et al. 2019, Do ImageNet Classifiers Generalize to ImageNet?",
        "https://huggingface.co/datasets/vaishaal/ImageNetV2",
        "folders of images named 0 to 999",
        "imagenet",
        10_000,
        1000,
    ),
    "imagenet_real": SetRow(
        "ImageNet ReaL",
        "Beyer et al. 2020, Are we done with ImageNet?",
        "https://github.com/google-research/reassessed-imagenet",
        "real.json, and the validation images ILSVRC2012_val_00000001.JPEG ... in it or below",
        "imagenet",
        50_000,
    ),
    "imagenet_sketch": SetRow(
        "ImageNet-Sketch",
        "Wang et al. 2019, Learning Robust Global Representations by Penalizing Local Predictive"
        " Power",
        "https://github.com/HaohanWang/ImageNet-Sketch",
        _WNIDS,
        "imagenet",
        50_889,
        1000,
    ),
    "imagenet_a": SetRow(
        "ImageNet-A",
        "Hendrycks et al. 2021, Natural Adversarial Examples",
        "https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar",
        _WNIDS,
        "imagenet",
        7_500,
        200,
        chosen_among_own=True,
    ),
    "imagenet_r": SetRow(
        "ImageNet-R",
        "Hendrycks et al. 2021, The Many Faces of Robustness",
        "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
        _WNIDS,
        "imagenet",
        30_000,
        200,
        chosen_among_own=True,
    ),
    "imagenet_c": SetRow(
        "ImageNet-C",
        "Hendrycks & Dietterich 2019, Benchmarking Neural Network Robustness",
        "https://zenodo.org/record/2235448",
        "folders CORRUPTION/SEVERITY/WNID, such as fog/1/n01440764",
        "imagenet",
        50_000,
        1000,
        is_prepared=True,
    ),
    "cifar10_1": SetRow(
        "CIFAR-10.1 v6",
        "Recht et al. 2018, Do CIFAR-10 Classifiers Generalize to CIFAR-10?",
        "https://github.com/modestyachts/CIFAR-10.1/tree/master/datasets",
        "cifar10.1_v6_data.npy and cifar10.1_v6_labels.npy",
        "cifar10",
        2_000,
        10,
        is_prepared=True,
    ),
    "cifar10_1_v4": SetRow(
        "CIFAR-10.1 v4",
        "Recht et al. 2018, Do CIFAR-10 Classifiers Generalize to CIFAR-10?",
        "https://github.com/modestyachts/CIFAR-10.1/tree/master/datasets",
        "cifar10.1_v4_data.npy and cifar10.1_v4_labels.npy",
        "cifar10",
        2_021,
        10,
        is_prepared=True,
    ),
    "cifar10_c": SetRow(
        "CIFAR-10-C",
        "Hendrycks & Dietterich 2019, Benchmarking Neural Network Robustness",
        "https://zenodo.org/record/2535967",
        "labels.npy and a file for each corruption, such as fog.npy",
        "cifar10",
        10_000,
        10,
        is_prepared=True,
    ),
    "cifar100_c": SetRow(
        "CIFAR-100-C",
        "Hendrycks & Dietterich 2019, Benchmarking Neural Network Robustness",
        "https://zenodo.org/record/3555552",
        "labels.npy and a file for each corruption, such as fog.npy",
        "cifar100",
        10_000,
        100,
        is_prepared=True,
    ),
}

CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
# The "fine" labels, in alphabetical order.
_FINE_LABELS = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house
kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table
tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
CIFAR100 = tuple(_FINE_LABELS.split())
