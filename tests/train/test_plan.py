"""The plan's arithmetic beside torch's own count of a small model's memory, and the paper's recipe."""

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from medreasoner.errors import BundleError
from medreasoner_train.distributed import ScaleOptions
from medreasoner_train.hub_policy import POSITIONS
from medreasoner_train.lora import LoraOptions
from medreasoner_train.plan import QWEN2_5_VL_7B, Workload, meta_model, plan

SMALL: dict[str, Any] = {
    "text_config": {
        "vocab_size": 500, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]},
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    },
    "vision_config": {
        "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 128,
        "window_size": 112, "fullatt_block_indexes": [1],
    },
    "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8,
    "tie_word_embeddings": False,
}  # fmt: skip
ALONE = ScaleOptions()
PAPER = ScaleOptions(nodes=8, processes=64, fsdp=True)


def measured(*, precision: str, checkpointing: bool) -> dict[str, int]:
    """Bytes at the peak of a second step, by kind: 4 answers of 160 tokens on an image of 64 patches."""
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**SMALL)).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimiser = torch.optim.AdamW(model.parameters())
    ids = torch.full((4, 160), 20)
    ids[:, 1:17] = 5
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 5).long(),
        "pixel_values": torch.randn(4 * 64, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * 4),
    }
    tracker = MemTracker()
    tracker.track_external(model, optimiser, *inputs.values())
    with tracker:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = model(**inputs, use_cache=False, logits_to_keep=1).logits
            logits.float().logsumexp(-1).sum().backward()
            optimiser.step()
            optimiser.zero_grad()
            tracker.reset_mod_stats()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return {str(kind): size for kind, size in peak.items()}


@pytest.mark.parametrize(("precision", "checkpointing"), [("fp32", False), ("bf16", True)])
def test_the_plan_is_what_torch_counts(precision: Any, checkpointing: bool) -> None:
    found = measured(precision=precision, checkpointing=checkpointing)
    work = Workload(answers=4, prompt_tokens=150, response_tokens=10, images=4, image_tokens=16)
    made = plan(SMALL, scale=ALONE, work=work, precision=precision, gradient_checkpointing=checkpointing, kl=False)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**SMALL))
    assert made.parameters == made.trained == sum(each.numel() for each in model.parameters())
    assert made.parts["weights"] == made.parts["gradients"] == found[str(_MemRefType.PARAM)]
    counters = 4 * sum(1 for _ in model.parameters())  # Adam's step, one number a tensor
    assert made.parts["adam"] + counters == found[str(_MemRefType.OPT)]
    kept = found[str(_MemRefType.ACT)] + found[str(_MemRefType.TEMP)]
    assert kept / 1.3 < made.parts["activations"] < kept * 1.3


def test_the_papers_run_fits_its_gpus() -> None:
    work = Workload(answers=8, rollouts=32)
    made = plan(QWEN2_5_VL_7B, scale=PAPER, work=work)
    assert made.parameters == 8_292_166_656  # as published
    assert made.parts["adam"] == 8 * 8_292_166_656 // 64
    assert made.parts["reference"] == 2 * 8_292_166_656 // 64
    # 28 layers, 4 heads of 128 for keys and values, two bytes each; 32 answers of 4096 tokens.
    assert made.parts["rollouts"] == 2 * 8_292_166_656 + 28 * 2 * 4 * 128 * 2 * 32 * 4096
    assert made.parts["logits"] == 18 * POSITIONS * 152_064
    assert 30e9 < made.total < 75e9
    assert "8,292,166,656 parameters" in str(made)
    alone = plan(QWEN2_5_VL_7B, scale=ALONE, work=work)
    assert alone.total > 150e9  # one GPU does not hold it


def test_lora_needs_no_reference_and_no_moments_of_the_whole() -> None:
    full = plan(SMALL, scale=ALONE, work=Workload(prompt_tokens=900))
    lora = plan(SMALL, scale=ALONE, work=Workload(prompt_tokens=900), lora=LoraOptions(rank=2))
    # Four layers; A and B of each matrix of in and out: q, k, v, o, gate, up, down.
    pairs = [(128, 128), (128, 64), (128, 64), (128, 128), (128, 384), (128, 384), (384, 128)]
    assert lora.trained == 4 * 2 * sum(a + b for a, b in pairs)
    assert lora.parameters == full.parameters + lora.trained
    assert lora.parts["reference"] == 0 < full.parts["reference"]
    assert lora.parts["weights"] == 4 * lora.trained + 2 * full.parameters


def test_frozen_embeddings_are_not_trained_but_a_head_of_its_own_is() -> None:
    whole, frozen = (plan(SMALL, scale=ALONE, work=Workload(), frozen_embeddings=each) for each in (False, True))
    sizes = meta_model(SMALL).config.get_text_config()
    assert not sizes.tie_word_embeddings
    assert whole.trained - frozen.trained == sizes.vocab_size * sizes.hidden_size


def test_the_recipe_has_the_papers_settings() -> None:
    recipe = tomllib.loads(files("medreasoner_train").joinpath("recipes/medreasoner-7b.toml").read_text())
    assert ScaleOptions(**recipe["scale"]) == ScaleOptions(nodes=8, processes=64, fsdp=True, micro_batch=8)
    assert (recipe["rollouts"]["count"], recipe["rollouts"]["max_tokens"]) == (16, 2048)
    train = recipe["train"]
    assert (train["lr"], train["prompts"], train["mini_batch"]) == (1e-6, 128, 64)
    assert train["steps"] == pytest.approx(5 * 14_000 / 128, abs=1)
    assert recipe["loss"]["kl"] == 0.01


def test_what_makes_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=str(tmp_path)):
        plan(tmp_path, scale=ALONE, work=Workload())
    with pytest.raises(ValueError, match="do not fit a prompt"):
        Workload(prompt_tokens=100, image_tokens=900)
