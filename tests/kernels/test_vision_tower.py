"""The vision tower against a plain twin in double precision, written from the architecture's description."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medreasoner import ops

pytestmark = pytest.mark.usefixtures("tile_road")
EPSILON = 1e-6
MERGED = 4


@dataclass
class Toy:
    """A tower of random weights, as the kernel takes them."""

    heads: int
    patches: np.ndarray
    matrices: list[list[np.ndarray]]
    vectors: list[list[np.ndarray]]
    is_full: list[bool]
    last_matrices: list[np.ndarray]
    last_vectors: list[np.ndarray]

    @property
    def hidden(self):
        return self.patches.shape[1]

    def kernel(self, dtype="float32", n_threads=1, *, pack=False):
        return ops.VisionTower(
            dtype,
            "float32",
            self.heads,
            MERGED,
            EPSILON,
            self.patches,
            [[stored(each, dtype) for each in layer] for layer in self.matrices],
            self.vectors,
            self.is_full,
            [stored(each, dtype) for each in self.last_matrices],
            self.last_vectors,
            pack,
            n_threads,
        )


def toy(heads=2, dim=16, mlp=48, patch_dim=12, out=32, is_full=(False, True), seed=0):
    rng = np.random.default_rng(seed)
    hidden = heads * dim
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    matrix = lambda rows, cols: draw(rows, cols) / np.sqrt(rows, dtype=np.float32)  # noqa: E731
    shapes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, mlp), (hidden, mlp), (mlp, hidden)]
    sizes = [3 * hidden, hidden, hidden, mlp, mlp, hidden]  # behind the norm: of qkv, output, norm, gate, up, down
    wide = MERGED * hidden
    return Toy(
        heads,
        matrix(patch_dim, hidden),
        [[matrix(*shape) for shape in shapes] for _ in is_full],
        [[1 + 0.1 * draw(hidden), *(0.3 * draw(size) + (i == 2) for i, size in enumerate(sizes))] for _ in is_full],
        list(is_full),
        [matrix(wide, wide), matrix(wide, out)],
        [1 + 0.1 * draw(hidden), 0.3 * draw(wide), 0.3 * draw(out)],
    )


def stored(array, dtype):
    if dtype == "bfloat16":
        return (array.view(np.uint32) >> 16).astype(np.uint16)
    return array.astype(dtype)


def image(model, n_tokens, window_tokens, seed=0):
    """Patches, tables, an order and its windows: tokens fall into windows at random, the last may be short."""
    rng = np.random.default_rng(seed)
    n = n_tokens * MERGED
    tokens = rng.permutation(n_tokens)
    order = (tokens[:, None] * MERGED + np.arange(MERGED)).reshape(-1)
    starts = np.append(np.arange(0, n, window_tokens * MERGED), n)
    angles = rng.uniform(0, 2 * np.pi, (n, model.hidden // model.heads // 2))
    tables = [np.tile(table(angles), 2).astype(np.float32) for table in (np.cos, np.sin)]
    patches = rng.standard_normal((1, n, model.patches.shape[0])).astype(np.float32)
    return patches, *tables, order, starts


def plain(model, patches, cos, sin, order, starts):
    """(n_tokens, out) in double precision."""
    normed = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale  # noqa: E731
    window = np.empty(len(order), int)
    for index, (start, end) in enumerate(pairwise(starts)):
        window[order[start:end]] = index
    x = patches.astype(np.float64) @ model.patches
    dim = model.hidden // model.heads
    for (qkv, output, gate, up, down), vectors, is_full in zip(
        model.matrices, model.vectors, model.is_full, strict=True
    ):
        norm, qkv_bias, output_bias, mlp_norm, gate_bias, up_bias, down_bias = vectors
        q, k, v = np.split((normed(x, norm) @ qkv + qkv_bias).reshape(len(x), -1, dim), 3, axis=1)
        q, k = (each * cos[:, None] + np.concatenate([-each[..., dim // 2 :], each[..., : dim // 2]], -1) * sin[:, None]
                for each in (q, k))  # fmt: skip
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim)
        if not is_full:
            scores[:, window[:, None] != window[None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1) @ output + output_bias
        h = normed(x, mlp_norm)
        g = h @ gate + gate_bias
        x = x + (g / (1 + np.exp(-g)) * (h @ up + up_bias)) @ down + down_bias
    (first, last), (norm, first_bias, last_bias) = model.last_matrices, model.last_vectors
    h = normed(x, norm).reshape(len(x) // MERGED, -1) @ first + first_bias
    return 0.5 * h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) @ last + last_bias


def apart(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(2, 16), (1, 32), (2, 48), (4, 80), (3, 32)]),
    st.sampled_from([16, 20, 33, 96]),
    st.sampled_from([7, 32, 588]),
    st.integers(1, 40),
    st.integers(1, 12),
    st.lists(st.booleans(), min_size=1, max_size=3),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.integers(1, 3),
)
def test_tokens_are_those_of_the_plain_twin(head, mlp, patch_dim, n_tokens, window, is_full, dtype, n_threads):
    model = toy(*head, mlp=mlp, patch_dim=patch_dim, is_full=tuple(is_full), seed=n_tokens)
    given = image(model, n_tokens, window, seed=window)
    found = model.kernel(dtype, n_threads).run(*given)
    assert found.shape == (1, n_tokens, 32)
    assert apart(found[0], plain(model, given[0][0], *given[1:])) < 0.02


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([(4, 16), (2, 32), (4, 48), (4, 80), (1, 64)]),
    st.sampled_from([16, 48, 64, 100, 192]),
    st.integers(1, 40),
    st.integers(1, 12),
    st.lists(st.booleans(), min_size=1, max_size=3),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.integers(1, 3),
)
def test_packed_it_is_nearly_the_plain_twin(head, mlp, n_tokens, window, is_full, dtype, n_threads):
    model = toy(*head, mlp=mlp, out=64, is_full=tuple(is_full), seed=n_tokens)
    given = image(model, n_tokens, window, seed=window)
    found = model.kernel(dtype, n_threads, pack=True).run(*given)
    assert found.shape == (1, n_tokens, 64)
    assert apart(found[0], plain(model, given[0][0], *given[1:])) < 0.04


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000])
def test_a_weight_that_is_no_number_is_not_rounded_to_one(pack, bits):
    model = toy(heads=4, dim=16, mlp=64, out=64)
    given = image(model, 12, 4)
    for matrix in (model.matrices[1][0], model.matrices[1][4], model.last_matrices[0]):
        before = matrix[3, 5]
        matrix[3, 5] = np.array(bits, np.uint32).view(np.float32)
        assert not np.isfinite(model.kernel(pack=pack).run(*given)).all()
        matrix[3, 5] = before
    assert np.isfinite(model.kernel(pack=pack).run(*given)).all()


def test_numbers_of_another_byte_order_are_refused():
    model = toy()
    model.patches = model.patches.astype(">f4")
    with pytest.raises(ValueError, match="byte order"):
        model.kernel()


def test_packed_sizes_are_whole_blocks():
    for model in (toy(heads=2, dim=16, out=64), toy(heads=4, dim=16, out=32)):
        with pytest.raises(ValueError, match="multiples of 64 to be packed"):
            model.kernel(pack=True)


def test_rounding_is_that_of_bfloat16():
    model = toy()
    given = image(model, 30, 9)
    assert 1e-4 < apart(model.kernel().run(*given)[0], plain(model, given[0][0], *given[1:])) < 0.01


@pytest.mark.parametrize("pack", [False, True])
def test_threads_and_callers_change_no_bit(pack):
    model = toy(heads=4, dim=32, mlp=100, out=64, is_full=(False, True, False))
    given = image(model, 50, 9)
    expected = model.kernel(pack=pack).run(*given)
    for n_threads in (2, 3, 8):
        kernel = model.kernel(n_threads=n_threads, pack=pack)
        np.testing.assert_array_equal(kernel.run(*given), expected)
        np.testing.assert_array_equal(kernel.run(*given, True), expected)
        with ThreadPoolExecutor(6) as pool:
            calls = [pool.submit(kernel.run, *given, alone) for alone in [False, True, False, False, True] * 6]
            for found in (call.result() for call in calls):
                np.testing.assert_array_equal(found, expected)


def test_images_of_other_sizes_in_turns():
    model = toy()
    kernel = model.kernel(n_threads=2)
    sizes = (3, 31, 1, 8, 17, 3, 40, 31)
    for n_tokens in sizes * 2:
        given = image(model, n_tokens, 4, seed=n_tokens)
        np.testing.assert_array_equal(kernel.run(*given), model.kernel().run(*given))


def test_images_of_a_batch_are_read_one_by_one():
    model = toy()
    patches, *rest = image(model, 12, 4)
    batch = np.concatenate([patches, 2 * patches, -patches])
    found = model.kernel().run(batch, *rest)
    for i in range(3):
        one = np.ascontiguousarray(batch[i : i + 1])
        np.testing.assert_array_equal(found[i : i + 1], model.kernel().run(one, *rest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: (g[0][0], *g[1:]), "patches must be"),
        (lambda g: (g[0][:, :-1], *g[1:]), "cos and sin must be"),
        (lambda g: (g[0], g[1][:, :-1], *g[2:]), "cos and sin must be"),
        (lambda g: (*g[:3], g[3][:-4], g[4]), "order must be"),
        (lambda g: (*g[:3], np.roll(g[3], 1), g[4]), "must lie together"),
        (lambda g: (*g[:3], g[3] + 4 * 12, g[4]), "must lie together"),
        (lambda g: (*g[:3], g[3] * 0 + np.arange(48) % 4, g[4]), "may be there once"),
        (lambda g: (*g[:4], g[4][:1]), "window_starts must be"),
        (lambda g: (*g[:4], g[4][:-1]), "from 0 to n_patches"),
        (lambda g: (*g[:4], np.array([0, 16, 16, 48])), "must ascend"),
        (lambda g: (*g[:4], np.array([0, 60, 30, 48])), "must ascend"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    model = toy()
    given = tuple(np.ascontiguousarray(each) for each in change(image(model, 12, 4)))
    with pytest.raises(ValueError, match=message):
        model.kernel().run(*given)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 1, "dim": 24}, "multiples of 32"),
        ({"heads": 4, "dim": 24}, "head_dim of 16"),
        ({"out": 40}, "multiples of 32"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        toy(**sizes).kernel()


def test_weights_that_do_not_fit_are_refused():
    model = toy()
    model.matrices[1][3] = model.matrices[1][3][:, :-1].copy()
    with pytest.raises(ValueError, match="does not fit the others"):
        model.kernel()
    model = toy()
    model.vectors[0][4] = model.vectors[0][4][:-1].copy()
    with pytest.raises(ValueError, match="does not fit the matrices"):
        model.kernel()
