"""SAM's image encoder (a ViT with windows and relative positions) as an ONNX graph, built without tracing.

Relative positions add ``rel_h[q, row of k] + rel_w[q, column of k]`` to the scores. Written as a dot product of the
query, lengthened by its two rows of offsets, with the key, lengthened by one-hot codes of its row and column, they need
no tensor of the size of the scores.

References
----------
SAM-Med2D, arXiv 2308.16184, section 3.2: the adapters.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from medreasoner_export.checkpoint import Weights
from medreasoner_export.graph import BITS, FLOAT, GraphBuilder, Precision, Storage, WeightsFile
from medreasoner_export.sam_config import SamConfig
from medreasoner_export.sam_image import neck, to_planes, to_tokens, within_windows

__all__ = ["encoder_graph", "image_tower_section"]

# SAM-Med2D's code holds this number.
ADAPTER_EPSILON = 1e-5


def encoder_graph(
    checkpoint: Weights,
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
        If a tensor is missing, misshapen or does not fit `storage`.
    """
    builder = GraphBuilder("encoder", storage=storage, precision=precision, dynamic=True, outside=outside)
    return _Encoder(checkpoint, config, builder).build(metadata)


def image_tower_section(config: SamConfig, storage: Storage, precision: Precision) -> dict[str, Any] | None:
    """A manifest's ``segmenter.tower`` for an encoder whose weights all are in the file beside its graph, in its order.

    None for encoders with something else than SAM's, for matrices in few bits, and for sizes that do not divide into
    tiles or are far from SAM's.
    """
    is_plain = config.qkv_bias and config.absolute_positions and config.relative_positions and not config.adapter_dim
    widths = (config.hidden_dim, config.mlp_dim, config.n_channels)
    divides = config.grid % 16 == 0 and config.hidden_dim % (16 * config.n_heads) == 0
    is_usual = config.window_size <= config.grid <= 256 and config.patch_size <= 64
    if not is_usual or not is_plain or precision in BITS or not divides or any(width % 32 for width in widths):
        return None
    is_half = precision == "fp16"
    return {
        "file": "encoder.onnx.data",
        "matrices": "float16" if is_half else storage,
        "vectors": "float16" if is_half else "float32",
        "patch_size": config.patch_size,
        "window_size": config.window_size,
        "global_layers": list(config.global_layers),
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "hidden_dim": config.hidden_dim,
        "mlp_dim": config.mlp_dim,
        "n_channels": config.n_channels,
        "norm_eps": config.layer_norm_eps,
    }


class _Encoder:
    def __init__(self, checkpoint: Weights, config: SamConfig, builder: GraphBuilder) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.g = builder

    def tensor(self, name: str, *shape: int) -> npt.NDArray[Any]:
        return self.checkpoint.tensor("vision_encoder." + name, shape)

    def vector(self, name: str, size: int) -> str:
        return self.g.weight(name, self.tensor(name, size))

    def build(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
        g, c = self.g, self.config
        pixels = g.input("pixel_values", FLOAT, ("batch", 3, c.image_size, c.image_size))
        x = self._patches(pixels)
        names = ["layers.0.layer_norm1.weight", "layers.0.layer_norm1.bias"]
        h = g.op(
            "LayerNormalization", x, *(self.vector(name, c.hidden_dim) for name in names), epsilon=c.layer_norm_eps
        )
        for index in range(c.n_layers):
            layer = f"layers.{index}."
            attended = self._windowed_attention(h, layer, c.window_size if index not in c.global_layers else c.grid)
            x, h = self._add(x, attended, layer + "attn.proj.bias", layer + "layer_norm2")
            y, bias = self._mlp(h, layer + "mlp."), layer + "mlp.lin2.bias"
            if c.adapter_dim:
                y = g.op("Add", y, self._adapter(h, layer + "Adapter."))
            if index + 1 < c.n_layers:
                x, h = self._add(x, y, bias, f"layers.{index + 1}.layer_norm1")
            else:
                x = g.op("Add", x, g.op("Add", y, self.vector(bias, c.hidden_dim)))
        neck(g, x, self.tensor, dim=c.hidden_dim, channels=c.n_channels, side=c.grid)
        g.output("image_embedding", FLOAT, ("batch", c.n_channels, c.grid, c.grid))
        return g.model(metadata)

    def _patches(self, pixels: str) -> str:
        """(batch, n_patches, hidden_dim), row by row."""
        g, c = self.g, self.config
        name = "patch_embed.projection"
        kernel = self.tensor(name + ".weight", c.hidden_dim, 3, c.patch_size, c.patch_size)
        patches = g.op(
            "Conv",
            pixels,
            g.weight(name + ".weight", kernel),
            self.vector(name + ".bias", c.hidden_dim),
            strides=[c.patch_size, c.patch_size],
        )
        x = to_tokens(g, patches, c.hidden_dim)
        if not c.absolute_positions:
            return x
        places = self.tensor("pos_embed", 1, c.grid, c.grid, c.hidden_dim)
        return g.op("Add", x, g.weight("pos_embed", places.reshape(1, -1, c.hidden_dim)))

    def _windowed_attention(self, h: str, layer: str, window: int) -> str:
        """(batch, n_patches, D) to the same, without the last bias."""
        c = self.config
        return within_windows(
            self.g, h, side=c.grid, window=window, dim=c.hidden_dim,
            attend=lambda part: self._attention(part, layer + "attn.", window),
        )  # fmt: skip

    def _attention(self, h: str, name: str, side: int) -> str:
        """Attention within each row of (B, side * side, D), and its output projection without the bias."""
        g, c = self.g, self.config
        dim, head = c.hidden_dim, c.hidden_dim // c.n_heads
        bias = self.tensor(name + "qkv.bias", 3 * dim) if c.qkv_bias else None
        qkv = g.linear(h, name + "qkv", self.tensor(name + "qkv.weight", 3 * dim, dim), bias)
        heads = g.op("Reshape", qkv, g.ints(0, 0, 3 * c.n_heads, head))
        heads = g.op("Transpose", heads, perm=[0, 2, 1, 3])  # (B, 3 * heads, T, head)
        q, k, v = g.ops("Split", heads, outputs=3, axis=1, num_outputs=3)
        if c.relative_positions:
            q, k = self._with_offsets(q, k, name, side)
        scores = g.op("com.microsoft.FusedMatMul", q, k, transB=1, alpha=head**-0.5)
        attended = g.op("MatMul", g.op("Softmax", scores, axis=-1), v)
        attended = g.op("Reshape", g.op("Transpose", attended, perm=[0, 2, 1, 3]), g.ints(0, 0, dim))
        return g.linear(attended, name + "proj", self.tensor(name + "proj.weight", dim, dim))

    def _with_offsets(self, q: str, k: str, name: str, side: int) -> tuple[str, str]:
        """Queries and keys (B, heads, T, head + 2 * side) whose product holds the relative positions."""
        g, c = self.g, self.config
        head = c.hidden_dim // c.n_heads
        # Offset of key j from query i is row i - j + side - 1 of the table.
        rows = np.arange(side)[:, None] - np.arange(side)[None, :] + side - 1
        tables = [
            g.weight(name + axis, self.tensor(name + axis, 2 * side - 1, head)[rows].transpose(0, 2, 1))
            for axis in ("rel_pos_h", "rel_pos_w")
        ]  # (query place, head, key place)
        grid = g.op("Reshape", q, g.ints(0, c.n_heads, side, side, head))
        by_row = g.op("MatMul", grid, tables[0])
        by_column = g.op("MatMul", g.op("Transpose", grid, perm=[0, 1, 3, 2, 4]), tables[1])
        by_column = g.op("Transpose", by_column, perm=[0, 1, 3, 2, 4])
        offsets = g.op("Concat", by_row, by_column, axis=-1)
        offsets = g.op("Reshape", offsets, g.ints(0, c.n_heads, side * side, 2 * side))
        # The scores are multiplied by head**-0.5 after the product, the offsets must not be.
        codes = np.concatenate([np.repeat(np.eye(side), side, axis=0), np.tile(np.eye(side), (side, 1))], axis=1)
        codes = (codes * head**0.5).astype(np.float32)[None, None]
        batch = g.op("Shape", k, start=0, end=1)
        shape = g.op("Concat", batch, g.ints(c.n_heads, side * side, 2 * side), axis=0)
        codes_name = g.op("Expand", g.constant(f"codes_{side}", codes), shape)
        return g.op("Concat", q, offsets, axis=-1), g.op("Concat", k, codes_name, axis=-1)

    def _mlp(self, h: str, name: str) -> str:
        g, c = self.g, self.config
        weight, bias = (
            self.tensor(name + "lin1.weight", c.mlp_dim, c.hidden_dim),
            self.tensor(name + "lin1.bias", c.mlp_dim),
        )
        hidden = g.op("Gelu", g.linear(h, name + "lin1", weight, bias))
        return g.linear(hidden, name + "lin2", self.tensor(name + "lin2.weight", c.hidden_dim, c.mlp_dim))

    def _adapter(self, h: str, name: str) -> str:
        """SAM-Med2D's branch beside the MLP: a gate on the channels, then two convolutions at half the resolution."""
        g, c = self.g, self.config
        dim, hidden = c.hidden_dim, c.adapter_dim
        gate = g.op("ReduceMean", h, g.ints(1), keepdims=1)
        gate = g.linear(gate, name + "channel.0", self.tensor(name + "channel.0.weight", hidden, dim))
        gate = g.linear(g.op("Relu", gate), name + "channel.2", self.tensor(name + "channel.2.weight", dim, hidden))
        x = to_planes(g, g.op("Mul", h, g.op("Sigmoid", gate)), dim, c.grid)
        for index, kind, side in ((0, "Conv", 3), (2, "ConvTranspose", 4)):
            kernel = f"{name}spatial.{index}.weight"
            weight = g.weight(kernel, self.tensor(kernel, dim, dim, side, side))
            x = g.op("Relu", g.op(kind, x, weight, strides=[2, 2], pads=[1, 1, 1, 1]))
        x = to_tokens(g, x, dim)
        norm = [self.vector(f"{name}norm.{part}", dim) for part in ("weight", "bias")]
        return g.op("LayerNormalization", g.op("Add", h, x), *norm, epsilon=ADAPTER_EPSILON)

    def _add(self, x: str, y: str, bias: str, norm: str) -> tuple[str, str]:
        """``x + y + bias`` and its normalisation by `norm`."""
        g, dim = self.g, self.config.hidden_dim
        vectors = [self.vector(f"{norm}.{part}", dim) for part in ("weight", "bias")]
        total = g.total(y, x, self.vector(bias, dim))
        return total, g.op("LayerNormalization", total, *vectors, epsilon=self.config.layer_norm_eps)
