"""Qwen2.5-VL's vision tower as an ONNX graph, built from the checkpoint's tensors without tracing.

Patches stay in merge order (the blocks that become one token follow each other). A windowed layer gathers its
projections into windows, attends there and scatters back, so nothing in the graph depends on the image's size: the
indices are inputs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from medreasoner_export.checkpoint import Weights
from medreasoner_export.graph import BITS, FLOAT, INT32, INT64, GraphBuilder, Precision, Storage, WeightsFile
from medreasoner_export.qwen_config import QwenConfig, QwenVisionConfig

__all__ = ["EPSILON", "VisionTower", "tower_section", "vision_graph"]

PREFIXES = ("model.visual.", "visual.")
# Qwen2_5_VLVisionBlock and Qwen2_5_VLPatchMerger hold this number in code, not in the configuration.
EPSILON = 1e-6
TILE, TILE_DEPTH = 16, 32  # what sizes must divide into for the kernel that multiplies tiles


def tower_section(config: QwenConfig, storage: Storage, precision: Precision) -> dict[str, Any] | None:
    """A manifest's ``reasoner.tower`` for a tower whose weights all are in the file beside its graph, in its order.

    None for other families, for matrices in few bits, and for sizes that do not divide into tiles.
    """
    vision = config.vision
    widths = (vision.hidden_dim, config.text.hidden_dim)
    divides = vision.head_dim % TILE == 0 and not any(width % TILE_DEPTH for width in widths)
    if config.family != "qwen2_5_vl" or precision in BITS or not divides:
        return None
    is_half = precision == "fp16"
    return {
        "file": "vision.onnx.data",
        "patches": "float16" if is_half else "float32",
        "matrices": "float16" if is_half else storage,
        "vectors": "float16" if is_half else "float32",
        "n_layers": vision.n_layers,
        "n_heads": vision.n_heads,
        "mlp_dim": vision.mlp_dim,
        "rms_norm_eps": EPSILON,
    }


def vision_graph(
    checkpoint: Weights,
    config: QwenConfig,
    *,
    storage: Storage,
    metadata: Mapping[str, str],
    precision: Precision = "fp32",
    outside: WeightsFile | None = None,
    tower: "type[VisionTower] | None" = None,
) -> onnx.ModelProto:
    """The graph from patches to image embeddings.

    Inputs: ``patches`` (batch, n_patches, 3 * patch * patch) float32; ``rotary_cos`` and ``rotary_sin``
    (n_patches, head_dim) float32, second half equal to the first; ``window_gather`` (n_windows, window_tokens) int64;
    ``window_bias`` (n_windows, 1, 1, window_tokens) float32, below -1 for padding; ``window_scatter`` (n_patches,)
    int64. Output: ``image_embeds`` (batch, n_patches / merge**2, hidden_dim) float32. `tower`: of another family.

    Raises
    ------
    BundleError
        If a tensor is missing, misshapen or does not fit `storage`.
    """
    builder = GraphBuilder("vision", storage=storage, precision=precision, dynamic=True, outside=outside)
    return (tower or VisionTower)(checkpoint, config, builder).build(metadata)


class VisionTower:
    """The tower of Qwen2.5-VL; other families replace the parts in which they differ."""

    def __init__(self, checkpoint: Weights, config: QwenConfig, builder: GraphBuilder) -> None:
        self.config: QwenVisionConfig = config.vision
        self.out_dim = config.text.hidden_dim
        self.checkpoint = checkpoint
        self.prefix = checkpoint.prefix(PREFIXES, "patch_embed.proj.weight")
        self.g = builder

    def tensor(self, name: str, *shape: int) -> npt.NDArray[Any]:
        """A tensor of the tower, by its name without the tower's."""
        return self.checkpoint.tensor(self.prefix + name, shape)

    def build(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """The finished graph."""
        g, c = self.g, self.config
        patch_dim = 3 * c.patch_size**2
        patches = g.input("patches", FLOAT, ("batch", "n_patches", patch_dim))
        tables = [g.input(name, FLOAT, ("n_patches", c.head_dim)) for name in ("rotary_cos", "rotary_sin")]
        # Both halves of a table are equal, and RotaryEmbedding wants one.
        self.cos, self.sin = (g.op("Slice", table, g.ints(0), g.ints(c.head_dim // 2), g.ints(1)) for table in tables)
        self._windows(patches)
        x = g.op("MatMul", patches, g.weight("patch_embed.weight", self._patch_embedding().T, exact=True))
        h = self.first_norm(x, "blocks.0.norm1")
        for index in range(c.n_layers):
            attended = self._attention(h, f"blocks.{index}.attn.", full=index in c.full_attention_layers)
            x, h = self.add(x, attended, f"blocks.{index}.attn.proj.bias", f"blocks.{index}.norm2")
            after = f"blocks.{index + 1}.norm1" if index + 1 < c.n_layers else "merger.ln_q"
            y, bias = self.mlp(h, f"blocks.{index}.mlp.")
            x, h = self.add(x, y, bias, after)
        self._merge(h)
        g.output("image_embeds", FLOAT, ("batch", "n_tokens", self.out_dim))
        return g.model(metadata)

    def _patch_embedding(self) -> npt.NDArray[Any]:
        """(hidden_dim, 3 * patch * patch): an image is its own second frame, so the frames' kernels add up."""
        c = self.config
        kernel = self.tensor(
            "patch_embed.proj.weight", c.hidden_dim, 3, c.temporal_patch_size, c.patch_size, c.patch_size
        )
        frames: npt.NDArray[np.float32] = kernel.astype(np.float32)
        return np.asarray(frames.sum(axis=2)).reshape(c.hidden_dim, -1)

    def _windows(self, patches: str) -> None:
        g = self.g
        self.gather = g.input("window_gather", INT64, ("n_windows", "window_tokens"))
        bias = g.input("window_bias", FLOAT, ("n_windows", 1, 1, "window_tokens"))
        self.scatter = g.input("window_scatter", INT64, ("n_patches",))
        shape = g.op("Shape", self.gather)
        # Images of one run share the grid: their windows follow each other in the batch of one attention.
        repeats = g.op("Concat", g.op("Shape", patches, start=0, end=1), g.ints(1), axis=0)
        valid = g.op(
            "Cast", g.op("Greater", bias, g.constant("padding_bias", np.array(-1.0, dtype=np.float32))), to=INT32
        )
        self.mask = g.op("Tile", g.op("Reshape", valid, shape), repeats)
        self.positions = g.op("Tile", self.gather, repeats)
        self.window_tokens = g.op("Shape", self.gather, start=1, end=2)
        self.flat_gather = g.op("Reshape", self.gather, g.ints(-1))

    def _attention(self, h: str, name: str, *, full: bool) -> str:
        """Attention and its output projection without the bias, which the following addition brings."""
        g, c = self.g, self.config
        qkv = g.linear(
            h,
            name + "qkv",
            self.tensor(name + "qkv.weight", 3 * c.hidden_dim, c.hidden_dim),
            self.tensor(name + "qkv.bias", 3 * c.hidden_dim),
        )
        if full:
            attended = self._attend(qkv, g.ints(0), "")
        else:
            gathered = g.op("Gather", qkv, self.flat_gather, axis=1)  # (batch, n_windows * window_tokens, 3 * D)
            windows = g.op("Reshape", gathered, self._windowed(3 * c.hidden_dim))
            attended = self._attend(windows, self.positions, self.mask)
            rows = g.op("Concat", g.op("Shape", h, start=0, end=1), g.ints(-1, c.hidden_dim), axis=0)
            attended = g.op("Gather", g.op("Reshape", attended, rows), self.scatter, axis=1)
        return g.linear(attended, name + "proj", self.tensor(name + "proj.weight", c.hidden_dim, c.hidden_dim))

    def _windowed(self, width: int) -> str:
        """(batch * n_windows, window_tokens, width) as a target of Reshape."""
        return self.g.op("Concat", self.g.ints(-1), self.window_tokens, self.g.ints(width), axis=0)

    def _attend(self, qkv: str, positions: str, mask: str) -> str:
        """(B, T, 3 * D) -> (B, T, D). Queries and keys are turned together: they have the same heads."""
        g, c = self.g, self.config
        qk, v = g.ops("Split", qkv, g.ints(2 * c.hidden_dim, c.hidden_dim), outputs=2, axis=-1)
        qk = g.op("com.microsoft.RotaryEmbedding", qk, positions, self.cos, self.sin)
        q, k = g.ops("Split", qk, outputs=2, axis=-1, num_outputs=2)
        return g.op("com.microsoft.MultiHeadAttention", q, k, v, "", mask, num_heads=c.n_heads)

    def mlp(self, h: str, name: str) -> tuple[str, str]:
        """Gated linear unit without its last bias, and that bias's name."""
        g, c = self.g, self.config
        gate, up = (
            g.linear(
                h,
                name + part,
                self.tensor(f"{name}{part}_proj.weight", c.mlp_dim, c.hidden_dim),
                self.tensor(f"{name}{part}_proj.bias", c.mlp_dim),
            )
            for part in ("gate", "up")
        )
        # QuickGelu with alpha 1 is x * sigmoid(x), in one pass.
        gated = g.op("Mul", g.op("com.microsoft.QuickGelu", gate, alpha=1.0), up)
        down = self.tensor(name + "down_proj.weight", c.hidden_dim, c.mlp_dim)
        # A product of two has a few very large values: in nano this layer alone made half of the error of eight bits.
        return g.linear(gated, name + "down", down, has_outliers=True), name + "down_proj.bias"

    def vector(self, name: str) -> str:
        """A weight of the width of the tower."""
        return self.g.weight(name, self.tensor(name, self.config.hidden_dim))

    def first_norm(self, x: str, name: str) -> str:
        """The normalisation that no sum comes before."""
        return self.g.op("SimplifiedLayerNormalization", x, self.vector(name + ".weight"), epsilon=EPSILON)

    def add(self, x: str, y: str, bias: str, norm: str) -> tuple[str, str]:
        """``x + y + bias`` and its normalisation by `norm`."""
        g = self.g
        h, _, _, total = g.ops(
            "com.microsoft.SkipSimplifiedLayerNormalization",
            y,
            x,
            self.vector(norm + ".weight"),
            self.vector(bias),
            outputs=(g.fresh("norm"), "", "", g.fresh("sum")),
            epsilon=EPSILON,
        )
        return total, h

    def _merge(self, h: str) -> None:
        """Put the patches of a block side by side and project them to one token."""
        g, c = self.g, self.config
        wide = c.hidden_dim * c.merge_size**2
        first, last = "merger.mlp.0.", "merger.mlp.2."
        blocks = g.op("Reshape", h, g.ints(0, -1, wide))
        weight, bias = self.tensor(first + "weight", wide, wide), self.tensor(first + "bias", wide)
        hidden = g.op("Gelu", g.linear(blocks, first[:-1], weight, bias))
        projected = g.op(
            "MatMul", hidden, g.weight(last + "weight", self.tensor(last + "weight", self.out_dim, wide).T)
        )
        bias = self.tensor(last + "bias", self.out_dim)
        g.op("Add", projected, g.weight(last + "bias", bias), out="image_embeds")
