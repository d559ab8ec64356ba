"""A decoder whose key-value buffer has one size, driven as ONNX Runtime's decoder is.

ONNX Runtime's attention counts the tokens in a buffer. An engine of TensorRT is told instead where in the buffer each
new token goes, and which places each token may look at. `StaticDecoder` works both out, so that nothing above it knows
which of the two it drives.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from medreasoner.session import Binding, Buffer, Session

__all__ = ["StaticDecoder", "static_places"]

Array: TypeAlias = NDArray[Any]


def static_places(before: NDArray[np.int64], n_new: int, capacity: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where new tokens go in a buffer, and what they may look at: what came before them, and themselves.

    Parameters
    ----------
    before
        (batch,) int64 tokens of each row in its buffer.
    n_new
        New tokens of each row.
    capacity
        Places in the buffer.

    Returns
    -------
    write_positions : (batch, n_new) int64
    attention_mask : (batch, n_new, capacity) bool

    Examples
    --------
    >>> places, mask = static_places(np.array([2]), 2, 5)
    >>> places.tolist(), mask.astype(int).tolist()
    ([[2, 3]], [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]])
    """
    places = before[:, None] + np.arange(n_new)
    return places, np.arange(capacity) <= places[..., None]


class StaticDecoder:
    """A `Session` of a decoder with a static buffer that takes the inputs of ONNX Runtime's decoder.

    Parameters
    ----------
    session
        Of the graph in TensorRT's dialect.
    capacity
        Places in a buffer.
    chunk
        Tokens of one row that it takes in a run; more go in several. Several rows take one token a run.
    dtype
        Of the buffers.
    """

    def __init__(self, session: Session, *, capacity: int, chunk: int, dtype: type[np.generic]) -> None:
        self._session, self._capacity, self._chunk, self._dtype = session, capacity, chunk, dtype

    @property
    def providers(self) -> tuple[str, ...]:
        """Those of the session below."""
        return self._session.providers

    @property
    def max_rows(self) -> int | None:
        """Those of the session below."""
        return self._session.max_rows

    @property
    def cuts_rows(self) -> bool:
        """As the session below has it."""
        return self._session.cuts_rows

    def element_type(self, name: str) -> type[np.generic]:
        """Of the buffers."""
        return self._dtype

    def allocate(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Buffer:
        """Zeroed buffer in the element type of the engine."""
        return self._session.allocate(shape, self._dtype)

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> "StaticBinding":
        """Run state whose keys and values stay in these buffers."""
        return StaticBinding(self._session.bind(inputs, outputs), capacity=self._capacity, chunk=self._chunk)


class StaticBinding:
    """One user's state of a `StaticDecoder`."""

    def __init__(self, binding: Binding, *, capacity: int, chunk: int) -> None:
        self._binding, self._capacity, self._chunk = binding, capacity, chunk

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Hidden states of new tokens, chunk by chunk."""
        embeds, ids = inputs["inputs_embeds"], inputs["rotary_ids"]
        batch, n, _ = embeds.shape
        tables = {name: inputs[name][ids] for name in ("rotary_cos", "rotary_sin")}  # (batch, n, head_dim / 2)
        # Rows that are shorter than the prompt they are read with are padded at the right.
        before = np.maximum(inputs["seqlens_k"].astype(np.int64) + 1 - n, 0)
        chunk = self._chunk if batch == 1 else 1
        states = []
        for start in range(0, n, chunk):
            part = slice(start, min(start + chunk, n))
            places, mask = static_places(before + start, part.stop - start, self._capacity)
            run = {name: table[:, part] for name, table in tables.items()}
            run |= {"inputs_embeds": embeds[:, part], "write_positions": places, "attention_mask": mask}
            states.append(self._binding.run(run)["hidden_states"])
        return {"hidden_states": states[0] if len(states) == 1 else np.concatenate(states, axis=1)}
