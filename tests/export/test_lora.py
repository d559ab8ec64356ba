"""LoRA adapters against peft itself, which makes them, and against what must be refused."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from medreasoner.bundle import load_bundle
from medreasoner.errors import BundleError
from medreasoner_export import ReasonerOptions, build_bundle, export_reasoner, export_segmenter, verify_bundle
from medreasoner_export.checkpoint import Checkpoint
from medreasoner_export.lora import with_adapter
from medreasoner_export.parity_reasoner import reasoner_stages

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "v_proj", "down_proj", "attn.qkv"]  # of the decoder, and of the vision tower


def _adapter(checkpoint: Path, folder: Path, **settings: Any) -> tuple[Path, Any]:
    """An adapter with weights that matter, saved by peft, and peft's own merged model."""
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 10, "target_modules": TARGETS} | settings))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft calls what transformers is about to drop
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        adapted.save_pretrained(folder)
        return folder, adapted.merge_and_unload().eval()


@pytest.fixture(scope="module")
def adapted(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return _adapter(toy / "reasoner", tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {r"^model.language_model.layers.1.self_attn.q_proj": 40}},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 3, "layers.0.self_attn.q_proj": 7}},
    ],
)
def test_every_matrix_is_what_peft_merges(toy: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder, merged = _adapter(toy / "reasoner", tmp_path / "a", **settings)
    plain, weights = Checkpoint(toy / "reasoner"), with_adapter(Checkpoint(toy / "reasoner"), folder)
    changed = 0
    for name, value in merged.named_parameters():
        stored = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        if stored not in weights:
            continue  # the tied head
        found = weights.tensor(stored, tuple(value.shape)).astype(np.float32)
        np.testing.assert_allclose(found, value.detach().numpy(), atol=1e-5)
        changed += not np.array_equal(found, plain.tensor(stored, tuple(value.shape)).astype(np.float32))
    assert changed == len(load_file(folder / "adapter_model.safetensors")) // 2 > 4
    assert weights.sha256() != plain.sha256()


def test_a_bundle_with_an_adapter_answers_as_the_adapted_model(
    toy: Path, tmp_path: Path, adapted: tuple[Path, Any]
) -> None:
    folder, _ = adapted
    export_reasoner(toy / "reasoner", tmp_path / "r", options=ReasonerOptions(adapter=folder, weights="float32"))
    export_segmenter(toy / "segmenter", tmp_path / "s")
    bundle = build_bundle(tmp_path / "r", tmp_path / "s", tmp_path / "b", name="adapted")
    report = verify_bundle(bundle, toy / "reasoner", toy / "segmenter", adapter=folder)
    assert report.passed, report.to_markdown()
    without = list(reasoner_stages(load_bundle(bundle), toy / "reasoner", tolerance=1e-4, seed=0))
    assert not any(stage.passed for stage in without if "hidden" in stage.name or "vision" in stage.name)


def _changed(folder: Path, out: Path, **settings: Any) -> Path:
    copy = Path(shutil.copytree(folder, out))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | settings))
    return copy


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected LORA, got 'IA3'"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
        ({"bias": "all"}, "bias: only none is supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"r": "many"}, "must be numbers"),
        ({"r": 0}, "at least 1"),
        ({"rank_pattern": [1]}, "must be numbers"),
    ],
)
def test_adapters_of_another_kind_are_refused(
    toy: Path, tmp_path: Path, adapted: tuple[Path, Any], settings: dict[str, Any], match: str
) -> None:
    folder = _changed(adapted[0], tmp_path / "a", **settings)
    with pytest.raises(BundleError, match=match):
        with_adapter(Checkpoint(toy / "reasoner"), folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w, n: w.pop(n.replace("lora_A", "lora_B")), "has no .*lora_B.* beside it"),
        (lambda w, n: w.update({n: w[n][:, :-1].copy()}), "does not fit"),
        (lambda w, n: w.update({n.replace("q_proj", "x_proj"): w.pop(n)}), "has no|is no matrix of"),
        (
            lambda w, n: w.update({"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)}),
            "no pairs of lora_A",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    toy: Path, tmp_path: Path, adapted: tuple[Path, Any], change: Any, match: str
) -> None:
    folder = _changed(adapted[0], tmp_path / "a")
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights, next(name for name in sorted(weights) if "q_proj.lora_A" in name))
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(BundleError, match=match):
        with_adapter(Checkpoint(toy / "reasoner"), folder)


def test_a_folder_without_an_adapter_is_named(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"adapter_config\.json is missing"):
        with_adapter(Checkpoint(toy / "reasoner"), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    with pytest.raises(BundleError, match=r"holds no adapter_model\.safetensors"):
        with_adapter(Checkpoint(toy / "reasoner"), tmp_path)
