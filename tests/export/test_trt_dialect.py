"""The graphs that engines are built from, against the bundle's own; ONNX Runtime runs standard operators too."""

import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from medreasoner.bundle import Bundle, load_bundle
from medreasoner.errors import BundleError
from medreasoner.ort_session import OrtSession
from medreasoner.providers import RuntimeOptions
from medreasoner.reasoner.rotary import rotary_tables
from medreasoner.reasoner.static_cache import StaticDecoder, static_places
from medreasoner.reasoner.vision import vision_grid
from medreasoner_export import (
    EngineLimits,
    ReasonerOptions,
    SegmenterOptions,
    build_bundle,
    export_reasoner,
    export_segmenter,
)
from medreasoner_export.calibrate import input_ranges, segmenter_images
from medreasoner_export.graph import save_graph, weights_file
from medreasoner_export.parity_reasoner import DecoderRun
from medreasoner_export.trt_dialect import trt_graph
from medreasoner_export.trt_plan import EnginePlan, engine_plans

Array = np.ndarray[Any, Any]
GRAPHS = ("vision", "decoder", "encoder", "mask_decoder")
# Float32 sums in another order differ by about 1e-6 of the largest value.
FLOAT32 = 1e-5
# Products of ten bits of fraction, float32 between them. What an engine makes of it was not measured: that needs a GPU.
FLOAT16 = 5e-3


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """nano in float32; the bundle that ships computes in float16."""
    source = Path(__file__).parents[2] / "models" / "nano"
    if not source.is_dir():
        pytest.skip(f"{source} is not there: the checkpoint of nano lies beside the sources only")
    folder = tmp_path_factory.mktemp("nano")
    export_reasoner(source / "reasoner", folder / "r")
    export_segmenter(source / "segmenter", folder / "s")
    return load_bundle(build_bundle(folder / "r", folder / "s", folder / "b", name="nano"))


@pytest.fixture(params=["toy", "nano"])
def model(request: pytest.FixtureRequest, bundle: Bundle) -> Bundle:
    found: Bundle = bundle if request.param == "toy" else request.getfixturevalue("nano")
    return found


def plan_of(bundle: Bundle, name: str, *, half: bool = False, **limits: Any) -> EnginePlan:
    plans = engine_plans(bundle, EngineLimits(**limits), "float16" if half else "float32")
    return next(plan for plan in plans if plan.name == name)


def written(bundle: Bundle, name: str, out: Path, *, half: bool = False, outside: bool = False, **limits: Any) -> Path:
    """The graph in the dialect, as a file."""
    plan, path = plan_of(bundle, name, half=half, **limits), out / f"{name}.onnx"
    with weights_file(path, wanted=outside) as file:
        save_graph(trt_graph(bundle.path(plan.source), plan, half=half, metadata={}, outside=file), path)
    return path


class MatMul(OpRun):
    """The evaluator's, with the product of halves by BLAS, which NumPy does not ask for it.

    In double precision, so that what is rounded in the end does not depend on the order of the sums.
    """

    op_domain = ""

    def _run(self, a: Array, b: Array) -> tuple[Array]:
        if a.dtype == np.float16:
            return (np.matmul(a, b, dtype=np.float64).astype(np.float16),)
        return (np.matmul(a, b),)


def evaluator(path: Path) -> ReferenceEvaluator:
    return ReferenceEvaluator(onnx.load(path), new_ops=[MatMul])


def both(bundle: Bundle, name: str, out: Path, *, half: bool = False, **options: Any) -> tuple[Any, Any]:
    """What runs the bundle's graph, and the dialect's.

    On the CPU, ONNX Runtime takes a cast to float16 and back out again, and with it the rounding. Graphs in half
    precision are thus run by ONNX's own evaluator, which computes as they say.
    """
    path = written(bundle, name, out, half=half, **options)
    own = ort.InferenceSession(bundle.path(plan_of(bundle, name).source), providers=["CPUExecutionProvider"])
    if half:
        return own, evaluator(path)
    return own, ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def relative_error(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def errors(own: Any, dialect: Any, inputs: Mapping[str, Array]) -> list[float]:
    """Of each output."""
    return [relative_error(a, b) for a, b in zip(dialect.run(None, inputs), own.run(None, inputs), strict=True)]


def vision_inputs(bundle: Bundle, batch: int, rows: int, columns: int) -> dict[str, Array]:
    v = bundle.spec.reasoner.vision
    unit = v.patch_size * v.merge_size
    grid = vision_grid(
        height=rows * unit, width=columns * unit, patch=v.patch_size, merge=v.merge_size, window=v.window_size,
        head_dim=v.head_dim,
    )  # fmt: skip
    shape = (batch, rows * columns * v.merge_size**2, 3 * v.patch_size**2)
    return {"patches": np.random.default_rng(batch).standard_normal(shape, dtype=np.float32), **grid.inputs()}


def own_grid(bundle: Bundle) -> tuple[int, int]:
    v = bundle.spec.reasoner.vision
    unit = v.patch_size * v.merge_size
    return v.resize.height // unit, v.resize.width // unit  # type: ignore[union-attr]


def prompts(bundle: Bundle, batch: int, n_points: int) -> dict[str, Array]:
    rng = np.random.default_rng(n_points)
    graph = onnx.load(bundle.path(bundle.spec.segmenter.graphs.decoder)).graph
    _, channels, side, _ = (each.dim_value for each in graph.input[0].type.tensor_type.shape.dim)
    labels = np.array([1, 1, 2, 3, -1, 0, 1, -1][-n_points:] if n_points > 4 else [1, 1, 2, 3][-n_points:])
    return {
        "image_embedding": rng.standard_normal((1, channels, side, side), dtype=np.float32),
        "points": rng.uniform(0, 64, (batch, n_points, 2)).astype(np.float32),
        "labels": np.tile(labels, (batch, 1)),
    }


def pixels(bundle: Bundle, batch: int) -> dict[str, Array]:
    resize = bundle.spec.segmenter.resize
    side = getattr(resize, "size", None) or getattr(resize, "width", 0)
    return {"pixel_values": np.random.default_rng(3).standard_normal((batch, 3, side, side), dtype=np.float32)}


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", GRAPHS)
def test_only_standard_operators_are_left(model: Bundle, name: str, half: bool, tmp_path: Path) -> None:
    graph = onnx.load(written(model, name, tmp_path, half=half))
    onnx.checker.check_model(graph, full_check=True)
    assert [each.domain for each in graph.opset_import] == [""]
    schemas = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert {node.op_type for node in graph.graph.node} <= schemas
    assert {each.key: each.value for each in graph.metadata_props}["dialect"] == "trt"
    types = {each.name: each.data_type for each in graph.graph.initializer}
    products = [node for node in graph.graph.node if node.op_type in ("MatMul", "Conv", "ConvTranspose")]
    expected = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    assert {types[each] for node in products for each in node.input if each in types} == {expected}


@pytest.mark.parametrize("name", GRAPHS)
def test_what_the_bundle_fixes_is_a_number_and_the_rest_has_a_profile(model: Bundle, name: str) -> None:
    plan = plan_of(model, name, max_batch=5, max_images=3, max_chunk=64)
    free = {size for each in plan.inputs for size in each.shape if isinstance(size, str)}
    assert free == {
        "vision": {"batch"}, "encoder": {"batch"}, "mask_decoder": {"batch", "n_points"}, "decoder": {"batch", "seq"},
    }[name]  # fmt: skip
    spec = model.spec.reasoner
    shapes = {each.name: each.shape for each in plan.inputs}
    if name == "decoder":
        step, read = plan.profiles
        assert (step["batch"].most, step["seq"].most, read["batch"].most, read["seq"].most) == (5, 1, 1, 64)
        assert shapes["past_key.0"] == ("batch", spec.n_kv_heads, spec.max_length, spec.head_dim)
        assert len(shapes) == 5 + 2 * spec.n_layers
    elif name == "vision":
        rows, columns = own_grid(model)
        assert shapes["patches"] == ("batch", rows * columns * spec.vision.merge_size**2, 3 * spec.vision.patch_size**2)
        assert plan.profiles[0]["batch"].to_json() == [1, 1, 3]


@pytest.mark.parametrize(
    ("batch", "half", "bound"),
    [(1, False, FLOAT32), (3, False, FLOAT32), (1, True, FLOAT16)],
    ids=["one", "three", "fp16"],
)
def test_vision_equals_the_bundles(model: Bundle, batch: int, half: bool, bound: float, tmp_path: Path) -> None:
    own, dialect = both(model, "vision", tmp_path, half=half)
    (error,) = errors(own, dialect, vision_inputs(model, batch, *own_grid(model)))
    assert error < bound
    assert (error > FLOAT32) is half  # rounding is there where it was asked for


@pytest.mark.parametrize(
    ("batch", "half", "bound"),
    [(1, False, FLOAT32), (3, False, FLOAT32), (1, True, FLOAT16)],
    ids=["one", "three", "fp16"],
)
def test_the_image_encoder_equals_the_bundles(
    model: Bundle, batch: int, half: bool, bound: float, tmp_path: Path
) -> None:
    own, dialect = both(model, "encoder", tmp_path, half=half)
    (error,) = errors(own, dialect, pixels(model, batch))
    assert error < bound
    assert (error > FLOAT32) is half


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 0.02), ("int8", 0.05)])
def test_bundles_of_other_precisions_are_rewritten_in_float32(
    toy: Path, tmp_path: Path, precision: Any, bound: float
) -> None:
    export_reasoner(toy / "reasoner", tmp_path / "r", options=ReasonerOptions(precision=precision))
    export_segmenter(toy / "segmenter", tmp_path / "s", options=SegmenterOptions(precision=precision))
    bundle = load_bundle(build_bundle(tmp_path / "r", tmp_path / "s", tmp_path / "b", name="other"))
    for name, inputs in (("vision", vision_inputs(bundle, 1, *own_grid(bundle))), ("encoder", pixels(bundle, 1))):
        own, dialect = both(bundle, name, tmp_path)
        assert 0 < max(errors(own, dialect, inputs)) < bound, name
    found, expected = Decoders(bundle, tmp_path).step(*tokens(bundle, 1, 20))
    assert 0 < relative_error(found, expected) < bound
    graph = onnx.load(written(bundle, "decoder", tmp_path))
    reals = {each.data_type for each in graph.graph.initializer} - {TensorProto.INT64}
    assert reals == {TensorProto.FLOAT}


@pytest.mark.parametrize(("half", "bound"), [(False, FLOAT32), (True, FLOAT16)], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("batch", "n_points"), [(1, 4), (3, 2), (8, 1), (2, 8)])
def test_the_mask_decoder_equals_the_bundles(
    model: Bundle, batch: int, n_points: int, half: bool, bound: float, tmp_path: Path
) -> None:
    own, dialect = both(model, "mask_decoder", tmp_path, half=half)
    assert max(errors(own, dialect, prompts(model, batch, n_points))) < bound


@pytest.mark.parametrize(("half", "bound"), [(False, FLOAT32), (True, FLOAT16)], ids=["fp32", "fp16"])
def test_a_box_drawn_into_the_mask_prompt_equals_the_bundles(
    toy: Path, tmp_path: Path, half: bool, bound: float
) -> None:
    options = SegmenterOptions(settings={"box_mask": True})
    export_segmenter(toy / "segmenter", tmp_path / "s", options=options)
    export_reasoner(toy / "reasoner", tmp_path / "r")
    drawn = load_bundle(build_bundle(tmp_path / "r", tmp_path / "s", tmp_path / "b", name="drawn"))
    own, dialect = both(drawn, "mask_decoder", tmp_path, half=half)
    assert max(errors(own, dialect, prompts(drawn, 3, 4))) < bound


class EvaluatedSession:
    """A `Session` on ONNX's evaluator, with buffers that are arrays."""

    providers = ("onnx.reference",)

    def __init__(self, path: Path) -> None:
        self.evaluator = evaluator(path)

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.zeros(shape, dtype)

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> "EvaluatedSession":
        self.inputs, self.outputs = inputs, outputs
        return self

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        names = self.evaluator.output_names
        results = dict(zip(names, self.evaluator.run(None, {**inputs, **self.inputs}), strict=True))
        for name, buffer in self.outputs.items():
            assert results[name].dtype == buffer.dtype
            buffer[...] = results.pop(name)
        return results


class Decoders:
    """The bundle's decoder and the dialect's, fed with the same tokens."""

    def __init__(self, bundle: Bundle, folder: Path, *, batch: int = 1, half: bool = False, chunk: int = 512) -> None:
        self.spec = spec = bundle.spec.reasoner
        self.own = DecoderRun(
            ort.InferenceSession(bundle.path(spec.graphs.decoder), providers=["CPUExecutionProvider"]),
            spec,
            batch=batch,
        )
        path = written(bundle, "decoder", folder, half=half)
        options = RuntimeOptions(device="cpu", n_threads=2)
        session: Any = EvaluatedSession(path) if half else OrtSession(path, options)
        static = StaticDecoder(session, capacity=spec.max_length, chunk=chunk, dtype=np.float16 if half else np.float32)
        shape = (batch, spec.n_kv_heads, spec.max_length, spec.head_dim)
        names = [f"{kind}.{layer}" for layer in range(spec.n_layers) for kind in ("key", "value")]
        buffers = {name: static.allocate(shape, np.float32) for name in names}
        self.binding = static.bind(
            {f"past_{name}": each for name, each in buffers.items()},
            {f"present_{name}": each for name, each in buffers.items()},
        )

    def step(self, embeds: Array, positions: Array) -> tuple[Array, Array]:
        """Hidden states of the dialect's and of the bundle's."""
        expected = self.own.step(embeds, positions)
        batch, seq, _ = embeds.shape
        cos, sin = rotary_tables(
            positions.reshape(3, -1), head_dim=self.spec.head_dim, theta=self.spec.rope_theta,
            sections=self.spec.mrope_section,
        )  # fmt: skip
        inputs = {
            "inputs_embeds": embeds,
            "rotary_cos": cos,
            "rotary_sin": sin,
            "rotary_ids": np.arange(batch * seq).reshape(batch, seq),
            "seqlens_k": self.own.lengths - 1,
        }
        return self.binding.run(inputs)["hidden_states"], expected


def tokens(bundle: Bundle, batch: int, n: int) -> tuple[Array, Array]:
    """Embeddings, and positions that differ between the axes as in an image."""
    rng = np.random.default_rng(n)
    embeds = rng.standard_normal((batch, n, bundle.spec.reasoner.hidden_dim), dtype=np.float32)
    return embeds, np.sort(rng.integers(0, 2 * n, (3, batch, n)), axis=-1)


@pytest.mark.parametrize(
    ("sizes", "half", "bound"),
    [
        ((40,), False, FLOAT32),
        ((17, 20, 3), False, FLOAT32),
        ((20, *[1] * 20), False, FLOAT32),
        ((12, 1, 1), True, FLOAT16),
    ],
    ids=["whole", "chunks", "steps", "fp16"],
)
def test_hidden_states_equal_the_bundles(
    model: Bundle, sizes: tuple[int, ...], half: bool, bound: float, tmp_path: Path
) -> None:
    run = Decoders(model, tmp_path, half=half, chunk=16)  # shorter than the prompt: several runs of the engine
    embeds, positions = tokens(model, 1, sum(sizes))
    found, expected, start = [], [], 0
    for size in sizes:
        a, b = run.step(embeds[:, start : start + size], positions[:, :, start : start + size])
        found.append(a)
        expected.append(b)
        start += size
    assert relative_error(np.concatenate(found, 1), np.concatenate(expected, 1)) < bound


@pytest.mark.parametrize(("half", "bound"), [(False, FLOAT32), (True, FLOAT16)], ids=["fp32", "fp16"])
def test_rows_of_different_length_decode_as_if_alone(model: Bundle, half: bool, bound: float, tmp_path: Path) -> None:
    lengths = (9, 5, 12)
    embeds, positions = tokens(model, 3, 16)
    alone = []
    for row, length in enumerate(lengths):
        run = Decoders(model, tmp_path, half=half)
        run.step(embeds[[row], :length], positions[:, [row], :length])
        parts = [run.step(embeds[[row], i : i + 1], positions[:, [row], i : i + 1]) for i in range(length, length + 3)]
        alone.append((np.concatenate([a for a, _ in parts], 1)[0], np.concatenate([b for _, b in parts], 1)[0]))
    together = Decoders(model, tmp_path, batch=3, half=half)
    together.step(embeds[:, :12], positions[:, :, :12])  # two rows are padded at their right
    together.own.lengths[:] = lengths
    for step in range(3):
        at = [length + step for length in lengths]
        new = np.stack([embeds[row, i] for row, i in enumerate(at)])[:, None]
        places = np.stack([positions[:, row, i] for row, i in enumerate(at)], axis=1)[:, :, None]
        found, expected = together.step(new, places)
        assert relative_error(found, expected) < bound
        for row in range(3):
            assert relative_error(found[row, 0], alone[row][0][step]) < (1e-3 if half else FLOAT32)
            assert relative_error(found[row, 0], alone[row][1][step]) < bound


def test_a_buffer_holds_up_to_its_last_place(bundle: Bundle, tmp_path: Path) -> None:
    run = Decoders(bundle, tmp_path)
    embeds, positions = tokens(bundle, 1, bundle.spec.reasoner.max_length)
    run.step(embeds[:, :-1], positions[:, :, :-1])
    found, expected = run.step(embeds[:, -1:], positions[:, :, -1:])
    assert relative_error(found, expected) < FLOAT32


@pytest.mark.parametrize("name", ["inputs_embeds", "rotary_cos", "rotary_sin", "write_positions", "attention_mask"])
def test_decoder_parity_breaks_when_an_input_is_disturbed(bundle: Bundle, name: str, tmp_path: Path) -> None:
    spec = bundle.spec.reasoner
    embeds, positions = tokens(bundle, 1, 12)
    cos, sin = rotary_tables(
        positions[:, 0], head_dim=spec.head_dim, theta=spec.rope_theta, sections=spec.mrope_section
    )
    places, mask = static_places(np.array([0]), 12, spec.max_length)
    inputs: dict[str, Array] = {
        "inputs_embeds": embeds, "rotary_cos": cos[None], "rotary_sin": sin[None], "write_positions": places,
        "attention_mask": mask,
    }  # fmt: skip
    shape = (1, spec.n_kv_heads, spec.max_length, spec.head_dim)
    for layer in range(spec.n_layers):
        inputs |= {f"past_{kind}.{layer}": np.ones(shape, np.float32) for kind in ("key", "value")}
    session = ort.InferenceSession(written(bundle, "decoder", tmp_path), providers=["CPUExecutionProvider"])
    plain = session.run(["hidden_states"], inputs)[0]
    disturbed = inputs[name].copy()
    if name == "write_positions":
        disturbed[0, 3] = 40
    elif name == "attention_mask":
        disturbed[0, 5, 20] = True
    else:
        disturbed[0, 4] *= 0.5
    found = session.run(["hidden_states"], inputs | {name: disturbed})[0]
    assert relative_error(found, plain) > 1e-3


def test_an_image_of_any_size_has_a_profile(toy: Path, tmp_path: Path) -> None:
    smart = {"rule": "smart", "min_pixels": 28 * 28, "max_pixels": 40 * 28 * 28, "factor": 28}
    export_reasoner(toy / "reasoner", tmp_path / "reasoner", options=ReasonerOptions(settings={"resize": smart}))
    export_segmenter(toy / "segmenter", tmp_path / "segmenter")
    bundle = load_bundle(build_bundle(tmp_path / "reasoner", tmp_path / "segmenter", tmp_path / "bundle", name="smart"))
    own, dialect = both(bundle, "vision", tmp_path)
    plan = plan_of(bundle, "vision")
    (profile,) = plan.profiles
    for rows, columns in ((5, 8), (1, 40), (40, 1), (6, 6), (1, 1)):
        inputs = vision_inputs(bundle, 2, rows, columns)
        assert errors(own, dialect, inputs)[0] < FLOAT32
        for each in plan.inputs:
            least, _, most = each.sizes(profile)
            assert all(a <= size <= b for a, size, b in zip(least, inputs[each.name].shape, most, strict=True))
    only = plan_of(bundle, "vision", image_size=(224, 140))
    assert {size for each in only.inputs for size in each.shape if isinstance(size, str)} == {"batch"}
    shapes = {each.name: each.shape[1:] for each in only.inputs}
    assert shapes["patches"] == vision_inputs(bundle, 1, 5, 8)["patches"].shape[1:]
    for size in ((225, 140), (280, 280), (0, 28)):
        with pytest.raises(BundleError, match="image_size: expected multiples of 28, 784 to 31360 pixels"):
            plan_of(bundle, "vision", image_size=size)


def test_another_size_than_the_bundles_only_one_is_refused(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="the bundle's images are always 252 x 252"):
        plan_of(bundle, "vision", image_size=(280, 252))


@pytest.mark.parametrize("half", [False, True])
def test_weights_beside_the_graph_give_the_same(toy: Path, tmp_path: Path, half: bool) -> None:
    options = ReasonerOptions(weights="bfloat16", external_data=True)
    export_reasoner(toy / "reasoner", tmp_path / "reasoner", options=options)
    export_segmenter(toy / "segmenter", tmp_path / "segmenter")
    bundle = load_bundle(build_bundle(tmp_path / "reasoner", tmp_path / "segmenter", tmp_path / "bundle", name="large"))
    inputs = vision_inputs(bundle, 1, *own_grid(bundle))
    results = []
    for outside in (False, True):
        folder = tmp_path / f"outside-{outside}"
        folder.mkdir()
        _, dialect = both(bundle, "vision", folder, half=half, outside=outside)
        results.append(dialect.run(None, inputs)[0])
        assert (folder / "vision.onnx.data").exists() is outside
    np.testing.assert_array_equal(*results)
    assert errors(*both(bundle, "vision", tmp_path, half=half), inputs)[0] < (FLOAT16 if half else FLOAT32)


def test_a_decoder_in_four_bits_becomes_the_matrices_that_its_levels_stand_for(toy: Path, tmp_path: Path) -> None:
    export_reasoner(toy / "reasoner", tmp_path / "reasoner", options=ReasonerOptions(precision="int4"))
    export_segmenter(toy / "segmenter", tmp_path / "segmenter")
    folder = build_bundle(tmp_path / "reasoner", tmp_path / "segmenter", tmp_path / "bundle", name="four")
    bundle = load_bundle(folder)
    path = bundle.path(bundle.spec.reasoner.graphs.decoder)
    graph = onnx.load(path)
    for node in graph.graph.node:  # products with activations as they are, and not in eight bits
        for each in node.attribute:
            if each.name == "accuracy_level":
                each.CopyFrom(helper.make_attribute("accuracy_level", 1))
    onnx.save(graph, path)
    run = Decoders(bundle, tmp_path)
    found, expected = run.step(*tokens(bundle, 1, 20))
    assert relative_error(found, expected) < FLOAT32


@pytest.mark.parametrize("kind", ["box_mask", "multimask"])
def test_other_forms_of_the_mask_decoder_equal_the_bundles(toy: Path, tmp_path: Path, kind: str) -> None:
    export_reasoner(toy / "reasoner", tmp_path / "reasoner")
    export_segmenter(toy / "segmenter", tmp_path / "segmenter", options=SegmenterOptions(settings={kind: True}))
    bundle = load_bundle(build_bundle(tmp_path / "reasoner", tmp_path / "segmenter", tmp_path / "bundle", name=kind))
    own, dialect = both(bundle, "mask_decoder", tmp_path)
    for n_points in (1, 2, 4):
        assert max(errors(own, dialect, prompts(bundle, 3, n_points))) < FLOAT32


def test_eight_bits_mark_every_matrix_of_the_encoder(model: Bundle, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = []
    for index in range(4):
        images.append(tmp_path / f"{index}.png")
        _picture(rng, images[-1])
    source, plan = model.path(model.spec.segmenter.graphs.encoder), plan_of(model, "encoder")
    feeds = list(segmenter_images(model, images))
    graph = trt_graph(source, plan, half=True, ranges=input_ranges(source, feeds), metadata={})
    onnx.checker.check_model(graph, full_check=True)
    kinds = collections.Counter(node.op_type for node in graph.graph.node)
    matrices = [each for each in graph.graph.initializer if each.data_type == onnx.TensorProto.INT8 and each.dims]
    assert kinds["DequantizeLinear"] == kinds["QuantizeLinear"] + len(matrices)
    layers = sum(node.op_type == "Softmax" for node in graph.graph.node)
    assert len(matrices) == 4 * layers + 1  # qkv, proj, lin1, lin2, and the neck's first
    own, eight = (
        ort.InferenceSession(each, providers=["CPUExecutionProvider"])
        for each in (str(source), graph.SerializeToString())
    )
    found, expected = eight.run(None, feeds[0])[0].ravel(), own.run(None, feeds[0])[0].ravel()
    cosine = float(found @ expected / np.linalg.norm(found) / np.linalg.norm(expected))
    assert 0.99 < cosine < 1 - 1e-7


def _picture(rng: np.random.Generator, path: Path) -> None:
    import PIL.Image

    coarse = rng.integers(0, 256, (8, 8)).astype(np.uint8)
    PIL.Image.fromarray(np.kron(coarse, np.ones((16, 16), np.uint8))).save(path)


def test_calibration_needs_an_image(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"encoder\.onnx: int8 needs at least one image"):
        input_ranges(bundle.path(bundle.spec.segmenter.graphs.encoder), [])


def test_calibration_refuses_numbers_that_are_not_finite(bundle: Bundle) -> None:
    feed = pixels(bundle, 1)
    feed["pixel_values"][0, 0, 3, 3] = np.nan
    with pytest.raises(BundleError, match="is not finite on an image to calibrate with"):
        input_ranges(bundle.path(bundle.spec.segmenter.graphs.encoder), [pixels(bundle, 1), feed])


def test_an_encoder_in_eight_bits_is_calibrated_too(toy: Path, tmp_path: Path) -> None:
    export_segmenter(toy / "segmenter", tmp_path, options=SegmenterOptions(precision="int8"))
    graph = onnx.load(tmp_path / "encoder.onnx").graph
    products = {node.input[0] for node in graph.node if node.op_type == "DynamicQuantizeMatMul"}
    assert products
    session = ort.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    _, channels, side, _ = session.get_inputs()[0].shape
    feed = np.random.default_rng(0).standard_normal((1, channels, side, side), dtype=np.float32)
    ranges = input_ranges(tmp_path / "encoder.onnx", [{"pixel_values": feed}])
    assert products <= ranges.keys()
    assert min(ranges.values()) > 0


def _changed(bundle: Bundle, change: Any) -> str:
    """Change the decoder's file in place and return its name in the bundle."""
    path = bundle.path(bundle.spec.reasoner.graphs.decoder)
    graph = onnx.load(path)
    change(graph)
    onnx.save(graph, path)
    return bundle.spec.reasoner.graphs.decoder


@pytest.fixture
def mine(toy: Path, tmp_path: Path) -> Bundle:
    """A bundle that a test may damage."""
    import shutil

    return load_bundle(shutil.copytree(toy / "bundle", tmp_path / "bundle"))


def test_a_weight_too_large_for_float16_is_named(mine: Bundle, tmp_path: Path) -> None:
    def enlarge(graph: onnx.ModelProto) -> None:
        weight = next(each for each in graph.graph.initializer if each.name.endswith("down_proj.weight"))
        array = onnx.numpy_helper.to_array(weight).copy()
        array[0, 0] = 1e6
        weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))

    _changed(mine, enlarge)
    with pytest.raises(BundleError, match=r"weight layers\.0\.mlp\.down_proj\.weight: 1e\+06 does not fit float16"):
        written(mine, "decoder", tmp_path, half=True)
    written(mine, "decoder", tmp_path)


def _unknown_operator(graph: onnx.ModelProto) -> None:
    next(node for node in graph.graph.node if node.op_type == "QuickGelu").op_type = "BiasGelu"


def _unknown_form(graph: onnx.ModelProto) -> None:
    node = next(node for node in graph.graph.node if node.op_type == "GroupQueryAttention")
    node.attribute.append(helper.make_attribute("local_window_size", 64))


def _other_opset(graph: onnx.ModelProto) -> None:
    graph.opset_import[0].version = 17


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_unknown_operator, "decoder: BiasGelu has no form in standard operators"),
        (_unknown_form, "decoder: attention with .*local_window_size.* is not one that this release exports"),
        (_other_opset, "opset 17, expected 20"),
    ],
)
def test_what_this_release_does_not_export_is_refused(mine: Bundle, change: Any, words: str, tmp_path: Path) -> None:
    _changed(mine, change)
    with pytest.raises(BundleError, match=words):
        written(mine, "decoder", tmp_path)


def test_limits_are_positive() -> None:
    with pytest.raises(BundleError, match="max_chunk: expected at least 1, got 0"):
        EngineLimits(max_chunk=0)


def test_profiles_are_readable_in_json(bundle: Bundle) -> None:
    plan = plan_of(bundle, "decoder")
    text = json.dumps([{name: span.to_json() for name, span in each.items()} for each in plan.profiles])
    assert json.loads(text) == [{"batch": [1, 1, 8], "seq": [1, 1, 1]}, {"batch": [1, 1, 1], "seq": [1, 512, 512]}]
