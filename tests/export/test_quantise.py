"""Matrices of few bits against ONNX Runtime, which reads them, and against the arithmetic that they stand for."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from medreasoner.errors import BundleError
from medreasoner_export.graph import FLOAT, GraphBuilder
from medreasoner_export.quantise import BLOCK, Bits, dequantise, quantise


@given(
    rows=st.integers(1, 5),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 99),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    bits=st.sampled_from([4, 8]),
)
def test_values_are_rounded_to_the_nearest_level_and_zero_stays(
    rows: int, blocks: int, seed: int, shift: float, bits: Bits
) -> None:
    rng = np.random.default_rng(seed)
    matrix = (rng.standard_normal((rows, blocks * BLOCK)) + shift).astype(np.float32)
    matrix[:, 3] = 0
    found = dequantise(quantise(matrix, "m", bits))
    parts = matrix.reshape(rows, blocks, BLOCK)
    step = (np.maximum(parts.max(-1), 0) - np.minimum(parts.min(-1), 0)) / (2**bits - 1)
    error, step = np.abs(found - matrix).reshape(rows, blocks, BLOCK), step[..., None]
    # Zero is a level, so that the ends of the range may lie half a step outside of the levels: only they are off more.
    low, high = (getattr(found.reshape(parts.shape), side)(-1)[..., None] for side in ("min", "max"))
    inside = (parts >= low) & (parts <= high)
    assert (error[inside] <= (0.501 * step + 1e-6).repeat(BLOCK, -1)[inside]).all()
    assert (error <= 1.01 * step + 1e-6).all()
    assert not found[:, 3].any()


def test_what_the_levels_hold_exactly_comes_back_exactly() -> None:
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 16, (70, 3, BLOCK))
    levels[..., 0], levels[..., 1], levels[..., 2] = 0, 15, 6
    matrix = ((levels - 6) * 0.25).astype(np.float32).reshape(70, -1)
    np.testing.assert_array_equal(dequantise(quantise(matrix, "m", 4)), matrix)


@pytest.mark.parametrize("matrix", [np.zeros((3, 64), np.float32), np.full((3, 64), -2.5, np.float32)])
def test_constant_blocks_are_exact(matrix: np.ndarray) -> None:
    np.testing.assert_allclose(dequantise(quantise(matrix, "m", 4)), matrix, rtol=1e-6)


@pytest.mark.parametrize("matrix", [np.full((2, 32), 1e39), np.array([[3e38, -3e38] * 16], np.float32)])
def test_values_that_overflow_are_refused(matrix: np.ndarray) -> None:
    with pytest.raises(BundleError, match="weight m: values beyond"):
        quantise(matrix, "m", 4)


def test_columns_must_divide_into_blocks() -> None:
    with pytest.raises(BundleError, match="weight m: 40 columns are no multiple of 32"):
        quantise(np.zeros((2, 40), np.float32), "m", 4)


def _product(graph: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def _linear(weight: np.ndarray, bias: np.ndarray | None, **options: Any) -> onnx.ModelProto:
    g = GraphBuilder("g", **options)
    x = g.input("x", FLOAT, ("n", weight.shape[1]))
    g.op("Identity", g.linear(x, "layer", weight, bias), out="y")
    g.output("y", TensorProto.FLOAT, ("n", weight.shape[0]))
    return g.model({})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(48, 96), (33, 160), (64, 32)])  # odd numbers of rows and of blocks among them
def test_onnx_runtime_multiplies_with_the_levels(shape: tuple[int, int], bits: Bits) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape).astype(np.float32)
    bias = rng.standard_normal(shape[0]).astype(np.float32)
    x = rng.standard_normal((5, shape[1])).astype(np.float32)
    graph = _linear(weight, bias, precision=f"int{bits}")
    (node,) = (node for node in graph.graph.node if node.op_type == "MatMulNBits")
    expected = x @ dequantise(quantise(weight, "m", bits)).T + bias
    assert np.abs(_product(graph, x) - expected).max() < 0.02 * np.abs(expected).max()  # activations of eight bits
    level = next(each for each in node.attribute if each.name == "accuracy_level")
    level.CopyFrom(helper.make_attribute("accuracy_level", 1))  # and without them
    np.testing.assert_allclose(_product(graph, x), expected, atol=1e-4)


def test_a_matrix_that_does_not_divide_stays_as_it_is() -> None:
    rng = np.random.default_rng(0)
    g = GraphBuilder("g", precision="int4")
    x = g.linear(g.input("x", FLOAT, ("n", 40)), "odd", rng.standard_normal((64, 40)).astype(np.float32))
    g.op("Identity", g.linear(x, "even", rng.standard_normal((8, 64)).astype(np.float32)), out="y")
    g.output("y", TensorProto.FLOAT, ("n", 8))
    assert [node.op_type for node in g.model({}).graph.node] == ["MatMul", "MatMulNBits", "Identity"]


def test_four_bits_without_one_matrix_that_divides_are_refused() -> None:
    with pytest.raises(BundleError, match="g: no matrix has columns that are a multiple of 32"):
        _linear(np.zeros((8, 40), np.float32), None, precision="int4")
