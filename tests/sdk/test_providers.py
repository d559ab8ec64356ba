"""Which runtime, which device, which options: without a GPU, by what is asked for and what is said."""

import importlib.metadata
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from medreasoner import sessions
from medreasoner.errors import ProviderError
from medreasoner.ort_session import OrtSession
from medreasoner.providers import (
    CPU,
    CUDA,
    TENSORRT,
    RuntimeOptions,
    fallback_warnings,
    provider_list,
    require_runtime,
    usable_cores,
)

GPU_BUILD = [TENSORRT, CUDA, CPU]


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def distribution(name: str) -> object:
        if name not in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return object()

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)


def test_one_runtime_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        installed(monkeypatch, name)
        require_runtime()


def test_no_runtime_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(ProviderError, match=r"pip install 'medreasoner\[cpu\]'"):
        require_runtime()


def test_two_runtimes_are_an_error_that_says_what_to_remove(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    with pytest.raises(ProviderError, match="pip uninstall -y onnxruntime onnxruntime-gpu"):
        require_runtime()


def test_a_runtime_that_cannot_be_imported_is_an_error_that_says_how_to_mend_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(monkeypatch, "onnxruntime-gpu")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ProviderError, match="pip install --force-reinstall onnxruntime-gpu"):
        require_runtime()


@pytest.mark.parametrize(
    ("device", "available", "expected"),
    [
        ("auto", GPU_BUILD, [TENSORRT, CUDA, CPU]),
        ("auto", [CPU], [CPU]),
        ("auto", [CPU, CUDA], [CUDA, CPU]),
        ("tensorrt", GPU_BUILD, [TENSORRT, CUDA, CPU]),
        ("cuda", GPU_BUILD, [CUDA, CPU]),
        ("cpu", GPU_BUILD, [CPU]),
    ],
)
def test_providers_go_from_tensorrt_to_cpu(device: str, available: list[str], expected: list[str]) -> None:
    options = RuntimeOptions(device=device)  # type: ignore[arg-type]
    assert [name for name, _ in provider_list(options, available)] == expected


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_named_device_that_this_runtime_lacks_is_an_error(device: str) -> None:
    with pytest.raises(ProviderError, match=r"medreasoner\[gpu\]"):
        provider_list(RuntimeOptions(device=device), ["AzureExecutionProvider", CPU])  # type: ignore[arg-type]


def test_gpu_options_say_precision_cache_and_graphs(tmp_path: Path) -> None:
    options = RuntimeOptions(fp16=True, cuda_graphs=True, engine_cache_dir=tmp_path)
    chosen = dict(provider_list(options, GPU_BUILD))
    assert chosen[TENSORRT] == {
        "trt_fp16_enable": "1",
        "trt_cuda_graph_enable": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(tmp_path),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(tmp_path),
    }
    assert chosen[CUDA]["enable_cuda_graph"] == "1"
    assert chosen[CPU] == {}
    plain = dict(provider_list(RuntimeOptions(fp16=False), GPU_BUILD))
    assert plain[TENSORRT] == {"trt_fp16_enable": "0", "trt_cuda_graph_enable": "0"}
    assert plain[CUDA]["enable_cuda_graph"] == "0"


@pytest.mark.parametrize(
    ("options", "match"),
    [({"device": "tpu"}, "device: expected one of auto"), ({"n_threads": 0}, "n_threads: expected at least 1")],
)
def test_options_out_of_range_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(ProviderError, match=match):
        RuntimeOptions(**options)  # type: ignore[arg-type]


def test_a_fall_back_is_said() -> None:
    auto = RuntimeOptions()
    assert fallback_warnings("vision", auto, GPU_BUILD, GPU_BUILD) == ()
    assert fallback_warnings("vision", auto, GPU_BUILD, [CUDA, CPU]) == (
        f"vision runs on {CUDA}: {TENSORRT} did not start",
    )
    (line,) = fallback_warnings("vision", auto, GPU_BUILD, [CPU])
    assert line == f"vision runs on {CPU}: {TENSORRT} and {CUDA} did not start"


def test_a_named_device_that_did_not_start_is_an_error() -> None:
    with pytest.raises(ProviderError, match="CUDAExecutionProvider did not start"):
        fallback_warnings("vision", RuntimeOptions(device="cuda"), [CUDA, CPU], [CPU])
    with pytest.raises(ProviderError, match="did not start"):
        fallback_warnings("vision", RuntimeOptions(device="tensorrt"), GPU_BUILD, [CPU])
    with pytest.raises(ProviderError, match="did not start"):
        fallback_warnings("vision", RuntimeOptions(device="tensorrt"), GPU_BUILD, [CUDA, CPU])


@pytest.mark.parametrize(
    ("quota", "at_most"),
    [("100000 100000", 1), ("50000 100000", 1), ("150000 100000", 2), ("max 100000", 4096), ("", 4096), ("a b", 4096)],
)
def test_cores_follow_affinity_and_quota(quota: str, at_most: int) -> None:
    assert usable_cores(quota) == min(len(os.sched_getaffinity(0)), at_most)


def identity(path: Path) -> Path:
    import onnx
    from onnx import TensorProto, helper

    shape = [1, 2, "n", 3]
    graph = helper.make_graph(
        [helper.make_node("Add", ["past", "step"], ["present"]), helper.make_node("ReduceSum", ["step"], ["sum"])],
        "toy",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("past", "step")],
        [
            helper.make_tensor_value_info("present", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, None),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


def test_bound_buffers_are_read_and_written_in_place(tmp_path: Path) -> None:
    session = OrtSession(identity(tmp_path / "toy.onnx"), RuntimeOptions(device="cpu", n_threads=1))
    assert session.providers == (CPU,)
    assert session.warnings == ()
    buffer = session.allocate((1, 2, 4, 3), np.float32)
    binding = session.bind({"past": buffer}, {"present": buffer})
    step = np.arange(24, dtype=np.float32).reshape(1, 2, 4, 3)
    for run in (1, 2, 3):
        outputs = binding.run({"step": step})
        assert outputs.keys() == {"sum"}
        assert outputs["sum"].sum() == step.sum()
        np.testing.assert_array_equal(buffer.save(4), run * step)
    np.testing.assert_array_equal(buffer.save(1), 3 * step[:, :, :1])
    buffer.restore(np.full((1, 2, 2, 3), 7, np.float32))
    np.testing.assert_array_equal(buffer.save(2), 7)
    binding.run({"step": step})
    np.testing.assert_array_equal(buffer.save(2), 7 + step[:, :, :2])


def test_a_file_that_is_no_graph_is_a_provider_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(ProviderError, match=r"bad\.onnx"):
        OrtSession(path, RuntimeOptions(device="cpu"))


def test_a_run_with_a_wrong_shape_is_a_provider_error(tmp_path: Path) -> None:
    session = OrtSession(identity(tmp_path / "toy.onnx"), RuntimeOptions(device="cpu", n_threads=1))
    with pytest.raises(ProviderError, match="ONNX Runtime failed"):
        session.bind({}, {}).run({"step": np.zeros(3, np.float32), "past": np.zeros(2, np.float32)})


def test_a_provider_that_does_not_start_is_passed_over_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime as ort

    real, tried = ort.InferenceSession, []

    def start(path: str, options: object, *, providers: list[tuple[str, dict[str, str]]], **more: object) -> object:
        tried.append([name for name, _ in providers])
        if providers[0][0] != CPU:
            raise RuntimeError(f"no library\nof {providers[0][0]}")
        return real(path, options, providers=providers, **more)

    monkeypatch.setattr(ort, "InferenceSession", start)
    monkeypatch.setattr(ort, "get_available_providers", lambda: GPU_BUILD)
    path = identity(tmp_path / "toy.onnx")
    session = OrtSession(path, RuntimeOptions())
    assert tried == [GPU_BUILD, [CUDA, CPU], [CPU]]
    assert session.warnings == (f"toy runs on {CPU}: {TENSORRT} and {CUDA} did not start (no library of {TENSORRT})",)
    assert capfd.readouterr().out == ""
    with pytest.raises(ProviderError, match="did not start"):
        OrtSession(path, RuntimeOptions(device="cuda"))


class Providers:
    """Stands in for ONNX Runtime's sessions where CUDA is built in: it starts, fails, or is left out in silence."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cuda: str) -> None:
        import onnxruntime as ort

        self._real, self._cuda = ort.InferenceSession, cuda
        self.loaded: list[str] = []
        monkeypatch.setattr(ort, "InferenceSession", self._start)
        monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])

    def _start(self, path: str, options: object, *, providers: list[tuple[str, object]], **more: object) -> object:
        asks_gpu = providers[0][0] == CUDA
        self.loaded.append(Path(path).name)
        if asks_gpu and self._cuda == "fails":
            raise RuntimeError("no such library")
        session = self._real(path, options, providers=[CPU], **more)
        if asks_gpu and self._cuda == "starts":
            session.get_providers = lambda: [CUDA, CPU]
        return session


@pytest.mark.parametrize(
    ("device", "cuda", "loaded"),
    [
        ("cpu", "starts", ["second.onnx"]),
        ("auto", "starts", ["main.onnx"]),
        ("cuda", "starts", ["main.onnx"]),
        ("auto", "fails", ["main.onnx", "second.onnx"]),
        ("auto", "is left out", ["main.onnx", "second.onnx"]),
    ],
)
def test_the_cpu_runs_the_graph_that_is_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, cuda: str, loaded: list[str]
) -> None:
    main, second = identity(tmp_path / "main.onnx"), identity(tmp_path / "second.onnx")
    runtime = Providers(monkeypatch, cuda)
    session = OrtSession(main, RuntimeOptions(device=device), second)  # type: ignore[arg-type]
    assert runtime.loaded == loaded
    assert session.path.name == loaded[-1]
    assert session.providers == ((CUDA, CPU) if loaded[-1] == "main.onnx" else (CPU,))
    assert bool(session.warnings) == (device == "auto" and cuda != "starts")


def test_without_a_gpu_in_the_build_only_the_cpus_graph_is_read(tmp_path: Path) -> None:
    session = OrtSession(tmp_path / "absent.onnx", RuntimeOptions(), identity(tmp_path / "second.onnx"))
    assert session.path == tmp_path / "second.onnx"
    assert session.max_rows is None


class OnGpu:
    """Stands in for a session on a GPU."""

    caches: type[np.generic] = np.float32

    def __init__(self, path: Path, options: RuntimeOptions, on_cpu: Path | None = None) -> None:
        self.path = on_cpu or path
        self.providers = (CPU,) if options.device == "cpu" else (CUDA, CPU)
        self.warnings: tuple[str, ...] = ()

    def element_type(self, name: str) -> type[np.generic]:
        assert name == "past_key.0"
        return self.caches


def test_a_decoder_with_float32_caches_never_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "OrtSession", OnGpu)
    session = sessions.decoder_session(Path("decoder.onnx"), RuntimeOptions())
    assert session.providers == (CPU,)
    assert sessions.decoder_session(Path("a"), RuntimeOptions(), Path("b")).path == Path("b")
    (line,) = session.warnings
    assert line.startswith(f"decoder runs on {CPU}: its caches are float32")
    with pytest.raises(
        ProviderError, match=r"decoder\.onnx cannot run on device 'cuda': .* export it with --precision"
    ):
        sessions.decoder_session(Path("decoder.onnx"), RuntimeOptions(device="cuda"))
    assert sessions.decoder_session(Path("decoder.onnx"), RuntimeOptions(device="cpu")).warnings == ()


def test_a_decoder_with_float16_caches_stays_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "OrtSession", OnGpu)
    monkeypatch.setattr(OnGpu, "caches", np.float16)
    assert sessions.decoder_session(Path("decoder.onnx"), RuntimeOptions(device="cuda")).providers == (CUDA, CPU)
