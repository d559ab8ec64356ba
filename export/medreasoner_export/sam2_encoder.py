"""SAM 2's image encoder (a Hiera and the neck behind it) as an ONNX graph, built without tracing.

A Hiera attends within windows, and halves the grid at the first block of each later stage by the largest query of each
2 x 2. The neck reads the four stages; the decoder's own narrow convolutions of the two finest are run here, once an
image, and since nothing lies between, as one product with the neck's.

References
----------
SAM 2, arXiv 2408.00714; Hiera, arXiv 2306.00989, and for its positions arXiv 2311.05613. The published code is that of
``sam2.modeling.backbones`` (facebookresearch/sam2).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from medreasoner_export.checkpoint import Weights
from medreasoner_export.graph import FLOAT, GraphBuilder, Precision, Storage, WeightsFile
from medreasoner_export.sam2_config import Block, Sam2Config
from medreasoner_export.sam_image import to_planes, to_tokens, within_windows

__all__ = ["bicubic_weights", "sam2_encoder_graph"]

# Of the cubic that torch enlarges with; others have -0.5.
CUBIC = -0.75
HIERA, NECK = "vision_encoder.backbone.", "vision_encoder.neck.convs."


def bicubic_weights(old: int, new: int) -> npt.NDArray[np.float64]:
    """(new, old): how ``torch.nn.functional.interpolate(mode="bicubic")`` mixes `old` values in a row into `new`.

    Half-pixel centres; the first and the last value are repeated beyond the ends.

    >>> bicubic_weights(3, 3).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    places = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(places).astype(np.int64) - 1
    weights = np.zeros((new, old))
    for step in range(4):
        apart = np.abs(places - (first + step))
        near = ((CUBIC + 2.0) * apart - (CUBIC + 3.0)) * apart**2 + 1.0
        far = ((CUBIC * apart - 5.0 * CUBIC) * apart + 8.0 * CUBIC) * apart - 4.0 * CUBIC
        columns = np.clip(first + step, 0, old - 1)
        np.add.at(weights, (np.arange(new), columns), np.where(apart <= 1.0, near, far))
    return weights


def sam2_encoder_graph(
    checkpoint: Weights,
    config: Sam2Config,
    *,
    storage: Storage,
    metadata: Mapping[str, str],
    precision: Precision = "fp32",
    outside: WeightsFile | None = None,
) -> onnx.ModelProto:
    """The graph from ``pixel_values`` (batch, 3, S, S) float32 to what the decoder reads of an image.

    Outputs, float32: ``image_embedding`` (batch, C, grid, grid), with the embedding that stands for "no memory" added,
    as the single-image predictor does; ``high_res_s1`` (batch, 4 * grid ** 2, C / 4) and ``high_res_s0`` (batch, 16 *
    grid ** 2, C / 8), the finer features in the order in which the decoder doubles the embedding: place by place of the
    grid, its quarters row by row, and in each of those its quarters again.

    Raises
    ------
    BundleError
        If a tensor is missing, misshapen or does not fit `storage`.
    """
    builder = GraphBuilder("encoder", storage=storage, precision=precision, dynamic=True, outside=outside)
    return _Encoder(checkpoint, config, builder).build(metadata)


class _Encoder:
    def __init__(self, checkpoint: Weights, config: Sam2Config, builder: GraphBuilder) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.g = builder

    def weight(self, name: str, *shape: int) -> str:
        return self.g.weight(name, self.checkpoint.tensor(name, shape))

    def build(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
        g, c = self.g, self.config
        pixels = g.input("pixel_values", FLOAT, ("batch", 3, c.image_size, c.image_size))
        x, side = self._patches(pixels), c.patches
        stages: list[str] = []
        for index, block in enumerate(c.blocks):
            x = self._block(x, f"{HIERA}blocks.{index}.", block, side)
            side //= 2 if block.pools else 1
            if block.ends:
                stages.append(x)
        self._embedding(*stages[2:])
        self._finer(stages[1], 1)
        self._finer(stages[0], 0)
        g.output("image_embedding", FLOAT, ("batch", c.n_channels, c.grid, c.grid))
        g.output("high_res_s1", FLOAT, ("batch", 4 * c.grid**2, c.n_channels // 4))
        g.output("high_res_s0", FLOAT, ("batch", 16 * c.grid**2, c.n_channels // 8))
        return g.model(metadata)

    def _patches(self, pixels: str) -> str:
        """(batch, patches ** 2, D), row by row, with their positions."""
        g, c = self.g, self.config
        name, dim = HIERA + "patch_embed.projection.", c.dims[0]
        weights = [self.weight(name + "weight", dim, 3, 7, 7), self.weight(name + "bias", dim)]
        patches = g.op("Conv", pixels, *weights, strides=[4, 4], pads=[3, 3, 3, 3])
        # Coarse positions over the whole grid, and fine ones that repeat from window to window.
        rows, columns = (
            g.constant(f"enlarge_{axis}", matrix.astype(np.float32))
            for axis, matrix in (
                ("rows", bicubic_weights(c.background[0], c.patches)),
                ("columns", bicubic_weights(c.background[1], c.patches).T),
            )
        )
        coarse = self.weight(HIERA + "pos_embed", 1, dim, *c.background)
        coarse = g.op("MatMul", g.op("MatMul", rows, coarse), columns)
        fine = self.weight(HIERA + "pos_embed_window", 1, dim, c.windows[0], c.windows[0])
        times = c.patches // c.windows[0]
        positions = g.op("Add", coarse, g.op("Tile", fine, g.ints(1, 1, times, times)))
        return to_tokens(g, g.op("Add", patches, positions), dim)

    def _block(self, x: str, name: str, block: Block, side: int) -> str:
        """(batch, side ** 2, D) to the same, or to a quarter of the places with more channels."""
        g = self.g
        h = self._norm(x, name + "layer_norm1", block.in_dim)
        if block.pools:
            x = self._halved(self._linear(h, name + "proj", block.dim, block.in_dim), block.dim, side)
        window = block.window or side
        attended = within_windows(
            g, h, side=side, window=window, dim=block.in_dim, shrink=1 + block.pools, out_dim=block.dim,
            attend=lambda part: self._attention(part, name + "attn.", block, window),
        )  # fmt: skip
        x = g.op("Add", x, attended)
        hidden = int(block.dim * self.config.mlp_ratio)
        y = self._norm(x, name + "layer_norm2", block.dim)
        y = g.op("Gelu", self._linear(y, name + "mlp.proj_in", hidden, block.dim))
        return g.op("Add", x, self._linear(y, name + "mlp.proj_out", block.dim, hidden))

    def _attention(self, h: str, name: str, block: Block, side: int) -> str:
        """Attention within each row of (B, side ** 2, D), to the queries that are left if the block pools."""
        g = self.g
        qkv = self._linear(h, name + "qkv", 3 * block.dim, block.in_dim)
        q, k, v = g.ops("Split", qkv, outputs=3, axis=2, num_outputs=3)
        if block.pools:
            q = self._halved(q, block.dim, side)
        attended = g.op("com.microsoft.MultiHeadAttention", q, k, v, num_heads=block.n_heads)
        return self._linear(attended, name + "proj", block.dim, block.dim)

    def _halved(self, x: str, dim: int, side: int) -> str:
        """The largest of each 2 x 2 places: (B, side ** 2, dim) to (B, (side / 2) ** 2, dim)."""
        g = self.g
        x = g.op("Reshape", x, g.ints(-1, 2, side * dim))  # (B * side / 2, row of two, ...)
        x = g.op("ReduceMax", x, g.ints(1), keepdims=0)
        x = g.op("Reshape", x, g.ints(-1, 2, dim))  # (B * side / 2 * side / 2, column of two, dim)
        x = g.op("ReduceMax", x, g.ints(1), keepdims=0)
        return g.op("Reshape", x, g.ints(-1, (side // 2) ** 2, dim))

    def _embedding(self, third: str, fourth: str) -> None:
        """``image_embedding``: the third stage with the fourth, enlarged, on top."""
        g, c = self.g, self.config
        half, channels = c.grid // 2, c.n_channels
        kernel, bias = self._neck(3)
        top = g.linear(fourth, NECK + "0", kernel, bias)
        top = g.op("Reshape", top, g.ints(-1, half, 1, half, 1, channels))
        top = g.op("Expand", top, g.ints(1, 1, 2, 1, 2, 1))
        top = g.op("Reshape", top, g.ints(-1, c.grid**2, channels))
        kernel, bias = self._neck(2)
        x = g.op("Add", g.linear(third, NECK + "1", kernel, bias), top)
        x = g.op("Add", x, self.weight("no_memory_embedding", 1, 1, channels))
        to_planes(g, x, channels, c.grid, out="image_embedding")

    def _finer(self, x: str, stage: int) -> None:
        """``high_res_s1`` or ``high_res_s0``: neck and the decoder's convolution of that stage in one product."""
        g, c = self.g, self.config
        out = c.n_channels // (4 if stage else 8)
        name = f"mask_decoder.conv_s{stage}."
        narrow = self.checkpoint.tensor(name + "weight", (out, c.n_channels, 1, 1))[:, :, 0, 0].astype(np.float64)
        kernel, bias = (part.astype(np.float64) for part in self._neck(stage))
        shift = narrow @ bias + self.checkpoint.tensor(name + "bias", (out,)).astype(np.float64)
        product = g.weight(f"high_res_s{stage}.weight", (narrow @ kernel).T.astype(np.float32), exact=True)
        y = g.op("MatMul", x, product)
        y = g.op("Add", y, g.weight(f"high_res_s{stage}.bias", shift.astype(np.float32)))
        # From row by row to place by place; the two or four columns of a place stay beside each other at the end.
        if stage:
            shape, order = g.ints(-1, c.grid, 2, c.grid, 2 * out), [0, 1, 3, 2, 4]
        else:
            shape, order = g.ints(-1, c.grid, 2, 2, c.grid, 2, 2 * out), [0, 1, 4, 2, 5, 3, 6]
        y = g.op("Transpose", g.op("Reshape", y, shape), perm=order)
        g.op("Reshape", y, g.ints(-1, (4 if stage else 16) * c.grid**2, out), out=f"high_res_s{stage}")

    def _neck(self, stage: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Matrix (C, D) and bias of the neck's convolution of a stage; the file counts them from the coarsest."""
        c, name = self.config, f"{NECK}{3 - stage}."
        kernel = self.checkpoint.tensor(name + "weight", (c.n_channels, c.dims[stage], 1, 1))
        return kernel[:, :, 0, 0], self.checkpoint.tensor(name + "bias", (c.n_channels,))

    def _linear(self, x: str, name: str, out: int, size: int) -> str:
        weight, bias = (
            self.checkpoint.tensor(f"{name}.{part}", shape)
            for part, shape in (("weight", (out, size)), ("bias", (out,)))
        )
        return self.g.linear(x, name, weight, bias)

    def _norm(self, x: str, name: str, size: int) -> str:
        vectors = [self.weight(f"{name}.{part}", size) for part in ("weight", "bias")]
        return self.g.op("LayerNormalization", x, *vectors, epsilon=self.config.layer_norm_eps)
