"""SAM's mask decoder without its graph, on processors that multiply tiles of bfloat16 (Intel AMX).

Of the time that a session takes for a small decoder's three hundred nodes most lies between them. Products are rounded
to bfloat16; prompts' places, norms and softmax stay float32. The weights are those of the graph, in the file beside it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medreasoner import ops
from medreasoner._text import one_line
from medreasoner.errors import BundleError
from medreasoner.kernel_session import KernelSession, running
from medreasoner.kernel_spec import DrawingSpec
from medreasoner.reasoner.stored import check_size, stored_tensors
from medreasoner.reasoner.weights import STORED
from medreasoner.spec import SegmenterSpec

__all__ = ["DrawingSession", "load_drawing"]

_ROOT = "mask_decoder."
Weight = tuple[str, bool, tuple[int, ...]]


class DrawingSession(KernelSession):
    """A `Session` of the mask decoder, from any number of threads, each on its own core."""

    def __init__(self, kernel: ops.PromptDecoder) -> None:
        self._kernel = kernel

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """``mask_logits`` and ``predicted_iou``, float32, of the graph's inputs.

        Raises
        ------
        ProviderError
            If they do not fit the weights.
        """
        with running("the mask decoder"):
            logits, scores = self._kernel.run(
                *(np.ascontiguousarray(inputs[name]) for name in ("image_embedding", "points", "labels"))
            )
        return {"mask_logits": logits, "predicted_iou": scores}


def load_drawing(path: Path, spec: SegmenterSpec, drawing: DrawingSpec) -> DrawingSession:
    """The weights as tiles, from the file beside the graph.

    Parameters
    ----------
    path
        The file: tensors in the order of the graph, each at a multiple of 4096 bytes.
    spec, drawing
        Sizes and element types.

    Raises
    ------
    BundleError
        If the file is not of these sizes, or they do not divide into tiles.
    """
    weights = list(_weights(drawing, spec.n_masks))
    types = {True: STORED[drawing.matrices], False: "<f4"}
    tensors = stored_tensors((name, types[is_matrix], shape) for name, is_matrix, shape in weights)
    check_size(path, drawing.file, tensors)
    content = np.memmap(path, np.uint8, mode="r")
    try:
        kernel = ops.PromptDecoder(
            drawing.matrices,
            {each.name: each.view(content) for each in tensors},
            drawing.n_heads,
            spec.mask_size // 4,
            drawing.image_size,
            drawing.n_layers,
            drawing.iou_depth,
            drawing.first_mask,
            spec.n_masks,
            drawing.norm_eps,
            drawing.prompt_norm_eps,
        )
    except ValueError as err:
        raise BundleError(f"{drawing.file}: {one_line(err)}") from err
    return DrawingSession(kernel)


def _weights(d: DrawingSpec, n_masks: int) -> Iterator[Weight]:
    """Name, whether it is a matrix, and shape of all weights in their order; matrices are (in, out)."""
    c = d.n_channels
    yield "frequencies", False, (2, c // 2)
    yield "point_kinds", True, (5, c)
    yield "output_tokens", True, (d.n_learned, c)
    yield "no_mask", False, (c,)
    if d.box_channels:
        yield from _box_prompt(d)
    for index in range(d.n_layers):
        yield from _layer(f"{_ROOT}transformer.layers.{index}.", d)
    yield from _from_tokens(f"{_ROOT}transformer.final_attn_token_to_image.", d)
    yield from _norm(f"{_ROOT}transformer.layer_norm_final_attn", c)
    yield from _linear(f"{_ROOT}upscale_conv1", c, c)
    yield from _norm(f"{_ROOT}upscale_layer_norm", c // 4)
    yield from _linear(f"{_ROOT}upscale_conv2", c // 4, c // 2)
    for index in range(d.first_mask, d.first_mask + n_masks):
        yield from _network(f"{_ROOT}output_hypernetworks_mlps.{index}.", (c, c, c, c // 8))
    sizes = (c, *[d.iou_dim] * (d.iou_depth - 1), d.n_learned - 1)
    yield from _network(f"{_ROOT}iou_prediction_head.", sizes)


def _linear(name: str, n_in: int, n_out: int) -> Iterator[Weight]:
    yield f"{name}.weight", True, (n_in, n_out)
    yield f"{name}.bias", False, (n_out,)


def _norm(name: str, size: int) -> Iterator[Weight]:
    yield f"{name}.weight", False, (size,)
    yield f"{name}.bias", False, (size,)


def _network(name: str, sizes: tuple[int, ...]) -> Iterator[Weight]:
    layers = ["proj_in", *(f"layers.{index}" for index in range(len(sizes) - 3)), "proj_out"]
    for layer, n_in, n_out in zip(layers, sizes[:-1], sizes[1:], strict=True):
        yield from _linear(name + layer, n_in, n_out)


def _box_prompt(d: DrawingSpec) -> Iterator[Weight]:
    name, size = "prompt_encoder.mask_embed.", d.box_channels
    yield from _linear(f"{name}conv1", 16, size)
    yield from _norm(f"{name}layer_norm1", size // 4)
    yield from _linear(f"{name}conv2", size, size)
    yield from _norm(f"{name}layer_norm2", size)
    yield f"{name}conv3.bias", False, (d.n_channels,)
    yield f"{name}conv3.weight", True, (size, d.n_channels)


def _from_tokens(name: str, d: DrawingSpec) -> Iterator[Weight]:
    size = d.inner_dim // d.n_heads
    yield from _linear(f"{name}q_proj", d.n_channels, d.inner_dim)
    yield f"{name}k_proj.weight", True, (d.n_heads, size, d.n_channels)
    yield f"{name}v_proj.weight", True, (d.n_heads, d.n_channels, size)
    yield from _linear(f"{name}out_proj", d.inner_dim, d.n_channels)


def _from_places(name: str, d: DrawingSpec) -> Iterator[Weight]:
    size = d.inner_dim // d.n_heads
    yield from _linear(f"{name}k_proj", d.n_channels, d.inner_dim)
    yield f"{name}q_proj.weight", True, (d.n_heads, size, d.n_channels)
    yield f"{name}q_proj.scores", False, (d.n_heads, size, 1)
    yield f"{name}v_proj.weight", True, (d.n_channels, d.inner_dim)
    yield f"{name}out_proj.weight", True, (d.n_heads, size, d.n_channels)
    yield f"{name}out_proj.bias", False, (d.n_heads, 1, d.n_channels)


def _layer(name: str, d: DrawingSpec) -> Iterator[Weight]:
    c = d.n_channels
    for part in ("q", "k", "v"):
        yield f"{name}self_attn.{part}_proj.weight", True, (c, c)
    yield f"{name}self_attn.bias", False, (3 * c,)
    yield from _linear(f"{name}self_attn.out_proj", c, c)
    yield from _norm(f"{name}layer_norm1", c)
    yield from _from_tokens(f"{name}cross_attn_token_to_image.", d)
    yield from _norm(f"{name}layer_norm2", c)
    yield from _linear(f"{name}mlp.lin1", c, d.mlp_dim)
    yield from _linear(f"{name}mlp.lin2", d.mlp_dim, c)
    yield from _norm(f"{name}layer_norm3", c)
    yield from _from_places(f"{name}cross_attn_image_to_token.", d)
    yield from _norm(f"{name}layer_norm4", c)
