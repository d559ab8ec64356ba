"""TensorRT proper as builder and runtime, on a stand-in of its module: no GPU and no TensorRT is needed, or shown.

The worker's process is real. The module that it imports has the names that TensorRT documents and no others, records
how they are used, and takes the graph for the engine. What runs such engines is in test_trt_runtime.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medreasoner import cuda
from medreasoner.engines import read_engines
from medreasoner.errors import BundleError, MissingExtraError, ProviderError
from medreasoner_export import EngineOptions, export_engines, find_builder, trt_build
from medreasoner_export.trt_build import check_architectures

VERSION = "10.99.0"
MODULE = f'''
import enum, json
from pathlib import Path
import numpy as np, onnx

__version__ = "{VERSION}"
HERE = Path(__file__).parent

def note(*what):
    with (HERE / "calls.jsonl").open("a") as file:
        file.write(json.dumps(what) + "\\n")

class ILogger:
    class Severity(enum.IntEnum):
        ERROR = 1
        WARNING = 2

class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1

class BuilderFlag(enum.IntEnum):
    TF32 = 7

class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0

def nptype(dtype):
    return np.dtype(dtype).type

class Tensor:
    def __init__(self, info):
        kind = info.type.tensor_type
        self.name = info.name
        self.dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        self.shape = tuple(-1 if each.dim_param else each.dim_value for each in kind.shape.dim)

class Network:
    def read(self, path):
        self.content = Path(path).read_bytes()
        graph = onnx.load_from_string(self.content).graph
        self.inputs, self.outputs = [*map(Tensor, graph.input)], [*map(Tensor, graph.output)]
        self.num_inputs, self.num_outputs = len(self.inputs), len(self.outputs)
    def get_input(self, index):
        return self.inputs[index]
    def get_output(self, index):
        return self.outputs[index]

class OnnxParser:
    def __init__(self, network, log):
        self.network = network
    def parse_from_file(self, path):
        self.network.read(path)
        return True

class HostMemory(bytes):
    pass

class TimingCache:
    def __init__(self, content):
        self.content = content
    def serialize(self):
        return HostMemory(b"timed")

class Profile:
    def set_shape(self, name, least, usual, most):
        pass

class Config:
    def clear_flag(self, flag):
        note("clear_flag", flag.name)
    def set_memory_pool_limit(self, pool, size):
        note("limit", pool.name, size)
    def create_timing_cache(self, content):
        note("cache", bytes(content).decode())
        return TimingCache(content)
    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        return cache.content != b"of another GPU"
    def add_optimization_profile(self, profile):
        return 0

class Builder:
    def __init__(self, log):
        self.log = log
    def create_network(self, flags):
        note("network", flags)
        return Network()
    def create_builder_config(self):
        return Config()
    def create_optimization_profile(self):
        return Profile()
    def build_serialized_network(self, network, config):
        if (HERE / "fails").exists():
            self.log.log(ILogger.Severity.ERROR, "no\\nkernel fits")
            self.log.log(ILogger.Severity.WARNING, "a warning")
            return None
        return HostMemory(network.content)
'''


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder of the stand-in, on a machine with a GPU of architecture sm_87."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "tensorrt.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", ":".join([str(folder), *sys.path]))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(trt_build, "compute_capability", lambda: (8, 7))
    trt_build._trt.cache_clear()
    yield folder
    trt_build._trt.cache_clear()
    sys.modules.pop("tensorrt", None)


def calls(fake: Path) -> list[list[Any]]:
    found = [json.loads(line) for line in (fake / "calls.jsonl").read_text().splitlines()]
    (fake / "calls.jsonl").unlink()
    return found


def options(fake: Path, **changed: Any) -> EngineOptions:
    return EngineOptions(builder="tensorrt", cache_dir=fake / "cache", **changed)


def test_a_build_is_typed_exact_limited_and_for_no_named_gpu(toy: Path, tmp_path: Path, fake: Path) -> None:
    said: list[str] = []
    chosen = options(fake, graphs=("encoder",), workspace=2**28)
    export_engines(toy / "bundle", tmp_path / "out", options=chosen, progress=said.append)
    assert calls(fake) == [["network", 2], ["clear_flag", "TF32"], ["limit", "WORKSPACE", 2**28], ["cache", ""]]
    content = json.loads((tmp_path / "out" / "engines.json").read_text())
    assert content["builder"] == f"tensorrt {VERSION}"
    (engine,) = content["engines"]
    assert (engine["architecture"], engine["file"]) == ("sm_87", "encoder.sm_87.fp16.engine")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"encoder.sm_87.fp16.engine", "engines.json"}
    assert engine["graph_sha256"] == engine["sha256"]  # the stand-in's engine is the graph that was built for it
    assert said[-1].endswith("its kernels were chosen by timing them, so that another build may differ")


@pytest.mark.parametrize(("kept", "given"), [("timed", ["timed"]), ("of another GPU", ["of another GPU", ""])])
def test_what_was_timed_serves_the_next_build_on_such_a_gpu(
    toy: Path, tmp_path: Path, fake: Path, kept: str, given: list[str]
) -> None:
    chosen = options(fake, graphs=("mask_decoder",))
    export_engines(toy / "bundle", tmp_path / "first", options=chosen)
    (file,) = (fake / "cache" / "engines").iterdir()
    assert (file.name, file.read_bytes()) == (f"tensorrt-{VERSION}.sm_87.timings", b"timed")
    file.write_text(kept)
    calls(fake)
    export_engines(toy / "bundle", tmp_path / "second", options=chosen)
    assert [each[1] for each in calls(fake) if each[0] == "cache"] == given
    assert file.read_bytes() == b"timed"


def test_a_cache_that_cannot_be_written_costs_no_engine(toy: Path, tmp_path: Path, fake: Path) -> None:
    (fake / "cache").write_text("a file")
    export_engines(toy / "bundle", tmp_path / "out", options=options(fake, graphs=("mask_decoder",)))
    assert len(read_engines(tmp_path / "out").engines) == 1


def test_what_it_cannot_build_is_told_in_its_words(toy: Path, tmp_path: Path, fake: Path) -> None:
    (fake / "fails").touch()
    with pytest.raises(BundleError, match=r"decoder\.onnx: TensorRT cannot build it for sm_87 \(no kernel fits\)"):
        export_engines(toy / "bundle", tmp_path / "out", options=options(fake, graphs=("mask_decoder",)))
    assert not (tmp_path / "out").exists()


def test_float32_means_float32_in_every_engine(toy: Path, tmp_path: Path, fake: Path) -> None:
    export_engines(toy / "bundle", tmp_path / "out", options=options(fake, precision="fp32"))
    assert calls(fake).count(["clear_flag", "TF32"]) == 4
    assert {each.precision for each in read_engines(tmp_path / "out").engines} == {"fp32"}


@pytest.mark.usefixtures("fake")
def test_only_this_machines_gpu_can_be_named() -> None:
    assert check_architectures((), "tensorrt") == ("sm_87",)
    assert check_architectures(("sm_87",), "tensorrt") == ("sm_87",)
    with pytest.raises(BundleError, match=r"for the GPU of this machine alone, sm_87, not for sm_86; leave --arch out"):
        check_architectures(("sm_86",), "tensorrt")
    with pytest.raises(BundleError, match="arch: expected names such as sm_86, got '87'"):
        check_architectures(("87",), "tensorrt")


def test_the_builder_is_the_one_that_is_installed(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert find_builder() == "tensorrt"
    with pytest.raises(MissingExtraError, match=r"medreasoner\[tensorrt-rtx\]"):
        find_builder("tensorrt-rtx")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", sys)
    trt_build._trt.cache_clear()
    assert find_builder() == "tensorrt-rtx"
    assert find_builder("tensorrt") == "tensorrt"


def test_the_command_without_a_gpu_says_so_in_a_line(toy: Path, tmp_path: Path, fake: Path) -> None:
    try:
        cuda.compute_capability()
    except ProviderError:
        pass
    else:
        pytest.skip("this machine has a GPU")
    code = "from medreasoner_cli.start import main; main()"
    command = ["export", "tensorrt", toy / "bundle", "--builder", "tensorrt", "-o", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("error: no NVIDIA driver: libcuda is not on this machine")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
