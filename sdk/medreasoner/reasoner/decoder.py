"""The decoder with its key-value caches: embeddings in, hidden states out, for several sequences at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medreasoner import ops
from medreasoner.errors import GenerationError
from medreasoner.reasoner.rotary import rotary_tables, text_positions
from medreasoner.reasoner.step import StepKernel
from medreasoner.session import Binding, Buffer, Session
from medreasoner.spec import ReasonerSpec

__all__ = ["Decoder", "KvCache", "SavedPrefix", "Step", "slots_that_fit"]

Array = NDArray[np.float32]

_MOST_SLOTS = 8
_SLOT_BYTES = 2 * 2**30  # of all slots together, unless one alone needs more


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SavedPrefix:
    """Keys and values of the first tokens of a prompt, by graph input: (1, n_kv_heads, length, head_dim), in the
    precision of the graph.
    """

    rows: dict[str, NDArray[np.floating]] = field(repr=False)
    length: int
    key: object = field(default_factory=object, repr=False)
    """By which a slot remembers what it holds, without keeping it alive."""

    @property
    def n_bytes(self) -> int:
        """Memory that it takes."""
        return sum(rows.nbytes for rows in self.rows.values())


@dataclass(frozen=True, slots=True)
class Step:
    """New tokens of a sequence: `embeds` (n, hidden_dim), and their rotary tables `cos` and `sin` (n, head_dim / 2).

    Hidden states are asked for of the last `n_out` of them.
    """

    cache: "KvCache"
    embeds: Array
    cos: Array
    sin: Array
    n_out: int

    def part(self, start: int, stop: int) -> "Step":
        """Some of its tokens."""
        at, behind = slice(start, stop), len(self.embeds) - stop
        n_out = min(stop - start, max(0, self.n_out - behind))
        return Step(self.cache, self.embeds[at], self.cos[at], self.sin[at], n_out)


def slots_that_fit(spec: ReasonerSpec, itemsize: int) -> int:
    """How many sequences are kept at once if nobody says: up to eight, as long as their caches stay below 2 GiB."""
    each = 2 * spec.n_layers * spec.n_kv_heads * spec.max_length * spec.head_dim * itemsize
    return max(1, min(_MOST_SLOTS, _SLOT_BYTES // each))


class KvCache:
    """One sequence's keys and values: a slot of the decoder's buffers, of the decoder's full length.

    The graph reads and writes the same buffers, so a step copies nothing. Positions beyond `length` hold whatever an
    earlier sequence left; the graph does not look at them. `sequence` runs steps on them, where there is a kernel for
    that and the buffers are in reach.
    """

    def __init__(self, index: int, session: Session, buffers: dict[str, Buffer], step: StepKernel | None) -> None:
        self.index = index
        self._buffers = buffers
        self.binding = _bound(session, buffers)
        hosts = [buffer.host for buffer in buffers.values() if buffer.host is not None]
        in_reach = len(hosts) == len(buffers)
        self.sequence = step.decoder.open(hosts[::2], hosts[1::2]) if step is not None and in_reach else None
        self.length = 0
        self.holds: object = None  # the key of what its first positions still are

    def save(self) -> SavedPrefix:
        """Copy of everything up to `length`."""
        rows = {name: buffer.save(self.length) for name, buffer in self._buffers.items()}
        saved = SavedPrefix(rows=rows, length=self.length)
        self.holds = saved.key
        return saved

    def restore(self, prefix: SavedPrefix, length: int) -> None:
        """Begin with the first `length` positions of a saved prefix; nothing is copied if they are still there."""
        if self.holds is not prefix.key:
            for name, buffer in self._buffers.items():
                buffer.restore(prefix.rows[name])
        self.holds = prefix.key if length == prefix.length else None  # what is cut off will be written over
        self.length = length


def _bound(session: Session, buffers: dict[str, Buffer]) -> Binding:
    return session.bind(
        inputs={f"past_{name}": buffer for name, buffer in buffers.items()},
        outputs={f"present_{name}": buffer for name, buffer in buffers.items()},
    )


class Decoder:
    """Runs tokens of one or more sequences; used by one thread at a time.

    Parameters
    ----------
    session
        Of the decoder graph.
    spec
        Sizes and limits.
    step
        What takes a few tokens in the graph's place, on the CPU.
    n_slots
        Sequences that are kept at once; None: as many as `slots_that_fit`.
    """

    def __init__(
        self, session: Session, spec: ReasonerSpec, step: StepKernel | None = None, *, n_slots: int | None = None
    ) -> None:
        self._session, self._spec, self._step = session, spec, step
        names = [f"{kind}.{layer}" for layer in range(spec.n_layers) for kind in ("key", "value")]
        self._names, self._dtype = names, session.element_type(f"past_{names[0]}")
        self.n_slots = n_slots or slots_that_fit(spec, np.dtype(self._dtype).itemsize)
        self._buffers: dict[str, Buffer] = {}  # of all slots, once there is one
        self._slots: list[KvCache] = []
        self._free: list[int] = []
        self._batches: dict[int, Binding] = {}
        # Text tokens have the same position in all three directions.
        positions = text_positions(0, spec.max_length)
        self._cos, self._sin = self._tables(positions)

    @property
    def kernel_limit(self) -> int:
        """Most tokens of one sequence that are run without the graph at once."""
        return 0 if self._step is None else self._step.max_tokens

    def _allocate(self, n_rows: int) -> dict[str, Buffer]:
        spec = self._spec
        shape = (n_rows, spec.n_kv_heads, spec.max_length, spec.head_dim)
        return {name: self._session.allocate(shape, self._dtype) for name in self._names}

    def _tables(self, positions: NDArray[np.int64]) -> tuple[Array, Array]:
        spec = self._spec
        return rotary_tables(positions, head_dim=spec.head_dim, theta=spec.rope_theta, sections=spec.mrope_section)

    @property
    def has_free_slot(self) -> bool:
        """Whether `open_cache` has one to give."""
        return bool(self._free) or len(self._slots) < self.n_slots

    def open_cache(self, prefix: SavedPrefix | None = None) -> KvCache:
        """A slot, if possible one that still holds this prefix; give it back with `close_cache`.

        The first free ones are taken, since a run of several sequences covers all slots up to the last in use.

        Raises
        ------
        GenerationError
            If all are in use.
        """
        held = [index for index in self._free if self._slots[index].holds is prefix.key] if prefix is not None else []
        fresh = [index for index in self._free if self._slots[index].holds is None]
        if held:
            index = min(held)
        elif not fresh and len(self._slots) < self.n_slots:
            return self._new_slot()
        elif self._free:
            index = min(fresh or self._free)
        else:
            raise GenerationError(f"all {self.n_slots} sequences are in use")
        self._free.remove(index)
        return self._slots[index]

    def _new_slot(self) -> KvCache:
        index = len(self._slots)
        if self._session.cuts_rows:
            self._buffers = self._buffers or self._allocate(self.n_slots)
            buffers = {name: buffer.rows(index, index + 1) for name, buffer in self._buffers.items()}
        else:
            buffers = self._allocate(1)
        self._slots.append(KvCache(index, self._session, buffers, self._step))
        return self._slots[index]

    def close_cache(self, cache: KvCache) -> None:
        """Take a slot back for the next sequence."""
        self._free.append(cache.index)

    @property
    def text_tables(self) -> tuple[Array, Array]:
        """(max_length, head_dim / 2) cosines and sines of text by position."""
        return self._cos, self._sin

    def step(self, cache: KvCache, embeds: Array, positions: NDArray[np.int64], n_out: int | None = None) -> Step:
        """Tokens (n, hidden_dim) at the positions (3, n), to be appended to a sequence.

        Hidden states are asked for of the last `n_out` of them, None: of all.

        Raises
        ------
        GenerationError
            If the sequence does not fit the cache.
        """
        self._check(cache, len(embeds))
        return Step(cache, embeds, *self._tables(positions), len(embeds) if n_out is None else n_out)

    def text_step(self, cache: KvCache, embeds: Array, position: int, n_out: int | None = None) -> Step:
        """The same for text, whose first token is at `position`."""
        n = len(embeds)
        self._check(cache, n)
        at = slice(position, position + n)
        if at.stop > len(self._cos):  # a position may run ahead of the number of tokens
            return self.step(cache, embeds, text_positions(position, n), n_out)
        return Step(cache, embeds, self._cos[at], self._sin[at], n if n_out is None else n_out)

    def _check(self, cache: KvCache, n: int) -> None:
        total = cache.length + n
        if total > self._spec.max_length:
            raise GenerationError(
                f"{total} tokens do not fit the model's {self._spec.max_length}; use a smaller image or query"
            )

    def run(self, steps: Sequence[Step]) -> list[Array]:
        """Append tokens to sequences, each of which is there once.

        Returns
        -------
        list of NDArray[np.float32]
            Of each step (n_out, hidden_dim) hidden states of its last tokens after the final norm.
        """
        short, single, alone = [], [], []
        for index, step in enumerate(steps):
            n = len(step.embeds)
            if self._step is not None and step.cache.sequence is not None and n <= self._step.max_tokens:
                short.append(index)
            elif n == 1 and self._session.cuts_rows:
                single.append(index)
            else:
                alone.append(index)
        if len(single) == 1:
            alone += single
            single = []
        results: dict[int, Array] = {}
        # A run of several slots writes behind those in between: before anything new is there.
        for indices, call in ((single, self._run_batch), (short, self._run_short)):
            if indices:
                results |= zip(indices, call([steps[index] for index in indices]), strict=True)
        for index in alone:
            results[index] = self._run_alone(steps[index])
        for step in steps:
            step.cache.length += len(step.embeds)
        return [results[index] for index in range(len(steps))]

    def _run_short(self, steps: Sequence[Step]) -> list[Array]:
        """All in one call of the kernel, which gives each what it would get alone."""
        counts, n_out = [len(step.embeds) for step in steps], [step.n_out for step in steps]
        embeds, cos, sin = _joined(steps) if len(steps) > 1 else (steps[0].embeds, steps[0].cos, steps[0].sin)
        states = ops.decoder_step(
            [step.cache.sequence for step in steps if step.cache.sequence is not None],
            [step.cache.length for step in steps],
            counts,
            embeds,
            cos,
            sin,
            n_out,
        )
        return [states] if len(steps) == 1 else np.split(states, np.cumsum(n_out[:-1]))

    def _run_alone(self, step: Step) -> Array:
        n = len(step.embeds)
        inputs = _inputs(step.embeds[None], step.cos, step.sin, np.array([step.cache.length + n - 1], np.int32))
        hidden = step.cache.binding.run(inputs)["hidden_states"]
        return np.asarray(hidden[0, n - step.n_out :], np.float32)

    def _run_batch(self, steps: Sequence[Step]) -> list[Array]:
        """One token of each of several sequences, in one run of the graph over all slots up to the last.

        A slot in between that takes no part gets a token too: it goes behind what the slot holds, where the next one
        will write over it, and nobody reads what comes of it.
        """
        rows = {step.cache.index: step for step in steps}
        batch = max(rows) + 1
        filler = steps[0]
        chosen = [rows.get(index, filler) for index in range(batch)]
        lasts = []
        for slot in self._slots[:batch]:
            if slot.length == self._spec.max_length:  # idle and full
                slot.length, slot.holds = 0, None
            lasts.append(slot.length)
        embeds, cos, sin = _joined(chosen)
        if batch not in self._batches:
            self._batches[batch] = _bound(
                self._session, {name: buffer.rows(0, batch) for name, buffer in self._buffers.items()}
            )
        hidden = self._batches[batch].run(_inputs(embeds[:, None], cos, sin, np.array(lasts, np.int32)))
        states = np.asarray(hidden["hidden_states"], np.float32)
        return [states[step.cache.index, 1 - step.n_out :] for step in steps]


def _joined(steps: Sequence[Step]) -> tuple[Array, Array, Array]:
    return (
        np.concatenate([step.embeds for step in steps]),
        np.concatenate([step.cos for step in steps]),
        np.concatenate([step.sin for step in steps]),
    )


def _inputs(embeds: Array, cos: Array, sin: Array, last: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
    """Of the graph, for (batch, n, hidden_dim) embeddings; `last` (batch,) is the place of each row's last token."""
    batch, n, _ = embeds.shape
    return {
        "inputs_embeds": embeds,
        "rotary_cos": cos,
        "rotary_sin": sin,
        "rotary_ids": np.arange(batch * n).reshape(batch, n),
        "seqlens_k": last,
        "total_sequence_length": np.array(last.max() + 1, np.int32),
    }
