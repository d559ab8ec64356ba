"""ONNX Runtime's own operators written out in standard ones, so that other builders of engines understand them.

Every function here replaces one node of a graph that this package made; forms of an operator that it does not make are
refused. Softmax, norms and sums stay in float32 whatever the products are computed in.

References
----------
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto

from medreasoner.errors import BundleError
from medreasoner_export.quantise import BLOCK, Rounded, RoundedRows, dequantise, dequantise_rows
from medreasoner_export.standard_graph import StandardGraph
from medreasoner_export.trt_plan import MASK, PLACES

__all__ = ["EXPANSIONS", "Expansion"]

# What ONNX Runtime's MultiHeadAttention adds to the scores of padding.
PADDED = -10_000.0
# Far below every score, and a number, so that a row without any key gives no NaN.
MASKED = -1e9

Attributes: TypeAlias = Mapping[str, Any]
Expansion: TypeAlias = Callable[[StandardGraph, onnx.NodeProto, Attributes], None]


def _rms_norm(g: StandardGraph, x: str, weight: str, epsilon: float, out: str) -> None:
    mean = g.op("ReduceMean", g.op("Mul", x, x), g.ints(-1), keepdims=1)
    root = g.op("Sqrt", g.op("Add", mean, g.number(epsilon)))
    g.op("Mul", g.op("Div", x, root), g.read(weight), out=out)


def _total(g: StandardGraph, parts: Sequence[str], name: str) -> str:
    """The sum of tensors, under `name` if that is not empty."""
    *first, last = [g.read(each) for each in parts if each]
    x = first[0]
    for each in first[1:]:
        x = g.op("Add", x, each)
    return g.op("Add", x, last, out=name or None)


def _simplified_layer_normalization(g: StandardGraph, node: onnx.NodeProto, attributes: Attributes) -> None:
    _rms_norm(g, node.input[0], node.input[1], attributes["epsilon"], node.output[0])


def _skip_simplified_layer_normalization(g: StandardGraph, node: onnx.NodeProto, attributes: Attributes) -> None:
    total = _total(g, [*node.input[:2], *node.input[3:4]], node.output[3])
    _rms_norm(g, total, node.input[2], attributes["epsilon"], node.output[0])


def _skip_layer_normalization(g: StandardGraph, node: onnx.NodeProto, attributes: Attributes) -> None:
    total = _total(g, [*node.input[:2], *node.input[4:5]], node.output[3] if len(node.output) > 3 else "")
    vectors = [g.read(each) for each in node.input[2:4]]
    g.op("LayerNormalization", total, *vectors, out=node.output[0], axis=-1, epsilon=attributes["epsilon"])


def _quick_gelu(g: StandardGraph, node: onnx.NodeProto, attributes: Attributes) -> None:
    x = node.input[0]
    alpha = attributes["alpha"]
    inner = x if alpha == 1.0 else g.op("Mul", x, g.number(alpha))
    g.op("Mul", x, g.op("Sigmoid", inner), out=node.output[0])


def _fused_mat_mul(g: StandardGraph, node: onnx.NodeProto, attributes: Attributes) -> None:
    if set(attributes) - {"transB", "alpha"} or not attributes.get("transB"):
        raise BundleError(f"{g.name}: FusedMatMul with {sorted(attributes)} is not one that this release exports")
    a, b = node.input
    rank = g.stored.rank(b)
    order = [*range(rank - 2), rank - 1, rank - 2]
    if attributes.get("alpha", 1.0) != 1.0:
        a = g.op("Mul", g.read(a), g.number(attributes["alpha"]))
    g.product("MatMul", a, g.op("Transpose", g.read(b), perm=order), out=node.output[0])


def _rotary_embedding(g: StandardGraph, node: onnx.NodeProto, attributes: Attributes) -> None:
    if attributes:
        raise BundleError(f"{g.name}: RotaryEmbedding with {sorted(attributes)} is not one that this release exports")
    x, ids, *tables = node.input
    cos, sin = (_rotary_rows(g, ids, table) for table in tables)
    heads = g.op("Reshape", x, g.ints(0, 0, -1, g.head_dim))
    first, second = g.ops("Split", heads, outputs=2, axis=-1, num_outputs=2)  # (B, T, heads, head_dim / 2)
    turned = (
        g.op("Sub", g.op("Mul", first, cos), g.op("Mul", second, sin)),
        g.op("Add", g.op("Mul", second, cos), g.op("Mul", first, sin)),
    )
    g.op("Reshape", g.op("Concat", *turned, axis=-1), g.ints(0, 0, -1), out=node.output[0])


def _rotary_rows(g: StandardGraph, ids: str, table: str) -> str:
    """(B, T, 1, head_dim / 2) rows of a table, or (1, T, 1, ...) for all of them in order."""

    def rows() -> str:
        if ids == "rotary_ids":  # the decoder's tables have a row for each token of each sequence
            return g.op("Unsqueeze", table, g.ints(2))
        if ids not in g.stored:
            return g.op("Unsqueeze", g.op("Gather", table, ids), g.ints(2))
        if g.stored.array(ids).tolist() != [0]:
            raise BundleError(f"{g.name}: rotary positions from {ids} are none that this release exports")
        return g.op("Unsqueeze", table, g.ints(0, 2))

    return g.once((ids, table), rows)


def _multi_head_attention(g: StandardGraph, node: onnx.NodeProto, attributes: Attributes) -> None:
    if set(attributes) != {"num_heads"}:
        raise BundleError(f"{g.name}: attention with {sorted(attributes)} is not one that this release exports")
    heads, dim = attributes["num_heads"], g.head_dim
    q, k, v, bias, mask = ([*node.input] + [""] * 5)[:5]
    if bias:
        parts = np.split(g.stored.array(bias), 3)
        dim = len(parts[0]) // heads
        q, k, v = (
            g.op("Add", x, g.constant(f"{bias}.{part}", np.ascontiguousarray(array)))
            for x, part, array in zip((q, k, v), "qkv", parts, strict=True)
        )
    q = g.op("Mul", g.heads(q, (heads, dim), (0, 2, 1, 3)), g.number(dim**-0.5))
    k, v = g.heads(k, (heads, dim), (0, 2, 3, 1)), g.heads(v, (heads, dim), (0, 2, 1, 3))
    attended = g.attention(q, k, v, g.once((mask,), lambda: _key_bias(g, mask)) if mask else "")
    rows = g.op("Transpose", attended, perm=[0, 2, 1, 3])
    g.op("Reshape", rows, g.ints(0, 0, heads * dim), out=node.output[0])


def _key_bias(g: StandardGraph, mask: str) -> str:
    """(B, 1, 1, T): nothing where an integer mask (B, T) has a key, far below every score where it has none."""
    there = g.op("Cast", mask, to=TensorProto.BOOL)
    return g.op("Unsqueeze", g.op("Where", there, g.number(0.0), g.number(PADDED)), g.ints(1, 2))


def _group_query_attention(g: StandardGraph, node: onnx.NodeProto, attributes: Attributes) -> None:
    """Attention over a static buffer: the new keys and values go to their places, the mask says who sees what.

    The buffer that comes out is another one than that which went in. On a GPU this costs one copy of it a step, which
    is small against the weights that a step reads (235 MB against 15 GB in the 7B model at 4096 tokens).
    """
    if attributes.get("do_rotary") or set(attributes) - {"num_heads", "kv_num_heads", "do_rotary"}:
        raise BundleError(f"{g.name}: attention with {sorted(attributes)} is not one that this release exports")
    heads, kv_heads, dim = attributes["num_heads"], attributes["kv_num_heads"], g.head_dim
    q, k, v, past_key, past_value = node.input[:5]
    key, value = (
        _written(g, past, g.heads(g.half(new), (kv_heads, dim), (0, 2, 1, 3)), out)
        for past, new, out in ((past_key, k, node.output[1]), (past_value, v, node.output[2]))
    )  # (B, kv_heads, capacity, D)
    group = heads // kv_heads
    q = g.op("Mul", q, g.number(dim**-0.5))
    q = g.op("Reshape", q, g.ints(0, 0, kv_heads, group, dim))
    q = g.op("Reshape", g.op("Transpose", q, perm=[0, 2, 3, 1, 4]), g.ints(0, kv_heads, -1, dim))  # rows group, seq
    key = g.op("Transpose", key, perm=[0, 1, 3, 2])
    for each in (key, value):
        g.is_product(each)
    attended = g.attention(q, key, value, g.once((MASK,), lambda: _buffer_bias(g, group)))
    attended = g.op("Reshape", attended, g.ints(0, kv_heads, group, -1, dim))
    rows = g.op("Transpose", attended, perm=[0, 3, 1, 2, 4])  # (B, seq, kv_heads, group, D)
    g.op("Reshape", rows, g.ints(0, 0, heads * dim), out=node.output[0])


def _written(g: StandardGraph, past: str, new: str, out: str) -> str:
    """The buffer (B, kv_heads, capacity, D) with `new` (B, kv_heads, seq, D) at its places."""

    def indices() -> str:
        return g.op("Expand", g.op("Unsqueeze", PLACES, g.ints(1, 3)), g.op("Shape", new))

    return g.op("ScatterElements", past, g.once((PLACES,), indices), new, out=out, axis=2)


def _buffer_bias(g: StandardGraph, group: int) -> str:
    """(B, 1, group * seq, capacity) of a mask (B, seq, capacity): the queries of a group have one key head."""
    bias = g.op("Unsqueeze", g.op("Where", MASK, g.number(0.0), g.number(MASKED)), g.ints(1))
    return g.op("Concat", *[bias] * group, axis=2) if group > 1 else bias


def _mat_mul_n_bits(g: StandardGraph, node: onnx.NodeProto, attributes: Attributes) -> None:
    """The matrix that the levels stand for, as it is: no builder of engines knows blocks with a zero point."""
    x, levels, scales, zeros = node.input
    bits = attributes["bits"]
    if bits not in (4, 8) or attributes["block_size"] != BLOCK:
        raise BundleError(f"{g.name}: {levels} is not in four or eight bits and blocks of {BLOCK}")
    parts = (g.stored.array(each) for each in (levels, scales, zeros))
    matrix = Rounded(bits=bits, **dict(zip(("levels", "scales", "zero_points"), parts, strict=True)))
    name = levels.removesuffix(".levels")
    g.stored.add(name, dequantise(matrix).T)
    g.product("MatMul", x, name, out=node.output[0])
    g.stored.drop(name)


def _dynamic_quantize_mat_mul(g: StandardGraph, node: onnx.NodeProto, attributes: Attributes) -> None:
    """The matrix that the levels stand for, too: an engine scales its activations in a way of its own, or not."""
    x, levels, scales, zeros, bias = ([*node.input] + [""] * 2)[:5]
    if attributes or zeros:
        raise BundleError(f"{g.name}: the product with {levels} is not one that this release exports")
    name = levels.removesuffix(".levels")
    g.stored.add(name, dequantise_rows(RoundedRows(levels=g.stored.array(levels), scales=g.stored.array(scales))).T)
    y = g.product("MatMul", x, name, out=None if bias else node.output[0])
    g.stored.drop(name)
    if bias:
        g.op("Add", y, g.read(bias), out=node.output[0])


def _product(g: StandardGraph, node: onnx.NodeProto, attributes: Attributes) -> None:
    g.product(node.op_type, *node.input, out=node.output[0], **attributes)


EXPANSIONS: Mapping[str, Expansion] = {
    "Conv": _product,
    "ConvTranspose": _product,
    "DynamicQuantizeMatMul": _dynamic_quantize_mat_mul,
    "FusedMatMul": _fused_mat_mul,
    "GroupQueryAttention": _group_query_attention,
    "MatMul": _product,
    "MatMulNBits": _mat_mul_n_bits,
    "MultiHeadAttention": _multi_head_attention,
    "QuickGelu": _quick_gelu,
    "RotaryEmbedding": _rotary_embedding,
    "SimplifiedLayerNormalization": _simplified_layer_normalization,
    "SkipLayerNormalization": _skip_layer_normalization,
    "SkipSimplifiedLayerNormalization": _skip_simplified_layer_normalization,
}
"""What replaces a node, by its operator."""
