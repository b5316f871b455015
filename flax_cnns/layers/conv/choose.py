"""Three tables that choose the algorithm of a convolution on a CPU.

On a CPU, XLA's own convolution is good for dense kernels on larger maps. It is 10 to 100 times
slower than necessary for groups, depthwise kernels and tiny maps, and inside loops. In these cases,
one of our algorithms replaces it. XLA compiles our algorithms to matmuls or plain loops. The tables
are `FORWARD`, `KERNEL_GRAD` and `INPUT_GRAD`. The first row whose condition holds names the
algorithm. Only shapes decide, so the choice is made once, when a program is lowered.

The thresholds were measured on two AVX-512 cores. Each algorithm was compared with XLA's own
convolution for every shape of the benchmark (experiments/benchmarks/shapes.py), forward and with
both gradients. To try other thresholds, change only this file, and compare the times of:

    python -m experiments.benchmark conv
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flax_cnns.layers.conv.geometry import ConvGeometry

MIN_WINOGRAD_MULTIPLICATIONS = 1e8  # with fewer, the overhead of many small operations dominates
MAX_WINOGRAD_BYTES = 2**29  # size of the transformed tiles
MIN_WINOGRAD_POSITIONS = 16
MIN_WINOGRAD_KERNEL = 4096  # channels x features: below, pieces are faster
PIECE_BYTES = 3 * 2**17  # of the output's gradient in a piece of the batch
MIN_BYTES_OF_PIECES = 2**22  # of it in the batch; with less, compiling takes longer than it saves
MAX_PIECES = 8  # each piece is a convolution to compile
MAX_DEPTHWISE_TAPS = 100  # each tap is an array in XLA: hundreds of them take long to compile
MAX_BLOCKS = 16  # each block of groups is a convolution to compile
BLOCK_CHANNELS = 32
MAX_BLOCK_CHANNELS = 128
SMALL_BLOCK_MAP = 36  # positions: up to this size, matmuls are faster than XLA on blocks of groups
SMALL_DENSE_MAP = 64  # positions: below this size, matmuls of many channels are faster than XLA
MIN_SHIFTED_CHANNELS = 64
TINY_DENSE_MAP = 9  # positions: below this size, matmuls of fewer channels are faster too
MIN_TINY_SHIFTED_CHANNELS = 32


class Product(NamedTuple):
    """The shapes of one product of a convolution, which decide its algorithm."""

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
        """Whether the output map is tiny and has many channels."""
        positions = self.geometry.positions
        tiny = positions < TINY_DENSE_MAP
        least = MIN_TINY_SHIFTED_CHANNELS if tiny else MIN_SHIFTED_CHANNELS
        return positions < SMALL_DENSE_MAP and self.min_channels >= least

    @property
    def is_rotatable(self) -> bool:
        """Whether each group has two to four channels, and as many features."""
        groups = self.geometry.groups
        few = self.channels == self.features <= 4 * groups
        return self.is_grouped and few and self.channels > groups

    @property
    def fits_few_blocks(self) -> bool:
        """Whether a few dense convolutions on larger maps can replace the groups."""
        groups = self.geometry.groups
        few = groups // groups_per_block(self.channels // groups, groups) <= MAX_BLOCKS
        large = self.geometry.positions > SMALL_BLOCK_MAP
        return self.is_grouped and few and large and not self.geometry.control_flow

    @property
    def output_bytes(self) -> int:
        """The size of the output, or of its gradient, in float32."""
        return 4 * self.images * self.geometry.positions * self.features

    @property
    def piece(self) -> int:
        """How many images make a piece of the batch, whose kernel gradient XLA computes quickly."""
        fitting = self.images * PIECE_BYTES // self.output_bytes
        return max(1, fitting, -(-self.images // MAX_PIECES))

    @property
    def suits_pieces(self) -> bool:
        """Whether the batch is worth cutting into pieces."""
        return self.images > self.piece and self.output_bytes >= MIN_BYTES_OF_PIECES

    def suits_winograd(self, min_channels: int) -> bool:
        """Whether F(2x2, 3x3) applies, saves more than its transforms cost, and fits in memory."""
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
    """A row of a table."""

    condition: Callable[[Product], bool]
    algorithm: str  # a key of the table of the same name in cpu.py
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
        "each tap is an array in XLA: hundreds of them take long to compile",
    ),
    Choice(
        lambda p: p.fits_few_blocks,
        "blocks",
        "XLA's own is fast on dense kernels, even if parts of them are zero",
    ),
    Choice(
        lambda p: p.is_grouped,
        "batched",
        "matmuls, no XLA convolution: good on tiny maps, inside loops and for any number of groups",
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
        "inside loops and branches, XLA's own is 10 to 100 times slower",
    ),
    Choice(
        lambda p: p.is_small_and_deep,
        "shifted",
        "most taps of a tiny map see only padding and are skipped; the others are matmuls",
    ),
    Choice(lambda p: True, "library", "nothing of ours is faster"),
)

FORWARD = (
    Choice(
        lambda p: p.is_rotatable,
        "rotated",
        "matmuls of so few channels are slower than a sum of two to four depthwise convolutions",
    ),
    *_GROUPED,
    *_DENSE_MATMULS,
    Choice(
        lambda p: p.suits_winograd(min_channels=64),
        "winograd",
        "2.25 times fewer multiplications; with fewer channels the transforms cost more than that",
    ),
    *_DENSE_REST,
)
KERNEL_GRAD = (
    *_GROUPED,
    *_DENSE_MATMULS,
    Choice(
        lambda p: (
            p.suits_winograd(min_channels=32 if p.geometry.positions <= 1024 else 128)
            and not (p.suits_pieces and p.channels * p.features < MIN_WINOGRAD_KERNEL)
        ),
        "winograd",
        "as in FORWARD, with the minimum of channels that was measured for this product",
    ),
    *_DENSE_REST[:-1],
    Choice(
        lambda p: p.suits_pieces,
        "pieces",
        "XLA's own falls off a cliff when a batch's gradients outgrow the cache",
    ),
    _DENSE_REST[-1],
)
# In this table, `channels` is the number per group, and `images` is not used.
INPUT_GRAD = (
    Choice(lambda p: p.geometry.control_flow, "phases", "its convolutions avoid XLA's own too"),
    Choice(lambda p: p.is_grouped, "phases", "FORWARD has algorithms for groups"),
    Choice(lambda p: p.geometry.strides == (1, 1), "phases", "it is one convolution, by FORWARD"),
    Choice(lambda p: p.is_pointwise, "phases", "one phase is a matmul, and the others are zero"),
    Choice(lambda p: p.geometry.is_patchwise, "patches", "it is a matmul before a reshape"),
    Choice(
        lambda p: p.is_small_and_deep, "phases", "FORWARD is faster than XLA's own on tiny maps"
    ),
    Choice(lambda p: True, "library", "nothing of ours is faster"),
)


def forward_algorithm(images: int, channels: int, features: int, geometry: ConvGeometry) -> str:
    """Returns the name of the fastest algorithm known for the output."""
    return _first(FORWARD, Product(images, channels, features, geometry))


def kernel_grad_algorithm(images: int, channels: int, features: int, geometry: ConvGeometry) -> str:
    """Returns the name of the fastest algorithm known for the kernel's gradient."""
    return _first(KERNEL_GRAD, Product(images, channels, features, geometry))


def images_per_piece(images: int, channels: int, features: int, geometry: ConvGeometry) -> int:
    """Returns how many images make a piece for the algorithm "pieces"."""
    return Product(images, channels, features, geometry).piece


def input_grad_algorithm(group_channels: int, features: int, geometry: ConvGeometry) -> str:
    """Returns the name of the fastest algorithm known for the input's gradient."""
    return _first(INPUT_GRAD, Product(1, group_channels, features, geometry))


def _first(table: tuple[Choice, ...], product: Product) -> str:
    return next(choice.algorithm for choice in table if choice.condition(product))


def groups_per_block(size: int, groups: int) -> int:
    """Returns how many groups of `size` channels make a block.

    A block has up to BLOCK_CHANNELS channels. If that makes more than MAX_BLOCKS blocks, it has up
    to MAX_BLOCK_CHANNELS channels. A block always has at least one group.
    """
    fitting = [
        n
        for n in range(1, groups + 1)
        if groups % n == 0 and (n == 1 or n * size <= MAX_BLOCK_CHANNELS)
    ]
    minimum = next((n for n in fitting if groups // n <= MAX_BLOCKS), fitting[-1])
    preferred = [n for n in fitting if n * size <= BLOCK_CHANNELS and n >= minimum]
    return max(preferred, default=minimum)
