"""Models and images of the benchmarks, and the table at the end."""

import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
from benchmarks.report import Report

from medreasoner import BundleError, Grounder, MissingExtraError, read_image
from medreasoner.bundle import load_bundle
from medreasoner.ops import simd_level
from medreasoner.providers import usable_cores
from medreasoner_cli.measure import facts, precision_words

if TYPE_CHECKING:
    from benchmarks.peers.transformers_pipeline import Pipeline

CHECKPOINTS = Path(__file__).parent.parent / "models" / "nano"
ROUNDS = int(os.environ.get("MEDREASONER_BENCH_ROUNDS", "30"))
COMPILED_WITH = ("Which paired organs fill with air on every breath?", "Which muscular organ pumps the blood?")
REPORT = pytest.StashKey[Report]()

# Libraries of the peer deprecate things as they load; that is no fault of what is measured.
PEER_WARNINGS = ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """One set of weights in two forms."""

    name: str
    bundle: str
    reasoner: Path
    segmenter: Path


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPORT] = Report()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"peer", "compiled_peer"} & set(getattr(item, "fixturenames", ())):
            for line in PEER_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(line))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash[REPORT].lines()
    if lines:
        terminalreporter.section("medreasoner and its peers")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    report = pytestconfig.stash[REPORT]
    named = ("medreasoner", "onnxruntime", "torch", "transformers", "numpy", "pillow")
    versions = ", ".join(f"{name} {found}" for name in named if (found := _version(name)))
    report.note(f"{platform.machine()} {simd_level()}, {usable_cores()} usable cores, load {os.getloadavg()[0]:.1f}")
    report.note(f"Python {platform.python_version()}, {versions}")
    return report


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Random weights, made in a second."""
    from medreasoner_export.toy import make_toy_bundle

    folder = tmp_path_factory.mktemp("toy")
    try:
        bundle = make_toy_bundle(folder)
    except MissingExtraError as err:
        pytest.skip(str(err))
    return Models(name="toy", bundle=str(bundle), reasoner=folder / "reasoner", segmenter=folder / "segmenter")


@pytest.fixture(scope="session")
def models(request: pytest.FixtureRequest, report: Report) -> Models:
    """nano, if its bundle and the checkpoints that it was made of are there; else the toy."""
    reason = _why_not_nano()
    if reason is None:
        models = Models(
            name="nano", bundle="nano", reasoner=CHECKPOINTS / "reasoner", segmenter=CHECKPOINTS / "segmenter"
        )
        report.note("weights: nano")
        return models
    report.judged = False
    report.note(f"weights: toy, random, whose ratios say nothing of a real model; no nano: {reason}")
    toy: Models = request.getfixturevalue("toy")
    return toy


def _why_not_nano() -> str | None:
    from medreasoner_export.checkpoint import Checkpoint

    try:
        source = load_bundle("nano").spec.source
        for part in ("reasoner", "segmenter"):
            if Checkpoint(CHECKPOINTS / part).sha256() != source[f"{part}_sha256"]:
                return f"its bundle was not made of {CHECKPOINTS / part}"
    except BundleError as err:
        return str(err)
    return None


@pytest.fixture(scope="session")
def grounder(models: Models, report: Report) -> Iterator[Grounder]:
    with Grounder.load(models.bundle, device="cpu", cache_bytes=0) as grounder:  # images come round again
        precision = precision_words(facts(grounder))
        report.note(f"ours: device cpu, {usable_cores()} threads, {precision}; defaults otherwise")
        yield grounder


@pytest.fixture(scope="session")
def peer(models: Models, report: Report) -> "Pipeline | None":
    """The same weights in torch and transformers; None, with the reason in the report, where they are absent."""
    try:
        import torch
        import transformers
    except ImportError as err:
        report.note(f"peer: skipped, {err}; pip install 'medreasoner[export]'")
        return None
    from benchmarks.peers.transformers_pipeline import SETTINGS, Pipeline

    assert torch.__version__
    transformers.utils.logging.disable_progress_bar()
    report.note(f"peer: {SETTINGS}")
    return Pipeline(models.reasoner, models.segmenter)


@pytest.fixture(scope="session")
def compiled_peer(
    models: Models, peer: "Pipeline | None", pixels: npt.NDArray[np.uint8], report: Report
) -> "Pipeline | None":
    """The peer once more, compiled by torch; None, with the reason in the report, where that does not work."""
    if peer is None:
        return None
    import torch
    from benchmarks.peers.transformers_pipeline import Pipeline

    compiled = Pipeline(models.reasoner, models.segmenter)
    compiled.compile()
    torch.set_num_threads(usable_cores())
    start = time.perf_counter()
    try:
        study = compiled.open(pixels)
        for query in COMPILED_WITH:
            text = compiled.ask(study, query).text
    except Exception as err:  # a compiler missing, or one that gives up: both are kinds of torch's own
        report.note(f"compiled peer: skipped, {type(err).__name__}: {' '.join(str(err).split())[:200]}")
        return None
    same = "the same" if text == peer.ask(peer.open(pixels), COMPILED_WITH[-1]).text else "ANOTHER"
    report.note(
        f"compiled peer: torch.compile(dynamic=True) of all four networks; {time.perf_counter() - start:.0f} s until "
        f"its second answer, {same} as uncompiled"
    )
    return compiled


@pytest.fixture(scope="session")
def pixels() -> npt.NDArray[np.uint8]:
    """A chest radiograph, (1841, 1955) uint8."""
    try:
        return read_image("sample:chest").pixels
    except MissingExtraError as err:
        pytest.skip(str(err))
