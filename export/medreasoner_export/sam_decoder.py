"""SAM's prompt encoder and mask decoder as one ONNX graph, built without tracing.

The two transposed convolutions of stride 2 are products with a matrix: each place of the embedding gives 4 x 4 places
of the mask. The masks are worked out in that order and put in their rows and columns last, when only they are left.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from medreasoner_export.box_mask import box_prompt
from medreasoner_export.checkpoint import Weights
from medreasoner_export.graph import FLOAT, INT64, GraphBuilder, Storage, WeightsFile, joined
from medreasoner_export.sam_attention import ImageAttention
from medreasoner_export.sam_config import DecoderConfig

__all__ = ["SamDecoder", "drawing_section", "sam_decoder_graph"]

# These norms hold their numbers in code, not in the configuration.
FINAL_EPSILON = 1e-5
UPSCALE_EPSILON = 1e-6
# Frequencies of the codes of the embedding's places.
IMAGE_CODES = "shared_image_embedding.positional_embedding"


def sam_decoder_graph(
    checkpoint: Weights,
    config: DecoderConfig,
    *,
    multimask: bool,
    box_mask: bool = False,
    storage: Storage,
    metadata: Mapping[str, str],
    outside: WeightsFile | None = None,
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
    outside
        File that takes the weights; None: they stay in the graph.
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
    return SamDecoder(checkpoint, config, storage, box_mask=box_mask, outside=outside).build(multimask, metadata)


def drawing_section(
    config: DecoderConfig, storage: Storage, *, multimask: bool, box_mask: bool
) -> dict[str, Any] | None:
    """A manifest's ``segmenter.drawing`` for a decoder whose weights all are in the file beside its graph, in order.

    None where the sizes do not divide into tiles.
    """
    channels, heads = config.n_channels, config.decoder_heads
    inner = channels // config.decoder_downsample
    divides = channels % 128 == 0 and inner % 32 == 0 and heads % 2 == 0 and channels % (16 * heads) == 0
    if box_mask and config.mask_channels % 16:
        return None
    if (
        not divides
        or inner / heads not in (16, 32)
        or config.grid**2 % 32
        or config.iou_dim % 32
        or config.iou_depth < 2
    ):
        return None
    return {
        "file": "decoder.onnx.data",
        "matrices": storage,
        "image_size": config.image_size,
        "n_channels": channels,
        "inner_dim": inner,
        "n_heads": heads,
        "mlp_dim": config.decoder_mlp_dim,
        "n_layers": config.decoder_layers,
        "n_learned": config.n_masks + 2,
        "first_mask": int(multimask),
        "iou_dim": config.iou_dim,
        "iou_depth": config.iou_depth,
        "box_channels": config.mask_channels if box_mask else 0,
        "norm_eps": config.decoder_norm_eps,
        "prompt_norm_eps": config.prompt_norm_eps,
    }


class SamDecoder:
    """Builds SAM's decoder, step by step; SAM 2's replaces names and steps.

    Attributes
    ----------
    SCORE_TOKEN
        Place of the token of the scores, before those of the masks, among the learned ones.
    POINT_CODES
        Name of the frequencies of points.
    OUT_PROJ, MLP
        Names of an attention's last matrix and of the two in a layer's MLP.
    """

    SCORE_TOKEN = 0
    POINT_CODES = IMAGE_CODES
    OUT_PROJ = "out_proj"
    MLP = ("lin1", "lin2")

    def __init__(
        self,
        checkpoint: Weights,
        config: DecoderConfig,
        storage: Storage,
        *,
        box_mask: bool,
        outside: WeightsFile | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.box_mask = box_mask
        self.g = GraphBuilder("decoder", storage=storage, outside=outside)

    def tensor(self, name: str, *shape: int) -> npt.NDArray[Any]:
        """The tensor `name` of the checkpoint, refused if it has another shape."""
        return self.checkpoint.tensor(name, shape)

    def frequencies(self, name: str) -> npt.NDArray[np.float32]:
        """(2, C / 2) float32: of the codes of places."""
        return self.tensor(name, 2, self.config.n_channels // 2).astype(np.float32)

    def learned_tokens(self) -> list[npt.NDArray[Any]]:
        """Rows (n, C) of the tokens before the prompts: one of the scores, then the masks'."""
        c = self.config
        return [
            self.tensor("mask_decoder.iou_token.weight", 1, c.n_channels),
            self.tensor("mask_decoder.mask_tokens.weight", c.n_masks + 1, c.n_channels),
        ]

    def point_kinds(self) -> list[npt.NDArray[Any]]:
        """Rows (n, C) added to points: for label -1, 0, 1, 2 and 3."""
        names = ["not_a_point_embed", *(f"point_embed.{index}" for index in range(4))]
        return [self.tensor(f"prompt_encoder.{name}.weight", 1, self.config.n_channels) for name in names]

    def refined(self, y: str, _stage: int, _channels: int) -> str:
        """The embedding (batch, places, channels) doubled once (stage 1) or twice (stage 0), before its norm."""
        return y

    def calibrated(self, scores: str) -> str:
        """Predicted IoU of what the last layer gives."""
        return scores

    def outputs(self, x: str, keys: str, *, multimask: bool) -> int:
        """Make ``mask_logits`` and ``predicted_iou``; return how many masks there are."""
        chosen = range(1, self.config.n_masks + 1) if multimask else range(1)
        self.masks(x, keys, chosen, out="mask_logits")
        self.scores(x, chosen, out="predicted_iou")
        return len(chosen)

    def build(self, multimask: bool, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """The finished model."""
        g, c = self.g, self.config
        tokens = self._tokens()
        x, keys = tokens, self._image_tokens()
        places = g.constant("image_places", self._image_places())
        for index in range(c.decoder_layers):
            x, keys = self._layer(x, keys, tokens, places, index)
        name = "mask_decoder.transformer."
        attention = self._attention(name + "final_attn_token_to_image.")
        attended = attention.from_tokens(g.op("Add", x, tokens), g.op("Add", keys, places), keys)
        x = self._norm(x, attended, name + "layer_norm_final_attn", FINAL_EPSILON)
        x = self._in_rows(x)
        count = self.outputs(x, keys, multimask=multimask)
        g.output("mask_logits", FLOAT, ("batch", count, c.mask_size, c.mask_size))
        g.output("predicted_iou", FLOAT, ("batch", count))
        return g.model(metadata)

    def _tokens(self) -> str:
        """(batch * T, C) with T = n_learned + n_points: the learned tokens, then the prompts."""
        g, c = self.g, self.config
        self.embedding = g.input("image_embedding", FLOAT, ("image_batch", c.n_channels, c.grid, c.grid))
        points = g.input("points", FLOAT, ("batch", "n_points", 2))
        labels = g.input("labels", INT64, ("batch", "n_points"))
        # 2 pi (2 (p + 0.5) / size - 1) @ F: one product and one sum.
        factor = 4.0 * np.pi / c.image_size
        scale = g.constant("point_scale", np.array(factor, dtype=np.float32))
        shift = g.constant("point_shift", np.array(0.5 * factor - 2.0 * np.pi, dtype=np.float32))
        scaled = g.op("Add", g.op("Mul", points, scale), shift)
        angles = g.op("MatMul", scaled, g.weight("frequencies", self.frequencies(self.POINT_CODES), exact=True))
        places = g.op("Concat", g.op("Sin", angles), g.op("Cos", angles), axis=-1)
        real = g.op("Cast", g.op("GreaterOrEqual", labels, g.ints(0)), to=FLOAT)
        places = g.op("Mul", places, g.op("Unsqueeze", real, g.ints(-1)))
        # Row label + 1; a padding point is this row alone.
        kinds = g.weight("point_kinds", joined(self.point_kinds()))
        prompts = g.op("Add", places, g.op("Gather", kinds, g.op("Add", labels, g.ints(1))))
        learned = joined(self.learned_tokens())[None]
        batch = g.op("Shape", points, start=0, end=1)
        self.points, self.labels = points, labels
        size = c.n_channels // c.decoder_downsample // c.decoder_heads
        self.rows, self.by_head, shape = (
            g.op("Concat", batch, g.ints(*rest), axis=0)
            for rest in ((-1, c.n_channels), (-1, c.decoder_heads, size), (1, 1))
        )
        # ONNX Runtime takes ten times as long for an Expand.
        tokens = g.op("Add", g.op("ConstantOfShape", shape), g.weight("output_tokens", learned))
        return g.op("Reshape", g.op("Concat", tokens, prompts, axis=1), g.ints(-1, self.config.n_channels))

    def _in_rows(self, x: str) -> str:
        """(batch * T, D) to (batch, T, D)."""
        g = self.g
        return g.op("Reshape", x, self.rows)

    def _image_tokens(self) -> str:
        """(1 or batch, grid * grid, C): the embedding with the mask prompt, or with what stands for none."""
        g, c = self.g, self.config
        no_mask = self.tensor("prompt_encoder.no_mask_embed.weight", 1, c.n_channels)
        flat = g.op("Transpose", g.op("Reshape", self.embedding, g.ints(0, c.n_channels, -1)), perm=[0, 2, 1])
        dense = g.weight("no_mask", no_mask[0])
        if self.box_mask:
            given = {"points": self.points, "labels": self.labels}
            return box_prompt(g, c, self.tensor, image=flat, without=dense, **given)
        return g.op("Add", flat, dense)

    def _image_places(self) -> npt.NDArray[np.float32]:
        """(1, grid * grid, C): codes of the centres of the embedding's places."""
        grid = self.config.grid
        centres = (np.arange(grid, dtype=np.float32) + 0.5) / grid
        xy = np.stack(np.meshgrid(centres, centres, indexing="xy"), axis=-1).reshape(-1, 2)
        angles = (2.0 * np.pi * ((2.0 * xy - 1.0) @ self.frequencies(IMAGE_CODES))).astype(np.float32)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)[None]

    def _layer(self, x: str, keys: str, tokens: str, places: str, index: int) -> tuple[str, str]:
        g, c = self.g, self.config
        name, eps = f"mask_decoder.transformer.layers.{index}.", self.config.decoder_norm_eps
        attended = self._attend_each_other(x, None if index == 0 else tokens, name + "self_attn.")
        # The first layer's attention replaces the tokens instead of adding to them.
        x = self._norm(None if index == 0 else x, attended, name + "layer_norm1", eps)
        placed = g.op("Add", keys, places)
        attention = self._attention(name + "cross_attn_token_to_image.")
        x = self._norm(x, attention.from_tokens(g.op("Add", x, tokens), placed, keys), name + "layer_norm2", eps)
        sizes = (c.n_channels, c.decoder_mlp_dim, c.n_channels)
        hidden = self._mlp(x, tuple(f"{name}mlp.{part}" for part in self.MLP), sizes)
        x = self._norm(x, hidden, name + "layer_norm3", eps)
        attention = self._attention(name + "cross_attn_image_to_token.")
        attended = attention.from_places(placed, g.op("Add", x, tokens), x)
        return x, self._norm(keys, attended, name + "layer_norm4", eps)

    def _attention(self, name: str) -> ImageAttention:
        c = self.config
        return ImageAttention(
            g=self.g, tensor=self.tensor, name=name, out=self.OUT_PROJ, by_head=self.by_head,
            channels=c.n_channels, inner=c.n_channels // c.decoder_downsample, heads=c.decoder_heads,
        )  # fmt: skip

    def _attend_each_other(self, x: str, tokens: str | None, name: str) -> str:
        """Attention among the tokens (batch * T, C), which are added to queries and keys if they are given."""
        g, c = self.g, self.config
        q = x if tokens is None else g.op("Add", x, tokens)
        q, v = self._in_rows(q), self._in_rows(x)
        projected = [
            g.linear(each, f"{name}{part}_proj", self.tensor(f"{name}{part}_proj.weight", c.n_channels, c.n_channels))
            for part, each in (("q", q), ("k", q), ("v", v))
        ]
        bias = joined([self.tensor(f"{name}{part}_proj.bias", c.n_channels) for part in "qkv"])
        attended = g.op(
            "com.microsoft.MultiHeadAttention",
            *projected,
            g.weight(name + "bias", bias),
            num_heads=c.decoder_heads,
        )
        attended = g.op("Reshape", attended, g.ints(-1, c.n_channels))
        return self._linear(attended, name + self.OUT_PROJ, c.n_channels, c.n_channels)

    def _linear(self, x: str, name: str, n_out: int, n_in: int) -> str:
        """Of rows (n, n_in), since ONNX Runtime puts product and sum together only where there are two axes."""
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
        total = y if x is None else g.total(x, y)
        return g.op("LayerNormalization", total, *vectors, epsilon=epsilon)

    def masks(self, x: str, keys: str, chosen: range, *, out: str | None = None) -> str:
        """(batch, n, mask_size, mask_size): logits of the chosen masks."""
        g, c = self.g, self.config
        quarter, eighth = c.n_channels // 4, c.n_channels // 8
        keys = g.op("Reshape", keys, g.ints(-1, c.n_channels))
        doubled = self._upscale(keys, "upscale_conv1", c.n_channels, quarter)
        y = self.refined(g.op("Reshape", doubled, g.ints(-1, 4 * c.grid**2, quarter)), 1, quarter)
        norm = "mask_decoder.upscale_layer_norm."
        vectors = [g.weight(norm + part, self.tensor(norm + part, quarter)) for part in ("weight", "bias")]
        y = g.op("Gelu", g.op("LayerNormalization", y, *vectors, epsilon=UPSCALE_EPSILON))
        doubled = self._upscale(g.op("Reshape", y, g.ints(-1, quarter)), "upscale_conv2", quarter, eighth)
        y = g.op("Gelu", self.refined(g.op("Reshape", doubled, g.ints(-1, 16 * c.grid**2, eighth)), 0, eighth))
        weights = [self._hyper(x, index) for index in chosen]
        hyper = weights[0] if len(weights) == 1 else g.op("Concat", *weights, axis=1)  # (batch, n_masks, C / 8)
        masks = g.op("com.microsoft.FusedMatMul", hyper, y, transB=1)  # (batch, n_masks, grid * grid * 4 * 4)
        masks = g.op("Reshape", masks, g.ints(-1, c.grid, c.grid, 2, 2, 2, 2))
        masks = g.op("Transpose", masks, perm=[0, 1, 3, 5, 2, 4, 6])  # (.., row, y, y, column, x, x)
        return g.op("Reshape", masks, g.ints(-1, len(chosen), c.mask_size, c.mask_size), out=out)

    def _upscale(self, x: str, name: str, n_in: int, n_out: int) -> str:
        """A transposed convolution of size and stride 2: (n, n_in) to (n, y, x, n_out) flattened."""
        name = f"mask_decoder.{name}"
        kernel = self.tensor(name + ".weight", n_in, n_out, 2, 2).transpose(2, 3, 1, 0).reshape(4 * n_out, n_in)
        return self.g.linear(x, name, kernel, np.tile(self.tensor(name + ".bias", n_out), 4))

    def _hyper(self, x: str, index: int) -> str:
        """(batch, 1, C / 8): the weights of mask `index`, from its token."""
        g, c = self.g, self.config
        name = f"mask_decoder.output_hypernetworks_mlps.{index}."
        place = self.SCORE_TOKEN + 1 + index
        layers = (name + "proj_in", name + "layers.0", name + "proj_out")
        sizes = (c.n_channels, c.n_channels, c.n_channels, c.n_channels // 8)
        return g.op("Unsqueeze", self._mlp(self._token(x, place), layers, sizes), g.ints(1))

    def scores(self, x: str, chosen: range, *, out: str | None = None) -> str:
        """(batch, n): predicted IoU of the chosen masks."""
        g, c = self.g, self.config
        name = "mask_decoder.iou_prediction_head."
        hidden = [f"{name}layers.{index}" for index in range(c.iou_depth - 2)]
        sizes = (c.n_channels, *(c.iou_dim for _ in range(c.iou_depth - 1)), c.n_masks + 1)
        scores = self._mlp(self._token(x, self.SCORE_TOKEN), (name + "proj_in", *hidden, name + "proj_out"), sizes)
        scores = self.calibrated(scores)  # (batch, n_masks + 1)
        return g.op("Slice", scores, g.ints(chosen.start), g.ints(chosen.stop), g.ints(1), out=out)

    def _token(self, x: str, place: int) -> str:
        """(batch, C): one of the tokens (batch, T, C)."""
        return self.g.op("Gather", x, self.g.constant(f"token_{place}", np.array(place, np.int64)), axis=1)
