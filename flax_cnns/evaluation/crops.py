"""Crops of an image for evaluation: one, 5, 10, GoogLeNet's 144, several scales.

    protocol = make_protocol("10")
    [group] = protocol.groups
    crops = group.read(image, 224, 3)  # u8 [10 224 224 3]

A crop is a box in the image, so its pixels come from the image as it is stored. "256" in the papers
stands for a shorter side of 256 where the network takes 224. A box of 224/256 of the shorter side
gives the same crop at any size.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flax_cnns.data.images import Box, read_boxes
from flax_cnns.errors import UserError, did_you_mean

PAPERS_SHARE = 224 / 256  # of the shorter side, in AlexNet, VGG, GoogLeNet and ResNet
GOOGLENET_SIDES = (256, 288, 320, 352)  # Szegedy et al. 2015, section 7
# Left or top corner, center, right or bottom corner, as the share of the room that a crop leaves.
_CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
_CENTER = (0.5, 0.5)


class View(NamedTuple):
    """One crop: a square in a square of the image, perhaps mirrored.

    The outer square has the image's shorter side. `along` places it along the longer side: 0 is
    left or top, 1 right or bottom. The inner square has `share` of that side, and `x` and `y` place
    it: 0 is left or top.
    """

    share: float = 1.0
    x: float = 0.5
    y: float = 0.5
    along: float = 0.5
    mirrored: bool = False

    def box(self, width: int, height: int) -> Box:
        """Returns the box in the pixels of an image of this size."""
        outer = min(width, height)
        left, top = (width - outer) * self.along, (height - outer) * self.along
        side = outer * self.share
        left, top = left + (outer - side) * self.x, top + (outer - side) * self.y
        return left, top, left + side, top + side


@dataclasses.dataclass(frozen=True)
class CropGroup:
    """The crops that a network sees at one size."""

    scale: float  # of the network's own size
    views: tuple[View, ...]

    def read(
        self,
        image: Image.Image,
        size: int,
        channels: int,
        resample: Image.Resampling = Image.Resampling.BILINEAR,
        decoder: str = "pillow",
    ) -> np.ndarray:
        """Returns the crops u8 [V size size channels] of a stored image."""
        boxes = [view.box for view in self.views]
        crops = read_boxes(image, boxes, size, channels, resample=resample, decoder=decoder)
        return self._mirror(crops)

    def cut(self, images: np.ndarray, size: int) -> np.ndarray:
        """Returns the crops [N V size size C] of images in memory [N H W C], u8 or f32, resized
        (bilinear, antialiased)."""
        return np.stack([self._cut_one(image, size) for image in images])

    def _cut_one(self, image: np.ndarray, size: int) -> np.ndarray:
        height, width, channels = image.shape
        planes = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(channels)]
        bilinear = Image.Resampling.BILINEAR
        crops = []
        for view in self.views:
            box = view.box(width, height)
            resized = [plane.resize((size, size), bilinear, box) for plane in planes]
            crops.append(np.stack([np.asarray(plane) for plane in resized], -1))
        return self._mirror(crops)

    def _mirror(self, crops: Sequence[np.ndarray]) -> np.ndarray:
        pairs = zip(crops, self.views)
        return np.stack([crop[:, ::-1] if view.mirrored else crop for crop, view in pairs])


@dataclasses.dataclass(frozen=True)
class CropProtocol:
    """All crops of an image whose probabilities are averaged."""

    name: str
    groups: tuple[CropGroup, ...]
    dense: bool = False  # the network's head slides over the maps; see `evaluation.dense`
    size: int | None = None  # side in pixels, if the user gave one in place of scales

    @property
    def count(self) -> int:
        """The number of crops of an image."""
        return sum(len(group.views) for group in self.groups)

    def as_dict(self) -> dict[str, Any]:
        """Returns what the crops are, for the file of an evaluation."""
        return {
            "name": self.name,
            "crops": self.count,
            "scales": [group.scale for group in self.groups],
            "dense": self.dense,
            **({} if self.size is None else {"size": self.size}),
        }

    def enlarges(self, side: int, size: int) -> bool:
        """Whether a crop of an image with the shorter side `side` is enlarged for a network that
        takes `size` pixels."""
        return any(
            side * view.share < round(group.scale * size) - 1e-9
            for group in self.groups
            for view in group.views
        )


def list_views(crops: str, share: float = PAPERS_SHARE, *, flip: bool = False) -> tuple[View, ...]:
    """Returns the crops of one scale.

    - "1": the central square with `share` of the shorter side.
    - "5": the four corners and the center of the central square, each with `share` of its side
      (Krizhevsky et al. 2012, section 4.1).
    - "10": these and their mirror images.
    - "144": GoogLeNet's (Szegedy et al. 2015, section 7). The shorter side is 256, 288, 320 or 352;
      of each, the left, central and right square, or the top, central and bottom one; of each, the
      four corners and the center at 224 and the whole square resized to 224; and their mirror
      images. `share` has no effect.

    `flip` adds the mirror images to "1" and "5". Raises UserError for other names.
    """
    if crops == "1":
        views = [View(share)]
    elif crops in ("5", "10"):
        views = [View(share, x, y) for x, y in (*_CORNERS, _CENTER)]
        flip = flip or crops == "10"
    elif crops == "144":
        views = []
        for side, along in itertools.product(GOOGLENET_SIDES, (0.0, 0.5, 1.0)):
            corners = (*_CORNERS, _CENTER)
            views += [View(224 / side, x, y, along) for x, y in corners]
            views.append(View(1.0, along=along))
        flip = True
    else:
        known = ("1", "5", "10", "144")
        raise UserError(
            f"--crops: expected {', '.join(known)}, got {crops!r}{did_you_mean(crops, known)}"
        )
    return tuple(
        view._replace(mirrored=mirrored)
        for mirrored in ((False, True) if flip else (False,))
        for view in views
    )


def make_protocol(
    crops: str = "1",
    *,
    share: float | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    dense: bool = False,
) -> CropProtocol:
    """Returns the protocol of these crops at each of the `scales`.

    `share` of the shorter side is what a crop sees at scale 1, timm's `crop_pct`. Its default is
    224/256 for several crops, and the whole square for one crop and for `dense`. At scale s, the
    same boxes are resized to s times the network's own size. Raises UserError.
    """
    if share is not None and not 0 < share <= 1:
        raise UserError(f"--crop-share: expected a number above 0 and at most 1, got {share:g}")
    if share is not None and crops == "144":
        raise UserError("--crop-share: GoogLeNet's 144 crops have shares of their own")
    if not scales or any(not 0 < scale <= 8 for scale in scales):
        raise UserError(f"--scales: expected numbers above 0 and at most 8, got {list(scales)}")
    if dense and crops != "1":
        raise UserError("--dense: the network slides over the whole image; it takes no --crops")
    default = PAPERS_SHARE if crops in ("5", "10") else 1.0
    views = list_views(crops, default if share is None else share, flip=flip)
    name = "dense" if dense else f"crops{crops}"
    name += "_flip" if flip and crops in ("1", "5") else ""
    name += "" if share is None else f"_share{share:g}"
    name += "" if tuple(scales) == (1.0,) else "_scales" + ",".join(f"{s:g}" for s in scales)
    groups = tuple(CropGroup(float(scale), views) for scale in scales)
    return CropProtocol(name, groups, dense)


def make_reader(
    group: CropGroup,
    size: int,
    channels: int,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
    decoder: str = "pillow",
) -> Callable[[Image.Image], np.ndarray]:
    """Returns `reader(image) -> u8 [V size size channels]`, which worker processes can use."""
    return partial(group.read, size=size, channels=channels, resample=resample, decoder=decoder)


def is_plain(protocol: CropProtocol, share: float) -> bool:
    """Whether the protocol is one central crop with this share, at the network's own size."""
    return not protocol.dense and protocol.groups == (CropGroup(1.0, (View(share),)),)
