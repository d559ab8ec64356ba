"""Attention between tokens and places against its plain form in 64 bits, and prompts in a batch against single ones."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medreasoner_export import SegmenterOptions, export_segmenter
from medreasoner_export.graph import FLOAT, GraphBuilder
from medreasoner_export.sam_attention import ImageAttention

Array = npt.NDArray[Any]
CHANNELS = 12
TOLERANCE = 1e-5


class Attention:
    """Random weights of one attention, as the graph computes it and as it is defined."""

    def __init__(self, rng: np.random.Generator, heads: int, size: int) -> None:
        self.heads, self.size, inner = heads, size, heads * size
        shapes = {f"{part}_proj": (inner, CHANNELS) for part in "qkv"} | {"out_proj": (CHANNELS, inner)}
        self.weights = {f"a.{name}.weight": rng.standard_normal(shape) / 3 for name, shape in shapes.items()}
        self.weights |= {f"a.{name}.bias": rng.standard_normal(shape[0]) for name, shape in shapes.items()}

    def tensor(self, name: str, *shape: int) -> Array:
        assert self.weights[name].shape == shape
        return self.weights[name].astype(np.float32)

    def linear(self, x: Array, name: str) -> Array:
        product: Array = x @ self.weights[f"a.{name}.weight"].T + self.weights[f"a.{name}.bias"]
        return product

    def plain(self, queries: Array, keys: Array, values: Array) -> Array:
        def split(x: Array) -> Array:
            return x.reshape(*x.shape[:2], self.heads, self.size).transpose(0, 2, 1, 3)

        q, k, v = (split(self.linear(x, f"{part}_proj")) for part, x in (("q", queries), ("k", keys), ("v", values)))
        scores = q @ k.transpose(0, 1, 3, 2) * self.size**-0.5
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        seen = (shares / shares.sum(-1, keepdims=True)) @ v
        return self.linear(seen.transpose(0, 2, 1, 3).reshape(*seen.shape[::2], -1), "out_proj")

    def graph(self, *, from_tokens: bool) -> ort.InferenceSession:
        g = GraphBuilder("attention")
        tokens, looks = (g.input(name, FLOAT, ("batch", "T", CHANNELS)) for name in ("tokens", "more"))
        places, values = (g.input(name, FLOAT, ("images", "P", CHANNELS)) for name in ("places", "values"))
        batch = g.op("Shape", tokens, start=0, end=1)
        shape = g.op("Concat", batch, g.ints(-1, self.heads, self.size), axis=0)
        attention = ImageAttention(
            g=g, tensor=self.tensor, name="a.", out="out_proj", channels=CHANNELS, inner=self.heads * self.size,
            heads=self.heads, by_head=shape,
        )  # fmt: skip
        rows, more = (g.op("Reshape", each, g.ints(-1, CHANNELS)) for each in (tokens, looks))
        found = (
            attention.from_tokens(rows, places, values) if from_tokens else attention.from_places(places, rows, more)
        )
        g.op("Identity", found, out="found")
        g.output("found", FLOAT, ("rows", CHANNELS) if from_tokens else ("batch", "P", CHANNELS))
        return ort.InferenceSession(g.model({}).SerializeToString(), providers=["CPUExecutionProvider"])


@settings(deadline=None, max_examples=30)
@given(
    heads=st.integers(1, 4), size=st.sampled_from([1, 4, 6]), batch=st.integers(1, 3), shared=st.booleans(),
    n_tokens=st.integers(1, 9), n_places=st.integers(1, 17), seed=st.integers(0, 999),
)  # fmt: skip
def test_both_directions_equal_attention_as_it_is_defined(
    heads: int, size: int, batch: int, shared: bool, n_tokens: int, n_places: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    attention = Attention(rng, heads, size)
    tokens, more = rng.standard_normal((2, batch, n_tokens, CHANNELS)).astype(np.float32)
    places, values = rng.standard_normal((2, 1 if shared else batch, n_places, CHANNELS)).astype(np.float32)
    every = [np.repeat(each, batch // len(each), axis=0) for each in (places, values)]
    feed = {"tokens": tokens, "more": more, "places": places, "values": values}
    for from_tokens, expected in (
        (True, attention.plain(tokens, *every).reshape(-1, CHANNELS)),
        (False, attention.plain(every[0], tokens, more)),
    ):
        session = attention.graph(from_tokens=from_tokens)
        found = session.run(None, {each.name: feed[each.name] for each in session.get_inputs()})[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.fixture(scope="module", params=["single", "multimask", "box_mask"])
def decoder(request: pytest.FixtureRequest, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("decoder")
    wanted = {} if request.param == "single" else {request.param: True}
    export_segmenter(toy / "segmenter", out, options=SegmenterOptions(settings=wanted))
    return ort.InferenceSession(out / "decoder.onnx", providers=["CPUExecutionProvider"])


@settings(deadline=None, max_examples=25)
@given(batch=st.integers(1, 8), n_points=st.integers(1, 8), seed=st.integers(0, 999))
def test_prompts_over_one_image_are_answered_as_if_alone(decoder: Any, batch: int, n_points: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    _, channels, side, _ = decoder.get_inputs()[0].shape
    embedding = rng.standard_normal((1, channels, side, side), dtype=np.float32)
    points = rng.uniform(0, 64, (batch, n_points, 2)).astype(np.float32)
    labels = rng.integers(-1, 4, (batch, n_points))  # of one prompt, and so also with and without a box in one batch
    together = decoder.run(None, {"image_embedding": embedding, "points": points, "labels": labels})
    for row in range(batch):
        one = slice(row, row + 1)
        alone = decoder.run(None, {"image_embedding": embedding, "points": points[one], "labels": labels[one]})
        for found, expected in zip(together, alone, strict=True):
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found[one], expected, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_onnx_runtime_makes_no_slow_norms_of_the_graphs(toy: Path, tmp_path: Path, graph: str) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(toy / f"bundle/segmenter/{graph}.onnx", options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert "LayerNormalization" in kinds
    assert "SkipLayerNormalization" not in kinds


def test_no_sum_of_more_than_two(decoder: Any) -> None:
    """On CUDA, ONNX Runtime 1.31 gets a Sum of three wrong whose first two widen each other; no test here would see."""
    graph = onnx.load(decoder._model_path).graph
    sums = [node for node in graph.node if node.op_type == "Sum"]
    assert sums, "the LayerNormalizations' sums are of this kind"
    assert {len(node.input) for node in sums} == {2}
