"""A graph of standard operators over the weights of a finished one: what rewrites a graph writes into this."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from medreasoner_export.graph import FLOAT, GraphBuilder, WeightsFile
from medreasoner_export.stored import StoredWeights

__all__ = ["StandardGraph"]

# Weights of products that stay in float32: a point's place in the image would move by half a pixel.
EXACT = ("frequencies",)
LEVELS = 127  # of int8 at each side of zero


class StandardGraph(GraphBuilder):
    """A graph of standard operators over the weights of another one.

    Parameters
    ----------
    name
        Of the graph.
    stored
        Weights, taken by name when a node first wants them.
    half
        Compute products (MatMul, Conv) in float16 and all else in float32.
    ranges
        Largest absolute values of tensors whose products with weights are computed in int8, by name.
    head_dim
        Of rotary positions.
    outside
        File for the weights; None: they stay in the graph.
    """

    def __init__(
        self,
        name: str,
        stored: StoredWeights,
        *,
        half: bool,
        head_dim: int,
        ranges: Mapping[str, float] | None = None,
        outside: WeightsFile | None = None,
    ) -> None:
        super().__init__(name, outside=outside)
        self.stored, self.is_half, self.head_dim, self.ranges = stored, half, head_dim, ranges or {}
        self._halves: dict[str, str] = {}  # float16 twins of tensors
        self._once: dict[tuple[str, ...], str] = {}

    def fresh(self, kind: str) -> str:
        """A tensor name that is used neither here nor in the graph that is rewritten."""
        return "std_" + super().fresh(kind)

    def copy(self, node: onnx.NodeProto, inputs: Sequence[str]) -> None:
        """Append a node of another graph, with other inputs."""
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.ClearField("input")
        copied.input.extend(inputs)
        self._nodes.append(copied)

    def has_initializer(self, name: str) -> bool:
        """Whether a constant or a weight has this name."""
        return name in self._initializers

    def read(self, name: str) -> str:
        """`name`, with the weight of that name put into the graph."""
        if name in self.stored and not self.has_initializer(name):
            self.keep(name, self.stored.array(name))
        return name

    def half(self, name: str) -> str:
        """The tensor in float16, which is itself where products are computed in float32."""
        if not self.is_half:
            return self.read(name)
        if name not in self._halves:
            if name in self.stored:
                self._halves[name] = twin = f"{name}.float16"
                self.keep(twin, self.stored.half(name))
            else:
                self._halves[name] = self.op("Cast", name, to=TensorProto.FLOAT16)
        return self._halves[name]

    def product(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        """A node in the precision of products; its output is float32, with a float16 twin for the next product."""
        x, weight = inputs[:2]
        if kind == "MatMul" and x in self.ranges and self.stored.is_matrix(weight):
            return self.op("MatMul", self.once(("int8", x), lambda: self._rounded(x)), self._levels(weight), out=out)
        if not self.is_half:
            return self.op(kind, *(self.read(each) for each in inputs), out=out, **attributes)
        if weight in EXACT:  # without a product in float32, which not every architecture has
            terms = self.op("Mul", self.op("Unsqueeze", x, self.ints(-1)), self.read(weight))
            return self.op("ReduceSum", terms, self.ints(-2), out=out, keepdims=0)
        twin = self.op(kind, *(self.half(each) for each in inputs), **attributes)
        result = self.op("Cast", twin, out=out, to=FLOAT)
        self._halves[result] = twin
        return result

    def _rounded(self, x: str) -> str:
        """A tensor through int8 and back, as a mark for the builder of the engine."""
        scale = self.number((self.ranges[x] or 1.0) / LEVELS)
        zero = self.constant("std_zero", np.array(0, np.int8))
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, scale, zero), scale, zero)

    def _levels(self, weight: str) -> str:
        """A matrix (in, out) in int8, each column with its scale."""
        array = self.stored.array(weight)
        scale = np.abs(array).max(axis=0) / np.float32(LEVELS)
        scale = np.where(scale > 0, scale, np.float32(1))
        self.keep(f"{weight}.int8", np.rint(array / scale).astype(np.int8))
        self.keep(f"{weight}.scale", scale)
        return self.op("DequantizeLinear", f"{weight}.int8", f"{weight}.scale", axis=1)

    def once(self, key: tuple[str, ...], make: Callable[[], str]) -> str:
        """What `make` made the first time that it was asked for with this key."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def number(self, value: float) -> str:
        """A float32 constant."""
        return self.constant(f"std_number_{value!r}", np.array(value, np.float32))

    def heads(self, x: str, shape: tuple[int, int], perm: Sequence[int]) -> str:
        """(B, T, heads * D) as (B, T, heads, D), transposed; `shape` is (heads, D)."""
        return self.op("Transpose", self.op("Reshape", x, self.ints(0, 0, *shape)), perm=list(perm))

    def is_product(self, name: str) -> None:
        """Note that a tensor has the element type of products already."""
        self._halves[name] = name

    def attention(self, q: str, k: str, v: str, bias: str, *, out: str | None = None) -> str:
        """``softmax(q @ k + bias) @ v``; `k` is transposed already, and without a bias the name is empty."""
        scores = self.product("MatMul", q, k)
        if bias:
            scores = self.op("Add", scores, bias)
        return self.product("MatMul", self.op("Softmax", scores, axis=-1), v, out=out)
