"""The decoder graph with its key-value caches: embeddings in, hidden states out."""

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medreasoner.errors import GenerationError
from medreasoner.ops import DecoderStep
from medreasoner.reasoner.rotary import rotary_tables
from medreasoner.reasoner.step import MAX_TOKENS
from medreasoner.session import Buffer, Session
from medreasoner.spec import ReasonerSpec

__all__ = ["Decoder", "KvCache", "SavedPrefix"]

_MAX_IDLE_CACHES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedPrefix:
    """Keys and values of the first tokens of a prompt, by graph input: (1, n_kv_heads, length, head_dim), in the
    precision of the graph.
    """

    rows: dict[str, NDArray[np.floating]] = field(repr=False)
    length: int


class KvCache:
    """One sequence's keys and values, in buffers of the decoder's full length.

    The graph reads and writes the same buffers, so a step copies nothing. Positions beyond `length` hold whatever an
    earlier sequence left; the graph does not look at them. `sequence` runs steps on them, where there is a `step` and
    the buffers are in reach.
    """

    def __init__(self, session: Session, spec: ReasonerSpec, step: DecoderStep | None) -> None:
        shape = (1, spec.n_kv_heads, spec.max_length, spec.head_dim)
        names = [f"{kind}.{layer}" for layer in range(spec.n_layers) for kind in ("key", "value")]
        dtype = session.element_type(f"past_{names[0]}")
        self._buffers: dict[str, Buffer] = {f"past_{name}": session.allocate(shape, dtype) for name in names}
        self.binding = session.bind(
            inputs=self._buffers, outputs={f"present_{name}": self._buffers[f"past_{name}"] for name in names}
        )
        hosts = [buffer.host for buffer in self._buffers.values() if buffer.host is not None]
        in_reach = len(hosts) == len(self._buffers)
        self.sequence = step.open(hosts[::2], hosts[1::2]) if step is not None and in_reach else None
        self.length = 0

    def save(self) -> SavedPrefix:
        """Copy of everything up to `length`."""
        rows = {name: buffer.save(self.length) for name, buffer in self._buffers.items()}
        return SavedPrefix(rows=rows, length=self.length)

    def restore(self, prefix: SavedPrefix, length: int) -> None:
        """Begin with the first `length` positions of a saved prefix."""
        for name, buffer in self._buffers.items():
            buffer.restore(prefix.rows[name][:, :, :length])
        self.length = length


class Decoder:
    """Runs tokens of one sequence at a time; safe to share between threads, each with its own cache.

    Parameters
    ----------
    session
        Of the decoder graph.
    spec
        Sizes and limits.
    step
        What takes a few tokens in the graph's place, on the CPU.
    """

    def __init__(self, session: Session, spec: ReasonerSpec, step: DecoderStep | None = None) -> None:
        self._session, self._spec, self._step = session, spec, step
        self._lock = threading.Lock()  # one run at a time: two would only take the cores from each other
        self._idle: list[KvCache] = []

    def open_cache(self) -> KvCache:
        """Empty cache; give it back with `close_cache`."""
        try:
            cache = self._idle.pop()
        except IndexError:
            return KvCache(self._session, self._spec, self._step)
        cache.length = 0
        return cache

    def close_cache(self, cache: KvCache) -> None:
        """Take a cache back for the next sequence."""
        if len(self._idle) < _MAX_IDLE_CACHES:
            self._idle.append(cache)

    def run(self, cache: KvCache, embeds: NDArray[np.float32], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append tokens to a sequence.

        Parameters
        ----------
        cache
            The sequence so far.
        embeds
            (n, hidden_dim) float32.
        positions
            (3, n) int64.

        Returns
        -------
        NDArray[np.float32]
            (n, hidden_dim) hidden states of these tokens after the final norm.

        Raises
        ------
        GenerationError
            If the sequence does not fit the cache.
        """
        n, spec = len(embeds), self._spec
        total = cache.length + n
        if total > spec.max_length:
            raise GenerationError(
                f"{total} tokens do not fit the model's {spec.max_length}; use a smaller image or query"
            )
        cos, sin = rotary_tables(positions, head_dim=spec.head_dim, theta=spec.rope_theta, sections=spec.mrope_section)
        if cache.sequence is not None and n <= MAX_TOKENS:
            with self._lock:
                states = cache.sequence.run(embeds, cos, sin, cache.length)
            cache.length = total
            return states
        inputs: dict[str, NDArray[Any]] = {
            "inputs_embeds": embeds[None],  # (1, n, hidden_dim)
            "rotary_cos": cos,
            "rotary_sin": sin,
            "rotary_ids": np.arange(n)[None],
            "seqlens_k": np.array([total - 1], np.int32),
            "total_sequence_length": np.array(total, np.int32),
        }
        with self._lock:
            hidden = cache.binding.run(inputs)["hidden_states"]
        cache.length = total
        return np.asarray(hidden[0], np.float32)
