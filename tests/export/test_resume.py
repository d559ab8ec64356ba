"""Builds that are stopped in the middle, and go on: the children here are really killed."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medreasoner.errors import BundleError
from medreasoner_export import (
    EngineOptions,
    ReasonerOptions,
    SegmenterOptions,
    export_engines,
    export_reasoner,
    export_segmenter,
)
from medreasoner_export import folder as folder_module
from medreasoner_export import tensorrt as engines_module
from medreasoner_export.folder import building
from medreasoner_export.trt_build import BuilderStoppedError

# Exports to the folder that it is given, and ends itself without a word when a tensor or an engine comes up.
KILLED = """
import os, signal, sys
from pathlib import Path
import medreasoner_export as package, medreasoner_export.tensorrt as module
from medreasoner_export import *
kind, source, out, at = sys.argv[1:]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
def progress(done, total, name):
    if at in name: die()
if kind == "reasoner":
    export_reasoner(source, out, options=ReasonerOptions(external_data=True, precision="int8"), progress=progress)
elif kind == "segmenter":
    export_segmenter(source, out, progress=progress)
else:
    from test_resume import stand_in
    stand_in(lambda engine: die() if engine.name.startswith(at) else None)
    export_engines(source, out, options=EngineOptions(architectures=("sm_86", "sm_89")))
raise SystemExit("it was not killed")
"""
OPTIONS = ReasonerOptions(external_data=True, precision="int8")


def stand_in(meet: Any = lambda _: None) -> None:
    """A builder that copies the graph, and meets each engine first."""

    def build(graph: Path, _plan: object, architecture: str, engine: Path, **_: object) -> bool:
        meet(engine)
        engine.write_bytes(architecture.encode() + graph.read_bytes())
        return True

    vars(engines_module).update(
        build_engine=build,
        find_builder=lambda _: "tensorrt-rtx",
        builder_version=lambda _: "a builder 1.0",
        check_architectures=lambda architectures, _: architectures,
    )


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("build_engine", "find_builder", "builder_version", "check_architectures"):
        monkeypatch.setattr(engines_module, name, getattr(engines_module, name))
    stand_in()


def kill(kind: str, source: Path, out: Path, at: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    command = [sys.executable, "-c", KILLED, kind, str(source), str(out), at]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def places(folder: Path) -> dict[str, tuple[int, int]]:
    """Of each file below a folder what a rename keeps, and writing it anew does not."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("stage.json", "lock", "key")]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    ("at", "finished"),
    [
        ("visual.blocks.1", ["checksum", "tokenizer"]),
        ("layers.1.mlp", ["checksum", "tokenizer", "vision"]),
        ("embed_tokens", ["checksum", "tokenizer", "vision", "decoder"]),
    ],
)
def test_a_reasoner_that_was_killed_goes_on_behind_its_last_stage(
    toy: Path, tmp_path: Path, at: str, finished: list[str]
) -> None:
    export_reasoner(toy / "reasoner", tmp_path / "whole", options=OPTIONS)
    kill("reasoner", toy / "reasoner", tmp_path / "out", at)
    assert not (tmp_path / "out").exists()
    work = tmp_path / ".out.export"
    before = {k: v for name in finished for k, v in places(work / name).items()}
    read: list[str] = []
    said: list[str] = []
    export_reasoner(
        toy / "reasoner", tmp_path / "out", options=OPTIONS,
        progress=lambda _done, _total, name: read.append(name), announce=said.append,
    )  # fmt: skip
    assert said[0].startswith(f"resumes: {', '.join(finished)} taken from the stopped build")
    assert before.items() <= places(tmp_path / "out").items()
    assert any("visual" in name for name in read) == ("vision" not in finished)
    assert any("layers" in name and "visual" not in name for name in read) == ("decoder" not in finished)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def test_a_segmenter_that_was_killed_goes_on_too(toy: Path, tmp_path: Path) -> None:
    export_segmenter(toy / "segmenter", tmp_path / "whole")
    kill("segmenter", toy / "segmenter", tmp_path / "out", "mask_decoder")
    before = places(tmp_path / ".out.export" / "encoder")
    assert set(before) == {"encoder.onnx"}
    export_segmenter(toy / "segmenter", tmp_path / "out")
    assert before.items() <= places(tmp_path / "out").items()
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.usefixtures("builder")
def test_engines_that_were_finished_are_kept_one_by_one(toy: Path, tmp_path: Path) -> None:
    options = EngineOptions(architectures=("sm_86", "sm_89"))
    export_engines(toy / "bundle", tmp_path / "whole", options=options)
    kill("engines", toy / "bundle", tmp_path / "out", "vision.sm_89")
    work = tmp_path / ".out.export"
    finished = [f"{graph}.{arch}" for graph in ("mask_decoder", "encoder") for arch in ("sm_86", "sm_89")]
    finished.append("vision.sm_86")
    before = {k: v for name in finished for k, v in places(work / name).items()}
    built: list[str] = []
    stand_in(lambda engine: built.append(engine.name))
    export_engines(toy / "bundle", tmp_path / "out", options=options)
    assert len(before) == 5
    assert before.items() <= places(tmp_path / "out").items()
    assert built == ["vision.sm_89.fp16.engine", "decoder.sm_86.fp16.engine", "decoder.sm_89.fp16.engine"]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert not work.exists()


@pytest.mark.usefixtures("builder")
def test_a_stopped_build_of_two_architectures_serves_one_of_one(toy: Path, tmp_path: Path) -> None:
    kill("engines", toy / "bundle", tmp_path / "out", "decoder.sm_89")
    stand_in(lambda _: pytest.fail("it was built"))
    export_engines(toy / "bundle", tmp_path / "out", options=EngineOptions(architectures=("sm_86",)))
    names = {f"{graph}.sm_86.fp16.engine" for graph in engines_module.GRAPH_NAMES}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"engines.json"}


@pytest.mark.usefixtures("builder")
def test_a_builder_that_the_system_stopped_leaves_the_engines_before(toy: Path, tmp_path: Path) -> None:
    def stopped(engine: Path) -> None:
        if "vision" in engine.name:
            raise BuilderStoppedError("it was killed")

    stand_in(stopped)
    said: list[str] = []
    options = EngineOptions(architectures=("sm_86",))
    with pytest.raises(BundleError, match="it was killed"):
        export_engines(toy / "bundle", tmp_path / "out", options=options, progress=said.append)
    assert said[-1].startswith("stopped: mask_decoder.sm_86, encoder.sm_86")
    assert not (tmp_path / "out").exists()


def stopped_reasoner(source: Path, out: Path, error: BaseException, **options: Any) -> list[str]:
    """What was said by an export that an error ended at the first matrix of the decoder."""

    def progress(_done: int, _total: int, name: str) -> None:
        if "layers.0.self_attn" in name:
            raise error

    said: list[str] = []
    with pytest.raises((type(error), BundleError)):
        export_reasoner(source, out, options=ReasonerOptions(**options), progress=progress, announce=said.append)
    return said


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(28, "No space left on device")])
def test_what_may_succeed_the_next_time_keeps_what_is_finished(toy: Path, tmp_path: Path, error: Any) -> None:
    said = stopped_reasoner(toy / "reasoner", tmp_path / "a" / "out", error)
    assert said[-1] == "stopped: checksum, tokenizer, vision kept for the same command, which goes on from there"
    assert not (tmp_path / "a" / "out").exists()
    work = tmp_path / "a" / ".out.export"
    assert {path.name for path in work.iterdir()} == {"checksum", "tokenizer", "vision", "key", "lock"}


@pytest.mark.parametrize("error", [BundleError("bad"), ZeroDivisionError("bug")])
def test_what_will_not_succeed_leaves_nothing_and_no_parent(toy: Path, tmp_path: Path, error: Any) -> None:
    stopped_reasoner(toy / "reasoner", tmp_path / "a" / "b" / "out", error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["precision", "settings", "weights", "config", "tokenizer", "fresh", "damage"])
def test_stages_of_other_options_or_sources_are_thrown_away(
    toy: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(toy / "reasoner", source)
    monkeypatch.setattr(folder_module, "_SMALL_BYTES", 100_000)  # the weights count as large
    stopped_reasoner(source, tmp_path / "out", KeyboardInterrupt())
    options: dict[str, Any] = {}
    if change == "precision":
        options["precision"] = "fp16"
    elif change == "settings":
        options["settings"] = {"max_think_tokens": 100}
    elif change == "fresh":
        options["fresh"] = True
    elif change == "weights":
        os.utime(source / "model.safetensors")
    elif change == "config":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "note": "other"}))
    elif change == "tokenizer":
        (source / "tokenizer.json").write_text((source / "tokenizer.json").read_text() + "\n")
    else:
        path = tmp_path / ".out.export" / "vision" / "vision.onnx"
        path.write_bytes(path.read_bytes()[:-1])
    said: list[str] = []
    export_reasoner(source, tmp_path / "out", options=ReasonerOptions(**options), announce=said.append)
    resumed = [line.partition(" taken")[0] for line in said if line.startswith("resumes")]
    assert resumed == ([] if change != "damage" else ["resumes: checksum, tokenizer"])
    export_reasoner(source, tmp_path / "whole", options=ReasonerOptions(**options))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_the_earlier_export_is_not_taken_for_the_stopped_one(toy: Path, tmp_path: Path) -> None:
    export_reasoner(toy / "reasoner", tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("stays")
    kill("reasoner", toy / "reasoner", tmp_path / "out", "layers.1.mlp")
    assert not (tmp_path / "out" / "export.json").exists()
    export_reasoner(toy / "reasoner", tmp_path / "out", options=OPTIONS)
    export_reasoner(toy / "reasoner", tmp_path / "whole", options=OPTIONS)
    (tmp_path / "out" / "mine.txt").unlink()
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_two_builds_of_one_output_do_not_meet(toy: Path, tmp_path: Path) -> None:
    with building(tmp_path / "out", key="a") as build:
        build.stage("one", lambda folder: {"size": (folder / "file").write_text("x")})
        with pytest.raises(BundleError, match=r"out\.export: another export to the same folder is running"):
            export_reasoner(toy / "reasoner", tmp_path / "out")
        build.write_description("{}")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"file", "export.json"}


def _command(*arguments: str | Path, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code = "from medreasoner_cli.start import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "export", *map(str, arguments)], capture_output=True, text=True, preexec_fn=limited
    )


def test_the_command_tells_what_it_keeps_and_goes_on_from_there(toy: Path, tmp_path: Path) -> None:
    export_reasoner(toy / "reasoner", tmp_path / "whole", options=ReasonerOptions(precision="int8"))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole").iterdir()}
    limit = (sizes["vision.onnx"] + sizes["embedding.bin"]) // 2  # stands for a disk that fills up
    assert max(sizes["vision.onnx"], sizes["decoder.onnx"]) < limit < sizes["embedding.bin"]
    command = ("reasoner", toy / "reasoner", "-o", tmp_path / "out", "--precision", "int8")
    done = _command(*command, limit=limit)
    *_, kept, error = done.stderr.splitlines()
    assert done.returncode == 4
    stages = "checksum, tokenizer, vision, decoder"
    assert kept == f"note: stopped: {stages} kept for the same command, which goes on from there"
    assert error.startswith(f"error: {tmp_path}/out: it cannot be written (File too large)")
    before = places(tmp_path / ".out.export" / "vision") | places(tmp_path / ".out.export" / "decoder")
    done = _command(*command)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"note: resumes: {stages} taken from the stopped build (--fresh")
    assert len(before) == 2
    assert before.items() <= places(tmp_path / "out").items()
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_what_is_finished_counts_as_disk_that_is_there(toy: Path, tmp_path: Path) -> None:
    first = stopped_reasoner(toy / "reasoner", tmp_path / "out", KeyboardInterrupt())
    said: list[str] = []
    export_reasoner(toy / "reasoner", tmp_path / "out", announce=said.append)
    told = [float(line.split()[0]) for line in (first[0], said[1])]
    vision = (tmp_path / "out" / "vision.onnx").stat().st_size + (tmp_path / "out" / "tokenizer.json").stat().st_size
    np.testing.assert_allclose(told[0] - told[1], vision / 1e6, atol=1.0)


def test_a_stopped_segmenter_of_other_settings_is_not_used(toy: Path, tmp_path: Path) -> None:
    kill("segmenter", toy / "segmenter", tmp_path / "out", "mask_decoder")
    said: list[str] = []
    options = SegmenterOptions(precision="fp16")
    export_segmenter(toy / "segmenter", tmp_path / "out", options=options, announce=said.append)
    assert not [line for line in said if line.startswith("resumes")]
