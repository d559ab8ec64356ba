"""A decoder in four bits without its graph: prompts and steps through the kernel, from the file beside the graph."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medreasoner import Grounder
from medreasoner.bundle import Bundle, load_bundle
from medreasoner.errors import BundleError
from medreasoner.providers import RuntimeOptions, is_cpu_only
from medreasoner.reasoner.decoder import Decoder
from medreasoner.reasoner.rotary import text_positions
from medreasoner.reasoner.step import NoGraph, load_step
from medreasoner.sessions import decoder_session
from medreasoner_export import ReasonerOptions, export_reasoner, verify_bundle
from medreasoner_export.package import build_bundle
from medreasoner_export.segmenter import export_segmenter
from medreasoner_export.toy import make_toy_reasoner, make_toy_segmenter

IMAGE = np.random.default_rng(1).integers(0, 256, (60, 80), dtype=np.uint8)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four-bits")
    make_toy_reasoner(folder / "reasoner", mlp_dim=128)
    make_toy_segmenter(folder / "segmenter")
    export_segmenter(folder / "segmenter", folder / "s")
    return folder


def exported(checkpoints: Path, out: Path, options: ReasonerOptions) -> Bundle:
    export_reasoner(checkpoints / "reasoner", out / "r", options=options)
    return load_bundle(build_bundle(out / "r", checkpoints / "s", out / "bundle", name="four"), verify="full")


@pytest.fixture(scope="module", params=[False, True], ids=["small", "large"])
def bundle(request: pytest.FixtureRequest, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """As a small checkpoint is exported, and as a large one."""
    options = ReasonerOptions(precision="int4", external_data=request.param)
    return exported(checkpoints, tmp_path_factory.mktemp("bundle"), options)


def kernel_decoder(bundle: Bundle, n_threads: int = 1) -> Decoder:
    spec = bundle.spec.reasoner
    assert spec.step is not None
    step = load_step(bundle.path(spec.step.file), spec, spec.step, n_threads=n_threads)
    return Decoder(NoGraph(np.float32), spec, step)


def states(decoder: Decoder, counts: tuple[int, ...]) -> list[np.ndarray]:
    rng, cache = np.random.default_rng(0), decoder.open_cache()
    found = []
    for n in counts:
        embeds = rng.standard_normal((n, 64)).astype(np.float32)
        found += decoder.run([decoder.step(cache, embeds, text_positions(cache.length, n))])
    return found


def test_prompts_and_steps_are_close_to_the_graphs(bundle: Bundle) -> None:
    spec = bundle.spec.reasoner
    assert spec.step is not None
    assert spec.step.matrices == "int4"
    graph = Decoder(decoder_session(bundle.path(spec.graphs.decoder), RuntimeOptions(device="cpu")), spec)
    counts = (300, 1, 3, 1)
    expected, found = states(graph, counts), states(kernel_decoder(bundle), counts)
    for one, other in zip(found, expected, strict=True):
        assert np.linalg.norm(one - other) < 0.03 * np.linalg.norm(other)


def test_threads_and_parts_change_no_bit(bundle: Bundle) -> None:
    alone = states(kernel_decoder(bundle), (37, 1))
    for one, other in zip(states(kernel_decoder(bundle, 2), (37, 1)), alone, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_saved_prefix_goes_on_in_another_slot(bundle: Bundle) -> None:
    decoder = kernel_decoder(bundle)
    rng = np.random.default_rng(2)
    embeds = rng.standard_normal((12, 64)).astype(np.float32)
    cache = decoder.open_cache()
    decoder.run([decoder.step(cache, embeds[:11], text_positions(0, 11))])
    saved = cache.save()
    other = decoder.open_cache()
    other.restore(saved, saved.length)
    both = decoder.run([decoder.step(each, embeds[11:], text_positions(11, 1)) for each in (cache, other)])
    np.testing.assert_array_equal(*both)


def test_the_graph_is_not_opened_where_the_kernel_pays(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for pays in (True, False):
        monkeypatch.setattr("medreasoner.engine.steps_pay", lambda pays=pays: pays)
        with Grounder.load(bundle.root, device="cpu", n_threads=2) as grounder:
            decoder = grounder._engine.reasoner._decoder
            assert isinstance(decoder._session, NoGraph) is pays
            assert grounder.providers["reasoner/decoder.onnx"] == "CPUExecutionProvider"
            answers.append(grounder.ground(IMAGE, "Where is it?", think=True))
    found, expected = answers  # the toy's own choices are a matter of rounding
    assert found.answer.startswith("<answer>")
    assert found.tokens["prompt"] == expected.tokens["prompt"]


def test_a_gpu_that_might_run_the_graph_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    assert is_cpu_only(RuntimeOptions(device="cpu"))
    assert not is_cpu_only(RuntimeOptions(device="cuda"))
    assert not is_cpu_only(RuntimeOptions(device="auto", engines_dir=tmp_path))
    for names, expected in ((["CPUExecutionProvider"], True), (["CUDAExecutionProvider"], False)):
        monkeypatch.setattr(ort, "get_available_providers", lambda names=names: names)
        assert is_cpu_only(RuntimeOptions()) is expected


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:4096]])
def test_a_file_of_another_size_is_refused(bundle: Bundle, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    spec = bundle.spec.reasoner
    assert spec.step is not None
    file = tmp_path / "decoder.onnx.data"
    file.write_bytes(change(bundle.path(spec.step.file).read_bytes()))
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data: \d+ bytes.*export it again"):
        load_step(file, spec, spec.step)


def test_a_scale_beyond_float16_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    spec = bundle.spec.reasoner
    assert spec.step is not None
    file = tmp_path / "decoder.onnx.data"
    content = bytearray(bundle.path(spec.step.file).read_bytes())
    content[8192:8196] = np.float32(7e4).tobytes()  # behind the norm and the levels, a page each
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data: a scale is larger"):
        load_step(file, spec, spec.step)


def test_int4_goes_with_no_other_products(bundle: Bundle) -> None:
    step = bundle.spec.reasoner.step
    assert step is not None
    with pytest.raises(BundleError, match="products float"):
        replace(step, products="int8")


def test_sizes_that_do_not_divide_keep_the_graph(checkpoints: Path, tmp_path: Path) -> None:
    make_toy_reasoner(tmp_path / "reasoner", mlp_dim=96)
    export = export_reasoner(tmp_path / "reasoner", tmp_path / "r", options=ReasonerOptions(precision="int4"))
    assert export.section["step"] is None


def test_verify_compares_the_kernel_too(bundle: Bundle, checkpoints: Path) -> None:
    report = verify_bundle(bundle.root, checkpoints / "reasoner", checkpoints / "segmenter")
    own = [stage for stage in report.stages if "without the graph" in stage.name]
    assert [stage.name.partition(" of ")[0] for stage in own] == [
        "hidden states, prefill without the graph", "hidden states, decode steps without the graph",
    ]  # fmt: skip
    assert all(stage.passed and stage.tolerance == 0.05 for stage in own)
