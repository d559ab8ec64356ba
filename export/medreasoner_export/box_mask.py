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
    g: GraphBuilder, config: DecoderConfig, tensor: ReadTensor, *, points: str, labels: str, without: str
) -> str:
    """(batch, grid * grid, C): the mask prompt of the box among the points, or `without` where there is none.

    Parameters
    ----------
    g, config
        The decoder's graph and its sizes.
    tensor
        Reads a tensor by its name and shape.
    points, labels
        (batch, n_points, 2) float32 and (batch, n_points) int64, as the decoder takes them.
    without
        (C,) float32.
    """
    scale = g.constant("mask_scale", np.array(config.mask_size / config.image_size, dtype=np.float32))
    corners, present = [], ""
    for label in (2, 3):  # the corner with this label, (batch, 2): zero where there is none
        chosen = g.op("Cast", g.op("Equal", labels, g.ints(label)), to=FLOAT)
        placed = g.op("Mul", points, g.op("Unsqueeze", chosen, g.ints(-1)))
        corners.append(g.op("Mul", g.op("ReduceSum", placed, g.ints(1), keepdims=0), scale))
        present = g.op("ReduceMax", chosen, g.ints(1), keepdims=1)  # (batch, 1)
    centres = g.constant("mask_centres", np.arange(config.mask_size, dtype=np.float32)[:, None] + 0.5)  # (side, 1)
    low, high = (g.op("Unsqueeze", corner, g.ints(1)) for corner in corners)  # (batch, 1, 2)
    inside = g.op("Min", g.op("Sub", centres, low), g.op("Sub", high, centres))  # (batch, side, 2)
    across, down = (
        g.op("Slice", inside, g.ints(axis), g.ints(axis + 1), g.ints(2)) for axis in (0, 1)
    )  # (batch, side, 1)
    nearest = g.op("Min", g.op("Transpose", across, perm=[0, 2, 1]), down)  # (batch, side, side)
    limits = [g.constant(name, np.array(value, np.float32)) for name, value in (("near", -4.0), ("far", 4.0))]
    drawn = g.op("Mul", g.op("Clip", nearest, *limits), g.constant("half", np.array(0.5, dtype=np.float32)))
    x = _mask_embed(g, config, tensor, g.op("Unsqueeze", drawn, g.ints(1)))
    zero = g.constant("zero", np.array(0.0, dtype=np.float32))
    return g.op("Where", g.op("Unsqueeze", g.op("Greater", present, zero), g.ints(-1)), x, without)


def _mask_embed(g: GraphBuilder, config: DecoderConfig, tensor: ReadTensor, x: str) -> str:
    """(batch, 1, side, side) mask prompt to (batch, grid * grid, C)."""
    name = "prompt_encoder.mask_embed."
    sizes = (1, config.mask_channels // 4, config.mask_channels)
    for index in (1, 2):
        kernel = tensor(f"{name}conv{index}.weight", sizes[index], sizes[index - 1], 2, 2)
        weights = [
            g.weight(f"{name}conv{index}.weight", kernel),
            g.weight(f"{name}conv{index}.bias", tensor(f"{name}conv{index}.bias", sizes[index])),
        ]
        x = g.op("Transpose", g.op("Conv", x, *weights, strides=[2, 2]), perm=[0, 2, 3, 1])
        norm = f"{name}layer_norm{index}."
        vectors = [g.weight(norm + part, tensor(norm + part, sizes[index])) for part in ("weight", "bias")]
        x = g.op("Gelu", g.op("LayerNormalization", x, *vectors, epsilon=config.prompt_norm_eps))
        if index == 1:
            x = g.op("Transpose", x, perm=[0, 3, 1, 2])
    x = g.op("Reshape", x, g.ints(0, -1, config.mask_channels))
    kernel = tensor(f"{name}conv3.weight", config.n_channels, config.mask_channels, 1, 1)[:, :, 0, 0]
    return g.linear(x, f"{name}conv3", kernel, tensor(f"{name}conv3.bias", config.n_channels))
