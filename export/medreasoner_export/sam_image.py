"""What SAM's image encoders share, whatever their layers are: attention within windows, and the neck."""

from collections.abc import Callable
from typing import Any

import numpy.typing as npt

from medreasoner_export.graph import GraphBuilder

__all__ = ["NECK_EPSILON", "neck", "to_planes", "to_tokens", "within_windows"]

# The neck's norms hold this number in code, not in a configuration.
NECK_EPSILON = 1e-6


def to_tokens(g: GraphBuilder, x: str, dim: int) -> str:
    """(batch, dim, side, side) to (batch, side ** 2, dim)."""
    return g.op("Transpose", g.op("Reshape", x, g.ints(0, dim, -1)), perm=[0, 2, 1])


def to_planes(g: GraphBuilder, x: str, dim: int, side: int, *, out: str | None = None) -> str:
    """(batch, side ** 2, dim) to (batch, dim, side, side)."""
    return g.op("Reshape", g.op("Transpose", x, perm=[0, 2, 1]), g.ints(0, dim, side, side), out=out)


def within_windows(
    g: GraphBuilder,
    h: str,
    *,
    side: int,
    window: int,
    dim: int,
    attend: Callable[[str], str],
    shrink: int = 1,
    out_dim: int | None = None,
) -> str:
    """`attend` of each window, (batch * windows, window ** 2, dim) to the same, on (batch, side ** 2, dim).

    A grid that does not divide is padded with zeros, which take part in the attention without a mask, as in SAM's code.
    `attend` may also make each window's side, and so the grid's, `shrink` times smaller, and the last size `out_dim`.
    """
    count = -(-side // window)
    padded = count * window
    if padded > side:
        h = g.op("Reshape", h, g.ints(0, side, side, dim))
        h = g.op("Pad", h, g.ints(0, 0, 0, 0, 0, padded - side, padded - side, 0))
    if count > 1:
        h = g.op("Reshape", h, g.ints(-1, count, window, count, window * dim))
        h = g.op("Transpose", h, perm=[0, 1, 3, 2, 4])  # (batch, window row, window column, row, ...)
    h = attend(g.op("Reshape", h, g.ints(-1, window * window, dim)))
    side, window, padded, dim = side // shrink, window // shrink, padded // shrink, out_dim or dim
    if count > 1:
        h = g.op("Reshape", h, g.ints(-1, count, count, window, window * dim))
        h = g.op("Transpose", h, perm=[0, 1, 3, 2, 4])
    if padded > side:
        h = g.op("Reshape", h, g.ints(-1, padded, padded, dim))
        h = g.op("Slice", h, g.ints(0, 0), g.ints(side, side), g.ints(1, 2))
    return g.op("Reshape", h, g.ints(-1, side * side, dim))


def neck(
    g: GraphBuilder, x: str, tensor: Callable[..., npt.NDArray[Any]], *, dim: int, channels: int, side: int
) -> None:
    """The last part: (batch, side ** 2, dim) to the output ``image_embedding`` (batch, channels, side, side)."""

    def norm(x: str, name: str) -> str:
        vectors = [g.weight(f"{name}.{part}", tensor(f"{name}.{part}", channels)) for part in ("weight", "bias")]
        return g.op("LayerNormalization", x, *vectors, epsilon=NECK_EPSILON)

    y = g.linear(x, "neck.conv1", tensor("neck.conv1.weight", channels, dim, 1, 1).reshape(channels, dim))
    y = to_planes(g, norm(y, "neck.layer_norm1"), channels, side)
    kernel = g.weight("neck.conv2.weight", tensor("neck.conv2.weight", channels, channels, 3, 3))
    y = to_tokens(g, g.op("Conv", y, kernel, pads=[1, 1, 1, 1]), channels)
    to_planes(g, norm(y, "neck.layer_norm2"), channels, side, out="image_embedding")
