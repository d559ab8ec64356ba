"""The embedding matrix and the language head, which stay outside the graphs: looked up and projected row by row."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medreasoner import ops
from medreasoner.errors import BundleError
from medreasoner.spec import WeightDtype, WeightSpec

__all__ = ["STORED", "LanguageHead", "WeightMatrix", "load_weight"]

STORED: Mapping[WeightDtype, str] = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
"""NumPy's type of a weight in a file; bfloat16 is read as its bit patterns."""


class LanguageHead(Protocol):
    """What turns a hidden state into logits."""

    def logits(self, hidden: NDArray[np.float32], rows: NDArray[np.int32] | None = None) -> NDArray[np.float32]:
        """Logits of some tokens, or of all, for one hidden state (hidden_dim,)."""
        ...

    def likeliest(self, hidden: NDArray[np.float32], rows: NDArray[np.int32]) -> int:
        """Token of the largest logit among `rows`, the first of equals."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMatrix:
    """A matrix (vocab_size, hidden_dim); bfloat16 is held as uint16 patterns. `n_threads` share a large one's rows."""

    values: NDArray[Any] = field(repr=False)
    dtype: WeightDtype
    n_threads: int = 1

    def embed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n,) token ids as (n, hidden_dim) float32."""
        return ops.gather_rows(self.values, self.dtype, ids)

    def logits(self, hidden: NDArray[np.float32], rows: NDArray[np.int32] | None = None) -> NDArray[np.float32]:
        """Logits of some tokens, or of all, for one hidden state (hidden_dim,)."""
        return ops.project_rows(hidden, self.values, self.dtype, rows, n_threads=self.n_threads)

    def likeliest(self, hidden: NDArray[np.float32], rows: NDArray[np.int32]) -> int:
        """Token of the largest logit among `rows`, the first of equals.

        Raises
        ------
        ArrayError
            If a logit is not finite.
        """
        return ops.select_token(hidden, self.values, self.dtype, rows)[0]


def load_weight(path: Path, spec: WeightSpec, *, n_threads: int = 1) -> WeightMatrix:
    """Matrix mapped from its file, so that only the rows in use come into memory.

    Raises
    ------
    BundleError
        If the file's size is not that of the matrix.
    """
    dtype = np.dtype(STORED[spec.dtype])
    expected = spec.shape[0] * spec.shape[1] * dtype.itemsize
    if path.stat().st_size != expected:
        raise BundleError(
            f"{spec.file}: {path.stat().st_size} bytes, expected {expected} for {spec.dtype} {spec.shape}"
        )
    return WeightMatrix(
        values=np.memmap(path, dtype, mode="r", shape=spec.shape), dtype=spec.dtype, n_threads=n_threads
    )
