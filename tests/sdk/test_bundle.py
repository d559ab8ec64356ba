"""A bundle is taken only whole and unaltered, and nothing in it leads out of its folder."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from medreasoner import bundle as bundle_module
from medreasoner.bundle import find_bundle, load_bundle
from medreasoner.errors import BundleError

VICTIM = "reasoner/vision.onnx"


def edit(root: Path, change: Any) -> None:
    path = root / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def rename(root: Path, name: str) -> None:
    def change(data: dict[str, Any]) -> None:
        data["reasoner"]["graphs"]["vision"] = name
        data["files"][name] = data["files"].pop(VICTIM)

    edit(root, change)


def test_a_whole_bundle_is_taken(bundle_folder: Path) -> None:
    for verify in ("auto", "full"):
        bundle = load_bundle(bundle_folder, verify=verify)
        assert bundle.path(VICTIM).read_bytes() == b"content of reasoner/vision.onnx"
        assert bundle.spec.name == "toy"
        assert len(bundle.digest) == 64


@pytest.mark.parametrize("name", ["reasoner/vision.onnx", "reasoner/tokenizer.json", "segmenter/decoder.onnx"])
def test_one_changed_byte_is_refused(bundle_folder: Path, name: str) -> None:
    path = bundle_folder / name
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=f"{name}: its SHA-256"):
        load_bundle(bundle_folder)


def test_a_shortened_file_is_refused(bundle_folder: Path) -> None:
    (bundle_folder / VICTIM).write_bytes(b"short")
    with pytest.raises(BundleError, match="5 bytes, the manifest says 31"):
        load_bundle(bundle_folder)


def test_a_missing_file_is_refused(bundle_folder: Path) -> None:
    (bundle_folder / VICTIM).unlink()
    with pytest.raises(BundleError, match="missing"):
        load_bundle(bundle_folder)


@pytest.mark.parametrize(
    "name",
    ["../vision.onnx", "/etc/passwd", "reasoner/../../x", "a\\b", "C:x", "", ".", "reasoner//vision.onnx", "a\0b"],
)
def test_a_path_that_is_not_plain_is_refused(bundle_folder: Path, name: str) -> None:
    rename(bundle_folder, name)
    with pytest.raises(BundleError, match="not a plain relative path"):
        load_bundle(bundle_folder)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_that_leaves_the_folder_is_refused(bundle_folder: Path, tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "vision.onnx").write_bytes((bundle_folder / VICTIM).read_bytes())
    (bundle_folder / VICTIM).unlink()
    if kind == "file":
        (bundle_folder / VICTIM).symlink_to(outside / "vision.onnx")
    else:
        (bundle_folder / "out").symlink_to(outside)
        rename(bundle_folder, "out/vision.onnx")
    with pytest.raises(BundleError, match="leaves the bundle's folder"):
        load_bundle(bundle_folder)


def test_a_link_to_itself_and_a_pipe_are_refused(bundle_folder: Path) -> None:
    path = bundle_folder / VICTIM
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(BundleError, match="missing"):
        load_bundle(bundle_folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BundleError, match="not a regular file"):
        load_bundle(bundle_folder)


def test_a_bundle_behind_a_link_is_taken(bundle_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(bundle_folder)
    assert load_bundle(tmp_path / "alias").root == bundle_folder.resolve()


def test_full_verification_refuses_what_is_not_listed(bundle_folder: Path) -> None:
    (bundle_folder / "reasoner" / "extra.bin").write_bytes(b"1")
    load_bundle(bundle_folder)
    with pytest.raises(BundleError, match=r"reasoner/extra\.bin: in the folder but not in the manifest"):
        load_bundle(bundle_folder, verify="full")


def test_a_large_file_is_hashed_once_for_its_content(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_module, "_SMALL_BYTES", 8)  # so that the weights count as large
    hashed: list[str] = []
    plain = bundle_module._sha256

    def record(path: Path) -> str:
        hashed.append(path.name)
        return plain(path)

    monkeypatch.setattr(bundle_module, "_sha256", record)
    cache = tmp_path / "cache"
    large = "embedding.bin"
    load_bundle(bundle_folder, cache_dir=cache)
    assert large in hashed
    hashed.clear()
    load_bundle(bundle_folder, cache_dir=cache)
    assert large not in hashed
    assert "vision.onnx" in hashed  # graphs are hashed every time, however large
    hashed.clear()
    load_bundle(bundle_folder, cache_dir=cache, verify="full")
    assert large in hashed
    path = bundle_folder / "reasoner" / large
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(1, 1))
    with pytest.raises(BundleError, match="SHA-256"):
        load_bundle(bundle_folder, cache_dir=cache)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"{"])
def test_a_broken_list_of_verified_files_costs_only_time(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(bundle_module, "_SMALL_BYTES", 8)
    (tmp_path / "verified.json").write_bytes(content)
    load_bundle(bundle_folder, cache_dir=tmp_path)
    assert json.loads((tmp_path / "verified.json").read_text())


def test_a_cache_folder_that_cannot_be_written_is_no_error(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_module, "_SMALL_BYTES", 8)
    (tmp_path / "file").write_bytes(b"")
    load_bundle(bundle_folder, cache_dir=tmp_path / "file" / "below")


def test_the_notice_is_shown_once_a_process(bundle_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(bundle_folder, lambda data: data["licence"].update(notice="For research\nonly."))
    edit(bundle_folder, lambda data: data.update(name="noticed"))
    with caplog.at_level(logging.WARNING, logger="medreasoner"):
        load_bundle(bundle_folder)
        load_bundle(bundle_folder)
    assert [record.getMessage() for record in caplog.records] == ["noticed 0.0.1: For research only."]


@pytest.mark.parametrize("name", ["no-such-bundle", ""])
def test_a_name_that_is_no_bundle_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=r"no bundle|is empty"):
        load_bundle(name)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json"):
        load_bundle(tmp_path)


def test_a_manifest_of_gigabytes_is_not_read(bundle_folder: Path) -> None:
    with (bundle_folder / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleError, match="larger than"):
        load_bundle(bundle_folder)


def test_a_build_without_nano_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bundle_module, "__file__", str(tmp_path / "bundle.py"))
    with pytest.raises(BundleError, match="this build has no 'nano' bundle"):
        find_bundle("nano")
