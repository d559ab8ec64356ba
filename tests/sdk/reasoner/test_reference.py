"""The runtime on an exported checkpoint says, token for token, what transformers says on the checkpoint itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import medreasoner as mr
from medreasoner.reasoner.model import Reasoner

QUERY = "Where is the heart in this image?"


@pytest.fixture(scope="module")
def model(toy_folder: Path) -> Any:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(toy_folder / "reasoner").eval()


def pixel_values(image: np.ndarray, reasoner: Reasoner) -> torch.Tensor:
    """The image resized by Pillow, normalised and cut as transformers' processor does: both time slices alike."""
    from PIL import Image as Pillow

    vision = reasoner.spec.vision
    small = np.asarray(Pillow.fromarray(image).convert("RGB").resize((252, 252), Pillow.Resampling.BICUBIC)) / 255
    planes = ((small - vision.image_mean) / vision.image_std).transpose(2, 0, 1)  # (3, 252, 252)
    cut = planes.reshape(3, 9, 2, 14, 9, 2, 14).transpose(1, 4, 2, 5, 0, 3, 6)  # (rows, columns, r, c, channel, y, x)
    cut = np.repeat(cut[:, :, :, :, :, None], 2, axis=5)
    return torch.from_numpy(cut.reshape(324, -1).astype(np.float32))


def greedy(model: Any, reasoner: Reasoner, tokenizer: Any, image: np.ndarray, tail: str, count: int) -> list[int]:
    prompt = reasoner.spec.prompt.template.replace("{image}", "<|image_pad|>" * 81).replace("{query}", QUERY) + tail
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids
    start = len(ids)
    pixels, grid = pixel_values(image, reasoner), torch.tensor([[1, 18, 18]])
    with torch.no_grad():
        for _ in range(count):
            sequence = torch.tensor([ids])
            kinds = (sequence == reasoner.prompt.image_token).int()
            logits = model(
                input_ids=sequence, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=kinds, use_cache=False
            ).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_thought_is_what_transformers_would_think(toy_bundle: Path, model: Any, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (100, 180), np.uint8)
    with mr.Grounder.load(toy_bundle, device="cpu") as grounder:
        reasoner = grounder._engine.reasoner
        tokenizer = reasoner.prompt._tokenizer
        expected = greedy(model, reasoner, tokenizer, image, "<think>", 24)
        result = grounder.ground(image, QUERY, think=True)
    text = tokenizer.decode(expected, skip_special_tokens=False).partition("</think>")[0].partition("<|im_end|>")[0]
    assert result.reasoning is not None
    assert result.reasoning.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert len(text) > 4
