"""The image encoder of LiteMedSAM, a TinyViT, as an ONNX graph, built without tracing.

Convolutions first, then stages of windowed attention with a table of offsets, each followed by a depthwise convolution;
batch norms are folded into the convolutions before them. The sizes are read from the weights.

References
----------
TinyViT, arXiv 2207.10666; MedSAM's branch LiteMedSAM (``tiny_vit_sam.py``), which keeps the image's full resolution in
the first stage.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from medreasoner.errors import BundleError
from medreasoner_export.checkpoint import Weights
from medreasoner_export.graph import FLOAT, GraphBuilder, Precision, Storage, WeightsFile
from medreasoner_export.sam_config import SamConfig
from medreasoner_export.sam_image import neck, to_planes, to_tokens, within_windows

__all__ = ["FIRST", "is_tiny_vit", "merge_stride", "offset_rows", "tiny_vit_graph"]

FIRST = "vision_encoder.patch_embed.seq.0.c.weight"
# Numbers that its code holds, not its weights.
NORM_EPSILON = 1e-5
KEEPS_RESOLUTION = (320, 448, 576)


def is_tiny_vit(weights: Weights) -> bool:
    """Whether the image encoder among `weights` is a TinyViT."""
    return FIRST in weights


def merge_stride(channels: int) -> int:
    """By how much the step between two stages shrinks the grid: TinyViT's code tells it by the channels behind it."""
    return 1 if channels in KEEPS_RESOLUTION else 2


def offset_rows(side: int) -> npt.NDArray[np.int64]:
    """(side ** 2, side ** 2): which entry of an attention's table belongs to a query and a key of one window.

    >>> offset_rows(2).tolist()
    [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]]
    """
    rows, columns = np.divmod(np.arange(side * side), side)
    rows_apart, columns_apart = np.abs(rows[:, None] - rows), np.abs(columns[:, None] - columns)
    return np.asarray(rows_apart * side + columns_apart, np.int64)


def tiny_vit_graph(
    weights: Weights,
    config: SamConfig,
    *,
    storage: Storage,
    metadata: Mapping[str, str],
    precision: Precision = "fp32",
    outside: WeightsFile | None = None,
) -> onnx.ModelProto:
    """The graph from ``pixel_values`` (batch, 3, S, S) to ``image_embedding`` (batch, C, grid, grid), float32.

    Raises
    ------
    BundleError
        If a tensor is missing, misshapen or does not fit `storage`, or the stages do not end in the decoder's grid.
    """
    builder = GraphBuilder("encoder", storage=storage, precision=precision, dynamic=True, outside=outside)
    return _Encoder(weights, config, builder).build(metadata)


class _Encoder:
    def __init__(self, weights: Weights, config: SamConfig, builder: GraphBuilder) -> None:
        self.weights = weights
        self.shapes = weights.shapes
        self.config = config
        self.g = builder
        self.side = config.image_size

    def shape(self, name: str, rank: int = 4) -> tuple[int, ...]:
        found = self.shapes.get("vision_encoder." + name)
        if found is None or len(found) != rank or 0 in found:
            raise BundleError(f"{self.weights.path}: vision_encoder.{name}: expected {rank} dimensions, got {found}")
        return found

    def tensor(self, name: str, *shape: int) -> npt.NDArray[Any]:
        return self.weights.tensor("vision_encoder." + name, shape)

    def vector(self, name: str, size: int) -> str:
        return self.g.weight(name, self.tensor(name, size))

    def count(self, start: str) -> int:
        return self.weights.count("vision_encoder." + start)

    def build(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
        g, c = self.g, self.config
        x = g.input("pixel_values", FLOAT, ("batch", 3, c.image_size, c.image_size))
        x = self._conv(x, "patch_embed.seq.0", 3)
        x = self._conv(g.op("Gelu", x), "patch_embed.seq.2", self.shape("patch_embed.seq.0.c.weight")[0])
        dim = self.shape("patch_embed.seq.2.c.weight")[0]
        for stage in range(self.count("layers.")):
            layer = f"layers.{stage}."
            for index in range(self.count(layer + "blocks.")):
                block = f"{layer}blocks.{index}."
                x = self._block(x, block, dim) if stage else self._convolutions(x, block, dim)
            if "vision_encoder." + layer + "downsample.conv1.c.weight" in self.weights:
                x, dim = self._merge(x, layer + "downsample.", dim)
        if self.side != c.grid:
            raise BundleError(f"{self.weights.path}: stages end in {self.side} patches, the decoder wants {c.grid}")
        neck(g, to_tokens(g, x, dim), self.tensor, dim=dim, channels=c.n_channels, side=c.grid)
        g.output("image_embedding", FLOAT, ("batch", c.n_channels, c.grid, c.grid))
        return g.model(metadata)

    def _conv(self, x: str, name: str, channels: int, *, stride: int = 1, depthwise: bool = False) -> str:
        """A convolution that keeps the grid but for `stride`, with the batch norm behind it."""
        out, _, side, _ = self.shape(name + ".c.weight")
        if side % 2 == 0:
            raise BundleError(f"{self.weights.path}: vision_encoder.{name}: a kernel of {side} x {side} moves the grid")
        kernel = self.tensor(name + ".c.weight", out, 1 if depthwise else channels, side, side).astype(np.float64)
        scale, shift, mean, variance = (
            self.tensor(f"{name}.bn.{part}", out).astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        if variance.min() < 0:
            raise BundleError(f"{self.weights.path}: vision_encoder.{name}.bn.running_var is negative")
        scale = scale / np.sqrt(variance + NORM_EPSILON)
        folded = (kernel * scale[:, None, None, None]).astype(np.float32)
        return self.g.op(
            "Conv",
            x,
            self.g.weight(name + ".weight", folded, exact=True),
            self.g.weight(name + ".bias", (shift - mean * scale).astype(np.float32)),
            strides=[stride, stride],
            pads=[side // 2] * 4,
            group=channels if depthwise else 1,
        )

    def _convolutions(self, x: str, name: str, dim: int) -> str:
        """A block of the first stage: wider, depthwise, narrower, on (batch, D, side, side)."""
        g, hidden = self.g, self.shape(name + "conv1.c.weight")[0]
        y = g.op("Gelu", self._conv(x, name + "conv1", dim))
        y = g.op("Gelu", self._conv(y, name + "conv2", hidden, depthwise=True))
        return g.op("Gelu", g.op("Add", self._conv(y, name + "conv3", hidden), x))

    def _merge(self, x: str, name: str, dim: int) -> tuple[str, int]:
        """The step to the next stage, and its channels."""
        g, out = self.g, self.shape(name + "conv1.c.weight")[0]
        stride = merge_stride(out)
        y = g.op("Gelu", self._conv(x, name + "conv1", dim))
        y = g.op("Gelu", self._conv(y, name + "conv2", out, stride=stride, depthwise=True))
        self.side = -(-self.side // stride)
        return self._conv(y, name + "conv3", out), out

    def _block(self, x: str, name: str, dim: int) -> str:
        """A block of a later stage, from and to (batch, D, side, side)."""
        g = self.g
        tokens = to_tokens(g, x, dim)
        tokens = g.op("Add", tokens, self._windowed_attention(tokens, name + "attn.", dim))
        x = self._conv(to_planes(g, tokens, dim, self.side), name + "local_conv", dim, depthwise=True)
        tokens = to_tokens(g, x, dim)
        hidden = self.shape(name + "mlp.fc1.weight", 2)[0]
        y = self._norm(tokens, name + "mlp.norm", dim)
        y = g.op("Gelu", self._linear(y, name + "mlp.fc1", hidden, dim))
        return to_planes(g, g.op("Add", tokens, self._linear(y, name + "mlp.fc2", dim, hidden)), dim, self.side)

    def _windowed_attention(self, h: str, name: str, dim: int) -> str:
        """(batch, side ** 2, D) to the same. The norm lies within: padding is zero before it."""
        heads, offsets = self.shape(name + "attention_biases", 2)
        window = math.isqrt(offsets)
        if window * window != offsets or dim % heads:
            raise BundleError(f"{self.weights.path}: {name}attention_biases: {heads} heads, {offsets} offsets")
        return within_windows(
            self.g, h, side=self.side, window=window, dim=dim,
            attend=lambda part: self._attention(part, name, dim, heads, window),
        )  # fmt: skip

    def _attention(self, h: str, name: str, dim: int, heads: int, window: int) -> str:
        g, head = self.g, dim // heads
        qkv = self._linear(self._norm(h, name + "norm", dim), name + "qkv", 3 * dim, dim)
        # Query, key and value lie side by side within each head.
        qkv = g.op("Transpose", g.op("Reshape", qkv, g.ints(0, 0, heads, 3 * head)), perm=[0, 2, 1, 3])
        q, k, v = g.ops("Split", qkv, outputs=3, axis=3, num_outputs=3)
        scores = g.op("com.microsoft.FusedMatMul", q, k, transB=1, alpha=head**-0.5)
        table = self.tensor(name + "attention_biases", heads, window * window)
        scores = g.op("Add", scores, g.weight(name + "offsets", table[:, offset_rows(window)][None]))
        attended = g.op("Transpose", g.op("MatMul", g.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        return self._linear(g.op("Reshape", attended, g.ints(0, 0, dim)), name + "proj", dim, dim)

    def _linear(self, x: str, name: str, out: int, size: int) -> str:
        return self.g.linear(x, name, self.tensor(name + ".weight", out, size), self.tensor(name + ".bias", out))

    def _norm(self, x: str, name: str, size: int) -> str:
        vectors = [self.vector(f"{name}.{part}", size) for part in ("weight", "bias")]
        return self.g.op("LayerNormalization", x, *vectors, epsilon=NORM_EPSILON)
