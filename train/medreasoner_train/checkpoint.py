"""Writes the reasoner as others read it: a Hugging Face checkpoint with what export must know beside."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from medreasoner_train.language import ABSENT, PRESENT, TEMPLATE
from medreasoner_train.loop import write_settings
from medreasoner_train.model import NANO

__all__ = ["save_reasoner"]


def save_reasoner(model: Any, tokenizer: Tokenizer, out: Path, *, size: int, absent_threshold: float = 0.5) -> None:
    """Write the Hugging Face form in bfloat16, the tokenizer, and ``medreasoner.json``: what export must know beside.

    Parameters
    ----------
    model, tokenizer
        What was trained.
    out
        Folder to write.
    size
        Side in pixels of the square that images are stretched to.
    absent_threshold
        Probability above which the answer is absent; calibrate it with ``medreasoner-cli eval``.
    """
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    model.save_pretrained(out, state_dict=state)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "prompt": {"template": TEMPLATE, "image_token": "<|image_pad|>"},
        "answer": {
            "present": PRESENT.replace("{{", "{").replace("}}", "}"),
            "absent": ABSENT,
            "think_open": "<think>",
            "think_close": "</think>",
            "end": "<|im_end|>",
        },
        "coordinates": f"relative_{NANO.image_size}",
        "absent_threshold": absent_threshold,
        "max_length": NANO.max_length,
        "max_query_tokens": 64,
        "max_think_tokens": 96,
        "resize": {"rule": "stretch", "width": size, "height": size},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    write_settings(out, settings)
