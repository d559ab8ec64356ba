"""What the runtime must know of a checkpoint, read from its folder: for those who run it in PyTorch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medreasoner.errors import BundleError
from medreasoner.manifest import read_record
from medreasoner.spec import ReasonerSpec
from medreasoner_export.checkpoint import read_json
from medreasoner_export.config_section import naming
from medreasoner_export.qwen_config import QwenConfig
from medreasoner_export.settings import check_section, reasoner_settings

__all__ = ["checkpoint_spec", "spec_sizes"]


def checkpoint_spec(folder: str | Path, settings: Mapping[str, Any] | None = None) -> ReasonerSpec:
    """The manifest's ``reasoner`` section that an export of this checkpoint would have; its graphs do not exist.

    Parameters
    ----------
    folder
        With ``config.json`` and ``tokenizer.json``, and perhaps ``medreasoner.json`` and ``preprocessor_config.json``.
    settings
        Entries that replace those of ``medreasoner.json``.

    Raises
    ------
    BundleError
        If a file is missing or malformed, or the model is of another architecture; the message names the file.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise BundleError(f"{folder} holds no config.json; give the folder of a Qwen2.5-VL checkpoint")
    if not (folder / "tokenizer.json").is_file():
        raise BundleError(
            f"{folder / 'tokenizer.json'} is missing: save the tokenizer in its fast form beside the weights"
        )
    with naming(folder):
        config = QwenConfig.from_json(read_json(folder / "config.json"))
    matrix = {"file": "none", "dtype": "float32", "shape": [config.text.vocab_size, config.text.hidden_dim]}
    section = {
        "architecture": config.family,
        "graphs": {"vision": "none", "decoder": "none"},
        "tokenizer": "tokenizer.json",
        **spec_sizes(config, reasoner_settings(folder, config, settings or {})),
        "step": None,
        "embedding": matrix,
        "lm_head": matrix,
    }
    check_section(ReasonerSpec, section, folder)
    return read_record(ReasonerSpec, json.loads(json.dumps(section)), "reasoner")


def spec_sizes(config: QwenConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's ``reasoner`` section but for its files."""
    text, vision = config.text, config.vision
    return {
        "n_layers": text.n_layers,
        "n_heads": text.n_heads,
        "n_kv_heads": text.n_kv_heads,
        "head_dim": text.head_dim,
        "hidden_dim": text.hidden_dim,
        "vocab_size": text.vocab_size,
        "rope_theta": text.rope_theta,
        "mrope_section": list(text.mrope_section),
        "max_length": settings["max_length"],
        "vision": {
            "patch_size": vision.patch_size,
            "merge_size": vision.merge_size,
            "window_size": vision.window_size,
            "head_dim": vision.head_dim,
            "full_attention_layers": list(vision.full_attention_layers),
            "image_mean": settings["image_mean"],
            "image_std": settings["image_std"],
            "resize": settings["resize"],
        },
        "prompt": settings["prompt"],
        "answer": settings["answer"],
        "coordinates": settings["coordinates"],
        "absent_threshold": settings["absent_threshold"],
        "max_query_tokens": settings["max_query_tokens"],
        "max_think_tokens": settings["max_think_tokens"],
    }
