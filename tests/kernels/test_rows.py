import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medreasoner import ops
from medreasoner.errors import ArrayError

DTYPES = ["float32", "float16", "bfloat16"]
every_level = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)


def widened(weight: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (weight.astype(np.uint32) << 16).view(np.float32)
    return weight.astype(np.float32)


def stored(weight: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (weight.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return weight.astype(dtype)


def problem(n_rows: int, dim: int, dtype: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(dim).astype(np.float32), stored(rng.standard_normal((n_rows, dim)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@every_level
@given(n_rows=st.integers(1, 23), dim=st.integers(1, 150), seed=st.integers(0, 99), data=st.data())
def test_projection_equals_numpy_in_double_precision(simd, dtype, n_rows, dim, seed, data):
    hidden, weight = problem(n_rows, dim, dtype, seed)
    rows = np.array(data.draw(st.lists(st.integers(0, n_rows - 1), max_size=30)), np.int32)
    wide = widened(weight, dtype).astype(np.float64)
    # A float32 sum of n terms is off by at most about n units of the sum of magnitudes; ours adds in a tree.
    bound = 1e-6 * (np.abs(wide) @ np.abs(hidden)) + 1e-12
    assert (np.abs(ops.project_rows(hidden, weight, dtype) - wide @ hidden) <= bound).all()
    some = ops.project_rows(hidden, weight, dtype, rows)
    assert some.shape == rows.shape
    assert (np.abs(some - wide[rows] @ hidden) <= bound[rows]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@every_level
@given(n_rows=st.integers(1, 40), dim=st.integers(1, 70), seed=st.integers(0, 99), data=st.data())
def test_selection_is_argmax_and_log_softmax_over_the_rows(simd, dtype, n_rows, dim, seed, data):
    hidden, weight = problem(n_rows, dim, dtype, seed)
    rows = np.array(data.draw(st.lists(st.integers(0, n_rows - 1), min_size=1, unique=True)), np.int32)
    logits = widened(weight, dtype).astype(np.float64)[rows] @ hidden
    logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    token, logprob = ops.select_token(hidden, weight, dtype, rows)
    assert logits[rows.tolist().index(token)] == pytest.approx(logits.max(), abs=1e-4)
    assert logprob == pytest.approx(logprobs.max(), abs=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [3, 37, 256])
def test_equal_rows_tie_and_the_first_asked_for_wins(simd, dtype, dim):
    hidden, weight = problem(1, dim, dtype, seed=5)
    weight = np.repeat(weight, 11, axis=0)  # rows fall on all places of the unrolled loop
    rows = np.array([9, 4, 10, 0, 1, 2, 3], np.int32)
    for n in range(1, 8):
        assert ops.select_token(hidden, weight, dtype, rows[:n])[0] == 9
    assert len(set(ops.project_rows(hidden, weight, dtype).tolist())) == 1


def test_selection_survives_logits_far_from_zero(simd):
    weight = np.array([[1e4], [1e4 - 1], [-1e4]], np.float32)
    token, logprob = ops.select_token(np.ones(1, np.float32), weight, "float32", np.arange(3, dtype=np.int32))
    assert token == 0
    assert logprob == pytest.approx(-np.log1p(np.exp(-1)), abs=1e-6)


@pytest.mark.parametrize("padding", [0, 1, 5])
def test_every_half_precision_pattern_widens_exactly(simd, padding):
    patterns = np.arange(1 << 16, dtype=np.uint16)
    weight = np.concatenate([patterns, patterns[:padding]])[None]  # the padding moves the vector loop's end
    for dtype, stored_as in (("float16", weight.view(np.float16)), ("bfloat16", weight)):
        found = ops.gather_rows(stored_as, dtype, np.zeros(1, np.int64))
        np.testing.assert_array_equal(found, widened(stored_as, dtype))  # NaN equals NaN here


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0,), (2, 0, 3)], ids=str)
def test_gather_equals_fancy_indexing(simd, dtype, shape):
    _, weight = problem(13, 37, dtype, seed=1)
    ids = np.random.default_rng(2).integers(0, 13, shape)
    found = ops.gather_rows(weight, dtype, np.asarray(ids, np.int64))
    np.testing.assert_array_equal(found, widened(weight, dtype)[ids])


def test_a_read_only_memory_map_is_accepted(tmp_path):
    _, weight = problem(5, 8, "bfloat16", seed=0)
    weight.tofile(tmp_path / "weight.bin")
    mapped = np.memmap(tmp_path / "weight.bin", np.uint16, mode="r", shape=(5, 8))
    np.testing.assert_array_equal(ops.gather_rows(mapped, "bfloat16", np.array([3])), widened(weight, "bfloat16")[[3]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_selection_refuses_logits_that_are_not_finite(bad):
    hidden, weight = np.array([bad], np.float32), np.ones((2, 1), np.float32)
    with pytest.raises(ArrayError, match="logit"):
        ops.select_token(hidden, weight, "float32", np.array([0, 1], np.int32))


GOOD = {
    "hidden": np.ones(4, np.float32),
    "weight": np.ones((6, 4), np.float32),
    "dtype": "float32",
    "rows": np.array([0, 5], np.int32),
}


@pytest.mark.parametrize("function", [ops.select_token, ops.project_rows])
@pytest.mark.parametrize(
    "change",
    [
        {"hidden": np.ones(5, np.float32)},
        {"hidden": np.ones(4, np.float64)},
        {"hidden": np.ones(8, np.float32)[::2]},
        {"hidden": np.ones((1, 4), np.float32)},
        {"weight": np.ones((6, 4), np.float64)},
        {"weight": np.ones((6, 8), np.float32)[:, ::2]},
        {"weight": np.ones((6, 4, 1), np.float32)},
        {"weight": np.ones((6, 4), np.float16)},
        {"dtype": "float16"},
        {"dtype": "bfloat16"},
        {"dtype": "int8"},
        {"rows": np.array([0, 6], np.int32)},
        {"rows": np.array([-1], np.int32)},
        {"rows": np.array([0], np.int64)},
        {"rows": np.zeros((1, 1), np.int32)},
    ],
    ids=lambda change: " ".join(f"{k} {getattr(v, 'dtype', '')}{getattr(v, 'shape', v)}" for k, v in change.items()),
)
def test_rows_refuse_what_does_not_fit(function, change):
    with pytest.raises(ArrayError):
        function(**(GOOD | change))


def test_no_rows_project_to_nothing_and_select_nothing():
    none = np.zeros(0, np.int32)
    assert ops.project_rows(GOOD["hidden"], GOOD["weight"], "float32", none).shape == (0,)
    with pytest.raises(ArrayError, match="at least one"):
        ops.select_token(GOOD["hidden"], GOOD["weight"], "float32", none)


@pytest.mark.parametrize("ids", [np.array([6]), np.array([-1]), np.array([2**62]), np.array([0], np.int32)], ids=str)
def test_gather_refuses_ids_outside_the_matrix(ids):
    with pytest.raises(ArrayError, match="ids"):
        ops.gather_rows(GOOD["weight"], "float32", ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_threads", [2, 3])
def test_threads_that_share_a_large_matrix_change_no_bit(dtype, n_threads):
    hidden, weight = problem(4099, 2048, dtype, 0)  # four shares and a bit
    rows = np.random.default_rng(1).permutation(4099).astype(np.int32)
    alone = ops.project_rows(hidden, weight, dtype)
    np.testing.assert_array_equal(ops.project_rows(hidden, weight, dtype, n_threads=n_threads), alone)
    np.testing.assert_array_equal(ops.project_rows(hidden, weight, dtype, rows, n_threads=n_threads), alone[rows])


def test_a_number_of_threads_that_is_none_is_refused():
    hidden, weight = problem(3, 16, "float32", 0)
    with pytest.raises(ArrayError, match="n_threads"):
        ops.project_rows(hidden, weight, "float32", n_threads=0)
