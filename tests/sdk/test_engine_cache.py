"""TensorRT inside ONNX Runtime is a stand-in here: one that leaves an engine's file where it was told to."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.sdk.test_providers import CPU, GPU_BUILD, TENSORRT, identity

from medreasoner import engine_cache
from medreasoner.errors import ProviderError
from medreasoner.ort_session import OrtSession
from medreasoner.providers import RuntimeOptions


class TensorRt:
    """Builds an engine when a session starts, for the GPU at hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import onnxruntime as ort

        self._real, self.architecture, self.options = ort.InferenceSession, (8, 6), dict[str, str]()
        monkeypatch.setattr(ort, "InferenceSession", self._start)
        monkeypatch.setattr(ort, "get_available_providers", lambda: GPU_BUILD)
        monkeypatch.setattr(engine_cache, "compute_capability", lambda: self.architecture)

    def build(self, shape: str = "") -> None:
        name = "{}_{}_sm{}{}.engine".format(self.options["trt_engine_cache_prefix"], shape, *self.architecture)
        folder = Path(self.options["trt_engine_cache_path"])
        folder.mkdir(exist_ok=True)
        if not (folder / name).exists():
            (folder / name).write_bytes(b"engine")

    def _start(self, path: str, options: object, *, providers: list[Any], **more: object) -> Any:
        self.options = dict(providers)[TENSORRT]
        self.build()
        session = self._real(path, options, providers=[CPU], **more)
        session.get_providers = lambda: GPU_BUILD
        return session


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> TensorRt:
    return TensorRt(monkeypatch)


def _load(tmp_path: Path) -> OrtSession:
    graph = identity(tmp_path / "vision.onnx")
    return OrtSession(graph, RuntimeOptions(device="auto", engine_cache_dir=tmp_path / "engines"))


def test_an_engine_is_announced_once(tmp_path: Path, tensorrt: TensorRt, caplog: pytest.LogCaptureFixture) -> None:
    _load(tmp_path)
    before, after = caplog.messages
    name, folder = f"{tmp_path.name}_vision", str(tmp_path / "engines")
    assert f"builds an engine of {name} now, which may take minutes; it is kept in {folder}" in before
    assert f"built an engine of {name} in 0 s" in after
    assert folder in after
    caplog.clear()
    _load(tmp_path)
    assert caplog.messages == []


def test_another_gpu_is_told_how_long_it_took_last_time(
    tmp_path: Path, tensorrt: TensorRt, caplog: pytest.LogCaptureFixture
) -> None:
    _load(tmp_path)
    (tmp_path / "engines" / f"{tmp_path.name}_vision.json").write_text('{"seconds": 83.2}')
    caplog.clear()
    tensorrt.architecture = (8, 9)
    _load(tmp_path)
    assert "which took 83 s last time" in caplog.messages[0]


def test_an_engine_for_another_shape_is_told_of(
    tmp_path: Path, tensorrt: TensorRt, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = _load(tmp_path)
    binding = session.bind({}, {})
    inputs = {name: np.zeros([2 if not isinstance(n, int) else n for n in shape], np.float32)
              for name, shape in session.inputs.items()}  # fmt: skip
    caplog.clear()
    binding.run(inputs)
    assert caplog.messages == []
    run = binding._session.run_with_iobinding

    def building(bound: Any) -> None:
        tensorrt.build("2x2")
        run(bound)

    monkeypatch.setattr(binding._session, "run_with_iobinding", building)
    binding.run(inputs)
    assert len(caplog.messages) == 1
    assert "built an engine" in caplog.messages[0]


def test_without_a_gpu_nothing_is_announced(
    tmp_path: Path, tensorrt: TensorRt, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> tuple[int, int]:
        raise ProviderError("no driver")

    monkeypatch.setattr(engine_cache, "compute_capability", absent)
    monkeypatch.setattr(tensorrt, "build", lambda: None)
    _load(tmp_path)
    assert caplog.messages == []
