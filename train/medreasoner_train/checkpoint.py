"""Writes the reasoner as others read it, a Hugging Face checkpoint with what export must know beside, and reads one."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from medreasoner._text import one_line
from medreasoner.errors import BundleError
from medreasoner_train.language import ABSENT, PRESENT_TEXT, TEMPLATE
from medreasoner_train.loop import write_settings
from medreasoner_train.model import NANO
from medreasoner_train.tokenizer import BY_TOKEN

__all__ = ["load_weights", "read_settings", "save_like", "save_reasoner"]


def load_weights(folder: Path, model: Any, *, added: Sequence[Sequence[int]] = ()) -> None:
    """Take the weights of a finished checkpoint, reasoner or segmenter, into a model of its sizes.

    `added`: where a reasoner's vocabulary has grown behind the checkpoint's, for each new token those that its text had
    before; it begins as their mean.

    Raises
    ------
    BundleError
        If the folder holds no such checkpoint, or one of other sizes; the message names it.
    """
    try:
        own, found = type(model).from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        state = own.state_dict()
        if added:
            for name in state.keys() & BY_TOKEN:
                rows = state[name]
                state[name] = torch.cat([rows, torch.stack([rows[list(ids)].mean(0) for ids in added])])
        model.load_state_dict(state)
    except Exception as err:  # transformers and safetensors raise many kinds for one cause
        raise BundleError(f"{folder}: not a finished checkpoint of these sizes ({one_line(err)})") from err
    if missing := sorted(found["missing_keys"]):
        raise BundleError(f"{folder}: {len(missing)} weights are missing, first {missing[0]}")


def read_settings(folder: Path) -> dict[str, Any]:
    """What ``medreasoner.json`` says of a checkpoint.

    Raises
    ------
    BundleError
        If it is not there, or no JSON object.
    """
    path = folder / "medreasoner.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise BundleError(f"{path}: cannot be read ({one_line(err)}); it says how the reasoner is asked") from err
    if not isinstance(settings, dict):
        raise BundleError(f"{path}: expected a JSON object")
    return settings


def save_like(model: Any, start: Path, out: Path, *, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write a reasoner that was trained on from the checkpoint `start`: bfloat16 weights, all else as it is there.

    `weights`: those to write in the place of the model's own, under the same names.
    """
    state = {name: value.to(torch.bfloat16) for name, value in (weights or model.state_dict()).items()}
    model.save_pretrained(out, state_dict=state)
    _copy_beside(start, out)


def _copy_beside(start: Path, out: Path) -> None:
    """Copy what a checkpoint holds beside its weights and its configuration: tokenizer, settings, templates."""
    for file in sorted(start.iterdir()):
        own = file.suffix in (".json", ".jinja", ".txt") and not file.name.endswith(("config.json", ".index.json"))
        if (own or file.name == "preprocessor_config.json") and file.resolve() != (out / file.name).resolve():
            shutil.copyfile(file, out / file.name)


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
            "present": PRESENT_TEXT,
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
