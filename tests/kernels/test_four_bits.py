"""Steps of a decoder whose matrices have four bits, against the plain twin in double precision; and its threads."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.test_decoder_step import (
    EPSILON,
    caches,
    every_level,
    kernel,
    normed,
    plain,
    rounded,
    run,
    tokens,
    toy,
)

from medreasoner import ops

FORMS = ["float16", "int8", "int4"]


def in_bits(matrix, rng):
    """A matrix (in, out) as levels, scales and zero points of its columns, in blocks of 32 rows; and its values."""
    rows, cols = matrix.shape
    blocks = matrix.T.reshape(cols, rows // 32, 32)
    zeros = rng.integers(0, 16, blocks.shape[:2], np.uint8)
    scales = np.ascontiguousarray(np.abs(blocks).max(-1) / 7, np.float16).astype(np.float32)
    levels = np.clip(np.rint(blocks / scales[..., None]) + zeros[..., None], 0, 15).astype(np.uint8)
    values = (levels.astype(np.float64) - zeros[..., None]) * scales[..., None]
    odd = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
    arrays = [levels[..., ::2] | levels[..., 1::2] << 4, scales, odd[:, ::2] | odd[:, 1::2] << 4]
    return arrays, values.reshape(cols, rows).T


def four_bits(model, seed=0, n_threads=1):
    """The kernel in four bits; the model gets the values that it computes with."""
    rng = np.random.default_rng(seed)
    found = [[in_bits(matrix, rng) for matrix in layer] for layer in model.matrices]
    model.matrices = [[values.astype(np.float32) for _, values in layer] for layer in found]
    arrays = ([array for three, _ in layer for array in three] for layer in found)  # one by one
    return ops.DecoderStep(
        "int4", model.heads, model.kv_heads, EPSILON, arrays, model.vectors, model.norm, n_threads=n_threads
    )


def step_of(form, model, n_threads=1):
    if form == "int4":
        return four_bits(model, n_threads=n_threads)
    return kernel(model, "float16", pack=form == "int8", n_threads=n_threads)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 13])
@pytest.mark.parametrize("hidden", [64, 192, 320])
def test_products_are_those_of_the_levels(simd, n, hidden):
    """The first layer's values without a bias are one such product, which the cache shows."""
    model = toy(hidden, 2, 1, 32, 64, 1, seed=n)
    model.vectors[0][1][:] = 0
    step = four_bits(model, n)
    keys, values = caches(model, n, np.float32)
    embeds, cos, sin = tokens(model, n, n)
    embeds[0, :32] = 0  # a block of nothing
    run(step.open(keys, values), embeds, cos, sin, 0)
    qkv, inputs = model.matrices[0][0], normed(embeds, model.vectors[0][0])
    expected = (rounded(inputs, 1, 32) @ qkv.astype(np.float64))[:, -64:]
    off = np.abs(values[0][0].swapaxes(0, 1).reshape(n, -1) - expected)
    level = np.abs(inputs).max() * np.abs(qkv).max() / 127  # a number on the verge may go to the level beside
    assert off.max() < level
    assert np.quantile(off, 0.75) < level / 100


@every_level
@given(
    group=st.integers(1, 3), mlp=st.sampled_from([64, 192, 448]), past=st.integers(0, 40), n=st.integers(1, 13),
    n_threads=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_is_the_plain_twin_but_for_rounded_activations(simd, group, mlp, past, n, n_threads, seed):
    model = toy(256, 2, group, 32, mlp, 2, seed)
    step = four_bits(model, seed, n_threads)
    (keys, values), (own_keys, own_values) = (caches(model, past + n + 3, np.float32, seed) for _ in range(2))
    inputs = tokens(model, n, seed)
    found = run(step.open(keys, values), *inputs, past)
    expected = plain(model, "float32", own_keys, own_values, *inputs, past)
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)
    for one, other in ((keys, own_keys), (values, own_values)):
        assert np.linalg.norm(np.array(one) - np.array(other)) < 0.03 * np.linalg.norm(np.array(other))
        np.testing.assert_array_equal(one[0][:, :, past + n :], other[0][:, :, past + n :])


@pytest.mark.parametrize("n_threads", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_threads_change_no_bit(simd, form, n_threads):
    results = []
    for threads in (1, n_threads, n_threads):
        model = toy(128, 2, 2, 32, 320, 3, seed=5)
        step = step_of(form, model, threads)
        buffers = [caches(model, 40, np.float16, number) for number in range(3)]
        sequences = [step.open(*each) for each in buffers]
        states = [run(sequences[0], *tokens(model, n, n), past) for n, past in ((9, 0), (1, 9), (1, 10))]
        joined = [np.concatenate(parts) for parts in zip(*(tokens(model, n, n) for n in (1, 5, 3)), strict=True)]
        states.append(ops.decoder_step(sequences, [11, 2, 0], [1, 5, 3], *joined))
        results.append([*states, np.array(buffers)])
    for one, other in zip(results[0] * 2, results[1] + results[2], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_callers_in_threads_of_their_own_take_turns(form):
    model = toy(128, 2, 1, 32, 320, 2, seed=6)
    step, inputs = step_of(form, model, 2), tokens(model, 4, 1)
    expected = run(step.open(*caches(model, 8, np.float32)), *inputs, 0)
    found = {}

    def work(number):
        sequence = step.open(*caches(model, 8, np.float32))
        for _ in range(50):
            found[number] = run(sequence, *inputs, 0)

    callers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in callers:
        each.start()
    for each in callers:
        each.join(60)
    assert len(found) == 4
    for states in found.values():
        np.testing.assert_array_equal(states, expected)


def test_idle_threads_rest():
    model = toy(128, 2, 1, 32, 320, 2, seed=6)
    sequence = step_of("int4", model, 4).open(*caches(model, 8, np.float32))
    run(sequence, *tokens(model, 4, 1), 0)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05  # three that spin would have spent up to 1.5 s


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_number_that_is_none_is_hidden(simd, value):
    model = toy(64, 1, 1, 64, 64, 1, seed=0)
    embeds, cos, sin = tokens(model, 2, 0)
    embeds[1, 3] = value
    found = run(four_bits(model).open(*caches(model, 4, np.float32)), embeds, cos, sin, 0)
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).any()


def layer_in_bits(**sizes):
    model = toy(**{"hidden": 64, "kv_heads": 1, "group": 1, "dim": 64, "mlp": 128, "layers": 1, "seed": 0, **sizes})
    return model, [array for matrix in model.matrices[0] for array in in_bits(matrix, np.random.default_rng(0))[0]]


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda a: a[:, :1], "does not fit"),
        (0, lambda a: a.astype(np.int8), "does not fit"),
        (0, lambda a: np.asfortranarray(a), "does not fit"),
        (1, lambda a: a.astype(np.float64), "does not fit"),
        (1, lambda a: np.full_like(a, 7e4), "scale"),
        (1, lambda a: np.full_like(a, np.nan), "scale"),
        (2, lambda a: a[:-1], "does not fit"),
        (3, lambda a: a[0], "levels must be"),
        (6, lambda a: a[:64].copy(), "does not fit"),
        (12, lambda a: a[:, :-1].copy(), "does not fit"),
    ],
)  # fmt: skip
def test_matrices_that_do_not_fit_are_refused(index, change, message):
    model, arrays = layer_in_bits()
    arrays[index] = change(arrays[index])
    with pytest.raises(ValueError, match=message):
        ops.DecoderStep("int4", 1, 1, EPSILON, [arrays], model.vectors, model.norm)


def test_sizes_layers_and_threads_that_do_not_fit_are_refused():
    model, arrays = layer_in_bits(mlp=96)
    with pytest.raises(ValueError, match="multiples of 64"):
        ops.DecoderStep("int4", 1, 1, EPSILON, [arrays], model.vectors, model.norm)
    model, arrays = layer_in_bits()
    for layers in ([], [arrays, arrays]):
        with pytest.raises(ValueError, match="one number of layers"):
            ops.DecoderStep("int4", 1, 1, EPSILON, layers, model.vectors, model.norm)
    with pytest.raises(ValueError, match="a layer has"):
        ops.DecoderStep("int4", 1, 1, EPSILON, [arrays[:-1]], model.vectors, model.norm)
    for n_threads in (0, -1, 5000):
        with pytest.raises(ValueError, match="n_threads"):
            ops.DecoderStep("int4", 1, 1, EPSILON, [arrays], model.vectors, model.norm, n_threads=n_threads)
