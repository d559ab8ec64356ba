"""Steps of a decoder against a plain twin in double precision, written from the architecture's description."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medreasoner import ops
from medreasoner.errors import ArrayError

every_level = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
EPSILON = 1e-6


@dataclass
class Toy:
    """A decoder of random weights: `matrices` and `vectors` layer by layer, as the kernel takes them."""

    heads: int
    kv_heads: int
    dim: int
    matrices: list[list[np.ndarray]]
    vectors: list[list[np.ndarray]]
    norm: np.ndarray


def toy(hidden, kv_heads, group, dim, mlp, layers, seed):
    rng = np.random.default_rng(seed)
    q, kv = kv_heads * group * dim, kv_heads * dim
    shapes = [(hidden, q + 2 * kv), (q, hidden), (hidden, mlp), (hidden, mlp), (mlp, hidden)]
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    matrices = [[draw(*shape) / np.sqrt(shape[0], dtype=np.float32) for shape in shapes] for _ in range(layers)]
    vectors = [[1 + 0.1 * draw(hidden), draw(q + 2 * kv), 1 + 0.1 * draw(hidden)] for _ in range(layers)]
    return Toy(kv_heads * group, kv_heads, dim, matrices, vectors, 1 + 0.1 * draw(hidden))


def stored(array, dtype):
    if dtype == "bfloat16":
        return (array.view(np.uint32) >> 16).astype(np.uint16)
    return array.astype(dtype)


def widened(array, dtype):
    wide = (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else array
    return wide.astype(np.float64)


def kernel(model, dtype, *, pack=False, n_threads=1):
    matrices = [[stored(matrix, dtype) for matrix in layer] for layer in model.matrices]
    return ops.DecoderStep(
        dtype, model.heads, model.kv_heads, EPSILON, matrices, model.vectors, model.norm, pack=pack, n_threads=n_threads
    )


def run(sequence, embeds, cos, sin, past):
    return ops.decoder_step([sequence], [past], [len(embeds)], embeds, cos, sin)


def caches(model, capacity, dtype, seed=0):
    rng = np.random.default_rng(seed)
    shape = (1, model.kv_heads, capacity, model.dim)
    return [[rng.standard_normal(shape).astype(dtype) for _ in model.matrices] for _ in "kv"]


def normed(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale


def turned(x, cos, sin):
    """(n, heads, dim) by (n, dim / 2)."""
    a, b = np.split(x, 2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def plain(model, dtype, keys, values, embeds, cos, sin, past):
    """Hidden states, and the keys and values of the new tokens as they are kept."""
    x, n, places = embeds.astype(np.float64), len(embeds), past + len(embeds)
    q_dim, kv_dim = model.heads * model.dim, model.kv_heads * model.dim
    for layer, (weights, (norm, bias, after)) in enumerate(zip(model.matrices, model.vectors, strict=True)):
        qkv, output, gate, up, down = (widened(stored(each, dtype), dtype) for each in weights)
        q, k, v = np.split(normed(x, norm) @ qkv + bias, [q_dim, q_dim + kv_dim], -1)
        q = turned(q.reshape(n, model.heads, -1), cos, sin)
        k = turned(k.reshape(n, model.kv_heads, -1), cos, sin)
        keys[layer][0, :, past:places] = k.swapaxes(0, 1)
        values[layer][0, :, past:places] = v.reshape(n, model.kv_heads, -1).swapaxes(0, 1)
        attended = np.empty_like(q)
        for head in range(model.heads):
            own = head // (model.heads // model.kv_heads)
            scores = q[:, head] @ keys[layer][0, own, :places].astype(np.float64).T / np.sqrt(model.dim)
            scores[np.arange(places) > past + np.arange(n)[:, None]] = -np.inf
            weight = np.exp(scores - scores.max(-1, keepdims=True))
            weight /= weight.sum(-1, keepdims=True)
            attended[:, head] = weight @ values[layer][0, own, :places].astype(np.float64)
        x = x + attended.reshape(n, -1) @ output
        h = normed(x, after)
        g = h @ gate
        x = x + (g / (1 + np.exp(-g)) * (h @ up)) @ down
    return normed(x, model.norm)


def tokens(model, n, seed):
    rng = np.random.default_rng(seed + 1)
    angles = rng.uniform(-3, 3, (n, model.dim // 2)).astype(np.float32)
    embeds = rng.standard_normal((n, model.norm.size)).astype(np.float32)
    return embeds, np.cos(angles), np.sin(angles)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("cache", [np.float32, np.float16])
@every_level
@given(
    hidden=st.sampled_from([16, 48, 112]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dim=st.sampled_from([16, 32, 80]),
    mlp=st.sampled_from([16, 80, 144]),
    layers=st.integers(1, 3),
    past=st.integers(0, 40),
    n=st.integers(1, 13),
    seed=st.integers(0, 99),
)
def test_it_is_the_plain_twin(simd, dtype, cache, hidden, kv_heads, group, dim, mlp, layers, past, n, seed):
    model = toy(hidden, kv_heads, group, dim, mlp, layers, seed)
    (keys, values), (own_keys, own_values) = (caches(model, past + n + 3, cache, seed) for _ in range(2))
    inputs = tokens(model, n, seed)
    found = run(kernel(model, dtype).open(keys, values), *inputs, past)
    expected = plain(model, dtype, own_keys, own_values, *inputs, past)
    # A cache in float16 rounds what the two sides differ in the last digit of: one unit there, now and then.
    tolerance = 2e-5 if cache is np.float32 else 4e-3
    np.testing.assert_allclose(found, expected, atol=tolerance)
    for one, other in ((keys, own_keys), (values, own_values)):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, atol=tolerance, rtol=1e-3 if cache is np.float16 else 1e-5)
            np.testing.assert_array_equal(a[:, :, :past], b[:, :, :past])  # what was there stays
            np.testing.assert_array_equal(a[:, :, past + n :], b[:, :, past + n :])


@pytest.mark.parametrize("parts", [[1] * 9, [4, 5], [8, 1], [2, 7]])
def test_tokens_one_by_one_or_together(simd, parts):
    model = toy(64, 2, 2, 32, 96, 3, seed=4)
    step, inputs = kernel(model, "float16"), tokens(model, 9, seed=4)
    whole = run(step.open(*caches(model, 16, np.float32)), *inputs, 3)
    sequence, rows = step.open(*caches(model, 16, np.float32)), []
    for n in parts:
        at = slice(len(rows), len(rows) + n)
        rows.extend(run(sequence, *(each[at] for each in inputs), 3 + at.start))
    np.testing.assert_array_equal(np.stack(rows), whole)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("cache", [np.float32, np.float16])
@every_level
@given(
    lengths=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=2, max_size=6), seed=st.integers(0, 9)
)
def test_sequences_together_are_those_alone_to_the_last_bit(simd, pack, cache, lengths, seed):
    model = toy(64, 2, 2, 32, 128, 2, seed)
    step = kernel(model, "float16", pack=pack)
    inputs = [tokens(model, n, number) for number, (_, n) in enumerate(lengths)]
    pasts, counts = zip(*lengths, strict=True)

    def opened():
        buffers = [caches(model, 40, cache, number) for number in range(len(lengths))]
        return buffers, [step.open(*each) for each in buffers]

    buffers, sequences = opened()
    joined = [np.concatenate(parts) for parts in zip(*inputs, strict=True)]
    together = ops.decoder_step(sequences, list(pasts), list(counts), *joined)
    own_buffers, own = opened()
    alone = [run(one, *each, past) for one, each, past in zip(own, inputs, pasts, strict=True)]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    np.testing.assert_array_equal(np.array(buffers), np.array(own_buffers))


def rounded(matrix, axis, block=64):
    """Blocks along an axis in 255 levels, as float64."""
    blocks = np.stack(np.split(matrix.astype(np.float32), matrix.shape[axis] // block, axis))
    scale = np.abs(blocks).max(axis + 1, keepdims=True) / np.float32(127)
    levels = np.rint(blocks / np.where(scale > 0, scale, 1))
    return np.concatenate(list(levels.astype(np.float64) * scale), axis)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 13])
def test_packed_products_are_those_of_rounded_numbers(simd, dtype, n):
    """The first layer's values without a bias are one such product, which the cache shows."""
    model = toy(128, 2, 1, 32, 64, 1, seed=n)
    model.vectors[0][1][:] = 0
    keys, values = caches(model, n, np.float32)
    embeds, cos, sin = tokens(model, n, n)
    embeds[0, :64] = 0  # a block of nothing
    run(kernel(model, dtype, pack=True).open(keys, values), embeds, cos, sin, 0)
    qkv = widened(stored(model.matrices[0][0], dtype), dtype)
    inputs = normed(embeds, model.vectors[0][0])
    expected = (rounded(inputs, 1) @ rounded(qkv, 0))[:, -64:]
    off = np.abs(values[0][0].swapaxes(0, 1).reshape(n, -1) - expected)
    level = np.abs(inputs).max() * np.abs(qkv).max() / 127  # a number on the verge may go to the level beside
    assert off.max() < level
    assert np.quantile(off, 0.75) < level / 100


def test_packed_steps_stay_close(simd):
    model = toy(256, 2, 2, 64, 768, 5, seed=0)
    inputs = tokens(model, 9, seed=1)
    plainly, packed = (
        run(kernel(model, "float16", pack=pack).open(*caches(model, 32, np.float16)), *inputs, 20)
        for pack in (False, True)
    )
    assert np.linalg.norm(packed - plainly) < 0.04 * np.linalg.norm(plainly)


@pytest.mark.parametrize(("kv_heads", "mlp"), [(2, 768), (4, 128), (1, 768)])  # the last one has no halves
def test_packed_steps_are_the_same_by_any_number_of_threads(simd, kv_heads, mlp):
    model = toy(256, kv_heads, 2, 64, mlp, 3, seed=0)
    found = []
    for n_threads in (1, 2, 3):
        step = kernel(model, "float16", pack=True, n_threads=n_threads)
        buffers = [caches(model, 64, np.float16, number) for number in range(2)]
        sequences = [step.open(*each) for each in buffers]
        read = ops.decoder_step(sequences, [5, 0], [3, 40], *tokens(model, 43, 1), n_out=[1, 2])
        nothing = ops.decoder_step(sequences[:1], [8], [2], *tokens(model, 2, 2), n_out=[0])
        steps = [ops.decoder_step(sequences, [10 + i, 40 + i], [1, 1], *tokens(model, 2, 3 + i)) for i in range(9)]
        assert nothing.shape == (0, 256)
        found.append(np.concatenate([np.concatenate([read, *steps]).ravel(), np.array(buffers).ravel()]))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_packed_steps_hide_no_number_that_is_none(simd, value):
    model = toy(64, 1, 1, 64, 64, 1, seed=0)
    embeds, cos, sin = tokens(model, 2, 0)
    embeds[1, 3] = value
    found = run(kernel(model, "float32", pack=True).open(*caches(model, 4, np.float32)), embeds, cos, sin, 0)
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).any()


def test_sizes_that_cannot_be_packed_are_refused():
    with pytest.raises(ValueError, match="multiples of 64"):
        kernel(toy(64, 1, 2, 16, 48, 1, seed=0), "float32", pack=True)


@pytest.mark.parametrize("value", [0.0, 1e-8, 6e-8, 6.1e-5, 0.1, 1 / 3, 2049, 65504, 65519, 65520, 1e9, np.inf, np.nan])
@pytest.mark.parametrize("sign", [1, -1])
def test_caches_are_rounded_as_numpy_does(simd, value, sign):
    """A value projection of zeros with a bias keeps the bias itself."""
    model = toy(16, 1, 1, 16, 16, 1, seed=0)
    model.matrices[0][0][:] = 0
    model.vectors[0][1][:] = np.float32(sign * value)
    keys, values = caches(model, 2, np.float16)
    run(kernel(model, "float32").open(keys, values), *tokens(model, 1, 0), 0)
    with np.errstate(over="ignore"):
        expected = np.float32(sign * value).astype(np.float16)
    np.testing.assert_array_equal(values[0][0, 0, 0], expected)


def test_attention_far_from_zero_and_not_a_number(simd):
    model = toy(32, 1, 2, 16, 32, 2, seed=1)
    keys, values = caches(model, 20, np.float32)
    keys[0] *= 1e4  # one place takes it all
    embeds, cos, sin = tokens(model, 2, 1)
    own = caches(model, 20, np.float32)
    own[0][0] *= 1e4
    found = run(kernel(model, "float32").open(keys, values), embeds, cos, sin, 10)
    np.testing.assert_allclose(found, plain(model, "float32", *own, embeds, cos, sin, 10), atol=2e-3)
    embeds[1] = np.nan
    found = run(kernel(model, "float32").open(keys, values), embeds, cos, sin, 10)
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()


def test_weights_and_buffers_outlive_their_names(simd):
    model = toy(32, 1, 2, 16, 32, 1, seed=2)
    inputs = tokens(model, 1, 2)
    expected = run(kernel(model, "float16").open(*caches(model, 4, np.float16)), *inputs, 1)
    sequence = kernel(model, "float16").open(*caches(model, 4, np.float16))  # nothing else holds them
    np.zeros(2**20)  # takes the place of what was let go
    np.testing.assert_array_equal(run(sequence, *inputs, 1), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.matrices[0].pop(), "five matrices|has the matrices"),
        (lambda m: m.vectors.pop(), "one number of layers"),
        (lambda m: m.vectors[0].__setitem__(1, m.vectors[0][1][1:]), "a vector does not fit"),
        (lambda m: m.matrices[1].__setitem__(4, m.matrices[1][4].T.copy()), "a matrix does not fit"),
        (lambda m: m.matrices[0].__setitem__(0, m.matrices[0][0].astype(np.float64)), "float32 array"),
        (lambda m: setattr(m, "kv_heads", 3), "multiple of kv_heads"),
        (lambda m: setattr(m, "heads", 0), "multiple of kv_heads"),
        (lambda m: setattr(m, "norm", m.norm[:-1]), "multiples of 16"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    model = toy(32, 1, 2, 16, 48, 2, seed=3)
    change(model)
    with pytest.raises(ValueError, match=message):
        ops.DecoderStep("float32", model.heads, model.kv_heads, EPSILON, model.matrices, model.vectors, model.norm)


def test_inputs_that_do_not_fit_are_refused():
    model = toy(32, 1, 2, 16, 48, 1, seed=3)
    step, (embeds, cos, sin) = kernel(model, "float32"), tokens(model, 2, 3)
    keys, values = caches(model, 4, np.float32)
    with pytest.raises(ValueError, match="must fit the cache"):
        run(step.open(keys, values), embeds, cos, sin, 3)
    with pytest.raises(ValueError, match="must fit the cache"):
        run(step.open(keys, values), embeds, cos, sin, -1)
    with pytest.raises(ValueError, match="must be \\(n, head_dim / 2\\)"):
        run(step.open(keys, values), embeds, cos[:1], sin, 0)
    with pytest.raises(ValueError, match="must be \\(n, hidden\\)"):
        run(step.open(keys, values), embeds[:, 1:].copy(), cos, sin, 0)
    with pytest.raises(ArrayError, match="incompatible"):
        run(step.open(keys, values), embeds.astype(np.float64), cos, sin, 0)
    one, other = step.open(keys, values), kernel(model, "float32").open(keys, values)
    half = step.open(*caches(model, 4, np.float16))
    for sequences, message in (
        ([], "for each sequence"),
        ([one, one], "once"),
        ([one, other], "one decoder"),
        ([one, half], "one type"),
    ):
        with pytest.raises(ArrayError, match=message):
            ops.decoder_step(sequences, [0] * len(sequences), [1] * len(sequences), embeds, cos, sin)
    with pytest.raises(ArrayError, match="for each sequence"):
        ops.decoder_step([one], [0], [1, 1], embeds, cos, sin)
    with pytest.raises(ValueError, match="for every layer"):
        step.open([], [])
    with pytest.raises(ValueError, match="C-contiguous"):
        step.open(keys, [values[0][:, :, :2]])
    with pytest.raises(ValueError, match="of one type"):
        step.open(keys, [values[0].astype(np.float16)])
    keys[0].flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        step.open(keys, values)
