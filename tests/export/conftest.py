"""A toy bundle, and the same checkpoints in transformers as the reference."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
import transformers

from medreasoner.bundle import Bundle, load_bundle
from medreasoner_export.toy import make_toy_bundle
from medreasoner_export.trt_dialect import trt_graph
from medreasoner_export.trt_plan import EngineLimits, engine_plans

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``bundle`` and the checkpoints ``reasoner`` and ``segmenter``."""
    return make_toy_bundle(tmp_path_factory.mktemp("toy")).parent


@pytest.fixture(scope="session")
def bundle(toy: Path) -> Bundle:
    return load_bundle(toy / "bundle", verify="full")


@pytest.fixture(scope="session")
def qwen(toy: Path) -> Any:
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(toy / "reasoner", dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="session")
def sam(toy: Path) -> Any:
    return transformers.SamModel.from_pretrained(toy / "segmenter", dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def sessions(bundle: Bundle) -> dict[str, ort.InferenceSession]:
    """By path in the bundle without its ending: ``"reasoner/vision"`` and so on."""
    names = [name for name in bundle.spec.used_files() if name.endswith(".onnx")]
    return {
        name.removesuffix(".onnx"): ort.InferenceSession(bundle.path(name), providers=["CPUExecutionProvider"])
        for name in names
    }


@pytest.fixture
def dialect_of() -> Callable[[Bundle, str], ort.InferenceSession]:
    """Session of a bundle's graph (``"encoder"`` and so on) in the dialect that engines are built from."""

    def session(bundle: Bundle, name: str) -> ort.InferenceSession:
        plan = next(plan for plan in engine_plans(bundle, EngineLimits()) if plan.name == name)
        graph = trt_graph(bundle.path(plan.source), plan, metadata={})
        return ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])

    return session
