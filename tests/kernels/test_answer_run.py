"""Answers written in one call, against the same loop step by step through the other kernels."""

import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.kernels.test_decoder_step import caches, kernel, toy

from medreasoner import ops
from medreasoner.errors import ArrayError

every_level = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=10)
LIMIT, HIDDEN, CAPACITY = 19, 64, 96
SINGLE = [[100 + value] for value in range(LIMIT + 1)]
DIGITS = [[80 + int(digit) for digit in str(value)] for value in range(LIMIT + 1)]
LITERALS = [[1, 2, 3], [10], [11, 12], [10], [4, 5, 13, 14], [10], [4, 6], [10], [7, 8]]
VOCABULARY = 120


@dataclass
class Model:
    """A decoder with random weights, and what stays outside it."""

    step: ops.DecoderStep
    weights: object
    embedding: np.ndarray
    head: np.ndarray
    cos: np.ndarray
    sin: np.ndarray

    def matrices(self):
        return (self.embedding, "float32"), (self.head, "float32"), self.cos, self.sin


def make_model(seed, *, pack=False, n_threads=1):
    rng = np.random.default_rng(seed)
    weights = toy(HIDDEN, 2, 2, 32, 128, 2, seed)
    embedding, head = rng.standard_normal((2, VOCABULARY, HIDDEN)).astype(np.float32)
    angles = np.outer(np.arange(CAPACITY), 10.0 ** -np.linspace(0, 3, 16)).astype(np.float32)
    step = kernel(weights, "float16", pack=pack, n_threads=n_threads)
    return Model(step, weights, embedding, head, np.cos(angles), np.sin(angles))


@dataclass
class Row:
    """An answer: where it begins, and what has come of it."""

    state: ops.AnswerState
    sequence: ops.DecoderSequence
    past: int
    position: int
    pending: list[int]
    temperature: float
    shares: list[float]
    hidden: np.ndarray | None = None
    written: list[int] = field(default_factory=list)
    n_chosen: int = 0
    n_runs: int = 0

    def writing(self):
        pending = [] if self.hidden is not None else self.pending
        return ops.AnswerWriting(
            self.state, self.sequence, self.past, self.position, self.hidden, pending, self.temperature, self.shares
        )


def make_rows(model, number, seed, *, temperature=0.0, tokens=SINGLE, past=5):
    grammar = ops.AnswerGrammar(LITERALS, tokens, None)
    rows = []
    for index in range(number):
        state = grammar.start(LIMIT, LIMIT - index)
        sequence = model.step.open(*caches(model.weights, CAPACITY, np.float16, seed + index))
        shares = np.random.default_rng([seed, index]).random(40).tolist()
        pending = [20 + index, *state.forced()]
        rows.append(Row(state, sequence, past + index, past + 2 * index, pending, temperature, shares))
    return rows


def by_steps(model, row):
    """The loop, through kernels that have tests of their own."""
    while not row.state.done:
        if row.hidden is None:
            n = len(row.pending)
            at = slice(row.position, row.position + n)
            embeds = ops.gather_rows(model.embedding, "float32", np.array(row.pending, np.int64))
            states = ops.decoder_step([row.sequence], [row.past], [n], embeds, model.cos[at], model.sin[at])
            row.hidden = states[-1]
            row.past, row.position, row.n_runs = row.past + n, row.position + n, row.n_runs + 1
        rows = row.state.allowed()
        if row.temperature == 0:
            token = ops.select_token(row.hidden, model.head, "float32", rows)[0]
        else:
            logits = ops.project_rows(row.hidden, model.head, "float32", rows)
            token = int(rows[ops.draw_token(logits, row.temperature, row.shares[row.n_chosen])])
        row.state.accept(token)
        row.pending, row.hidden = [token, *row.state.forced()], None
        row.written += row.pending
        row.n_chosen += 1


def by_kernel(model, rows, *, n_threads=1):
    """The same with the kernel, which stops whenever an answer is done."""
    rows = list(rows)
    while under_way := [row for row in rows if not row.state.done]:
        writings = [row.writing() for row in under_way]
        ops.write_answers(writings, *model.matrices(), ops.Interrupt(), None, n_threads=n_threads)
        for row, writing in zip(under_way, writings, strict=True):
            assert not writing.is_stuck
            row.shares = row.shares[writing.n_chosen :]
            row.past, row.position, row.hidden = writing.past, writing.position, writing.hidden
            row.pending = writing.pending
            row.written += writing.written
            row.n_chosen += writing.n_chosen
            row.n_runs += writing.n_runs


@pytest.mark.parametrize("tokens", [SINGLE, DIGITS], ids=["one token", "digits"])
@pytest.mark.parametrize("pack", [False, True])
@every_level
@given(
    number=st.integers(1, 8),
    temperature=st.sampled_from([0.0, 0.7, 3.0]),
    seed=st.integers(0, 99),
    threads=st.integers(1, 3),
)
def test_it_is_the_loop_step_by_step(simd, tokens, pack, number, temperature, seed, threads):
    model = make_model(seed, pack=pack)
    expected, found = (make_rows(model, number, seed, temperature=temperature, tokens=tokens) for _ in range(2))
    for row in expected:
        by_steps(model, row)
    by_kernel(model, found, n_threads=threads)
    for one, other in zip(expected, found, strict=True):
        assert other.written == one.written
        assert other.state.values == one.state.values
        assert (other.n_chosen, other.n_runs, other.past, other.position) == (
            one.n_chosen,
            one.n_runs,
            one.past,
            one.position,
        )


def test_a_crew_writes_the_same(simd):
    alone, crew = make_model(3), make_model(3, n_threads=3)
    expected, found = make_rows(alone, 4, 3), make_rows(crew, 4, 3)
    by_kernel(alone, expected)
    by_kernel(crew, found, n_threads=2)
    assert [row.written for row in found] == [row.written for row in expected]


def write_one(model, row, interrupt=None, seconds=None):
    writing = row.writing()
    ops.write_answers([writing], *model.matrices(), interrupt or ops.Interrupt(), seconds)
    return writing


def test_an_interrupt_and_the_time_end_it_between_two_steps():
    model = make_model(1)
    stop = ops.Interrupt()
    stop.set()
    (row,) = make_rows(model, 1, 1)
    assert write_one(model, row, stop).n_runs == 0
    stop.clear()
    assert write_one(model, row, stop).n_runs == 8
    (row,) = make_rows(model, 1, 1)
    assert write_one(model, row, seconds=-1.0).n_runs == 0
    (row,) = make_rows(model, 1, 1)
    assert write_one(model, row, seconds=60.0).n_runs == 8


def test_another_thread_interrupts_it():
    """The lock of the interpreter is free meanwhile: else the interrupt would come after the end."""
    weights = toy(HIDDEN, 2, 2, 32, 512 * 64, 6, 0)
    model = make_model(0)
    model.step, model.weights = kernel(weights, "float32"), weights
    (row,) = make_rows(model, 1, 0)
    writing, stop = row.writing(), ops.Interrupt()
    worker = threading.Thread(target=ops.write_answers, args=([writing], *model.matrices(), stop, None))
    worker.start()
    while writing.n_runs == 0 and worker.is_alive():
        time.sleep(0)
    stop.set()
    worker.join()
    assert 0 < writing.n_runs < 8


def test_it_stops_before_what_it_cannot_do():
    model = make_model(2)
    grammar = ops.AnswerGrammar(LITERALS, SINGLE, [1, 2, 9])
    (row,) = make_rows(model, 1, 2)
    row.state = grammar.start(LIMIT, LIMIT)
    row.pending = [20, *row.state.forced()]
    at_absent = write_one(model, row)
    assert (at_absent.n_runs, at_absent.n_chosen, row.state.at_absent_choice) == (1, 0, True)
    assert at_absent.is_stuck
    assert at_absent.hidden.shape == (HIDDEN,)

    (row,) = make_rows(model, 1, 2, past=CAPACITY - 9)
    full = write_one(model, row)
    assert full.is_stuck
    assert full.pending
    assert full.past + len(full.pending) > CAPACITY
    assert not row.state.done

    (row,) = make_rows(model, 1, 2, temperature=1.0)
    row.shares = row.shares[:3]
    assert write_one(model, row).n_chosen == 3

    for bad in (np.nan, np.inf):
        (row,) = make_rows(model, 1, 2)
        model.head = make_model(2).head * np.float32(bad)
        broken = write_one(model, row)
        assert (broken.n_runs, broken.n_chosen, broken.pending) == (1, 0, [])
        assert row.state.values == []


def test_wrong_arguments_are_refused():
    model = make_model(4)
    (row,) = make_rows(model, 1, 4)
    writing, (embedding, head, cos, sin), stop = row.writing(), model.matrices(), ops.Interrupt()

    def refused(match, *arguments, **options):
        with pytest.raises(ArrayError, match=match):
            ops.write_answers(*arguments, **options)

    refused("must be an answer", [], embedding, head, cos, sin, stop, None)
    refused("may be there once", [writing, writing], embedding, head, cos, sin, stop, None)
    refused("V, hidden", [writing], (model.embedding[:, :32].copy(), "float32"), head, cos, sin, stop, None)
    refused("V, hidden", [writing], embedding, (model.head[:, :32].copy(), "float32"), cos, sin, stop, None)
    refused("float16", [writing], embedding, (model.head, "float16"), cos, sin, stop, None)
    refused("positions", [writing], embedding, head, cos[:, :3].copy(), sin, stop, None)
    refused("positions", [writing], embedding, head, cos, sin[:5].copy(), stop, None)
    refused("positions", [writing], embedding, head, cos[0].copy(), sin[0].copy(), stop, None)
    refused("incompatible", [writing], embedding, head, cos.astype(np.float64), sin, stop, None)
    refused("finite", [writing], embedding, head, cos, sin, stop, float("nan"))
    refused("1 to 1024", [writing], embedding, head, cos, sin, stop, None, n_threads=0)
    (other,) = make_rows(make_model(4), 1, 4)
    refused("one decoder", [writing, other.writing()], embedding, head, cos, sin, stop, None)
    for change, match in (
        ({"past": -1}, "past must fit"),
        ({"past": CAPACITY + 1}, "past must fit"),
        ({"position": -1}, "past must fit"),
        ({"pending": []}, "either a hidden state or tokens"),
        ({"hidden": np.zeros(HIDDEN + 1, np.float32)}, "hidden must be"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
    ):
        (row,) = make_rows(model, 1, 4)
        for name, value in change.items():
            setattr(row, name, value)
        with pytest.raises(ValueError, match=match):
            row.writing()
    (row,) = make_rows(model, 1, 4)
    row.pending = [VOCABULARY]  # not in the embedding: it does not go on
    assert write_one(model, row).n_runs == 0


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40),
    st.floats(0.1, 5),
    st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None, max_examples=50)
def test_draws_are_those_of_numpy(logits, temperature, share):
    logits = np.array(logits, np.float32)
    scaled = logits.astype(np.float64) / temperature
    sums = np.cumsum(np.exp(scaled - scaled.max()))
    found = ops.draw_token(logits, temperature, share)
    assert (sums[found - 1] if found else 0) <= share * sums[-1] * (1 + 1e-12)
    assert share * sums[-1] <= sums[found] * (1 + 1e-12)


@pytest.mark.parametrize(("logits", "temperature", "share"), [([], 1, 0), ([1], 0, 0), ([1], 1, 1), ([1], 1, -0.1)])
def test_draws_out_of_range_are_refused(logits, temperature, share):
    with pytest.raises(ArrayError):
        ops.draw_token(np.array(logits, np.float32), temperature, share)


@pytest.mark.parametrize("pack", [False, True])
@every_level
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4),
    seed=st.integers(0, 9),
)
def test_fewer_states_are_the_last_of_all(simd, pack, lengths, seed):
    model = toy(64, 2, 2, 32, 128, 2, seed)
    step = kernel(model, "float16", pack=pack)
    pasts, counts = [past for past, _, _ in lengths], [n for _, n, _ in lengths]
    n_out = [min(n, asked) for _, n, asked in lengths]
    rng = np.random.default_rng(seed)
    embeds = rng.standard_normal((sum(counts), 64)).astype(np.float32)
    cos, sin = rng.standard_normal((2, sum(counts), 16)).astype(np.float32)

    def run(asked):
        buffers = [caches(model, 32, np.float32, number) for number in range(len(lengths))]
        return ops.decoder_step([step.open(*each) for each in buffers], pasts, counts, embeds, cos, sin, asked), buffers

    (whole, kept), (some, kept_too) = run(None), run(n_out)
    ends = np.cumsum(counts)
    np.testing.assert_array_equal(some, np.concatenate([whole[e - n : e] for e, n in zip(ends, n_out, strict=True)]))
    np.testing.assert_array_equal(np.array(kept), np.array(kept_too))
    with pytest.raises(ArrayError, match="n_out"):
        run([n + 1 for n in counts])
    with pytest.raises(ArrayError, match="n_out"):
        run([*n_out, 1])


ABSENT = [1, 2, 9, 8]


def decided(model, pending, cache, grammar, threshold):
    """The answer with what NumPy makes of the first choice, and a run of its own for what comes then."""
    state = grammar.start(LIMIT, LIMIT)
    row = Row(state, cache, 5, 5, [*pending, *state.forced()], 0.0, [])
    embeds = ops.gather_rows(model.embedding, "float32", np.array(row.pending, np.int64))
    at = slice(5, 5 + len(row.pending))
    hidden = ops.decoder_step([cache], [5], [len(embeds)], embeds, model.cos[at], model.sin[at])[-1]
    row.past, row.position, row.n_runs = at.stop, at.stop, 1
    present, absent = 3, 9
    logits = ops.project_rows(hidden, model.head, "float32", np.array([present, absent], np.int32)).astype(np.float64)
    share = float(1 / (1 + np.exp(logits[0] - logits[1])))
    is_absent = logits[1] > logits[0] if threshold is None else share > threshold
    state.accept(absent if is_absent else present)
    row.pending = [absent if is_absent else present, *state.forced()]
    row.written = list(row.pending)
    by_steps(model, row)
    return row, share


@pytest.mark.parametrize("threshold", [None, 0.0, 0.2, 0.8, 1.0])
@pytest.mark.parametrize("is_guessed", [False, True])
@every_level
@given(seed=st.integers(0, 99), n=st.integers(1, 40))
def test_absent_is_decided_on_the_way(simd, is_guessed, threshold, seed, n):
    model = make_model(seed, pack=True)
    grammar = ops.AnswerGrammar(LITERALS, SINGLE, ABSENT)
    pending = np.random.default_rng(seed).integers(20, 60, n).tolist()
    expected, share = decided(
        model, pending, model.step.open(*caches(model.weights, CAPACITY, np.float16, seed)), grammar, threshold
    )
    state = grammar.start(LIMIT, LIMIT)
    sequence = model.step.open(*caches(model.weights, CAPACITY, np.float16, seed))
    ahead = [3] if is_guessed else []  # what follows where the target is there, up to its first number
    pending += [*state.forced(), *ahead]
    writing = ops.AnswerWriting(state, sequence, 5, 5, None, pending, 0.0, [], True, threshold, ahead)
    ops.write_answers([writing], *model.matrices(), ops.Interrupt(), None)
    assert writing.written == expected.written
    assert state.absent == expected.state.absent
    assert state.values == expected.state.values
    assert writing.absent_share == pytest.approx(share, abs=1e-5)
    assert writing.n_chosen == expected.n_chosen
    assert writing.n_runs == expected.n_runs - (is_guessed and not state.absent)
    assert writing.seconds_to_hidden > 0


def test_absent_is_left_to_the_caller_unless_he_asks():
    model = make_model(1)
    state = ops.AnswerGrammar(LITERALS, SINGLE, ABSENT).start(LIMIT, LIMIT)
    sequence = model.step.open(*caches(model.weights, CAPACITY, np.float16, 1))
    writing = ops.AnswerWriting(state, sequence, 5, 5, None, [20, *state.forced(), 3], 0.0, [], ahead=[3])
    ops.write_answers([writing], *model.matrices(), ops.Interrupt(), None)
    assert writing.is_stuck
    assert state.at_absent_choice
    assert writing.absent_share is None
    with pytest.raises(ValueError, match="pending must end with ahead"):
        ops.AnswerWriting(state, sequence, 5, 5, None, [20, 3], 0.0, [], ahead=[3, 4])
