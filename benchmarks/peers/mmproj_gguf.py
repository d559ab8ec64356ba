"""A checkpoint's vision tower as the GGUF file that llama.cpp wants beside the text model; needs the package gguf."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
from q4_gguf import finish, rounded_matrix
from text_checkpoint import read_matrix, tensors

__all__ = ["write_mmproj"]

_BLOCK = 32  # columns that share a scale
_PARTS = {
    "norm1": "ln1", "norm2": "ln2", "attn.proj": "attn_out",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_ENDS = {"merger.ln_q": "v.post_ln", "merger.mlp.0": "mm.0", "merger.mlp.2": "mm.2"}


def write_mmproj(checkpoint: Path, path: Path, kind: str) -> None:
    """Matrices in `kind` (F16, Q8_0, Q4_0), or in F16 where their columns fill no blocks, as its own converter does."""
    config = json.loads((checkpoint / "config.json").read_text())
    vision = config["vision_config"]
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "qwen2.5vl_merger")
    writer.add_bool("clip.use_silu", True)
    every = vision["fullatt_block_indexes"][0] + 1
    for name, value in (
        ("image_size", 560), ("patch_size", 14), ("embedding_length", vision["hidden_size"]),
        ("feed_forward_length", vision["intermediate_size"]), ("block_count", vision["depth"]),
        ("projection_dim", vision["out_hidden_size"]), ("attention.head_count", vision["num_heads"]),
        ("n_wa_pattern", every), ("window_size", vision["window_size"]),
    ):  # fmt: skip
        writer.add_uint32(f"clip.vision.{name}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_array("clip.vision.image_mean", [0.48145466, 0.4578275, 0.40821073])
    writer.add_array("clip.vision.image_std", [0.26862954, 0.26130258, 0.27577711])
    with ThreadPoolExecutor(2) as pool:
        for name, values in tensors(checkpoint, ("visual.",)):
            stem, _, end = name.removeprefix("visual.").rpartition(".")
            if stem == "patch_embed.proj":  # a convolution for each of the two frames
                for frame, suffix in ((0, ""), (1, ".1")):
                    writer.add_tensor(f"v.patch_embd.weight{suffix}", read_matrix(values[:, :, frame]))
                continue
            # Queries, keys and values are three matrices there.
            parts = np.split(values, 3) if stem.endswith("attn.qkv") else [values]
            for new, part in zip(_names(stem), parts, strict=True):
                if part.ndim == 1:
                    writer.add_tensor(f"{new}.{end}", read_matrix(part))
                elif kind == "F16" or part.shape[1] % _BLOCK:
                    writer.add_tensor(f"{new}.{end}", read_matrix(part).astype(np.float16))
                else:
                    level = gguf.GGMLQuantizationType[kind]
                    writer.add_tensor(f"{new}.{end}", rounded_matrix(part, level, pool), raw_dtype=level)
    finish(writer)


def _names(stem: str) -> list[str]:
    if stem in _ENDS:
        return [_ENDS[stem]]
    _, layer, part = stem.split(".", 2)
    return [
        f"v.blk.{layer}.{each}" for each in (("attn_q", "attn_k", "attn_v") if part == "attn.qkv" else (_PARTS[part],))
    ]
