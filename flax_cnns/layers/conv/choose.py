"""Which algorithm computes a convolution on a CPU: three tables, and the only file that a benchmark
changes.

XLA's own convolution is good on a CPU for dense kernels on maps of some size, and 10 to 100 times
slower than need be for groups, depthwise kernels, tiny maps, and inside loops. There one of our
algorithms, which XLA turns into matmuls or plain loops, takes its place. `FORWARD`, `KERNEL_GRAD`
and `INPUT_GRAD` are walked from the top: the first row whose condition holds names the algorithm.
Only shapes decide, so the choice is made once, when a program is lowered.

The thresholds were measured on two AVX-512 cores, each algorithm against XLA's own for every shape
of the benchmark's sweep (experiments/benchmarks/shapes.py), forward and with both gradients. To
measure them again, change a row and compare:

    python -m experiments.benchmark conv
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flax_cnns.layers.conv.geometry import ConvGeometry

MIN_WINOGRAD_MULTIPLICATIONS = 1e8  # that make its many small operations worth their while
MAX_WINOGRAD_BYTES = 2**29  # of its tiles
MIN_WINOGRAD_POSITIONS = 16
MAX_DEPTHWISE_TAPS = 100  # each is an array to XLA: hundreds of them compile for long
MAX_BLOCKS = 16  # of groups: each is a convolution to compile
BLOCK_CHANNELS = 32
MAX_BLOCK_CHANNELS = 128
SMALL_BLOCK_MAP = 36  # positions: up to here matmuls are faster than XLA on blocks of groups
SMALL_DENSE_MAP = 64  # positions: below, matmuls are faster than XLA if channels are many enough
MIN_SHIFTED_CHANNELS = 32


class Product(NamedTuple):
    """What a choice goes by: the shapes of one product of a convolution."""

    images: int
    channels: int
    features: int
    geometry: ConvGeometry

    @property
    def min_channels(self) -> int:
        return min(self.channels, self.features)

    @property
    def is_grouped(self) -> bool:
        return self.geometry.groups > 1

    @property
    def is_depthwise(self) -> bool:
        return self.channels == self.geometry.groups > 1

    @property
    def taps(self) -> int:
        return self.geometry.kernel_size[0] * self.geometry.kernel_size[1]

    @property
    def is_pointwise(self) -> bool:
        return self.geometry.kernel_size == (1, 1)

    @property
    def is_small_and_deep(self) -> bool:
        """Whether the map is tiny and the channels are many."""
        small = self.geometry.positions < SMALL_DENSE_MAP
        return small and self.min_channels >= MIN_SHIFTED_CHANNELS

    @property
    def is_rotatable(self) -> bool:
        """Whether a group has at most four channels, and as many features."""
        groups = self.geometry.groups
        few = self.channels == self.features <= 4 * groups
        return self.is_grouped and few and self.channels > groups

    @property
    def fits_few_blocks(self) -> bool:
        """Whether few dense convolutions on maps of some size can replace the groups."""
        groups = self.geometry.groups
        few = groups // groups_per_block(self.channels // groups, groups) <= MAX_BLOCKS
        large = self.geometry.positions > SMALL_BLOCK_MAP
        return self.is_grouped and few and large and not self.geometry.control_flow

    def suits_winograd(self, min_channels: int) -> bool:
        """Whether F(2x2, 3x3) applies, has work enough to pay for its transforms, and fits."""
        geometry = self.geometry
        positions = self.images * geometry.positions
        plain = geometry.strides == geometry.dilation == (1, 1)
        return (
            (geometry.kernel_size == (3, 3) and plain)
            and geometry.positions >= MIN_WINOGRAD_POSITIONS
            and self.min_channels >= min_channels
            and 9 * positions * self.channels * self.features >= MIN_WINOGRAD_MULTIPLICATIONS
            and 16 * positions * (self.channels + self.features) <= MAX_WINOGRAD_BYTES
        )


class Choice(NamedTuple):
    """A line of a table."""

    condition: Callable[[Product], bool]
    algorithm: str  # a key of cpu.py's table of the same name
    why: str


_GROUPED = (
    Choice(
        lambda p: p.is_depthwise and p.taps <= MAX_DEPTHWISE_TAPS,
        "depthwise",
        "plain loops over shifted images; XLA's own is 10 to 100 times slower",
    ),
    Choice(
        lambda p: p.is_depthwise,
        "library",
        "a tap is an array to XLA: hundreds of them compile for long",
    ),
    Choice(
        lambda p: p.fits_few_blocks,
        "blocks",
        "XLA's own is fast on dense kernels, though part of each kernel is zero",
    ),
    Choice(
        lambda p: p.is_grouped,
        "batched",
        "no XLA convolution at all: good on tiny maps, inside loops and for any number of groups",
    ),
)
_DENSE_MATMULS = (
    Choice(lambda p: p.is_pointwise, "pointwise", "it is a matmul"),
    Choice(lambda p: p.geometry.is_patchwise, "patches", "it is a matmul after a reshape"),
)
_DENSE_REST = (
    Choice(
        lambda p: p.geometry.control_flow,
        "shifted",
        "inside loops and branches XLA's own is 10 to 100 times slower",
    ),
    Choice(
        lambda p: p.is_small_and_deep,
        "shifted",
        "most taps of a tiny map see padding alone: they are skipped, the others are matmuls",
    ),
    Choice(lambda p: True, "library", "nothing of ours is faster"),
)

FORWARD = (
    Choice(
        lambda p: p.is_rotatable,
        "rotated",
        "matmuls of at most four channels are slower than a sum of that many depthwise ones",
    ),
    *_GROUPED,
    *_DENSE_MATMULS,
    Choice(
        lambda p: p.suits_winograd(min_channels=64),
        "winograd",
        "2.25 times fewer multiplications, which the transforms cost for fewer channels",
    ),
    *_DENSE_REST,
)
KERNEL_GRAD = (
    *_GROUPED,
    *_DENSE_MATMULS,
    Choice(
        lambda p: p.suits_winograd(min_channels=32 if p.geometry.positions <= 1024 else 128),
        "winograd",
        "as forward, with the channels that were measured for this product",
    ),
    *_DENSE_REST,
)
# Here `channels` are those of one group; the number of images does not matter.
INPUT_GRAD = (
    Choice(lambda p: p.geometry.control_flow, "phases", "forward avoids XLA's own in its turn"),
    Choice(lambda p: p.is_grouped, "phases", "forward has algorithms for groups"),
    Choice(
        lambda p: p.geometry.strides == (1, 1), "phases", "one phase: a convolution like forward"
    ),
    Choice(lambda p: p.is_pointwise, "phases", "one phase is a matmul, and the others are zero"),
    Choice(lambda p: p.geometry.is_patchwise, "patches", "it is a matmul before a reshape"),
    Choice(
        lambda p: p.is_small_and_deep, "phases", "forward is faster than XLA's own on such maps"
    ),
    Choice(lambda p: True, "library", "nothing of ours is faster"),
)


def forward_algorithm(images: int, channels: int, features: int, geometry: ConvGeometry) -> str:
    """The name of the fastest algorithm known for the output."""
    return _first(FORWARD, Product(images, channels, features, geometry))


def kernel_grad_algorithm(images: int, channels: int, features: int, geometry: ConvGeometry) -> str:
    """The name of the fastest algorithm known for the gradient to the kernel."""
    return _first(KERNEL_GRAD, Product(images, channels, features, geometry))


def input_grad_algorithm(group_channels: int, features: int, geometry: ConvGeometry) -> str:
    """The name of the fastest algorithm known for the gradient to the input."""
    return _first(INPUT_GRAD, Product(1, group_channels, features, geometry))


def _first(table: tuple[Choice, ...], product: Product) -> str:
    return next(choice.algorithm for choice in table if choice.condition(product))


def groups_per_block(size: int, groups: int) -> int:
    """How many groups of `size` channels make a block: 32 channels, up to 128 where that leaves no
    more than 16 blocks."""
    fitting = [
        n
        for n in range(1, groups + 1)
        if groups % n == 0 and (n == 1 or n * size <= MAX_BLOCK_CHANNELS)
    ]
    few = [n for n in fitting if groups // n <= MAX_BLOCKS] or fitting[-1:]
    return max([n for n in fitting if n * size <= BLOCK_CHANNELS and n >= few[0]], default=few[0])
