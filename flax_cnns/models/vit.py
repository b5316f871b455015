"""Vision Transformer: patches of an image as tokens, in blocks of attention and an MLP.

B and L come from table 1, Ti and S from https://arxiv.org/abs/2012.12877 and
https://arxiv.org/abs/2106.10270. /16 and /32 are the height and width of a patch. GELU is exact, as
in torchvision and timm; the authors' released code has the tanh approximation. Initial kernels are
torchvision's: Glorot's, LeCun's for the patches, zero for the head (section 3.2). There are two
differences from torchvision. The last layer of the attention has Glorot's initialization, where
PyTorch's is smaller. Biases start at 0, where torchvision's MLP has a standard deviation of 1e-6.
The hidden layer that pre-training puts before the head is left out, as in both libraries.

There is one position embedding per patch of `input_size`, so images must have exactly this size.
For another size use `resize_positions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.models.fields import Classes, Count, ImageSize, Positive, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
    authors=(
        "Dosovitskiy, Beyer, Kolesnikov, Weissenborn, Zhai, Unterthiner, Dehghani, Minderer, "
        "Heigold, Gelly, Uszkoreit, Houlsby"
    ),
    year=2020,
    url="https://arxiv.org/abs/2010.11929",
)
RESIZE_METHODS = {"bicubic": "cubic", "bilinear": "linear"}


class Block(nn.Module):
    """Encoder block (equations 2 and 3): attention and an MLP, each residual and after a norm.

    [N T C] -> [N T C].
    """

    heads: int
    dense: ModuleDef
    norm: ModuleDef
    expansion: int = 4
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Array, drop: layers.DropPath | None = None, key: jax.Array | None = None
    ) -> Array:
        """Applies the block; `key` is the dropout's random key, None in evaluation."""
        keys = None if key is None else jax.random.split(key, 3)

        def dropped(i: int, x: Array) -> Array:
            if keys is None:
                return x
            dropout = nn.Dropout(self.dropout, deterministic=False, name=f"dropout{i + 1}")
            return dropout(x, rng=keys[i])

        def attend(block: Block, x: Array) -> Array:
            y = block.norm(name="norm1")(x)
            y = layers.MultiHeadAttention(block.heads, block.dense, name="attention")(y)
            return dropped(0, y)

        def mlp(block: Block, x: Array) -> Array:
            y = block.norm(name="norm2")(x)
            y = block.dense(block.expansion * x.shape[-1], name="expand")(y)
            y = dropped(1, nn.gelu(y, approximate=False))
            return dropped(2, block.dense(x.shape[-1], name="project")(y))

        first, second = layers.split_by_branch(drop, 2)
        x = layers.residual(x, attend, self, x, first)
        return layers.residual(x, mlp, self, x, second)


class ViT(nn.Module):
    """Vision Transformer: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns the normalized class token, f32 [N width], if `num_classes` is None. Raises `UserError`
    if the images do not have `input_size`, or if `input_size` is not a multiple of `patch`.
    """

    # architecture
    patch: Count  # height and width of a patch, in pixels
    width: Count  # of a token
    depth: Count  # blocks
    heads: Count
    expansion: Count = 4  # of the MLP's hidden layer
    input_size: ImageSize = (224, 224, 3)
    # head
    num_classes: Classes | None = 1000
    # regularization
    dropout: Rate = 0.0  # after the positions and each dense layer except qkv: section B.1
    drop_path: Rate = 0.0  # rate of the last block: layers.make_drop_paths
    drop_path_mode: str = "sample"
    drop_path_schedule: str = "convnext"
    # numerics
    epsilon: Positive = 1e-6
    kernel_init: str | Callable = "paper"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # changes nothing: no layer combines images
    # compilation
    scan: bool = False  # run all blocks but the first under nn.scan: layers.Stage
    remat: bool = False  # recompute the inside of each block in the backward pass

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
        rows, columns = _grid(self.input_size, self.patch)
        if images.shape[1:3] != tuple(self.input_size[:2]):
            (h, w), (height, width) = images.shape[1:3], self.input_size[:2]
            raise UserError(
                f"expected images of {height}x{width}, the size of the position grid, got {h}x{w}; "
                f"create_model(..., input_size=({h}, {w}, {images.shape[-1]})) takes them, "
                "with trained positions from flax_cnns.models.vit.resize_positions"
            )
        types: Any = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        glorot, lecun = map(layers.get_initializer, ("xavier", "lecun"))
        kernel_init = layers.get_initializer(self.kernel_init, paper=glorot)
        patches = layers.Conv(
            self.width,
            (self.patch, self.patch),
            strides=self.patch,
            padding=0,
            kernel_init=layers.get_initializer(self.kernel_init, paper=lecun),
            name="patches",
            **types,
        )
        x = patches(images).reshape(len(images), rows * columns, self.width)
        token = self.param(
            "class_token", nn.initializers.zeros, (1, 1, self.width), self.param_dtype
        )
        token = jnp.broadcast_to(token, (len(x), 1, self.width))
        x = jnp.concatenate([token.astype(x.dtype), x], axis=1)  # [N T C], T = 1 + rows * columns
        positions = self.param(
            "position_embedding",
            layers.gaussian(0.02),
            (1, 1 + rows * columns, self.width),
            self.param_dtype,
        )
        x = x + positions.astype(x.dtype)

        drops = layers.make_drop_paths(self, [self.depth], train)[0]
        keys = None
        if self.dropout and train and not self.is_initializing():
            keys = jax.random.split(layers.make_key(self, "dropout"), self.depth)
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        norm = layers.make_norm("channel", train=train, epsilon=self.epsilon, **types)
        block = partial(
            Block,
            self.heads,
            partial(
                nn.Dense,
                kernel_init=kernel_init,
                dot_general=layers.flat_dot_general,
                **types,
            ),
            norm,
            expansion=self.expansion,
            dropout=self.dropout,
        )
        encoder = layers.Stage(
            block, None, self.depth, None, scan=self.scan, remat=self.remat, name="encoder"
        )
        x = encoder(x, drops, keys)[:, 0].astype(jnp.float32)  # [N T C] -> [N C]
        x = partial(norm, dtype=jnp.float32)(name="norm")(x)  # equation 4
        return layers.classify(self, x, paper=nn.initializers.zeros)


def _grid(size: Sequence[int], patch: int) -> tuple[int, int]:
    """Counts patches along H and W; raises `UserError` if `size` is not a multiple of `patch`."""
    height, width = size[:2]
    if height % patch or width % patch or not height or not width:
        raise UserError(
            f"expected height and width to be multiples of the patch, {patch}, got {height}x{width}"
        )
    return height // patch, width // patch


def resize_positions(
    params: dict[str, Any],
    old: Sequence[int],
    new: Sequence[int],
    method: str = "bicubic",
) -> dict[str, Any]:
    """Converts `params` of a ViT from images of the size `old` to `new`, both (H, W) in pixels.

    Interpolates the grid of position embeddings by `method`, "bicubic" or "bilinear", with
    antialiasing if the grid shrinks. The class token's embedding and all other parameters stay. For
    fine-tuning at another resolution (section 3.2):

    params = resize_positions(params, (224, 224), (384, 384))
    model = create_model("vit_b_16", input_size=(384, 384, 3))

    Raises `UserError` for an unknown method, for sizes that are not multiples of the patch, and if
    `params` are not those of a ViT for `old`.
    """
    if "position_embedding" not in params:
        raise UserError(f'expected variables["params"] of a ViT, got a tree of {sorted(params)}')
    if method not in RESIZE_METHODS:
        raise UserError(f"unknown method {method!r}{did_you_mean(method, RESIZE_METHODS)}")
    positions, patch = params["position_embedding"], params["patches"]["kernel"].shape[0]
    before, after = _grid(old, patch), _grid(new, patch)
    tokens = positions.shape[1]
    if tokens != 1 + before[0] * before[1]:
        raise UserError(
            f"expected positions of {before[0]}x{before[1]} patches of {patch}x{patch} and the "
            f"class token, got {tokens}: these params are not for images of {old[0]}x{old[1]}"
        )
    return {**params, "position_embedding": resize_grid(positions, before, after, method)}


def resize_grid(
    positions: Array, before: Sequence[int], after: Sequence[int], method: str = "bicubic"
) -> Array:
    """Interpolates embeddings [1 T C] from the grid `before`, (rows, columns), to `after`.

    T counts the class token and the grid; the class token's embedding stays.
    """
    width = positions.shape[-1]
    grid = positions[:, 1:].reshape(1, *before, width)
    grid = jax.image.resize(grid, (1, *after, width), RESIZE_METHODS[method])
    return jnp.concatenate([positions[:, :1], grid.reshape(1, -1, width)], axis=1)


_TI = partial(ViT, width=192, depth=12, heads=3)
_S = partial(ViT, width=384, depth=12, heads=6)
_B = partial(ViT, width=768, depth=12, heads=12)
_L = partial(ViT, width=1024, depth=24, heads=16)
VARIANTS = {
    "vit_tiny_patch16_224": partial(_TI, patch=16),
    "vit_small_patch16_224": partial(_S, patch=16),
    "vit_small_patch32_224": partial(_S, patch=32),
    "vit_b_16": partial(_B, patch=16),
    "vit_b_32": partial(_B, patch=32),
    "vit_l_16": partial(_L, patch=16),
    "vit_l_32": partial(_L, patch=32),
}
# timm's names and short names: `vit_base_patch16_224` is `vit_b_16`.
ALIASES = {
    "vit_tiny16": "vit_tiny_patch16_224",
    "vit_small16": "vit_small_patch16_224",
    "vit_base_patch16_224": "vit_b_16",
    "vit_base_patch32_224": "vit_b_32",
    "vit_large_patch16_224": "vit_l_16",
    "vit_large_patch32_224": "vit_l_32",
}
SOURCES = {
    name: ("torchvision",) if name.startswith(("vit_b_", "vit_l_")) else ("timm",)
    for name in VARIANTS
}
VARIANTS |= {alias: VARIANTS[name] for alias, name in ALIASES.items()}
SOURCES |= {alias: ("timm",) for alias in ALIASES}
