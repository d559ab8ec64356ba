"""A box drawn into SAM's mask prompt, and that prompt's own small network, as part of a decoder's graph."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from medreasoner_export.graph import FLOAT, GraphBuilder
from medreasoner_export.sam_config import DecoderConfig

__all__ = ["box_prompt"]

ReadTensor = Callable[..., npt.NDArray[Any]]


def box_prompt(
    g: GraphBuilder, config: DecoderConfig, tensor: ReadTensor, *, image: str, points: str, labels: str, without: str
) -> str:
    """(batch, grid * grid, C): the image and the mask prompt of the box among the points, or `without` it.

    Parameters
    ----------
    g, config
        The decoder's graph and its sizes.
    tensor
        Reads a tensor by its name and shape.
    image
        (1 or batch, grid * grid, C) float32.
    points, labels
        (batch, n_points, 2) float32 and (batch, n_points) int64, as the decoder takes them.
    without
        (C,) float32: what is added to the image where there is no box.
    """
    # Of each corner, in the order of its axis of two: whether a point is it, then its place, zero if there is none.
    chosen = g.op("Cast", g.op("Equal", g.op("Unsqueeze", labels, g.ints(-1)), g.ints(2, 3)), to=FLOAT)
    corners = g.op("Mul", g.op("Unsqueeze", chosen, g.ints(-1)), g.op("Unsqueeze", points, g.ints(2)))
    corners = g.op("ReduceSum", corners, g.ints(1), keepdims=0)  # (batch, 2, 2)
    last = g.op("Slice", chosen, g.ints(1), g.ints(2), g.ints(2))  # (batch, n_points, 1)
    present = g.op("ReduceMax", last, g.ints(1), keepdims=1)  # (batch, 1, 1)
    hidden = g.op("Mul", _mask_embed(g, config, tensor, _drawn(g, config, corners)), present)
    name, size = "prompt_encoder.mask_embed.conv3", (config.n_channels, config.mask_channels)
    kernel, bias = tensor(f"{name}.weight", *size, 1, 1).reshape(size), tensor(f"{name}.bias", config.n_channels)
    zero = g.constant("zero", np.array(0.0, dtype=np.float32))
    rest = g.op("Where", g.op("Greater", present, zero), g.weight(f"{name}.bias", bias), without)  # (batch, 1, C)
    # Not one Sum of three: on CUDA, ONNX Runtime 1.31 gets that wrong where image (1, ..) and hidden (batch, ..) widen.
    return g.op("Add", g.op("Add", image, g.linear(hidden, name, kernel)), rest)


def _drawn(g: GraphBuilder, config: DecoderConfig, corners: str) -> str:
    """(batch * grid * grid, 16): the mask prompt of a box, the 4 x 4 pixels of each place row by row.

    `corners`, (batch, 2, 2), are the top left and the bottom right in pixels of the image.
    """
    grid = config.grid
    # In halves of a pixel of the mask.
    factor = 0.5 * config.mask_size / config.image_size
    placed = g.op("Mul", corners, g.constant("mask_scale", np.array(factor, dtype=np.float32)))
    low, high = (
        g.op("Reshape", g.op("Slice", placed, g.ints(n), g.ints(n + 1), g.ints(1)), g.ints(-1, 2, 1, 1)) for n in (0, 1)
    )
    pixels = 0.5 * (np.arange(config.mask_size, dtype=np.float32).reshape(grid, 4) + 0.5)
    # (2, grid, 16): where the pixels of the places in a row are from the left, and those in a column from the top.
    centres = g.constant("mask_centres", np.stack([np.tile(pixels, 4), np.repeat(pixels, 4, axis=1)]))
    inside = g.op("Min", g.op("Sub", centres, low), g.op("Sub", high, centres))  # (batch, 2, grid, 16)
    limits = [g.constant(name, np.array(value, np.float32)) for name, value in (("near", -2.0), ("far", 2.0))]
    inside = g.op("Clip", inside, *limits)
    across, down = (g.op("Slice", inside, g.ints(n), g.ints(n + 1), g.ints(1)) for n in (0, 1))
    nearest = g.op("Min", across, g.op("Reshape", down, g.ints(-1, grid, 1, 16)))  # (batch, grid, grid, 16)
    return g.op("Reshape", nearest, g.ints(-1, 16))


def _mask_embed(g: GraphBuilder, config: DecoderConfig, tensor: ReadTensor, x: str) -> str:
    """Mask prompts (batch * grid * grid, 16) to what the last convolution takes, (batch, grid * grid, D).

    Both convolutions are of size and stride 2 and end in one place, so that they are products.
    """
    name, first, second = "prompt_encoder.mask_embed.", config.mask_channels // 4, config.mask_channels
    small = tensor(f"{name}conv1.weight", first, 1, 2, 2)[:, 0]
    wide = np.zeros((2, 2, first, 4, 4), small.dtype)  # of each quarter the channels, from the pixels of all
    for down, right in np.ndindex(2, 2):
        wide[down, right, :, 2 * down : 2 * down + 2, 2 * right : 2 * right + 2] = small
    bias = np.tile(tensor(f"{name}conv1.bias", first), 4)
    x = g.linear(x, f"{name}conv1", wide.reshape(4 * first, 16), bias)
    x = _norm_gelu(g, tensor, g.op("Reshape", x, g.ints(-1, first)), 1, first, config.prompt_norm_eps)
    matrix = tensor(f"{name}conv2.weight", second, first, 2, 2).transpose(0, 2, 3, 1).reshape(second, 4 * first)
    bias = tensor(f"{name}conv2.bias", second)
    x = g.linear(g.op("Reshape", x, g.ints(-1, 4 * first)), f"{name}conv2", matrix, bias)
    x = _norm_gelu(g, tensor, x, 2, second, config.prompt_norm_eps)
    return g.op("Reshape", x, g.ints(-1, config.grid**2, second))


def _norm_gelu(g: GraphBuilder, tensor: ReadTensor, x: str, index: int, channels: int, epsilon: float) -> str:
    name = f"prompt_encoder.mask_embed.layer_norm{index}."
    vectors = [g.weight(name + part, tensor(name + part, channels)) for part in ("weight", "bias")]
    return g.op("Gelu", g.op("LayerNormalization", x, *vectors, epsilon=epsilon))
