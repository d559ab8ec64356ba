"""Qwen2-VL: the second family of reasoners, from a random checkpoint to an answer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from medreasoner import Grounder
from medreasoner.bundle import load_bundle
from medreasoner.errors import BundleError
from medreasoner_export import ReasonerOptions, build_bundle, export_reasoner, export_segmenter, verify_bundle
from medreasoner_export.parity_reasoner import reasoner_stages
from medreasoner_export.qwen_config import QwenConfig
from medreasoner_export.toy import make_toy_reasoner


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's tokenizer and settings with a Qwen2-VL of its sizes; weights of a size that makes faults show."""
    folder = make_toy_reasoner(tmp_path_factory.mktemp("qwen2") / "reasoner")
    old = json.loads((folder / "config.json").read_text())
    text = old["text_config"] | {"model_type": "qwen2_vl_text"}
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2}
    ids = {key: value for key, value in old.items() if key.endswith("_token_id")}
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean=centre, std=0.15)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    export_reasoner(checkpoint, folder / "r")
    export_segmenter(toy / "segmenter", folder / "s")
    return build_bundle(folder / "r", folder / "s", folder / "b", name="qwen2")


def test_every_stage_and_whole_answers_equal_transformers(bundle: Path, checkpoint: Path, toy: Path) -> None:
    report = verify_bundle(bundle, checkpoint, toy / "segmenter")
    assert report.passed, report.to_markdown()
    assert load_bundle(bundle).spec.reasoner.architecture == "qwen2_vl"


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_the_other_precisions_too(checkpoint: Path, toy: Path, tmp_path: Path, precision: Any) -> None:
    export_reasoner(checkpoint, tmp_path / "r", options=ReasonerOptions(precision=precision))
    export_segmenter(toy / "segmenter", tmp_path / "s")
    folder = build_bundle(tmp_path / "r", tmp_path / "s", tmp_path / "b", name="qwen2")
    stages = list(reasoner_stages(load_bundle(folder), checkpoint, tolerance=1e-4, seed=0))
    assert [stage.name for stage in stages if not stage.passed] == []


def test_it_answers_through_the_runtime(bundle: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120), dtype=np.uint8)
    with Grounder.load(bundle, device="cpu") as grounder:
        assert grounder.ground(pixels, "Where is it?").answer.startswith("<answer>")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "qwen3_vl"}, "expected qwen2_5_vl or qwen2_vl, got 'qwen3_vl'"),
        ({"vision_config": {"hidden_act": "silu"}}, "hidden_act: only 'quick_gelu'"),
        ({"vision_config": {"hidden_size": 99}}, "hidden_size is not the decoder's"),
        ({"vision_config": {"mlp_ratio": -1}}, "mlp_ratio: expected a positive number"),
        ({"vision_config": {"num_heads": 3}}, "heads of a multiple of 4 do not fit"),
    ],
)
def test_configurations_that_the_graph_cannot_follow_are_refused(
    checkpoint: Path, change: dict[str, Any], match: str
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    with pytest.raises(BundleError, match=match):
        QwenConfig.from_json(config)
