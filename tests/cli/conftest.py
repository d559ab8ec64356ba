"""Bundles with random weights whose answer is known beforehand, and the program run in this process."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from medreasoner_export.toy import make_toy_bundle

    folder = tmp_path_factory.mktemp("toy")
    make_toy_bundle(folder)
    return folder


def _with_threshold(folder: Path, name: str, threshold: float) -> Path:
    copy = folder / name
    shutil.copytree(folder / "bundle", copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["reasoner"]["absent_threshold"] = threshold
    manifest["licence"]["notice"] = "random weights, for tests only"
    manifest["licence"]["weights"] = "public domain"
    manifest["training"] = {"data": "none"}
    manifest["quality"] = {"dice": {"lungs": 0.5}}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.fixture(scope="session")
def finding_bundle(toy_folder: Path) -> str:
    """Finds something in every image: no probability of absence is above 1."""
    return str(_with_threshold(toy_folder, "finding", 1.0))


@pytest.fixture(scope="session")
def absent_bundle(toy_folder: Path) -> str:
    """Never finds anything: every probability of absence is above 0."""
    return str(_with_threshold(toy_folder, "absent", 0.0))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (60, 80), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """Run the program with these arguments."""
    import medreasoner.bundle
    from medreasoner_cli.main import run

    for name in ("MEDREASONER_BUNDLE", "MEDREASONER_BUNDLES", "MEDREASONER_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(medreasoner.bundle, "_noticed", set())
    logger = logging.getLogger("medreasoner")
    handlers, level = logger.handlers[:], logger.level

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        return Outcome(code, *capfd.readouterr())

    yield call
    logger.handlers[:], logger.level = handlers, level
