"""Steps without the graph: the same hidden states over the same buffers, from the file beside the graph."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medreasoner import Grounder, ops
from medreasoner.bundle import Bundle, load_bundle
from medreasoner.errors import BundleError
from medreasoner.providers import RuntimeOptions
from medreasoner.reasoner import step as step_module
from medreasoner.reasoner.decoder import Decoder
from medreasoner.reasoner.rotary import text_positions
from medreasoner.reasoner.step import load_step
from medreasoner.sessions import decoder_session
from medreasoner_export import ReasonerOptions, export_reasoner, verify_bundle
from medreasoner_export.package import build_bundle
from medreasoner_export.segmenter import export_segmenter
from medreasoner_export.toy import make_toy_bundle, make_toy_reasoner, make_toy_segmenter


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_bundle(tmp_path_factory.mktemp("steps")).parent


@pytest.fixture(scope="module", params=["fp32-float32", "fp32-float16", "fp32-bfloat16", "fp16-source"])
def bundle(request: pytest.FixtureRequest, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    precision, weights = request.param.split("-")
    export_reasoner(toy / "reasoner", folder / "r", options=ReasonerOptions(precision=precision, weights=weights))
    export_segmenter(toy / "segmenter", folder / "s")
    return load_bundle(build_bundle(folder / "r", folder / "s", folder / "bundle", name="steps"), verify="full")


def decoders(bundle: Bundle) -> tuple[Decoder, Decoder]:
    """One that runs the graph for everything, and one that steps."""
    spec = bundle.spec.reasoner
    assert spec.step is not None
    session = decoder_session(bundle.path(spec.graphs.decoder), RuntimeOptions(device="cpu"))
    return Decoder(session, spec), Decoder(session, spec, load_step(bundle.path(spec.step.file), spec, spec.step))


def test_graph_and_steps_take_turns_on_one_sequence(bundle: Bundle) -> None:
    plain, stepping = decoders(bundle)
    spec, rng = bundle.spec.reasoner, np.random.default_rng(0)
    one, other = plain.open_cache(), stepping.open_cache()
    assert one.sequence is None
    assert other.sequence is not None
    most = load_step(bundle.path(spec.step.file), spec, spec.step).max_tokens
    for n in (most + 5, 3, 1, most + 1, most, 2):
        embeds = rng.standard_normal((n, spec.hidden_dim)).astype(np.float32)
        positions = text_positions(one.length, n)
        (expected,) = plain.run([plain.step(one, embeds, positions)])
        (found,) = stepping.run([stepping.step(other, embeds, positions)])
        half = bundle.spec.precision == "fp16"
        np.testing.assert_allclose(found, expected, atol=2e-2 if half else 2e-5)
        assert one.length == other.length
    a, b = one.save(), other.save()
    for name in a.rows:
        np.testing.assert_allclose(a.rows[name], b.rows[name], atol=2e-2 if half else 2e-5)


def test_answers_are_those_of_the_graph(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(1).integers(0, 256, (60, 80), dtype=np.uint8)
    with Grounder.load(bundle.root, device="cpu") as grounder:
        found = grounder.ground(image, "Where is it?")
    monkeypatch.setattr("medreasoner.engine.steps_pay", lambda: False)
    with Grounder.load(bundle.root, device="cpu") as grounder:
        expected = grounder.ground(image, "Where is it?")
    assert found.answer == expected.answer
    np.testing.assert_array_equal(found.mask, expected.mask)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:4096], lambda b: b"x" * 10])
def test_a_file_of_another_size_is_refused(bundle: Bundle, tmp_path: Path, change) -> None:
    spec = bundle.spec.reasoner
    file = tmp_path / "decoder.onnx.data"
    file.write_bytes(change(bundle.path(spec.step.file).read_bytes()))
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data: \d+ bytes.*export it again"):
        load_step(file, spec, spec.step)


def test_sizes_that_do_not_divide_are_refused(bundle: Bundle) -> None:
    spec = bundle.spec.reasoner
    step = replace(spec.step, mlp_dim=spec.step.mlp_dim - 1)
    with pytest.raises(BundleError, match=r"export it again|multiples of 16"):
        load_step(bundle.path(step.file), spec, step)


def test_one_changed_byte_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle.root, tmp_path / "copy")
    file = copy / bundle.spec.reasoner.step.file
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data"):
        load_bundle(copy)


def test_a_manifest_without_steps_still_loads(bundle: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle.root, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["reasoner"]["step"], manifest["sha256"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert load_bundle(copy).spec.reasoner.step is None


def test_machines_without_these_vectors_keep_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    for level, pays in (("avx512", True), ("avx2", True), ("sse2", False), ("neon", False)):
        monkeypatch.setattr(ops, "simd_level", lambda level=level: level)
        assert step_module.steps_pay() is pays


def test_few_bits_have_no_steps(toy: Path, tmp_path: Path) -> None:
    export = export_reasoner(toy / "reasoner", tmp_path / "r", options=ReasonerOptions(precision="int8"))
    assert export.section["step"] is None
    assert not (tmp_path / "r" / "decoder.onnx.data").exists()


def test_integers_are_for_decoders_that_step_and_divide(toy: Path, tmp_path: Path) -> None:
    options = ReasonerOptions(precision="int8")
    export_reasoner(toy / "reasoner", tmp_path / "r", options=options)
    export_segmenter(toy / "segmenter", tmp_path / "s")
    with pytest.raises(BundleError, match="steps in integers are for decoders of up to 64 MiB"):
        build_bundle(tmp_path / "r", tmp_path / "s", tmp_path / "bundle", name="x", integer_steps=True)
    assert not (tmp_path / "bundle").exists()


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a bundle whose steps are in integers, and its checkpoints."""
    folder = tmp_path_factory.mktemp("integers")
    make_toy_reasoner(folder / "reasoner", mlp_dim=128)
    make_toy_segmenter(folder / "segmenter")
    export_reasoner(folder / "reasoner", folder / "r")
    export_segmenter(folder / "segmenter", folder / "s")
    build_bundle(folder / "r", folder / "s", folder / "bundle", name="integers", integer_steps=True)
    return folder


def test_integers_stay_close_to_the_graph(integers: Path) -> None:
    bundle = load_bundle(integers / "bundle")
    assert bundle.spec.reasoner.step is not None
    assert bundle.spec.reasoner.step.products == "int8"
    plain, stepping = decoders(bundle)
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((9, bundle.spec.reasoner.hidden_dim)).astype(np.float32)
    (expected,), (found,) = (
        each.run([each.step(each.open_cache(), embeds, text_positions(0, 9))]) for each in (plain, stepping)
    )
    apart = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-5 < apart < 0.03


def test_verify_allows_integers_what_they_round(integers: Path) -> None:
    report = verify_bundle(integers / "bundle", integers / "reasoner", integers / "segmenter")
    steps = [stage for stage in report.stages if "without the graph" in stage.name]
    assert {stage.tolerance for stage in steps} == {0.05}
    assert all(stage.passed for stage in steps)
    through_the_graph = [stage for stage in report.stages if stage.name.startswith("hidden") and stage not in steps]
    assert through_the_graph
    assert all(stage.tolerance < 1e-3 for stage in through_the_graph)
