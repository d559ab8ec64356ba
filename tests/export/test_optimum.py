"""A SAM that optimum exported, against transformers with the weights that it was made from.

``make_optimum_sam.py`` makes the archive; optimum itself is not needed here.
"""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from onnx import helper

from medreasoner import Grounder
from medreasoner.bundle import load_bundle
from medreasoner.errors import BundleError
from medreasoner.image import read_image
from medreasoner.segmenter import encoder_input
from medreasoner_export import ReasonerOptions, SegmenterOptions, build_bundle, export_reasoner, export_segmenter
from medreasoner_export.parity_segmenter import segmenter_stages

ENCODER, DECODER = "vision_encoder.onnx", "prompt_encoder_mask_decoder.onnx"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``optimum``, ``checkpoint``, and ``segmenter``, the export."""
    root = tmp_path_factory.mktemp("optimum")
    with zipfile.ZipFile(Path(__file__).parent / "data" / "optimum_sam.zip") as archive:
        archive.extractall(root / "optimum")
    (root / "optimum" / "checkpoint").rename(root / "checkpoint")
    export_segmenter(root / "optimum", root / "segmenter")
    return root


@pytest.fixture(scope="module")
def reference(made: Path) -> Any:
    return transformers.SamModel.from_pretrained(made / "checkpoint", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def joined(made: Path, toy: Path) -> Path:
    """A bundle with the toy's reasoner."""
    options = ReasonerOptions(settings={"absent_threshold": 1.0})  # of random weights, which always find something
    export_reasoner(toy / "reasoner", made / "reasoner", options=options)
    return build_bundle(made / "reasoner", made / "segmenter", made / "bundle", name="optimum")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy of optimum's folder to change."""
    return Path(shutil.copytree(made / "optimum", tmp_path / "sam"))


def _run(folder: Path, name: str, **inputs: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def _pixels() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((2, 3, 64, 64), dtype=np.float32)


def _padded(points: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Prompts (n, k, 2) as SAM's decoder takes them: the padding point behind them."""
    n = len(points)
    return {
        "points": np.concatenate([points, np.zeros((n, 1, 2), np.float32)], axis=1),
        "labels": np.concatenate([labels, np.full((n, 1), -1)], axis=1),
    }


def test_the_encoder_is_that_of_transformers(made: Path, reference: Any) -> None:
    with torch.inference_mode():
        expected = reference.get_image_embeddings(torch.from_numpy(_pixels())).numpy()
    (found,) = _run(made / "segmenter", "encoder", pixel_values=_pixels())
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    (other,) = _run(made / "segmenter", "encoder", pixel_values=_pixels()[::-1])
    assert np.abs(other - expected).max() > 0.1


@pytest.mark.parametrize("labels", [[1, 1], [1], [1, 0], [1, 1, 0, 1]], ids=str)
@pytest.mark.parametrize(("images", "prompts"), [(1, 1), (1, 3), (2, 2)])
def test_the_decoder_is_that_of_transformers(
    made: Path, reference: Any, labels: list[int], images: int, prompts: int
) -> None:
    points = np.random.default_rng(1).uniform(0, 64, (prompts, len(labels), 2)).astype(np.float32)
    kinds = np.tile(labels, (prompts, 1))
    (embedding,) = _run(made / "segmenter", "encoder", pixel_values=_pixels()[:images])
    shape = (images, prompts // images)
    with torch.inference_mode():
        result = reference(
            image_embeddings=torch.from_numpy(embedding),
            input_points=torch.from_numpy(points.reshape(*shape, -1, 2)),
            input_labels=torch.from_numpy(kinds.reshape(*shape, -1)),
        )
    masks, scores = result.pred_masks.flatten(0, 1).numpy(), result.iou_scores.flatten(0, 1).numpy()
    found = _run(made / "segmenter", "decoder", image_embedding=embedding, **_padded(points, kinds))
    np.testing.assert_allclose(found[0], masks, rtol=0, atol=TOLERANCE * np.abs(masks).max())
    np.testing.assert_allclose(found[1], scores, rtol=0, atol=TOLERANCE)
    # Each kind of input matters far beyond that.
    for other in (
        {"image_embedding": embedding[..., ::-1].copy(), **_padded(points, kinds)},
        {"image_embedding": embedding, **_padded(64 - points, kinds)},
        {"image_embedding": embedding, **_padded(points, 1 - kinds)},
    ):
        moved = _run(made / "segmenter", "decoder", **other)
        assert np.abs(moved[0] - masks).max() > 0.01 * np.abs(masks).max()


def test_a_bundle_is_verified_with_the_checkpoint_that_optimum_exported(joined: Path, made: Path) -> None:
    stages = list(segmenter_stages(load_bundle(joined), made / "checkpoint", tolerance=1e-4, seed=0))
    assert len(stages) == 4
    assert [stage.name for stage in stages if not stage.passed] == []
    with pytest.raises(BundleError, match="holds ONNX graphs without weights to read; give the checkpoint"):
        list(segmenter_stages(load_bundle(joined), made / "optimum", tolerance=1e-4, seed=0))


def test_it_grounds_end_to_end_with_the_best_of_three_masks(joined: Path, reference: Any, tmp_path: Path) -> None:
    image = read_image(np.random.default_rng(2).integers(0, 255, (64, 64, 3), np.uint8))  # of the grid's own size
    with Grounder.load(joined, cache_dir=tmp_path) as grounder, grounder.open(image) as study:
        result = study.ground("Where is the heart in this image?")
        assert result.found
        assert result.points is not None
        points = ((8.0, 20.0), (50.5, 41.0))
        own = study.segment(box=(0, 0, 64, 64), points=points)
        grounded = result.mask, result.score
        spec = grounder.bundle.spec.segmenter
    planes, _ = encoder_input(spec, image)
    assert (spec.prompts, spec.n_masks, spec.mask_size) == ("points", 3, 16)
    for places, (mask, score) in ((points, own), (result.points, grounded)):
        with torch.inference_mode():
            expected = reference(
                pixel_values=torch.from_numpy(planes[None]), input_points=torch.tensor([[places]], dtype=torch.float32)
            )
        best = int(expected.iou_scores[0, 0].argmax())
        logits = torch.nn.functional.interpolate(expected.pred_masks[0, :, best : best + 1], (64, 64), mode="bilinear")
        sure = logits[0, 0].abs().numpy() > 1e-4
        assert sure.mean() > 0.99
        np.testing.assert_array_equal(mask[sure], logits[0, 0].numpy()[sure] > 0)
        assert score == pytest.approx(float(expected.iou_scores[0, 0, best].clamp(0, 1)), abs=1e-5)


def test_in_the_dialect_of_engines_it_computes_the_same(joined: Path, made: Path, dialect_of: Any) -> None:
    (found,) = dialect_of(load_bundle(joined), "encoder").run(None, {"pixel_values": _pixels()})
    (embedding,) = _run(made / "segmenter", "encoder", pixel_values=_pixels())
    np.testing.assert_allclose(found, embedding, rtol=0, atol=TOLERANCE)
    prompts = _padded(np.full((1, 2, 2), 20, np.float32), np.ones((1, 2), np.int64))
    expected = _run(made / "segmenter", "decoder", image_embedding=embedding[:1], **prompts)
    inputs = {"image_embedding": embedding[:1], **prompts}
    np.testing.assert_allclose(
        dialect_of(load_bundle(joined), "mask_decoder").run(["mask_logits"], inputs)[0], expected[0], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("one_file", [True, False])
def test_weights_beside_the_graphs_stay_beside_them(made: Path, copy: Path, tmp_path: Path, one_file: bool) -> None:
    for name in (ENCODER, DECODER):
        onnx.save(
            onnx.load(copy / name), copy / name,
            save_as_external_data=True, all_tensors_to_one_file=one_file, location=name + "_data", size_threshold=0,
        )  # fmt: skip
    export = export_segmenter(copy, tmp_path / "out")
    for name in ("encoder", "decoder"):
        assert (tmp_path / "out" / f"{name}.onnx.data").stat().st_size > 10_000
    (embedding,) = _run(tmp_path / "out", "encoder", pixel_values=_pixels())
    prompts = _padded(np.full((2, 2, 2), 20, np.float32), np.ones((2, 2), np.int64))
    found = _run(tmp_path / "out", "decoder", image_embedding=embedding, **prompts)
    expected = _run(made / "segmenter", "decoder", image_embedding=embedding, **prompts)
    np.testing.assert_array_equal(embedding, _run(made / "segmenter", "encoder", pixel_values=_pixels())[0])
    np.testing.assert_array_equal(found[0], expected[0])
    data = [file for file in copy.iterdir() if file.suffix not in (".onnx", ".json")]
    data[0].write_bytes(data[0].read_bytes()[:-4] + b"spam")
    assert export_segmenter(copy, tmp_path / "again").sha256 != export.sha256


Change = Callable[[Path], None]


def _graph(name: str, change: Callable[[onnx.ModelProto], None]) -> Change:
    def apply(folder: Path) -> None:
        model = onnx.load(folder / name)
        change(model)
        (folder / name).write_bytes(model.SerializeToString())  # onnx.save would look for the other files

    return apply


def _renamed(old: str, new: str) -> Callable[[onnx.ModelProto], None]:
    def apply(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.name = new if value.name == old else value.name
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]

    return apply


def _own_operator(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("evil.ops", 1))
    model.graph.node[0].domain = "evil.ops"


def _hidden_operator(model: onnx.ModelProto) -> None:
    """Of another domain, in a branch of an If."""
    branch = helper.make_graph([helper.make_node("Run", [], ["y"], domain="evil.ops")], "b", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch))


def _beside(location: str, *, offset: str = "0") -> Callable[[onnx.ModelProto], None]:
    """The first weight lies in the file `location`."""

    def apply(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset)):
            tensor.external_data.add(key=key, value=value)

    return apply


def _constant_beside(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Constant")
    node.attribute[0].t.data_location = onnx.TensorProto.EXTERNAL
    node.attribute[0].t.external_data.add(key="location", value="/etc/passwd")


def _any_size(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"


def _opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 11


def _other_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "sam2"}))


def _truncated(folder: Path) -> None:
    (folder / DECODER).write_bytes((folder / DECODER).read_bytes()[:5000])


def _monolith(folder: Path) -> None:
    (folder / ENCODER).unlink()
    (folder / DECODER).rename(folder / "model.onnx")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / DECODER).unlink(), f"{DECODER} is missing"),
        (_monolith, f"{ENCODER} is missing: .* without --monolith"),
        (_truncated, f"{DECODER} is no"),
        (_other_kind, "model_type: expected 'sam', got 'sam2'"),
        (_graph(DECODER, _renamed("input_points", "input_boxes")), "expected .*input_points.*, got .*input_boxes"),
        (_graph(DECODER, _renamed("pred_masks", "masks")), "expected .*pred_masks, .* got .*masks"),
        (_graph(ENCODER, _own_operator), "only ONNX's standard operators are accepted, it uses evil.ops"),
        (_graph(ENCODER, _hidden_operator), "only ONNX's standard operators are accepted, it uses evil.ops"),
        (_graph(ENCODER, _beside("../secret.bin")), r"lies in '../secret.bin', which is no file of the folder"),
        (_graph(ENCODER, _beside("/etc/passwd")), r"lies in '/etc/passwd', which is no file of the folder"),
        (_graph(ENCODER, _beside("link.bin")), r"lies in 'link.bin', which is no file of the folder"),
        (_graph(ENCODER, _beside("absent.bin")), r"lies in 'absent.bin', which is no file of the folder"),
        (_graph(ENCODER, _beside("config.json", offset="1384")), "config.json is truncated, or weight"),
        (_graph(ENCODER, _beside("config.json", offset="many")), "config.json: weight .* has a damaged place"),
        (_graph(ENCODER, _constant_beside), "a constant of a node lies in another file"),
        (_graph(ENCODER, _any_size), "pixel_values: expected squares of a fixed size"),
        (_graph(ENCODER, _opset), "opset \\[11\\]; export it again with --opset 18"),
    ],
)
def test_other_folders_are_refused_in_a_line(copy: Path, tmp_path: Path, change: Change, words: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(100_000))
    (copy / "link.bin").symlink_to(tmp_path / "secret.bin")
    change(copy)
    with pytest.raises(BundleError, match=words) as caught:
        export_segmenter(copy, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(copy))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (SegmenterOptions(settings={"prompts": "box"}), 'prompts: its decoder takes points alone .* "points", got'),
        (SegmenterOptions(settings={"prompts": "joint"}), 'prompts: its decoder takes points alone .* "points", got'),
        (SegmenterOptions(settings={"multimask": False}), "multimask: .* must be true, got False"),
        (SegmenterOptions(settings={"box_mask": True}), "box_mask: .* must be false, got True"),
        (SegmenterOptions(arch="medsam"), "ONNX graphs are taken as they are"),
        (SegmenterOptions(precision="int8"), "ONNX graphs are taken as they are"),
        (SegmenterOptions(weights="float16"), "ONNX graphs are taken as they are"),
    ],
    ids=str,
)
def test_what_the_graphs_cannot_do_is_refused(
    made: Path, tmp_path: Path, options: SegmenterOptions, words: str
) -> None:
    with pytest.raises(BundleError, match=words):
        export_segmenter(made / "optimum", tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_with_the_weights_beside_them_the_weights_are_taken(copy: Path, made: Path, tmp_path: Path) -> None:
    shutil.copy(made / "checkpoint" / "model.safetensors", copy)
    export = export_segmenter(copy, tmp_path / "out")
    assert (export.section["prompts"], export.section["n_masks"]) == ("joint", 1)
