"""Continuous batching: sequences join and leave a running batch between two steps of the decoder.

There is no thread of its own. Of the threads that wait for an answer one drives the decoder for all of them, until its
own answer has got on; then another takes over. A single caller so pays for no change of threads.

Each sequence is a generator that yields `Step`s, and is sent their hidden states. A tick runs the next step of every
sequence that has a slot. Long ones go in pieces while others run, so that reading a prompt does not stall an answer.
Where all of them have come to their answers, the kernel reads what is left of the questions and writes those in one
tick, until one is done; who joins or gives up interrupts it between two steps.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from medreasoner.errors import CancelledError, DeadlineError, MedReasonerError, QueueFullError
from medreasoner.ops import Interrupt
from medreasoner.reasoner.choosing import Choosing, write_together
from medreasoner.reasoner.decoder import Decoder, KvCache, SavedPrefix, Step
from medreasoner.result import Answer, Thought

__all__ = ["Cancellation", "Event", "Scheduler", "Stream", "Ticket", "gather"]

Event: TypeAlias = Thought | Answer
T = TypeVar("T")
Stream: TypeAlias = Generator[Event | Step | Choosing, NDArray[np.float32], T]

_CHUNK = 32  # tokens of one sequence in a tick in which others take part
_LARGEST_CHUNK = 256  # alone, so that who comes meanwhile need not wait for a whole prompt


class Cancellation:
    """Lets another thread, or an event loop, give up what a caller waits for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._tickets: list[Ticket[object]] = []

    def cancel(self) -> None:
        """Give up whatever was started with this, and whatever will be."""
        with self._lock:
            self._cancelled = True
            tickets, self._tickets = self._tickets, []
        for ticket in tickets:
            ticket.cancel()

    def covers(self, ticket: "Ticket[object]") -> None:
        """Give this one up too when the time comes."""
        with self._lock:
            if not self._cancelled:
                self._tickets.append(ticket)
                return
        ticket.cancel()


class Ticket(Generic[T]):
    """One sequence's place with the scheduler; made by `Scheduler.start`."""

    def __init__(
        self,
        scheduler: "Scheduler",
        open_stream: Callable[[KvCache], "Stream[T]"],
        prefix: SavedPrefix | None,
        deadline: float | None,
    ) -> None:
        self._scheduler, self._deadline = scheduler, deadline
        self.open_stream, self.prefix = open_stream, prefix
        self.ready = threading.Event()  # something happened that its caller waits for
        self.events: deque[Event] = deque()
        self.cache: KvCache | None = None
        self.is_done = False
        self.is_awaited = False  # a thread sleeps until `ready`
        self._stream: Stream[T] | None = None
        self._step: Step | None = None
        self._states: list[NDArray[np.float32]] = []
        self._fed = self._running = 0  # tokens of the step
        self.choosing: Choosing | None = None  # in the place of a step
        self._result: T | None = None
        self._error: BaseException | None = None
        self._is_cancelled = False

    def run(self) -> Generator[Event, None, T]:
        """Drive or wait: the sequence's events, and its result.

        Raises
        ------
        CancelledError, DeadlineError
            If it was given up.
        MedReasonerError
            Whatever the sequence itself raised.
        """
        try:
            while (event := self._scheduler.next_event(self)) is not None:
                yield event
        finally:
            self._scheduler.drop(self)
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # set when there is no error

    def result(self) -> T:
        """The result, without the events."""
        events = self.run()
        while True:
            try:
                next(events)
            except StopIteration as stop:
                value: T = stop.value
                return value

    def drop(self) -> None:
        """Give it up if it is not done: its caller will not ask for it."""
        self._scheduler.drop(self)

    def cancel(self) -> None:
        """Give it up, from any thread; its caller gets `CancelledError`."""
        self._is_cancelled = True
        self._scheduler.interrupt()
        self.ready.set()

    @property
    def overdue(self) -> MedReasonerError | None:
        """Why it must not go on."""
        if self._is_cancelled:
            return CancelledError("the question was cancelled")
        if self._deadline is not None and time.monotonic() > self._deadline:
            return DeadlineError("the answer was not ready by its deadline")
        return None

    @property
    def seconds_left(self) -> float | None:
        """Until the deadline; None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def begin(self, cache: KvCache) -> None:
        """Start in a slot."""
        self.cache = cache
        self._stream = self.open_stream(cache)
        self._advance(None)

    def next_step(self, limit: int) -> Step:
        """What to run next, of at most so many tokens."""
        step = self._step
        assert step is not None
        n = len(step.embeds)
        self._running = min(n - self._fed, limit)
        return step if self._running == n else step.part(self._fed, self._fed + self._running)

    def take(self, states: NDArray[np.float32]) -> None:
        """Hidden states of what was run; goes on once the step is complete."""
        assert self._step is not None
        self._fed += self._running
        if self._fed < len(self._step.embeds):
            self._states.append(states)
            return
        whole = states if not self._states else np.concatenate([*self._states, states])
        self._states, self._fed = [], 0
        self._advance(whole)

    def go_on(self, *, by_hand: bool = False) -> None:
        """After choices were made; `by_hand` until there is a step to run."""
        while self.choosing is not None and not self.is_done:
            self.choosing.is_stuck |= by_hand
            self._advance(None)
            if not by_hand:
                return

    def fail(self, error: BaseException) -> None:
        """End with an error, unless it has ended."""
        if self.is_done:
            return
        self._error, self.is_done = error, True
        if self._stream is not None:
            self._stream.close()

    def _advance(self, states: NDArray[np.float32] | None) -> None:
        stream = self._stream
        assert stream is not None
        try:
            item = next(stream) if states is None else stream.send(states)
            while not isinstance(item, (Step, Choosing)):
                self.events.append(item)
                item = next(stream)
        except StopIteration as stop:
            self._result, self.is_done = stop.value, True
        except Exception as err:
            self._error, self.is_done = err, True
        else:
            self._step, self.choosing = (None, item) if isinstance(item, Choosing) else (item, None)


def gather(tickets: Sequence[Ticket[T]]) -> list[T]:
    """Results of several sequences, which run together; if one fails the others are given up."""
    try:
        return [ticket.result() for ticket in tickets]
    finally:
        for ticket in tickets:
            ticket.drop()


class Scheduler:
    """Shares a decoder between callers.

    Parameters
    ----------
    decoder
        Nobody else may run it.
    max_waiting
        How many sequences may wait for a slot.
    n_threads
        That may share the answers of a batch.
    """

    def __init__(self, decoder: Decoder, *, max_waiting: int, n_threads: int = 1) -> None:
        self._decoder, self._max_waiting, self._n_threads = decoder, max_waiting, n_threads
        self._lock = threading.Lock()
        self._is_driven = False
        self._interrupt = Interrupt()
        self._waiting: deque[Ticket[object]] = deque()
        self._active: list[Ticket[object]] = []

    @property
    def n_slots(self) -> int:
        """Sequences that run at once."""
        return self._decoder.n_slots

    @property
    def room(self) -> int:
        """Sequences that run or wait before one is refused."""
        return self._decoder.n_slots + self._max_waiting

    def start(
        self,
        open_stream: "Callable[[KvCache], Stream[T]]",
        *,
        prefix: SavedPrefix | None = None,
        deadline: float | None = None,
        cancellation: Cancellation | None = None,
    ) -> Ticket[T]:
        """A place for a sequence; it runs as long as some caller waits for one.

        Parameters
        ----------
        open_stream
            Makes the sequence in the slot that it gets.
        prefix
            What the slot should hold already, if one does.
        deadline
            By `time.monotonic`, seconds.
        cancellation
            What may give it up.

        Raises
        ------
        QueueFullError
            If as many wait as may.
        """
        ticket = Ticket(self, open_stream, prefix, deadline)
        with self._lock:
            if len(self._waiting) >= self._max_waiting and not self._decoder.has_free_slot:
                raise QueueFullError(
                    f"{len(self._active)} questions are being answered and {len(self._waiting)} wait: try again later"
                )
            self._waiting.append(ticket)  # type: ignore[arg-type]
            self._interrupt.set()
        if cancellation is not None:
            cancellation.covers(ticket)  # type: ignore[arg-type]
        return ticket

    def next_event(self, ticket: Ticket[T]) -> Event | None:
        """The ticket's next event, None when it is done: drives the decoder, or waits for who does."""
        while True:
            with self._lock:
                if ticket.events:
                    return ticket.events.popleft()
                if ticket.is_done:
                    return None
                drives = not self._is_driven
                self._is_driven = True
                if not drives and ticket.cache is None and (error := ticket.overdue):
                    self._give_up(ticket, error)
                    continue
                ticket.ready.clear()
                ticket.is_awaited = not drives
            if drives:
                self._drive(ticket)
            else:
                ticket.ready.wait(ticket.seconds_left or None)  # once it is overdue, until who drives sees it

    def interrupt(self) -> None:
        """Let whoever drives look at what has changed, after the step that is running."""
        self._interrupt.set()

    def drop(self, ticket: Ticket[T]) -> None:
        """Forget a ticket that nobody asks for any more."""
        with self._lock:
            ticket.is_awaited = False
            if ticket.is_done:
                return
            ticket.cancel()  # who drives sees it
            if not self._is_driven or ticket.cache is None:
                self._give_up(ticket, CancelledError("the question was given up"))

    def _drive(self, ticket: Ticket[T]) -> None:
        """Run ticks until there is something for this ticket's caller, then let another one drive."""
        try:
            while not (ticket.events or ticket.is_done):
                self._tick()
        finally:
            with self._lock:
                self._is_driven = False
                heir = next((each for each in (*self._active, *self._waiting) if each.is_awaited), None)
                if heir is not None:
                    heir.ready.set()

    def _tick(self) -> None:
        """One step of each sequence that has a slot, or more of them where all make choices."""
        with self._lock:
            self._interrupt.clear()  # whatever comes from now on sets it again
            self._admit()
            active = list(self._active)
            lefts = [each.seconds_left for each in (*active, *self._waiting)]
        if not active:
            return
        try:
            limit = min(_LARGEST_CHUNK if len(active) == 1 else _CHUNK, self._decoder.kernel_limit)
            choosing = [ticket.choosing for ticket in active if ticket.choosing and ticket.choosing.goes_whole(limit)]
            if len(choosing) == len(active):
                seconds = min((left for left in lefts if left is not None), default=None)
                write_together(choosing, self._interrupt, seconds, n_threads=self._n_threads)
                for ticket in active:
                    ticket.go_on()
            else:
                self._step(active)
        except BaseException as err:  # of the runtime, or an interrupt: no sequence can be trusted to be whole
            for ticket in active:
                ticket.fail(err if isinstance(err, Exception) else CancelledError("the run was interrupted"))
            if not isinstance(err, Exception):
                raise
        finally:
            with self._lock:
                for ticket in active:
                    if ticket.is_done:
                        self._leave(ticket)
                    elif ticket.events:
                        ticket.ready.set()

    def _step(self, active: "Sequence[Ticket[object]]") -> None:
        """One step of each."""
        for ticket in active:
            ticket.go_on(by_hand=True)
        running = [ticket for ticket in active if not ticket.is_done]
        limit = _LARGEST_CHUNK if len(active) == 1 else _CHUNK
        results = self._decoder.run([ticket.next_step(limit) for ticket in running])
        for ticket, states in zip(running, results, strict=True):
            ticket.take(states)

    def _admit(self) -> None:
        """Give up what is overdue, and free slots to those who wait, the first first."""
        for ticket in (*self._active, *self._waiting):
            if error := ticket.overdue:
                self._give_up(ticket, error)
        while self._waiting and self._decoder.has_free_slot:
            ticket = self._waiting.popleft()
            cache = self._decoder.open_cache(ticket.prefix)
            self._active.append(ticket)
            ticket.begin(cache)
            if ticket.is_done:
                self._leave(ticket)

    def _give_up(self, ticket: "Ticket[T]", error: MedReasonerError) -> None:
        """End a ticket; the lock is held, and no tick is running on its slot."""
        ticket.fail(error)
        self._leave(ticket)

    def _leave(self, ticket: "Ticket[T]") -> None:
        """Take out a ticket that is done, with its slot; the lock is held."""
        if ticket in self._active:
            self._active.remove(ticket)  # type: ignore[arg-type]
        elif ticket in self._waiting:
            self._waiting.remove(ticket)  # type: ignore[arg-type]
        if ticket.cache is not None:
            self._decoder.close_cache(ticket.cache)
            ticket.cache = None
        ticket.ready.set()
