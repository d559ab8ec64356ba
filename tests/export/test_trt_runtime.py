"""The road of an engine at run time, on a stand-in of TensorRT and of a GPU's memory.

Its engines are the graphs themselves, its kernels ONNX Runtime's, its device a table of addresses: what is shown are
the bindings, the shapes, the copies, the profiles and the choice of engines. What a GPU computes is not.
"""

import dataclasses
import gc
import json
import sys
import threading
import types
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import medreasoner as mr
from medreasoner import trt_session
from medreasoner.bundle import Bundle
from medreasoner.engines import EngineRecord, read_engines
from medreasoner.errors import BundleError, MissingExtraError, ProviderError
from medreasoner.reasoner.static_cache import StaticDecoder
from medreasoner.trt_session import Gpu, TrtSession, open_gpu
from medreasoner_export import EngineLimits, EngineOptions, export_engines
from medreasoner_export import tensorrt as export_module
from medreasoner_export.trt_build import check_architectures, find_builder

Array = np.ndarray[Any, Any]
RUNTIME = "stand-in 1.0"
QUERY = "Where is the heart in this image?"


class TableMemory:
    """A device whose memory is a table of arrays; counts what is done to it."""

    stream = 77

    def __init__(self) -> None:
        self.table: dict[int, Array] = {}
        self.counts: Counter[str] = Counter()
        self._next = 4096

    def allocate(self, n_bytes: int) -> int:
        self.counts["allocate"] += 1
        self.table[self._next] = np.full(n_bytes, 0xFF, np.uint8)  # NaN, if anyone reads it
        self._next += n_bytes + 512
        return self._next - n_bytes - 512

    def free(self, address: int) -> None:
        del self.table[address]

    def view(self, address: int, n_bytes: int) -> Array:
        start = max(each for each in self.table if each <= address)
        part = self.table[start][address - start : address - start + n_bytes]
        assert len(part) == n_bytes
        return part

    def zero(self, address: int, n_bytes: int) -> None:
        self.view(address, n_bytes)[:] = 0

    def upload(self, address: int, host: Array) -> None:
        self.counts["upload"] += 1
        self.view(address, host.nbytes)[:] = host.reshape(-1).view(np.uint8)

    def download(self, host: Array, address: int) -> None:
        self.counts["download"] += 1
        host.reshape(-1).view(np.uint8)[:] = self.view(address, host.nbytes)

    def synchronize(self) -> None:
        self.counts["synchronize"] += 1


class Context:
    def __init__(self, session: ort.InferenceSession, memory: TableMemory) -> None:
        self.session, self.memory = session, memory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile: int | None = None
        self.runs: list[dict[str, tuple[int, ...]]] = []

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == self.memory.stream
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes: dict[str, int] = {}
        for each in self.session.get_inputs():
            sizes |= {a: b for a, b in zip(each.shape, self.shapes[each.name], strict=True) if isinstance(a, str)}
        (output,) = (each for each in self.session.get_outputs() if each.name == name)
        return tuple(sizes[size] if isinstance(size, str) else size for size in output.shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.memory.stream
        assert self.profile is not None
        inputs = {}
        for each in self.session.get_inputs():
            dtype, shape = _dtype(each.type), self.shapes[each.name]
            content = self.memory.view(self.addresses[each.name], int(np.prod(shape)) * dtype.itemsize)
            inputs[each.name] = content.view(dtype).reshape(shape)
        outputs = [each.name for each in self.session.get_outputs()]
        assert not {self.addresses[each] for each in outputs} & {self.addresses[each] for each in inputs}
        for name, array in zip(outputs, self.session.run(outputs, inputs), strict=True):
            self.memory.view(self.addresses[name], array.nbytes)[:] = array.reshape(-1).view(np.uint8)
        self.runs.append(dict(self.shapes))
        return True


def _dtype(kind: str) -> np.dtype[Any]:
    names = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(bool)": "bool"}
    return np.dtype(names[kind])


class Engine:
    def __init__(self, content: bytes, memory: TableMemory) -> None:
        self.session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.num_io_tensors = len(self.tensors)
        self.memory = memory
        self.contexts: list[Context] = []

    def get_tensor_name(self, index: int) -> str:
        return str(self.tensors[index].name)

    def get_tensor_dtype(self, name: str) -> np.dtype[Any]:
        return next(_dtype(each.type) for each in self.tensors if each.name == name)

    def create_execution_context(self) -> Context:
        self.contexts.append(Context(self.session, self.memory))
        return self.contexts[-1]


class StandIn:
    """What `TrtSession` uses of the module."""

    class ILogger:
        class Severity:
            ERROR = 1

    def __init__(self, memory: TableMemory) -> None:
        self.memory = memory
        self.engines: list[Engine] = []

    def nptype(self, dtype: np.dtype[Any]) -> type[Any]:
        return dtype.type

    def Runtime(self, log: Any) -> "StandIn":  # noqa: N802
        self.log = log
        return self

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        if content == b"for another GPU":
            self.log.log(1, "a wrong\nnumber")
            return None
        self.engines.append(Engine(content, self.memory))
        return self.engines[-1]


@pytest.fixture
def gpu() -> Gpu:
    memory = TableMemory()
    return Gpu(tensorrt=StandIn(memory), runtime=RUNTIME, architecture="sm_86", memory=memory)


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def engines(request: pytest.FixtureRequest, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the export writes it, with graphs for engines."""
    out = tmp_path_factory.mktemp("engines")
    _export(toy / "bundle", out, request.param)
    return out


def _export(bundle: Path, out: Path, precision: Any, **limits: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            export_module, "build_engine", lambda graph, _, __, engine, **_k: engine.write_bytes(graph.read_bytes())
        )
        patch.setattr(export_module, "find_builder", lambda _: "tensorrt-rtx")
        patch.setattr(export_module, "builder_version", lambda _: RUNTIME)
        patch.setattr(export_module, "check_architectures", lambda architectures, _: architectures)
        limits = {"max_batch": 8, "max_chunk": 24} | limits
        options = EngineOptions(architectures=("sm_86",), precision=precision, limits=EngineLimits(**limits))
        export_engines(bundle, out, options=options)


@pytest.fixture
def use_gpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    monkeypatch.setattr(trt_session, "open_gpu", lambda _: gpu)
    return gpu


def _record(folder: Path, graph: str) -> EngineRecord:
    return next(each for each in read_engines(folder).engines if each.graph == graph)


def _session(folder: Path, graph: str, gpu: Gpu) -> TrtSession:
    record = _record(folder, graph)
    return TrtSession(read_engines(folder).read(record), record, gpu)


IMAGE = np.random.default_rng(0).integers(0, 255, (60, 80), np.uint8)
QUERIES = [QUERY, "Which organ lies behind the stomach?", "Where is it?"]


def _answers(bundle: Path, cache: Path, **options: Any) -> tuple[list[Any], tuple[str, ...], set[str]]:
    with mr.Grounder.load(bundle, cache_dir=cache, **options) as grounder:
        results = grounder.ground(IMAGE, QUERIES)
        more = grounder.ground(IMAGE, QUERY, think=True)
        found = [(each.found, each.box, each.points, each.answer, each.reasoning) for each in [*results, more]]
        return found, results[0].warnings, set(grounder.providers.values())


def test_the_same_scheduler_gives_the_same_answers(toy: Path, engines: Path, use_gpu: Gpu, tmp_path: Path) -> None:
    expected, _, on_cpu = _answers(toy / "bundle", tmp_path, device="cpu")
    found, warnings, on_gpu = _answers(toy / "bundle", tmp_path, engines=engines)
    assert found == expected
    assert (on_cpu, on_gpu) == ({"CPUExecutionProvider"}, {"TensorRT-RTX"})
    assert not [line for line in warnings if "engine" in line]
    runs = [run for engine in use_gpu.tensorrt.engines for context in engine.contexts for run in context.runs]
    assert sum("inputs_embeds" in run for run in runs) > 10


def test_masks_are_those_of_the_cpu(toy: Path, engines: Path, use_gpu: Gpu, tmp_path: Path) -> None:
    box, points = (10, 10, 60, 50), ((20, 20), (40, 40))
    results = []
    for options in ({"device": "cpu"}, {"engines": engines}):
        with mr.Grounder.load(toy / "bundle", cache_dir=tmp_path, **options) as grounder, grounder.open(IMAGE) as study:  # type: ignore[arg-type]
            results.append(study.segment(box=box, points=points))
    (mask, score), (expected, expected_score) = results[1], results[0]
    assert float((mask == expected).mean()) > 0.999
    assert score == pytest.approx(expected_score, abs=5e-3)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_step_copies_only_its_tokens_and_waits_once(bundle: Bundle, engines: Path, gpu: Gpu, batch: int) -> None:
    spec, session = bundle.spec.reasoner, _session(engines, "decoder", gpu)
    dtype = np.dtype(_record(engines, "decoder").inputs[-1].dtype).type
    shape = (batch, spec.n_kv_heads, spec.max_length, spec.head_dim)
    names = [f"{kind}.{layer}" for layer in range(spec.n_layers) for kind in ("key", "value")]
    buffers = {name: session.allocate(shape, dtype) for name in names}
    binding = session.bind(
        {f"past_{n}": b for n, b in buffers.items()}, {f"present_{n}": b for n, b in buffers.items()}
    )
    memory = gpu.memory
    assert isinstance(memory, TableMemory)
    rng = np.random.default_rng(0)
    for step in range(3):
        memory.counts.clear()
        before = {name: (each.address, each.next_address) for name, each in buffers.items()}
        memory.counts["allocate"] = 0  # the second pieces of the buffers, at the first step
        table = rng.standard_normal((batch, 1, spec.head_dim // 2)).astype(np.float32)
        places = np.full((batch, 1), step, np.int64)
        inputs = {
            "inputs_embeds": rng.standard_normal((batch, 1, spec.hidden_dim)).astype(np.float32),
            "rotary_cos": table, "rotary_sin": table, "write_positions": places,
            "attention_mask": np.arange(spec.max_length) <= places[..., None],
        }  # fmt: skip
        hidden = binding.run(inputs)["hidden_states"]
        assert hidden.shape == (batch, 1, spec.hidden_dim)
        assert np.isfinite(hidden).all()
        assert memory.counts["upload"] == 5
        assert (memory.counts["download"], memory.counts["synchronize"]) == (1, 1)
        assert memory.counts["allocate"] == (6 if step == 0 else 0)
        for name, each in buffers.items():  # the two pieces have changed places
            assert (each.address, each.next_address) == before[name][::-1]
    engine = gpu.tensorrt.engines[-1]
    (context,) = engine.contexts
    assert context.profile == 0
    assert context.runs[-1]["past_key.0"] == shape
    saved = buffers["key.0"].save(4)
    assert saved.shape == (batch, spec.n_kv_heads, 4, spec.head_dim)
    assert np.abs(saved[:, :, :3]).min(axis=-1).max() > 0
    assert not saved[:, :, 3].any()  # not written yet


def test_a_prompt_is_read_in_chunks_by_the_other_profile(
    toy: Path, engines: Path, use_gpu: Gpu, tmp_path: Path
) -> None:
    _answers(toy / "bundle", tmp_path, engines=engines)
    decoder = next(e for e in use_gpu.tensorrt.engines if "inputs_embeds" in {each.name for each in e.tensors})
    by_profile = {
        context.profile: {run["inputs_embeds"][1] for run in context.runs}
        for context in decoder.contexts
        if context.runs
    }
    assert by_profile[0] == {1}
    assert max(by_profile[1]) == 24  # the chunk that the engines were built for
    assert min(by_profile[1]) > 1


def test_several_rows_go_token_by_token_and_as_if_at_once(bundle: Bundle, engines: Path, gpu: Gpu) -> None:
    spec, session = bundle.spec.reasoner, _session(engines, "decoder", gpu)
    dtype = np.dtype(_record(engines, "decoder").inputs[-1].dtype).type
    decoder = StaticDecoder(session, capacity=spec.max_length, chunk=24, dtype=dtype)
    shape = (1, spec.n_kv_heads, spec.max_length, spec.head_dim)
    names = [f"{kind}.{layer}" for layer in range(spec.n_layers) for kind in ("key", "value")]
    rng = np.random.default_rng(1)
    embeds = rng.standard_normal((2, 3, spec.hidden_dim)).astype(np.float32)
    angles = rng.standard_normal((6, spec.head_dim // 2)).astype(np.float32)

    def run(rows: slice) -> Array:
        n = len(embeds[rows])
        buffers = {name: decoder.allocate((n, *shape[1:]), np.float32) for name in names}
        binding = decoder.bind(
            {f"past_{k}": b for k, b in buffers.items()}, {f"present_{k}": b for k, b in buffers.items()}
        )
        return binding.run(
            {
                "inputs_embeds": embeds[rows],
                "rotary_cos": np.cos(angles),
                "rotary_sin": np.sin(angles),
                "rotary_ids": np.arange(6).reshape(2, 3)[rows],
                "seqlens_k": np.full(n, 2, np.int32),
            }
        )["hidden_states"]

    alone = np.concatenate([run(slice(row, row + 1)) for row in range(2)])
    np.testing.assert_allclose(run(slice(0, 2)), alone, atol=5e-3 if dtype is np.float16 else 1e-5)
    contexts = {context.profile: context.runs for context in gpu.tensorrt.engines[-1].contexts}
    assert [each["inputs_embeds"][:2] for each in contexts[0]] == [(2, 1)] * 3
    assert [each["inputs_embeds"][:2] for each in contexts[1]] == [(1, 3)] * 2


def test_a_buffer_is_saved_and_restored_head_by_head(engines: Path, gpu: Gpu) -> None:
    session = _session(engines, "decoder", gpu)
    buffer = session.allocate((1, 2, 16, 4), np.float32)
    content = np.random.default_rng(0).standard_normal((1, 2, 5, 4)).astype(np.float32)
    buffer.restore(content)
    np.testing.assert_array_equal(buffer.save(5), content)
    np.testing.assert_array_equal(buffer.save(3), content[:, :, :3])
    assert not buffer.save(16)[:, :, 5:].any()


def test_memory_goes_back_with_its_buffer(engines: Path, gpu: Gpu) -> None:
    session = _session(engines, "encoder", gpu)
    assert isinstance(gpu.memory, TableMemory)
    before = set(gpu.memory.table)
    buffer = session.allocate((1, 1, 8, 4), np.float32)
    assert set(gpu.memory.table) > before
    del buffer
    assert set(gpu.memory.table) == before


def test_a_shape_beyond_every_profile_is_refused(engines: Path, gpu: Gpu) -> None:
    session = _session(engines, "encoder", gpu)
    pixels = np.zeros((5, 3, 64, 64), np.float32)
    with pytest.raises(ProviderError, match=r"encoder\.sm_86.*no profile holds \{'batch': 5\}; build the engines for"):
        session.bind({}, {}).run({"pixel_values": pixels})
    with pytest.raises(ProviderError, match=r"pixel_values of .* does not fit"):
        session.bind({}, {}).run({"pixel_values": pixels[:1, :, :32]})
    with pytest.raises(ProviderError, match="pixel_values: expected float32, got float64"):
        session.bind({}, {}).run({"pixel_values": pixels[:1].astype(np.float64)})


def test_foreign_buffers_are_refused(engines: Path, gpu: Gpu) -> None:
    with pytest.raises(ProviderError, match="only buffers that its own session allocated"):
        _session(engines, "decoder", gpu).bind({"past_key.0": object()}, {})  # type: ignore[dict-item]


def test_threads_share_a_session(engines: Path, gpu: Gpu) -> None:
    session = _session(engines, "encoder", gpu)
    images = np.random.default_rng(0).standard_normal((6, 1, 3, 64, 64), dtype=np.float32)
    alone = [session.bind({}, {}).run({"pixel_values": image})["image_embedding"] for image in images]
    found: dict[int, Array] = {}

    def work(index: int) -> None:
        found[index] = session.bind({}, {}).run({"pixel_values": images[index]})["image_embedding"]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(6):
        np.testing.assert_array_equal(found[index], alone[index])


@pytest.fixture
def copy(engines: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder of engines that a test may change."""
    import shutil

    return shutil.copytree(engines, tmp_path / "copy")


def _change(folder: Path, **values: Any) -> None:
    """Change ``engines.json``: keys of the file, or of each engine."""
    content = json.loads((folder / "engines.json").read_text())
    for key, value in values.items():
        if key in content:
            content[key] = value
        else:
            for each in content["engines"]:
                each[key] = value
    (folder / "engines.json").write_text(json.dumps(content))


def _proper(gpu: Gpu, version: str) -> Gpu:
    """The same GPU with TensorRT proper."""
    return dataclasses.replace(gpu, runtime=f"tensorrt {version}", provider="TensorRT")


def test_engines_of_tensorrt_proper_run_on_it(
    toy: Path, copy: Path, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _change(copy, builder="tensorrt 10.99.0")
    known = {"tensorrt 10.99.0": _proper(gpu, "10.99.0")}
    monkeypatch.setattr(trt_session, "open_gpu", lambda builder: known[builder])
    expected, _, _ = _answers(toy / "bundle", tmp_path, device="cpu")
    found, warnings, providers = _answers(toy / "bundle", tmp_path, engines=copy)
    assert found == expected
    assert providers == {"TensorRT"}, warnings


def test_engines_of_another_tensorrt_proper_are_passed_over_with_the_reason(
    toy: Path, copy: Path, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _change(copy, builder="tensorrt 10.99.0")
    monkeypatch.setattr(trt_session, "open_gpu", lambda _: _proper(gpu, "11.4.0"))
    _, warnings, providers = _answers(toy / "bundle", tmp_path, engines=copy)
    assert providers == {"CPUExecutionProvider"}
    reason = "the engines were built by tensorrt 10.99.0, and tensorrt 11.4.0 is installed"
    assert any(reason in line for line in warnings)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "sm_120"}, "are for sm_120, and this GPU is sm_86"),
        ({"builder": "stand-in 0.9"}, "were built by stand-in 0.9, and stand-in 1.0 is installed"),
        ({"source_sha256": "0" * 64}, "were built from another bundle"),
        ({"engines": []}, "has no engine of reasoner/vision.onnx"),
    ],
    ids=["architecture", "version", "bundle", "none"],
)
def test_an_engine_that_does_not_fit_is_passed_over_with_the_reason(
    toy: Path, copy: Path, use_gpu: Gpu, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    _change(copy, **changes)
    expected, _, _ = _answers(toy / "bundle", tmp_path, device="cpu")
    found, warnings, providers = _answers(toy / "bundle", tmp_path, engines=copy)
    assert found == expected
    assert providers == {"CPUExecutionProvider"}
    assert any(
        line.startswith("CPUExecutionProvider runs instead of an engine: ") and reason in line for line in warnings
    )


def test_an_engine_that_the_gpu_does_not_take_is_passed_over(
    toy: Path, copy: Path, use_gpu: Gpu, tmp_path: Path
) -> None:
    record = _record(copy, "vision")
    (copy / record.file).write_bytes(b"for another GPU")
    content = json.loads((copy / "engines.json").read_text())
    for each in content["engines"]:
        if each["graph"] == "vision":
            import hashlib

            each["sha256"] = hashlib.sha256(b"for another GPU").hexdigest()
    (copy / "engines.json").write_text(json.dumps(content))
    _, warnings, providers = _answers(toy / "bundle", tmp_path, engines=copy)
    assert providers == {"CPUExecutionProvider", "TensorRT-RTX"}
    assert any("stand-in 1.0 does not take it on this GPU, sm_86 (a wrong number)" in line for line in warnings)


def test_without_a_gpu_the_reason_is_said(toy: Path, engines: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(trt_session, "open_gpu", _no_gpu)
    _, warnings, providers = _answers(toy / "bundle", tmp_path, engines=engines)
    assert providers == {"CPUExecutionProvider"}
    assert any("no NVIDIA driver" in line for line in warnings)


def _no_gpu(_builder: str) -> Gpu:
    raise ProviderError("no NVIDIA driver: libcuda is not on this machine")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_engines_beside_a_device_that_runs_none_are_refused(
    toy: Path, engines: Path, use_gpu: Gpu, tmp_path: Path, device: Any
) -> None:
    with pytest.raises(ProviderError, match=f"engines run on device 'auto' or 'tensorrt', not '{device}'"):
        mr.Grounder.load(toy / "bundle", cache_dir=tmp_path, engines=engines, device=device)


def test_where_nothing_runs_a_graph_the_engines_reason_is_said_too(
    toy: Path, engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_session, "open_gpu", _no_gpu)
    with pytest.raises(ProviderError, match=r"device 'tensorrt' needs .*; no engine runs it either: no NVIDIA driver"):
        mr.Grounder.load(toy / "bundle", cache_dir=tmp_path, engines=engines, device="tensorrt")


def test_a_named_tensorrt_runs_engines_without_onnx_runtimes_own(
    toy: Path, engines: Path, use_gpu: Gpu, tmp_path: Path
) -> None:
    _, _, providers = _answers(toy / "bundle", tmp_path, engines=engines, device="tensorrt")
    assert providers == {"TensorRT-RTX"}


def test_closing_gives_the_sessions_and_the_gpus_memory_back(
    toy: Path, engines: Path, use_gpu: Gpu, tmp_path: Path
) -> None:
    grounder = mr.Grounder.load(toy / "bundle", cache_dir=tmp_path, engines=engines)
    study = grounder.open(IMAGE)
    study.ground(QUERY)
    memory, ended = use_gpu.memory, weakref.ref(grounder._engine.segmenter)
    assert isinstance(memory, TableMemory)
    assert memory.table
    grounder.close()
    with pytest.raises(mr.MedReasonerError, match="this Grounder is closed"):
        study.ground(QUERY)
    with pytest.raises(mr.MedReasonerError, match="this Grounder is closed"):
        grounder.ground(IMAGE, QUERY)
    study.close()
    gc.collect()
    assert ended() is None
    assert not memory.table
    grounder.close()  # a second time is nothing


@pytest.mark.parametrize(
    ("builder", "words"),
    [
        ("tensorrt_rtx 1.7.1.116", "TensorRT-RTX cannot be imported .*medreasoner\\[tensorrt-rtx"),
        ("tensorrt 10.13.0.35", "TensorRT cannot be imported .*medreasoner\\[tensorrt\\].*JetPack"),
        ("tvm 1.0", "were built by 'tvm 1.0', which this release cannot run"),
        ("os 1.0", "were built by 'os 1.0', which this release cannot run"),
    ],
)
def test_the_module_is_that_of_the_builder(builder: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ProviderError, match=words):
        open_gpu(builder)


@pytest.mark.parametrize(("module", "provider"), [("tensorrt", "TensorRT"), ("tensorrt_rtx", "TensorRT-RTX")])
def test_the_installed_version_is_part_of_the_runtimes_name(
    module: str, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = TableMemory()
    monkeypatch.setattr(trt_session, "CudaMemory", lambda: memory)
    memory.capability = (8, 7)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(__version__="10.13"))  # type: ignore[arg-type]
    gpu = open_gpu(f"{module} 10.12")
    assert (gpu.runtime, gpu.architecture, gpu.provider) == (f"{module} 10.13", "sm_87", provider)


def test_an_altered_engine_is_never_handed_to_the_driver(toy: Path, copy: Path, use_gpu: Gpu, tmp_path: Path) -> None:
    path = copy / _record(copy, "decoder").file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"its SHA-256 is not that of engines\.json"):
        mr.Grounder.load(toy / "bundle", cache_dir=tmp_path, engines=copy)
    path.unlink()
    with pytest.raises(BundleError, match="No such file or directory; build the engines again"):
        mr.Grounder.load(toy / "bundle", cache_dir=tmp_path, engines=copy)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "schema_version: expected 1, got None"),
        ('{"schema_version": 2}', "schema_version: expected 1, got 2"),
        ('{"schema_version": 1, "bundle": {}, "builder": "x"}', "engines: missing"),
        ('{"schema_version": 1, "bundle": {}, "builder": 3, "engines": []}', "builder: expected text"),
    ],
)
def test_a_malformed_list_of_engines_is_refused_by_its_key(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "engines.json").write_text(text)
    with pytest.raises(BundleError, match=words):
        read_engines(tmp_path)


def test_a_path_out_of_the_folder_is_refused(copy: Path) -> None:
    _change(copy, file="../engine")
    with pytest.raises(BundleError, match=r"engines\[0\]\.file: '\.\./engine' is not a plain name"):
        read_engines(copy)


def test_a_folder_without_engines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="'medreasoner-cli export tensorrt' writes it"):
        read_engines(tmp_path)


@pytest.mark.parametrize("kind", ["missing", "other type"])
def test_an_engine_with_other_tensors_than_its_record_is_refused(engines: Path, gpu: Gpu, kind: str) -> None:
    record = _record(engines, "encoder")
    (tensor,) = record.inputs
    other = dataclasses.replace(tensor, **({"name": "pixels"} if kind == "missing" else {"dtype": "float64"}))
    words = "the engine has no pixels" if kind == "missing" else "pixel_values is float32, and not float64"
    with pytest.raises(ProviderError, match=words):
        TrtSession(read_engines(engines).read(record), dataclasses.replace(record, inputs=(other,)), gpu)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"profiles": []}, "profiles: none says how large"),
        ({"profiles": [{}]}, r"profiles\[0\]: .* is missing"),
        ({"file": "a\0b"}, "zero byte"),
        ({"file": "../x"}, "not a plain name"),
    ],
)
def test_records_that_would_fail_later_are_refused_when_they_are_read(
    engines: Path, tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    content = json.loads((engines / "engines.json").read_text())
    content["engines"][0] |= change
    (tmp_path / "engines.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=match):
        read_engines(tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("asked", ["tensorrt-rtx", "tensorrt"])
def test_engines_on_a_gpu_compute_what_the_cpu_computes(toy: Path, tmp_path: Path, asked: Any) -> None:
    try:
        builder = find_builder(asked)
        gpu = open_gpu(builder.replace("-", "_"))
        check_architectures((gpu.architecture,), builder)
    except (BundleError, MissingExtraError, ProviderError) as err:
        pytest.skip(f"no GPU that an installed TensorRT builds for: {err}")
    options = EngineOptions(
        architectures=(gpu.architecture,), precision="fp32", builder=builder, cache_dir=tmp_path / "cache"
    )
    export_engines(toy / "bundle", tmp_path / "engines", options=options)
    expected, _, _ = _answers(toy / "bundle", tmp_path, device="cpu")
    found, warnings, providers = _answers(toy / "bundle", tmp_path, engines=tmp_path / "engines")
    assert providers == {gpu.provider}, warnings
    assert found == expected
