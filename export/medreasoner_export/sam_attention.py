"""Attention between the few tokens of a prompt and the many places of an image, with few products over the places.

A head's scores are ``(x Wq + bq) (p Wk + bk)^T`` of a token x and a place p. Read from the left, ``(x Wq + bq) Wk^T``
is a query as deep as the image, and no place needs a key of its own; what ``bk`` adds is the same for all places, which
a softmax over them does not see. The other matrices of the image's side go the same way: ``softmax (p Wv) = (softmax p)
Wv``. With T tokens and H heads a place takes ``2 H T C`` products instead of ``2 C D + 2 T D``: at the usual 9 tokens
a half of SAM's, and as many only with 17. Nothing of a place is transposed, and what prompts share is read as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medreasoner_export.graph import GraphBuilder

__all__ = ["ImageAttention"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageAttention:
    """One attention's weights, and the steps of both directions.

    Attributes
    ----------
    g
        The graph.
    tensor
        Reads a tensor by its name and shape.
    name
        Of the attention, with a dot at the end.
    out
        Name in it of the last matrix.
    channels, inner, heads
        Depth of tokens and places, that of all heads together, and how many these are.
    by_head
        Shape (4,) int64 of (batch, T, heads, depth of a head), which the rows of all tokens take.
    """

    g: GraphBuilder
    tensor: Callable[..., npt.NDArray[Any]]
    name: str
    out: str
    channels: int
    inner: int
    heads: int
    by_head: str

    @property
    def size(self) -> int:
        """Depth of a head."""
        return self.inner // self.heads

    def from_tokens(self, queries: str, keys: str, values: str) -> str:
        """Tokens (batch * T, C) look at keys and values (1 or batch, places, C): to (batch * T, C)."""
        g = self.g
        q = g.op("Add", self._project(queries, "q_proj"), g.weight(*self._vector("q_proj", self.inner)))
        q = self._deepened(self._by_head(q), "k_proj", self._matrix("k_proj"))
        self._vector("k_proj", self.inner)  # only checked: it changes no softmax
        scores = g.op("com.microsoft.FusedMatMul", q, keys, transB=1, alpha=self.size**-0.5)  # (batch, H * T, places)
        seen = g.op("MatMul", g.op("Softmax", scores, axis=-1), values)  # (batch, H * T, C)
        narrow = self._matrix("v_proj").reshape(self.heads, self.size, -1).transpose(0, 2, 1)
        seen = g.op("Reshape", seen, g.ints(0, self.heads, -1, self.channels))
        seen = g.op("MatMul", seen, g.weight(f"{self.name}v_proj.weight", narrow))  # (batch, H, T, size)
        seen = g.op("Reshape", g.op("Transpose", seen, perm=[0, 2, 1, 3]), g.ints(-1, self.inner))
        last = self.tensor(f"{self.name}{self.out}.weight", self.channels, self.inner)
        _, bias = self._vector(self.out, self.channels)
        # The shares of a softmax make 1, so that the values' bias arrives whole.
        through = bias + _exact(last) @ self._vector("v_proj", self.inner)[1]
        return g.linear(seen, self.name + self.out, last, through.astype(np.float32))

    def from_places(self, queries: str, keys: str, values: str) -> str:
        """Places (1 or batch, places, C) look at tokens, keys and values (batch * T, C): to (batch, places, C)."""
        g, heads = self.g, self.heads
        k = g.op("Add", self._project(keys, "k_proj"), g.weight(*self._vector("k_proj", self.inner)))
        k = self._by_head(k)
        deep = self._deepened(k, "q_proj", self._matrix("q_proj"))
        alpha = self.size**-0.5
        own = (alpha * self._vector("q_proj", self.inner)[1]).reshape(heads, self.size, 1)
        own_name = g.weight(f"{self.name}q_proj.scores", own.astype(np.float32), exact=True)
        own_scores = g.op("Reshape", g.op("MatMul", k, own_name), g.ints(0, 1, -1))  # (batch, 1, H * T)
        scores = g.op("com.microsoft.FusedMatMul", queries, deep, transB=1, alpha=alpha)  # (batch, places, H * T)
        scores = g.op("Reshape", g.op("Add", scores, own_scores), g.ints(0, 0, heads, -1))
        shares = g.op("Reshape", g.op("Softmax", scores, axis=-1), g.ints(0, 0, -1))
        last = self.tensor(f"{self.name}{self.out}.weight", self.channels, self.inner).T
        split = _exact(last).reshape(heads, self.size, -1)
        biases = self._vector("v_proj", self.inner)[1].reshape(heads, 1, self.size) @ split
        biases = (biases + self._vector(self.out, self.channels)[1] / heads).astype(np.float32)  # (H, 1, C)
        v = self._deepened(self._by_head(self._project(values, "v_proj")), self.out, last, biases)
        return g.op("MatMul", shares, v)

    def _vector(self, part: str, size: int) -> tuple[str, npt.NDArray[np.float64]]:
        """Name and values of a bias."""
        name = f"{self.name}{part}.bias"
        return name, _exact(self.tensor(name, size))

    def _matrix(self, part: str) -> npt.NDArray[Any]:
        return self.tensor(f"{self.name}{part}.weight", self.inner, self.channels)

    def _project(self, x: str, part: str) -> str:
        """Rows (.., C) to (.., D), without the bias."""
        return self.g.linear(x, self.name + part, self._matrix(part))

    def _by_head(self, x: str) -> str:
        """(batch * T, D) to (batch, H, T, size)."""
        return self.g.op("Transpose", self.g.op("Reshape", x, self.by_head), perm=[0, 2, 1, 3])

    def _deepened(self, x: str, part: str, matrix: npt.NDArray[Any], bias: npt.NDArray[Any] | None = None) -> str:
        """Heads (batch, H, T, size) times their rows of a matrix to (batch, H * T, C)."""
        g = self.g
        split = matrix.reshape(self.heads, self.size, -1)
        y = g.op("MatMul", x, g.weight(f"{self.name}{part}.weight", split))
        if bias is not None:
            y = g.op("Add", y, g.weight(f"{self.name}{part}.bias", bias, exact=True))
        return g.op("Reshape", y, g.ints(0, -1, self.channels))


def _exact(array: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """For products of weights with each other."""
    return array.astype(np.float64)
