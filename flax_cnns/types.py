"""Type aliases for signatures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax

Array = jax.Array
Dtype = Annotated[Any, "a floating-point dtype or its name"]
ModuleDef = Callable[..., Any]  # a linen module class or a partial of one
PyTree = Any
# {"image": u8 or f32 [N H W C], "label": i32 [N] or f32 [N K], "mask": f32 [N] in evaluation}
Batch = dict[str, Any]


class Paper(NamedTuple):
    """The paper that a family of networks comes from."""

    title: str
    authors: str
    year: int
    url: str
