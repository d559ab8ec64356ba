"""A Qwen2.5-VL checkpoint as the text model in it, for peers that read no other; NumPy alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["read_matrix", "tensors", "text_config", "write_text_checkpoint"]

_KEPT = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "tie_word_embeddings", "rms_norm_eps",
)  # fmt: skip


def text_config(checkpoint: Path) -> dict[str, Any]:
    """config.json of the text model, a Qwen2."""
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    rope = text["rope_parameters"]["rope_theta"]
    return {key: text[key] for key in _KEPT if key in text} | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16", "torch_dtype": "bfloat16",
        "hidden_act": "silu", "max_position_embeddings": 4096,
        "rope_theta": rope, "rope_parameters": {"rope_type": "default", "rope_theta": rope},
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "use_sliding_window": False,
    }  # fmt: skip


def write_text_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Names of the tensors are the same in both: the shards are only linked."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(text_config(checkpoint)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    for path in (*checkpoint.glob("*.safetensors*"), checkpoint / "tokenizer.json"):
        (folder / path.name).symlink_to(path.resolve())


def tensors(
    checkpoint: Path, parts: tuple[str, ...] = ("model.", "lm_head.")
) -> Iterator[tuple[str, npt.NDArray[np.uint16]]]:
    """Names and bfloat16 bit patterns of the text model's tensors, or of other parts, mapped from their files."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name.startswith(parts):
                start = 8 + size + entry["data_offsets"][0]
                yield name, np.memmap(path, np.uint16, mode="r", offset=start, shape=tuple(entry["shape"]))


def read_matrix(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bfloat16 bit patterns as float32."""
    return (values.astype(np.uint32) << 16).view(np.float32)
