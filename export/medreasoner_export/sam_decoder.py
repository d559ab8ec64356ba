"""SAM's prompt encoder and mask decoder as one ONNX graph, built without tracing.

The two transposed convolutions of stride 2 are products with a matrix: each place of the embedding gives 4 x 4 places
of the mask. The masks are worked out in that order and put in their rows and columns last, when only they are left.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from medreasoner_export.checkpoint import Weights
from medreasoner_export.graph import FLOAT, INT64, GraphBuilder, Storage, joined
from medreasoner_export.sam_config import SamConfig

__all__ = ["sam_decoder_graph"]

# These norms hold their numbers in code, not in the configuration.
FINAL_EPSILON = 1e-5
UPSCALE_EPSILON = 1e-6


def sam_decoder_graph(
    checkpoint: Weights,
    config: SamConfig,
    *,
    multimask: bool,
    box_mask: bool = False,
    storage: Storage,
    metadata: Mapping[str, str],
) -> onnx.ModelProto:
    """The graph from an image's embedding and prompts to masks.

    Inputs: ``image_embedding`` (1 or batch, C, grid, grid) float32; ``points`` (batch, n_points, 2) float32, x before
    y, pixels of the padded image (half a pixel is added here, as in SAM); ``labels`` (batch, n_points) int64: 1 inside,
    0 outside, 2 and 3 corners of a box, -1 padding. Outputs: ``mask_logits`` (batch, n_masks, 4 * grid, 4 * grid),
    ``predicted_iou`` (batch, n_masks), float32.

    Parameters
    ----------
    checkpoint, config
        The weights and their sizes.
    storage, metadata
        Element type of matrices, and ``metadata_props``.
    multimask
        Return the masks for ambiguous prompts (3) instead of the single one.

    box_mask
        Draw a box into the mask prompt too: of each of its places the distance to the box's nearest side in places,
        positive inside, clipped to [-4, 4] and halved; without a box, no mask prompt.

    Raises
    ------
    BundleError
        If a tensor is missing, misshapen or does not fit `storage`.

    References
    ----------
    segment-anything, ``utils/onnx.py``: the labels.
    """
    return _Decoder(checkpoint, config, storage, box_mask=box_mask).build(multimask, metadata)


class _Decoder:
    def __init__(self, checkpoint: Weights, config: SamConfig, storage: Storage, *, box_mask: bool) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.box_mask = box_mask
        self.g = GraphBuilder("decoder", storage=storage)

    def tensor(self, name: str, *shape: int) -> npt.NDArray[Any]:
        return self.checkpoint.tensor(name, shape)

    def frequencies(self) -> npt.NDArray[np.float32]:
        name = "shared_image_embedding.positional_embedding"
        return self.tensor(name, 2, self.config.n_channels // 2).astype(np.float32)

    def build(self, multimask: bool, metadata: Mapping[str, str]) -> onnx.ModelProto:
        g, c = self.g, self.config
        tokens = self._tokens()
        x, keys = tokens, self._image_tokens(tokens)
        places = g.constant("image_places", self._image_places())
        for index in range(c.decoder_layers):
            x, keys = self._layer(x, keys, tokens, places, index)
        name = "mask_decoder.transformer."
        queries = g.op("Add", x, tokens)
        attended = self._attend(queries, g.op("Add", keys, places), keys, name + "final_attn_token_to_image.")
        x = self._norm(x, attended, name + "layer_norm_final_attn", FINAL_EPSILON)
        chosen = range(1, c.n_masks + 1) if multimask else range(1)
        self._masks(x, keys, chosen)
        self._iou(x, chosen)
        g.output("mask_logits", FLOAT, ("batch", len(chosen), c.mask_size, c.mask_size))
        g.output("predicted_iou", FLOAT, ("batch", len(chosen)))
        return g.model(metadata)

    def _tokens(self) -> str:
        """(batch, 2 + n_masks + n_points, C): the learned tokens, then the prompts."""
        g, c = self.g, self.config
        self.embedding = g.input("image_embedding", FLOAT, ("image_batch", c.n_channels, c.grid, c.grid))
        points = g.input("points", FLOAT, ("batch", "n_points", 2))
        labels = g.input("labels", INT64, ("batch", "n_points"))
        # 2 pi (2 (p + 0.5) / size - 1) @ F: one product and one sum.
        factor = 4.0 * np.pi / c.image_size
        scale = g.constant("point_scale", np.array(factor, dtype=np.float32))
        shift = g.constant("point_shift", np.array(0.5 * factor - 2.0 * np.pi, dtype=np.float32))
        scaled = g.op("Add", g.op("Mul", points, scale), shift)
        angles = g.op("MatMul", scaled, g.constant("frequencies", self.frequencies()))
        places = g.op("Concat", g.op("Sin", angles), g.op("Cos", angles), axis=-1)
        real = g.op("Cast", g.op("GreaterOrEqual", labels, g.ints(0)), to=FLOAT)
        places = g.op("Mul", places, g.op("Unsqueeze", real, g.ints(-1)))
        # Row label + 1; a padding point is this row alone.
        names = ["not_a_point_embed", *(f"point_embed.{index}" for index in range(4))]
        rows = [self.tensor(f"prompt_encoder.{name}.weight", 1, c.n_channels) for name in names]
        kinds = g.op("Gather", g.weight("point_kinds", joined(rows)), g.op("Add", labels, g.ints(1)))
        prompts = g.op("Add", places, kinds)
        learned = [
            self.tensor("mask_decoder.iou_token.weight", 1, c.n_channels),
            self.tensor("mask_decoder.mask_tokens.weight", c.n_masks + 1, c.n_channels),
        ]
        self.batch = g.op("Shape", points, start=0, end=1)
        self.points, self.labels = points, labels
        shape = g.op("Concat", self.batch, g.ints(c.n_masks + 2, c.n_channels), axis=0)
        tokens = g.op("Expand", g.weight("output_tokens", joined(learned)[None]), shape)
        return g.op("Concat", tokens, prompts, axis=1)

    def _image_tokens(self, tokens: str) -> str:
        """(batch, grid * grid, C): the embedding without a mask prompt, repeated if it is one image's."""
        g, c = self.g, self.config
        no_mask = self.tensor("prompt_encoder.no_mask_embed.weight", 1, c.n_channels)
        flat = g.op("Transpose", g.op("Reshape", self.embedding, g.ints(0, c.n_channels, -1)), perm=[0, 2, 1])
        dense = g.weight("no_mask", no_mask[0])
        if self.box_mask:
            return g.op("Add", flat, self._box_prompt(dense))
        flat = g.op("Add", flat, dense)
        return g.op("Expand", flat, g.op("Concat", self.batch, g.ints(1, 1), axis=0))

    def _box_prompt(self, no_mask: str) -> str:
        """(batch, grid * grid, C): the mask prompt of the box among the points, or `no_mask` where there is none."""
        g, c = self.g, self.config
        scale = g.constant("mask_scale", np.array(c.mask_size / c.image_size, dtype=np.float32))
        corners, present = [], ""
        for label in (2, 3):  # the corner with this label, (batch, 2): zero where there is none
            chosen = g.op("Cast", g.op("Equal", self.labels, g.ints(label)), to=FLOAT)
            placed = g.op("Mul", self.points, g.op("Unsqueeze", chosen, g.ints(-1)))
            corners.append(g.op("Mul", g.op("ReduceSum", placed, g.ints(1), keepdims=0), scale))
            present = g.op("ReduceMax", chosen, g.ints(1), keepdims=1)  # (batch, 1)
        centres = g.constant("mask_centres", np.arange(c.mask_size, dtype=np.float32)[:, None] + 0.5)  # (side, 1)
        low, high = (g.op("Unsqueeze", corner, g.ints(1)) for corner in corners)  # (batch, 1, 2)
        inside = g.op("Min", g.op("Sub", centres, low), g.op("Sub", high, centres))  # (batch, side, 2)
        across, down = (
            g.op("Slice", inside, g.ints(axis), g.ints(axis + 1), g.ints(2)) for axis in (0, 1)
        )  # (batch, side, 1)
        nearest = g.op("Min", g.op("Transpose", across, perm=[0, 2, 1]), down)  # (batch, side, side)
        limits = [g.constant(name, np.array(value, np.float32)) for name, value in (("near", -4.0), ("far", 4.0))]
        drawn = g.op("Mul", g.op("Clip", nearest, *limits), g.constant("half", np.array(0.5, dtype=np.float32)))
        x = self._mask_embed(g.op("Unsqueeze", drawn, g.ints(1)))
        there = g.op(
            "Unsqueeze", g.op("Greater", present, g.constant("zero", np.array(0.0, dtype=np.float32))), g.ints(-1)
        )
        return g.op("Where", there, x, no_mask)

    def _mask_embed(self, x: str) -> str:
        """(batch, 1, side, side) mask prompt to (batch, grid * grid, C)."""
        g, c, name = self.g, self.config, "prompt_encoder.mask_embed."
        sizes = (1, c.mask_channels // 4, c.mask_channels)
        for index in (1, 2):
            kernel = self.tensor(f"{name}conv{index}.weight", sizes[index], sizes[index - 1], 2, 2)
            weights = [
                g.weight(f"{name}conv{index}.weight", kernel),
                g.weight(f"{name}conv{index}.bias", self.tensor(f"{name}conv{index}.bias", sizes[index])),
            ]
            x = g.op("Transpose", g.op("Conv", x, *weights, strides=[2, 2]), perm=[0, 2, 3, 1])
            vectors = [
                g.weight(
                    f"{name}layer_norm{index}.{part}", self.tensor(f"{name}layer_norm{index}.{part}", sizes[index])
                )
                for part in ("weight", "bias")
            ]
            x = g.op("Gelu", g.op("LayerNormalization", x, *vectors, epsilon=c.prompt_norm_eps))
            if index == 1:
                x = g.op("Transpose", x, perm=[0, 3, 1, 2])
        x = g.op("Reshape", x, g.ints(0, -1, c.mask_channels))
        kernel = self.tensor(f"{name}conv3.weight", c.n_channels, c.mask_channels, 1, 1)[:, :, 0, 0]
        return g.linear(x, f"{name}conv3", kernel, self.tensor(f"{name}conv3.bias", c.n_channels))

    def _image_places(self) -> npt.NDArray[np.float32]:
        """(1, grid * grid, C): codes of the centres of the embedding's places."""
        grid = self.config.grid
        centres = (np.arange(grid, dtype=np.float32) + 0.5) / grid
        xy = np.stack(np.meshgrid(centres, centres, indexing="xy"), axis=-1).reshape(-1, 2)
        angles = (2.0 * np.pi * ((2.0 * xy - 1.0) @ self.frequencies())).astype(np.float32)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)[None]

    def _layer(self, x: str, keys: str, tokens: str, places: str, index: int) -> tuple[str, str]:
        g, c = self.g, self.config
        name, eps = f"mask_decoder.transformer.layers.{index}.", self.config.decoder_norm_eps
        q = x if index == 0 else g.op("Add", x, tokens)
        attended = self._attend(q, q, x, name + "self_attn.", downsample=1)
        if index == 0:  # the first layer's attention replaces the tokens instead of adding to them
            x = self._norm(None, attended, name + "layer_norm1", eps)
        else:
            x = self._norm(x, attended, name + "layer_norm1", eps)
        placed = g.op("Add", keys, places)
        attended = self._attend(g.op("Add", x, tokens), placed, keys, name + "cross_attn_token_to_image.")
        x = self._norm(x, attended, name + "layer_norm2", eps)
        sizes = (c.n_channels, c.decoder_mlp_dim, c.n_channels)
        x = self._norm(x, self._mlp(x, (name + "mlp.lin1", name + "mlp.lin2"), sizes), name + "layer_norm3", eps)
        attended = self._attend(placed, g.op("Add", x, tokens), x, name + "cross_attn_image_to_token.")
        return x, self._norm(keys, attended, name + "layer_norm4", eps)

    def _attend(self, q: str, k: str, v: str, name: str, *, downsample: int | None = None) -> str:
        """(batch, T, C) queries over (batch, S, C) keys and values to (batch, T, C)."""
        g, c = self.g, self.config
        inner = c.n_channels // (downsample or c.decoder_downsample)
        projected = [
            g.linear(x, f"{name}{part}_proj", self.tensor(f"{name}{part}_proj.weight", inner, c.n_channels))
            for part, x in (("q", q), ("k", k), ("v", v))
        ]
        bias = joined([self.tensor(f"{name}{part}_proj.bias", inner) for part in "qkv"])
        attended = g.op(
            "com.microsoft.MultiHeadAttention",
            *projected,
            g.weight(name + "bias", bias),
            num_heads=c.decoder_heads,
        )
        return self._linear(attended, name + "out_proj", c.n_channels, inner)

    def _linear(self, x: str, name: str, n_out: int, n_in: int) -> str:
        return self.g.linear(x, name, self.tensor(name + ".weight", n_out, n_in), self.tensor(name + ".bias", n_out))

    def _mlp(self, x: str, layers: tuple[str, ...], sizes: tuple[int, ...]) -> str:
        for index, name in enumerate(layers):
            x = self._linear(self.g.op("Relu", x) if index else x, name, sizes[index + 1], sizes[index])
        return x

    def _norm(self, x: str | None, y: str, name: str, epsilon: float) -> str:
        """Normalisation of ``x + y``, or of y."""
        g = self.g
        vectors = [
            g.weight(f"{name}.{part}", self.tensor(f"{name}.{part}", self.config.n_channels))
            for part in ("weight", "bias")
        ]
        if x is None:
            return g.op("LayerNormalization", y, *vectors, epsilon=epsilon)
        return g.op("com.microsoft.SkipLayerNormalization", x, y, *vectors, epsilon=epsilon)

    def _masks(self, x: str, keys: str, chosen: range) -> None:
        """``mask_logits`` of the chosen masks."""
        g, c = self.g, self.config
        quarter, eighth = c.n_channels // 4, c.n_channels // 8
        y = g.op("Reshape", self._upscale(keys, "upscale_conv1", c.n_channels, quarter), g.ints(0, -1, quarter))
        norm = "mask_decoder.upscale_layer_norm."
        vectors = [g.weight(norm + part, self.tensor(norm + part, quarter)) for part in ("weight", "bias")]
        y = g.op("Gelu", g.op("LayerNormalization", y, *vectors, epsilon=UPSCALE_EPSILON))
        y = g.op("Gelu", g.op("Reshape", self._upscale(y, "upscale_conv2", quarter, eighth), g.ints(0, -1, eighth)))
        weights = [self._hyper(x, index) for index in chosen]
        hyper = weights[0] if len(weights) == 1 else g.op("Concat", *weights, axis=1)  # (batch, n_masks, C / 8)
        masks = g.op("com.microsoft.FusedMatMul", hyper, y, transB=1)  # (batch, n_masks, grid * grid * 4 * 4)
        masks = g.op("Reshape", masks, g.ints(-1, c.grid, c.grid, 2, 2, 2, 2))
        masks = g.op("Transpose", masks, perm=[0, 1, 3, 5, 2, 4, 6])  # (.., row, y, y, column, x, x)
        g.op("Reshape", masks, g.ints(-1, len(chosen), c.mask_size, c.mask_size), out="mask_logits")

    def _upscale(self, x: str, name: str, n_in: int, n_out: int) -> str:
        """A transposed convolution of size and stride 2: (.., n_in) to (.., y, x, n_out) flattened."""
        name = f"mask_decoder.{name}"
        kernel = self.tensor(name + ".weight", n_in, n_out, 2, 2).transpose(2, 3, 1, 0).reshape(4 * n_out, n_in)
        return self.g.linear(x, name, kernel, np.tile(self.tensor(name + ".bias", n_out), 4))

    def _hyper(self, x: str, index: int) -> str:
        """(batch, 1, C / 8): the weights of mask `index`, from its token."""
        g, c = self.g, self.config
        name = f"mask_decoder.output_hypernetworks_mlps.{index}."
        token = g.op("Slice", x, g.ints(index + 1), g.ints(index + 2), g.ints(1))
        layers = (name + "proj_in", name + "layers.0", name + "proj_out")
        return self._mlp(token, layers, (c.n_channels, c.n_channels, c.n_channels, c.n_channels // 8))

    def _iou(self, x: str, chosen: range) -> None:
        """``predicted_iou`` of the chosen masks."""
        g, c = self.g, self.config
        name = "mask_decoder.iou_prediction_head."
        hidden = [f"{name}layers.{index}" for index in range(c.iou_depth - 2)]
        sizes = (c.n_channels, *(c.iou_dim for _ in range(c.iou_depth - 1)), c.n_masks + 1)
        token = g.op("Slice", x, g.ints(0), g.ints(1), g.ints(1))
        scores = self._mlp(token, (name + "proj_in", *hidden, name + "proj_out"), sizes)
        scores = g.op("Slice", scores, g.ints(chosen.start), g.ints(chosen.stop), g.ints(2))
        g.op("Reshape", scores, g.ints(-1, len(chosen)), out="predicted_iou")
