"""Weights in the file beside a graph, in the order in which the exporter wrote them: for kernels that need no graph."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medreasoner.errors import BundleError

__all__ = ["StoredTensor", "check_size", "stored_tensors"]

_ALIGNMENT = 4096  # of every tensor in the file


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A place in the file; of a vector, or a part of a matrix."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int

    @property
    def is_vector(self) -> bool:
        """Whether it is a bias or a norm."""
        return len(self.shape) == 1

    @property
    def end(self) -> int:
        """Where it ends, bytes."""
        return self.start + int(np.prod(self.shape)) * self.dtype.itemsize

    def view(self, content: NDArray[np.uint8]) -> NDArray[Any]:
        """Its numbers in the file's content."""
        return content[self.start : self.end].view(self.dtype).reshape(self.shape)

    def vector(self, content: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The same as float32, a copy."""
        return self.view(content).astype(np.float32)


def stored_tensors(weights: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[StoredTensor]:
    """Places of weights with these names, types and shapes, in this order."""
    found: list[StoredTensor] = []
    end = 0
    for name, dtype, shape in weights:
        found.append(StoredTensor(name, np.dtype(dtype), shape, -(-end // _ALIGNMENT) * _ALIGNMENT))
        end = found[-1].end
    return found


def check_size(path: Path, name: str, tensors: Sequence[StoredTensor]) -> None:
    """Refuse a file that is not of the size of its tensors.

    Raises
    ------
    BundleError
        If it is not; the message says `name`.
    """
    end, found = tensors[-1].end, path.stat().st_size
    if end > found:
        raise BundleError(f"{name}: {found} bytes are fewer than its weights have; export it again")
    if end != found:
        raise BundleError(f"{name}: {found} bytes, expected {end}; export it again")
