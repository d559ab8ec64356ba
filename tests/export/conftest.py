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


def scatter_weights(model: Any) -> None:
    """Weights of ordinary size for a model that was just made.

    Its zeros would hide positions, its small numbers the order of attention; larger ones than these would make each
    softmax a choice of one, and rounding errors grow from layer to layer.
    """
    for parameter in model.parameters():
        if parameter.ndim > 1 or not parameter.any():
            inputs = parameter.shape[-1] if parameter.shape[0] == 1 else parameter[0].numel()
            torch.nn.init.normal_(parameter, std=max(inputs, 16) ** -0.5)


@pytest.fixture(scope="session")
def build_sam2() -> Any:
    """Make a random ``Sam2Model`` for images of `size`, of Hiera-tiny's true shape or with entries of its sections.

    Each time the same.
    """

    def build(size: int, *, hiera: dict[str, Any] | None = None, channels: int = 256, **decoder: Any) -> Any:
        hiera = {"model_type": "sam2_hiera_det_model", "image_size": [size, size], **(hiera or {})}
        vision = {
            "backbone_config": hiera, "fpn_hidden_size": channels,
            "backbone_channel_list": hiera.get("embed_dim_per_stage", [96, 192, 384, 768])[::-1],
            "backbone_feature_sizes": [[size // stride] * 2 for stride in (4, 8, 16)],
        }  # fmt: skip
        config = transformers.Sam2Config(
            vision_config=vision,
            prompt_encoder_config={"image_size": size, "hidden_size": channels},
            mask_decoder_config={"hidden_size": channels, **decoder},
        )
        torch.manual_seed(0)
        model = transformers.Sam2Model(config).eval()
        scatter_weights(model)
        codes = model.shared_image_embedding.positional_embedding
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(codes)  # as published files have it
        return model

    return build


@pytest.fixture
def dialect_of() -> Callable[[Bundle, str], ort.InferenceSession]:
    """Session of a bundle's graph (``"encoder"`` and so on) in the dialect that engines are built from."""

    def session(bundle: Bundle, name: str) -> ort.InferenceSession:
        plan = next(plan for plan in engine_plans(bundle, EngineLimits()) if plan.name == name)
        graph = trt_graph(bundle.path(plan.source), plan, metadata={})
        return ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])

    return session
