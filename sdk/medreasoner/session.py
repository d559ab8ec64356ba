"""What the runtime asks of whatever runs a graph: ONNX Runtime, an engine, or a stand-in in a test."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Binding", "Buffer", "Session"]

Array: TypeAlias = NDArray[Any]


class Buffer(Protocol):
    """Keys or values (rows, n_kv_heads, capacity, head_dim) that live on the session's device from run to run."""

    @property
    def host(self) -> Array | None:
        """An array that shares its memory; None where that is a device's."""
        ...

    def rows(self, start: int, stop: int) -> "Buffer":
        """Some rows of the same memory; only where the session `cuts_rows`."""
        ...

    def save(self, n_positions: int) -> Array:
        """Copy (rows, n_kv_heads, n_positions, head_dim) of the leading positions, on the host."""
        ...

    def restore(self, saved: Array) -> None:
        """Write saved positions back, to the same places; the others become undefined."""
        ...


class Session(Protocol):
    """A graph that is ready to run on one device."""

    @property
    def providers(self) -> tuple[str, ...]:
        """Execution providers that the graph really runs on, the first preferred."""
        ...

    @property
    def max_rows(self) -> int | None:
        """Most images or sequences in a run; None if any number will do."""
        ...

    @property
    def cuts_rows(self) -> bool:
        """Whether a run may have some rows of a buffer only, so that several sequences go in one run."""
        ...

    def element_type(self, name: str) -> type[np.generic]:
        """Of a graph input, such as a key-value cache, which may be of half precision."""
        ...

    def allocate(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Buffer:
        """Zeroed buffer on the session's device."""
        ...

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> "Binding":
        """Run state whose named inputs and outputs stay in these buffers; one thread at a time may use it."""
        ...


class Binding(Protocol):
    """One user's state of a session."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs, on the host, that are not bound to buffers; `inputs` are those that are not bound."""
        ...
