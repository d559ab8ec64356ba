"""Bundles: whole or not at all."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from medreasoner.bundle import load_bundle
from medreasoner.errors import BundleError, ImageReadError
from medreasoner_export import Licence, build_bundle, verify_bundle
from medreasoner_export.folder import building
from medreasoner_export.report import ParityReport, ParityStage, compare


@pytest.fixture
def exports(toy: Path, tmp_path: Path) -> tuple[Path, Path]:
    names = ("reasoner-onnx", "segmenter-onnx")
    first, second = (Path(shutil.copytree(toy / name, tmp_path / name)) for name in names)
    return first, second


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.endswith("-onnx")]


def test_a_bundle_loads_with_every_file_listed_by_hash(exports: tuple[Path, Path], tmp_path: Path) -> None:
    terms = tmp_path / "terms-onnx"
    terms.write_text("Research only.")
    out = build_bundle(
        *exports,
        tmp_path / "deep/bundle",
        name="x",
        licence=Licence(weights="research", notice="Not for diagnosis.", file=terms),
        training={"images": 3},
    )
    bundle = load_bundle(out, verify="full")
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files - {"manifest.json"} == set(bundle.spec.files)
    for name, entry in bundle.spec.files.items():
        content = (out / name).read_bytes()
        assert (entry.sha256, entry.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert bundle.spec.licence.file == "LICENSE.weights"
    assert bundle.spec.training["images"] == 3


def test_any_changed_digit_of_the_manifest_is_noticed(exports: tuple[Path, Path], tmp_path: Path) -> None:
    out = build_bundle(*exports, tmp_path / "bundle", name="x", training={"images": 3})
    text = (out / "manifest.json").read_text()
    assert '"images": 3' in text
    (out / "manifest.json").write_text(json.dumps(json.loads(text)))  # another layout says the same
    load_bundle(out)
    (out / "manifest.json").write_text(text.replace('"images": 3', '"images": 4'))
    with pytest.raises(BundleError, match=r"bundle: manifest\.json: its SHA-256"):
        load_bundle(out)


def test_an_existing_folder_is_kept_unless_forced(exports: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(BundleError, match="exists"):
        build_bundle(*exports, out, name="x")
    assert (out / "mine.txt").read_text() == "keep"
    build_bundle(*exports, out, name="x", force=True)
    assert not (out / "mine.txt").exists()
    assert leftovers(tmp_path) == ["bundle"]


@pytest.mark.parametrize("missing", ["reasoner-onnx/vision.onnx", "segmenter-onnx/export.json"])
def test_a_failure_leaves_nothing_behind(exports: tuple[Path, Path], tmp_path: Path, missing: str) -> None:
    (tmp_path / missing).unlink()
    with pytest.raises(BundleError, match=missing.rpartition("/")[2]):
        build_bundle(*exports, tmp_path / "bundle", name="x")
    assert leftovers(tmp_path) == []


def test_a_failed_replacement_keeps_the_old_bundle(exports: tuple[Path, Path], tmp_path: Path) -> None:
    out = build_bundle(*exports, tmp_path / "bundle", name="old")
    (exports[0] / "embedding.bin").unlink()
    with pytest.raises(BundleError, match=r"embedding\.bin"):
        build_bundle(*exports, out, name="new", force=True)
    assert load_bundle(out, verify="full").spec.name == "old"


def test_a_path_that_leaves_the_export_is_refused(exports: tuple[Path, Path], tmp_path: Path) -> None:
    path = exports[0] / "export.json"
    description = json.loads(path.read_text())
    description["section"]["tokenizer"] = "../segmenter-onnx/encoder.onnx"
    path.write_text(json.dumps(description))
    with pytest.raises(BundleError, match="not a file there"):
        build_bundle(*exports, tmp_path / "bundle", name="x")


@pytest.mark.parametrize("text", ["{}", '{"section": {}}', '{"section": []}', "["])
def test_a_malformed_description_is_refused_by_name(exports: tuple[Path, Path], tmp_path: Path, text: str) -> None:
    (exports[1] / "export.json").write_text(text)
    with pytest.raises(BundleError, match=r"export\.json"):
        build_bundle(*exports, tmp_path / "bundle", name="x")


def test_a_report_fails_when_one_stage_does() -> None:
    good = compare("good", [1.0, 2.0], [1.0, 2.0], 0.0)
    for bad in (
        compare("bad", [1.0], [2.0], 0.1),
        compare("bad", [1.0], [1.0, 1.0], 0.1),
        compare("bad", [float("nan")], [1.0], 0.1),
        ParityStage(name="bad", error=1.0, scale=1.0, tolerance=0.0),
    ):
        report = ParityReport(bundle="toy", stages=(good, bad), versions={"torch": "2"})
        assert good.passed
        assert not report.passed
        assert "FAILED" in report.to_markdown()
        assert "| bad |" in report.to_markdown()
    assert json.loads(json.dumps(ParityReport(bundle="toy", stages=(good,), versions={}).to_json()))["passed"] is True


@pytest.mark.parametrize(
    ("part", "words"), [("reasoner", "/config.json is missing"), ("segmenter", "/config.json is missing")]
)
def test_verifying_against_a_folder_that_holds_no_checkpoint_names_it(
    toy: Path, tmp_path: Path, part: str, words: str
) -> None:
    folders = {"reasoner": toy / "reasoner", "segmenter": toy / "segmenter", part: tmp_path}
    with pytest.raises(BundleError, match=re.escape(tmp_path.name + words)):
        verify_bundle(toy / "bundle", folders["reasoner"], folders["segmenter"])


def test_an_image_that_cannot_be_read_is_not_called_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(ImageReadError, match=r"a\.png: broken"),
        building(tmp_path / "out"),
    ):
        raise ImageReadError("a.png: broken")
    assert not (tmp_path / "out").exists()
    with pytest.raises(BundleError, match="out: it cannot be written"), building(tmp_path / "out"):
        raise OSError(28, "No space left on device")
