"""Qwen2.5-VL's decoder as an ONNX graph for ONNX Runtime, built from the checkpoint's tensors without tracing.

Attention is ``com.microsoft.GroupQueryAttention`` over a preallocated buffer that past and present share. Rotary
positions come in as tables with one row a token, so that the three axes of an image token need no node here.
"""

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnx

from medreasoner_export.checkpoint import Weights
from medreasoner_export.graph import (
    BITS,
    FLOAT,
    INT32,
    INT64,
    GraphBuilder,
    Precision,
    Rounding,
    Storage,
    WeightsFile,
    joined,
    width,
)
from medreasoner_export.quantise import quantise
from medreasoner_export.qwen_config import QwenConfig, QwenTextConfig

__all__ = ["TEXT_PREFIXES", "decoder_graph", "layer_graph", "step_section"]

TEXT_PREFIXES = ("model.language_model.", "model.")

LARGEST_STEP_BYTES = 64 * 2**20
"""Of a decoder that a step is worth: one thread reads the weights of a larger one longer than a session takes."""
STEP_ALIGNMENT = 16  # of all sizes, for the kernel's vectors
STEP_BLOCK = 64  # of all sizes, for matrices that the kernel packs


def step_section(text: QwenTextConfig, storage: Storage, precision: Precision) -> dict[str, Any] | None:
    """A manifest's ``reasoner.step`` for a decoder whose weights all are in the file beside its graph, in its order.

    None for a large decoder that is not in four bits, for one in eight, and for sizes that do not divide into vectors.
    """
    q, kv = text.hidden_dim, text.n_kv_heads * text.head_dim
    section = {"file": "decoder.onnx.data", "mlp_dim": text.mlp_dim, "rms_norm_eps": text.rms_norm_eps}
    if precision in BITS:
        sizes = (text.hidden_dim, text.mlp_dim, q + 2 * kv)
        has_kernel = precision == "int4" and not any(size % STEP_BLOCK for size in sizes)
        return section | {"matrices": "int4", "vectors": "float32"} if has_kernel else None
    n_weights = text.n_layers * (text.hidden_dim * (2 * q + 2 * kv) + 3 * text.hidden_dim * text.mlp_dim)
    matrices: Storage = "float16" if precision == "fp16" else storage
    sizes = (text.hidden_dim, text.head_dim, text.mlp_dim)
    if n_weights * width(matrices) > LARGEST_STEP_BYTES or any(size % STEP_ALIGNMENT for size in sizes):
        return None
    return section | {"matrices": matrices, "vectors": "float16" if precision == "fp16" else "float32"}


def decoder_graph(
    checkpoint: Weights,
    config: QwenConfig,
    *,
    storage: Storage,
    metadata: Mapping[str, str],
    precision: Precision = "fp32",
    outside: WeightsFile | None = None,
    rounding: Rounding = quantise,
) -> onnx.ModelProto:
    """The graph from embeddings to the last hidden states, with a key-value cache.

    Inputs: ``inputs_embeds`` (batch, seq, hidden_dim) float32; ``rotary_cos`` and ``rotary_sin``
    (batch * seq, head_dim / 2) float32; ``rotary_ids`` (batch, seq) int64, the row of each token in them;
    ``seqlens_k`` (batch,) int32, tokens in the cache after this step less one; ``total_sequence_length`` () int32;
    ``past_key.{i}`` and ``past_value.{i}`` (batch, n_kv_heads, capacity, head_dim) float32, or float16 at that
    precision. Outputs:
    ``hidden_states`` (batch, seq, hidden_dim) after the final norm, ``present_key.{i}``, ``present_value.{i}``.

    Raises
    ------
    BundleError
        If a tensor is missing, misshapen or does not fit `storage`.
    """
    builder = GraphBuilder("decoder", storage=storage, precision=precision, outside=outside, rounding=rounding)
    return _Decoder(checkpoint, config.text, builder).build(metadata)


def layer_graph(
    checkpoint: Weights,
    config: QwenConfig,
    index: int,
    *,
    storage: Storage,
    precision: Precision = "fp32",
    outside: WeightsFile | None = None,
    rounding: Rounding = quantise,
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """One layer on its own, to run prompts through the decoder with one layer in memory.

    Inputs as those of :func:`decoder_graph`, with the caches of this layer alone. Output: ``layer_output`` (batch, seq,
    hidden_dim) float32, the next layer's ``inputs_embeds``.

    Returns
    -------
    graph
    multiplied : dict
        The tensor that each matrix is multiplied with, by the matrix's name in the decoder's graph.

    Raises
    ------
    BundleError
        If a tensor is missing, misshapen or does not fit `storage`.
    """
    builder = GraphBuilder("layer", storage=storage, precision=precision, outside=outside, rounding=rounding)
    graph = _Decoder(checkpoint, config.text, builder).build_layer(index)
    return graph, builder.multiplied


class _Decoder:
    def __init__(self, checkpoint: Weights, config: QwenTextConfig, builder: GraphBuilder) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.prefix = checkpoint.prefix(TEXT_PREFIXES, "embed_tokens.weight")
        self.g = builder

    def tensor(self, name: str, *shape: int) -> npt.NDArray[Any]:
        return self.checkpoint.tensor(self.prefix + name, shape)

    def build(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
        g, c = self.g, self.config
        x = self._inputs()
        h = g.op("SimplifiedLayerNormalization", x, self._norm("layers.0.input_layernorm"), epsilon=c.rms_norm_eps)
        for index in range(c.n_layers):
            layer = f"layers.{index}."
            x, h = self._add(x, self._attention(h, layer, index), layer + "post_attention_layernorm")
            last = index + 1 == c.n_layers
            after = "norm" if last else f"layers.{index + 1}.input_layernorm"
            x, h = self._add(x, self._mlp(h, layer + "mlp."), after, out="hidden_states" if last else None)
        g.output("hidden_states", FLOAT, ("batch", "seq", c.hidden_dim))
        for index in range(c.n_layers):
            self._caches_out(index)
        return g.model(metadata)

    def build_layer(self, index: int) -> onnx.ModelProto:
        """The layer `index` alone."""
        g, c, layer = self.g, self.config, f"layers.{index}."
        x = self._inputs()
        h = g.op("SimplifiedLayerNormalization", x, self._norm(layer + "input_layernorm"), epsilon=c.rms_norm_eps)
        x, h = self._add(x, self._attention(h, layer, index), layer + "post_attention_layernorm")
        g.op("Add", x, self._mlp(h, layer + "mlp."), out="layer_output")
        g.output("layer_output", FLOAT, ("batch", "seq", c.hidden_dim))
        self._caches_out(index)
        return g.model({})

    def _inputs(self) -> str:
        """All but the caches; returns the embeddings."""
        g, c = self.g, self.config
        x = g.input("inputs_embeds", FLOAT, ("batch", "seq", c.hidden_dim))
        self.cos, self.sin = (
            g.input(name, FLOAT, ("batch_seq", c.head_dim // 2)) for name in ("rotary_cos", "rotary_sin")
        )
        self.ids = g.input("rotary_ids", INT64, ("batch", "seq"))
        self.lengths = g.input("seqlens_k", INT32, ("batch",))
        self.total = g.input("total_sequence_length", INT32, ())
        return x

    def _caches_out(self, index: int) -> None:
        g, c = self.g, self.config
        for part in ("key", "value"):
            g.output(f"present_{part}.{index}", g.real, ("batch", c.n_kv_heads, "capacity", c.head_dim))

    def _attention(self, h: str, layer: str, index: int) -> str:
        g, c = self.g, self.config
        qkv = g.linear(h, layer + "qkv", *self._packed_projection(layer + "self_attn."))
        kv_dim = c.n_kv_heads * c.head_dim
        # Queries and keys are turned together: their heads have one size and follow each other.
        qk, v = g.ops("Split", qkv, g.ints(c.hidden_dim + kv_dim, kv_dim), outputs=2, axis=-1)
        qk = g.op("com.microsoft.RotaryEmbedding", qk, self.ids, self.cos, self.sin)
        q, k = g.ops("Split", qk, g.ints(c.hidden_dim, kv_dim), outputs=2, axis=-1)
        cache = ("batch", c.n_kv_heads, "capacity", c.head_dim)
        past = [g.input(f"past_{part}.{index}", g.real, cache) for part in ("key", "value")]
        attended = g.ops(
            "com.microsoft.GroupQueryAttention",
            q,
            k,
            v,
            *past,
            self.lengths,
            self.total,
            outputs=(g.fresh("attended"), f"present_key.{index}", f"present_value.{index}"),
            num_heads=c.n_heads,
            kv_num_heads=c.n_kv_heads,
            do_rotary=0,
        )[0]
        name = layer + "self_attn.o_proj"
        return g.linear(attended, name, self.tensor(name + ".weight", c.hidden_dim, c.hidden_dim))

    def _packed_projection(self, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Weight (hidden_dim + 2 * kv_dim, hidden_dim) and bias of the query, key and value projections."""
        c = self.config
        rows = {"q": c.hidden_dim, "k": c.n_kv_heads * c.head_dim, "v": c.n_kv_heads * c.head_dim}
        weight = joined([self.tensor(f"{name}{part}_proj.weight", n, c.hidden_dim) for part, n in rows.items()])
        return weight, joined([self.tensor(f"{name}{part}_proj.bias", n) for part, n in rows.items()])

    def _mlp(self, h: str, name: str) -> str:
        g, c = self.g, self.config
        gate, up = (
            g.linear(h, name + part, self.tensor(f"{name}{part}_proj.weight", c.mlp_dim, c.hidden_dim))
            for part in ("gate", "up")
        )
        # QuickGelu with alpha 1 is x * sigmoid(x), in one pass.
        gated = g.op("Mul", g.op("com.microsoft.QuickGelu", gate, alpha=1.0), up)
        return g.linear(gated, name + "down_proj", self.tensor(name + "down_proj.weight", c.hidden_dim, c.mlp_dim))

    def _norm(self, name: str) -> str:
        return self.g.weight(name + ".weight", self.tensor(name + ".weight", self.config.hidden_dim))

    def _add(self, x: str, y: str, norm: str, *, out: str | None = None) -> tuple[str, str]:
        """``x + y`` and its normalisation by `norm`."""
        g = self.g
        h, _, _, total = g.ops(
            "com.microsoft.SkipSimplifiedLayerNormalization",
            y,
            x,
            self._norm(norm),
            outputs=(out or g.fresh("norm"), "", "", g.fresh("sum")),
            epsilon=self.config.rms_norm_eps,
        )
        return total, h
