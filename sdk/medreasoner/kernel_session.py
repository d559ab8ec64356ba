"""Sessions in the place of a graph that a kernel of ours runs without ONNX Runtime."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from medreasoner import ops
from medreasoner._text import one_line
from medreasoner.errors import ProviderError
from medreasoner.kernel_spec import DrawingSpec, ImageTowerSpec, TowerSpec
from medreasoner.providers import CPU
from medreasoner.session import Buffer

__all__ = ["HostBuffer", "KernelSession", "ReadingSession", "multiplies_integers", "running", "runs_without_graph"]

Kernel = TypeVar("Kernel")


def runs_without_graph(weights: TowerSpec | ImageTowerSpec | DrawingSpec | None) -> bool:
    """Whether a bundle wants a kernel in a graph's place, and this processor has instructions for its products."""
    if weights is None or weights.products == "float":
        return False
    return multiplies_integers(weights) or ops.tile_road() in ("avx512-bf16", "amx-bf16")


def multiplies_integers(weights: TowerSpec | ImageTowerSpec | DrawingSpec) -> bool:
    """Whether a kernel's products are in eight bits here: where that was allowed, and no tiles do bfloat16 as fast."""
    return weights.products == "int8" and ops.has_tiles() and ops.tile_road() != "amx-bf16"


@contextmanager
def running(kernel: str) -> Iterator[None]:
    """Inputs that a kernel refuses while it runs become a `ProviderError` that names it."""
    try:
        yield
    except (ValueError, TypeError) as err:
        raise ProviderError(f"{kernel}'s kernel failed: {one_line(err)}") from err


class HostBuffer:
    """Keys or values in ordinary memory: a `Buffer`."""

    def __init__(self, host: NDArray[Any]) -> None:
        self.host = host

    def rows(self, start: int, stop: int) -> "HostBuffer":
        """Some rows of the same memory."""
        return HostBuffer(self.host[start:stop])

    def save(self, n_positions: int) -> NDArray[Any]:
        """Copy of the leading positions."""
        return self.host[:, :, :n_positions].copy()

    def restore(self, saved: NDArray[Any]) -> None:
        """Write saved positions back."""
        self.host[:, :, : saved.shape[2]] = saved


class KernelSession:
    """What `Session` asks for beside a run, on the CPU; a run keeps nothing, so that any thread may start one.

    `products`: the numbers that it multiplies, ``"bfloat16"`` or ``"int8"``.
    """

    providers = (CPU,)
    products = "bfloat16"
    max_rows = None
    cuts_rows = False

    def element_type(self, name: str) -> type[np.generic]:
        """Of a graph input."""
        return np.float32

    def allocate(self, shape: tuple[int, ...], dtype: type[np.generic]) -> HostBuffer:
        """Zeroed buffer."""
        return HostBuffer(np.zeros(shape, dtype))

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Self:
        """Itself."""
        return self

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The graph's outputs."""
        raise NotImplementedError


class ReadingSession(KernelSession, Generic[Kernel]):
    """A kernel that reads images, for any number of threads; with `alone`, each keeps to its own core."""

    def __init__(self, kernel: Kernel, *, products: str, alone: bool = False) -> None:
        self._kernel, self._alone, self.products = kernel, alone, products

    def alone(self) -> Self:
        """The same weights for callers that run side by side."""
        return type(self)(self._kernel, products=self.products, alone=True)
