"""What a decoder's session is asked to do for one, three and eight sequences: recorded by a stand-in for a device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medreasoner.reasoner.decoder import Decoder, KvCache
from medreasoner.reasoner.scheduler import Scheduler, Stream, gather
from medreasoner.spec import BundleSpec

Array = NDArray[Any]


@dataclass
class Device:
    """What happened to a session's memory, in order."""

    calls: list[tuple[str, Any]] = field(default_factory=list)

    def named(self, name: str) -> list[Any]:
        return [what for call, what in self.calls if call == name]


class DeviceBuffer:
    """Rows of memory that the host cannot see, and that counts what is copied to it and from it."""

    host = None

    def __init__(self, device: Device, content: Array, rows: tuple[int, int]) -> None:
        self.device, self.content, self.place = device, content, rows

    def rows(self, start: int, stop: int) -> "DeviceBuffer":
        return DeviceBuffer(self.device, self.content[start:stop], (start, stop))

    def save(self, n_positions: int) -> Array:
        self.device.calls.append(("copy", self.place))
        return self.content[:, :, :n_positions].copy()

    def restore(self, saved: Array) -> None:
        self.device.calls.append(("copy", self.place))
        self.content[:, :, : saved.shape[2]] = saved


class DeviceSession:
    """A graph that adds up all it has seen of a sequence: (batch, n, hidden), with the sums in its key buffers."""

    providers = ("CUDAExecutionProvider",)
    max_rows = None

    def __init__(self, *, cuts_rows: bool = True) -> None:
        self.device, self.cuts_rows = Device(), cuts_rows

    def element_type(self, name: str) -> Any:
        return np.float32

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> DeviceBuffer:
        self.device.calls.append(("allocate", shape))
        return DeviceBuffer(self.device, np.zeros(shape, dtype), (0, shape[0]))

    def bind(self, inputs: Mapping[str, DeviceBuffer], outputs: Mapping[str, DeviceBuffer]) -> "DeviceBinding":
        assert {name.replace("past", "present"): id(buffer) for name, buffer in inputs.items()} == {
            name: id(buffer) for name, buffer in outputs.items()
        }  # what is read is what is written
        self.device.calls.append(("bind", inputs["past_key.0"].place))
        return DeviceBinding(self.device, inputs["past_key.0"])


class DeviceBinding:
    def __init__(self, device: Device, keys: DeviceBuffer) -> None:
        self.device, self.keys = device, keys

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        embeds = inputs["inputs_embeds"]
        batch, n, _ = embeds.shape
        self.device.calls.append(("run", (self.keys.place, n)))  # with one synchronisation at its end
        assert len(self.keys.content) == batch
        assert int(inputs["total_sequence_length"]) == int(inputs["seqlens_k"].max()) + 1
        states = np.zeros_like(embeds)
        for row, last in enumerate(inputs["seqlens_k"]):
            for i in range(n):
                place = int(last) - n + 1 + i
                self.keys.content[row, 0, place, 0] = embeds[row, i, 0]
                states[row, i] = self.keys.content[row, 0, : place + 1, 0].sum()
        return {"hidden_states": states}


def counting(decoder: Decoder, first: list[float], n_more: int) -> Callable[[KvCache], Stream[list[float]]]:
    """A sequence that feeds some numbers, and then a few times the last digit of the sum so far."""

    def open_stream(cache: KvCache) -> Stream[list[float]]:
        cache.length, cache.holds = 0, None
        hidden = decoder._spec.hidden_dim
        numbers, fed, seen = first, 0, []
        for _ in range(n_more + 1):
            embeds = np.repeat(np.array(numbers, np.float32)[:, None], hidden, axis=1)
            states = yield decoder.text_step(cache, embeds, fed)
            fed += len(numbers)
            seen.append(float(states[-1, 0]))
            numbers = [seen[-1] % 10]
        return seen

    return open_stream


def expected(first: list[float], n_more: int) -> list[float]:
    total, seen = sum(first), []
    for _ in range(n_more + 1):
        seen.append(total)
        total += total % 10
    return seen


def scheduler(spec: BundleSpec, session: DeviceSession, n_slots: int = 8) -> tuple[Decoder, Scheduler]:
    decoder = Decoder(session, spec.reasoner, n_slots=n_slots)  # type: ignore[arg-type]
    return decoder, Scheduler(decoder, max_waiting=64)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_tick_is_one_run_over_bound_memory(spec: BundleSpec, batch: int) -> None:
    session = DeviceSession()
    decoder, schedule = scheduler(spec, session)
    prompts = [[float(number), 2.0, 3.0] for number in range(batch)]
    found = gather([schedule.start(counting(decoder, prompt, 5)) for prompt in prompts])
    assert found == [expected(prompt, 5) for prompt in prompts]
    device = session.device
    assert device.named("copy") == []  # nothing goes to the host and back
    assert {shape[0] for shape in device.named("allocate")} == {8}  # all slots at once, and never again
    assert len(device.named("allocate")) == 2 * spec.reasoner.n_layers
    # Prompts of several tokens go row by row, then every tick is one run over all rows.
    whole = (0, batch)
    assert device.named("run") == [((row, row + 1), 3) for row in range(batch)] + [(whole, 1)] * 5
    assert device.named("bind").count(whole) == 1  # bound once, and used for all ticks


def test_a_slot_that_takes_no_part_keeps_what_it_holds(spec: BundleSpec) -> None:
    """The one between feeds two tokens at a time, which go alone; the others' runs pass over its slot."""
    session = DeviceSession()
    decoder, schedule = scheduler(spec, session)

    def pairs(cache: KvCache) -> Stream[list[float]]:
        cache.length, cache.holds = 0, None
        seen = []
        for turn in range(4):
            embeds = np.full((2, decoder._spec.hidden_dim), 7.0, np.float32)
            states = yield decoder.text_step(cache, embeds, 2 * turn)
            seen.append(float(states[-1, 0]))
        return seen

    tickets = [
        schedule.start(counting(decoder, [1.0], 5)),
        schedule.start(pairs),
        schedule.start(counting(decoder, [4.0], 5)),
    ]
    assert gather(tickets) == [expected([1.0], 5), [14.0, 28.0, 42.0, 56.0], expected([4.0], 5)]
    assert ((0, 3), 1) in session.device.named("run")


def test_a_long_prompt_goes_in_pieces_beside_others(spec: BundleSpec) -> None:
    session = DeviceSession()
    decoder, schedule = scheduler(spec, session)
    long = [1.0] * 100
    found = gather([schedule.start(counting(decoder, [1.0], 3)), schedule.start(counting(decoder, long, 0))])
    assert found == [expected([1.0], 3), expected(long, 0)]
    pieces = [n for (start, _), n in session.device.named("run") if start == 1]
    assert pieces == [32, 32, 32, 4]
    alone = DeviceSession()
    decoder, schedule = scheduler(spec, alone)
    assert gather([schedule.start(counting(decoder, long, 0))]) == [expected(long, 0)]
    assert [n for _, n in alone.device.named("run")] == [100]


def test_buffers_that_cannot_be_cut_run_row_by_row(spec: BundleSpec) -> None:
    session = DeviceSession(cuts_rows=False)
    decoder, schedule = scheduler(spec, session)
    prompts = [[float(number)] for number in range(3)]
    found = gather([schedule.start(counting(decoder, prompt, 2)) for prompt in prompts])
    assert found == [expected(prompt, 2) for prompt in prompts]
    assert {shape[0] for shape in session.device.named("allocate")} == {1}
    assert session.device.named("run") == [((0, 1), 1)] * 9


def test_more_sequences_than_slots_take_turns(spec: BundleSpec) -> None:
    session = DeviceSession()
    decoder, schedule = scheduler(spec, session, n_slots=2)
    lengths = [5, 1, 1, 3, 0]
    found = gather([schedule.start(counting(decoder, [1.0], n)) for n in lengths])
    assert found == [expected([1.0], n) for n in lengths]
    assert max(stop for (_, stop), _ in session.device.named("run")) == 2
    assert not schedule._active
    assert not schedule._waiting
