"""Checkpoints with random weights, small enough for tests: the whole road in a second, answers without meaning.

No torch: tests of the runtime make a bundle with this, and the import would take longer than all else.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from medreasoner._extras import require
from medreasoner_export.package import build_bundle
from medreasoner_export.reasoner import export_reasoner
from medreasoner_export.segmenter import export_segmenter

__all__ = ["make_toy_bundle", "make_toy_reasoner", "make_toy_segmenter"]

LARGEST_COORDINATE = 252
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
)
ANSWER = '<answer>{"bbox": [{x1}, {y1}, {x2}, {y2}], "points_1": [{p1x}, {p1y}], "points_2": [{p2x}, {p2y}]}</answer>'
ABSENT = '<answer>{"bbox": null, "points_1": null, "points_2": null}</answer>'
TEMPLATE = "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{query}<|im_end|>\n<|im_start|>assistant\n"
TEXTS = (ANSWER, ABSENT, TEMPLATE, "Which organ lies behind the stomach?", "Where is the heart in this image?")

SETTINGS: Mapping[str, Any] = {
    "prompt": {"template": TEMPLATE, "image_token": "<|image_pad|>"},
    "answer": {
        "present": ANSWER,
        "absent": ABSENT,
        "think_open": "<think>",
        "think_close": "</think>",
        "end": "<|im_end|>",
    },
    "coordinates": "absolute",
    "absent_threshold": 0.5,
    "resize": {"rule": "stretch", "width": LARGEST_COORDINATE, "height": LARGEST_COORDINATE},
    "max_length": 512,
    "max_query_tokens": 96,
    "max_think_tokens": 128,
}
SAM_CONFIG: Mapping[str, Any] = {
    "architectures": ["SamModel"],
    "model_type": "sam",
    "vision_config": {
        "hidden_size": 32,
        "output_channels": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "window_size": 3,
        "global_attn_indexes": [1],
        "num_pos_feats": 16,
        "mlp_dim": 64,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 8},
    "mask_decoder_config": {
        "hidden_size": 32,
        "mlp_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "iou_head_hidden_dim": 32,
    },
}


def make_toy_reasoner(folder: str | Path, *, seed: int = 0, tied: bool = True, mlp_dim: int = 96) -> Path:
    """Write a tiny Qwen2.5-VL checkpoint with a tokenizer and ``medreasoner.json``; return its folder.

    Images are stretched to 252 pixels, 18 patches a side; windows are 8 patches, so that some are padded.

    Parameters
    ----------
    folder
        Made if absent.
    seed
        Of the weights.
    tied
        Share the token embedding with the output projection.
    mlp_dim
        Width of the decoder's inner layers.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = dict(zip(SPECIAL_TOKENS, range(len(SPECIAL_TOKENS)), strict=True))  # the trainer gives them first
    vocab = tokenizer.get_vocab_size()
    _write_json(folder / "config.json", _qwen_config(tokens, vocab_size=vocab, tied=tied, mlp_dim=mlp_dim))
    _write_json(folder / "medreasoner.json", SETTINGS)
    # Wide enough that attention is not uniform and a fault in it shows.
    _write_weights(folder, _qwen_shapes(vocab, tied=tied, mlp_dim=mlp_dim), seed=seed, spread=0.15)
    return folder


def make_toy_segmenter(folder: str | Path, *, seed: int = 0) -> Path:
    """Write a tiny SAM checkpoint for images of 64 pixels and masks of 32; return its folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", SAM_CONFIG)
    # SamConfig's own range of 1e-10 would give denormals.
    _write_weights(folder, _sam_shapes(), seed=seed, spread=0.15)
    return folder


def make_toy_bundle(folder: str | Path, *, seed: int = 0) -> Path:
    """Make both toy checkpoints, export them and join them: ``folder / "bundle"`` is returned.

    The checkpoints stay in ``folder / "reasoner"`` and ``folder / "segmenter"``, as references.
    """
    folder = Path(folder)
    reasoner = make_toy_reasoner(folder / "reasoner", seed=seed)
    segmenter = make_toy_segmenter(folder / "segmenter", seed=seed)
    export_reasoner(reasoner, folder / "reasoner-onnx")
    export_segmenter(segmenter, folder / "segmenter-onnx")
    return build_bundle(folder / "reasoner-onnx", folder / "segmenter-onnx", folder / "bundle", name="toy")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def _write_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]], *, seed: int, spread: float) -> None:
    """Random float32 weights: norms near one, position frequencies near one, all else near zero."""
    safetensors = require("safetensors.numpy", extra="export", feature="Making a toy checkpoint")
    generator = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        noise = generator.standard_normal(shape, dtype=np.float32)
        if "norm" in name or "ln_q" in name:
            return 0.1 * noise + np.float32(name.endswith("weight"))
        return noise if "positional" in name else spread * noise

    weights = {name: draw(name, shape) for name, shape in shapes.items()}
    safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\d| ?[A-Za-z]+|[^\sA-Za-z\d]+ ?|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken(str(value), normalized=False) for value in range(LARGEST_COORDINATE + 1)])
    return tokenizer


def _qwen_config(tokens: Mapping[str, int], *, vocab_size: int, tied: bool, mlp_dim: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "intermediate_size": mlp_dim,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": tokens["<|im_end|>"],
            "pad_token_id": tokens["<|endoftext|>"],
            "tie_word_embeddings": tied,
        },
        "vision_config": {
            "model_type": "qwen2_5_vl_vision",
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "window_size": 112,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        "image_token_id": tokens["<|image_pad|>"],
        "video_token_id": tokens["<|endoftext|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_end_token_id": tokens["<|vision_end|>"],
        "tie_word_embeddings": tied,
    }


def _dense(name: str, n_out: int, n_in: int, *, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (n_out, n_in)} | ({f"{name}.bias": (n_out,)} if bias else {})


def _norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _qwen_shapes(vocab_size: int, *, tied: bool, mlp_dim: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published layout, for the sizes in :func:`_qwen_config`."""
    shapes: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (32, 3, 2, 14, 14)}
    for index in range(2):
        block = f"visual.blocks.{index}."
        shapes |= {block + "norm1.weight": (32,), block + "norm2.weight": (32,)}
        shapes |= _dense(block + "attn.qkv", 96, 32) | _dense(block + "attn.proj", 32, 32)
        shapes |= _dense(block + "mlp.gate_proj", 48, 32) | _dense(block + "mlp.up_proj", 48, 32)
        shapes |= _dense(block + "mlp.down_proj", 32, 48)
    shapes |= {"visual.merger.ln_q.weight": (32,)}
    shapes |= _dense("visual.merger.mlp.0", 128, 128) | _dense("visual.merger.mlp.2", 64, 128)
    shapes |= {"model.embed_tokens.weight": (vocab_size, 64), "model.norm.weight": (64,)}
    for index in range(2):
        layer = f"model.layers.{index}."
        shapes |= {layer + "input_layernorm.weight": (64,), layer + "post_attention_layernorm.weight": (64,)}
        for part, rows in (("q", 64), ("k", 32), ("v", 32)):
            shapes |= _dense(f"{layer}self_attn.{part}_proj", rows, 64)
        shapes |= _dense(layer + "self_attn.o_proj", 64, 64, bias=False)
        for part, rows, columns in (("gate", mlp_dim, 64), ("up", mlp_dim, 64), ("down", 64, mlp_dim)):
            shapes |= _dense(f"{layer}mlp.{part}_proj", rows, columns, bias=False)
    return shapes if tied else shapes | {"lm_head.weight": (vocab_size, 64)}


def _sam_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' SamModel, for the sizes in `SAM_CONFIG`."""
    encoder, prompts = "vision_encoder.", "prompt_encoder."
    shapes: dict[str, tuple[int, ...]] = {
        encoder + "pos_embed": (1, 8, 8, 32),
        encoder + "patch_embed.projection.weight": (32, 3, 8, 8),
        encoder + "patch_embed.projection.bias": (32,),
        encoder + "neck.conv1.weight": (32, 32, 1, 1),
        encoder + "neck.conv2.weight": (32, 32, 3, 3),
        "shared_image_embedding.positional_embedding": (2, 16),
        prompts + "no_mask_embed.weight": (1, 32),
        prompts + "not_a_point_embed.weight": (1, 32),
        prompts + "mask_embed.conv1.weight": (4, 1, 2, 2),
        prompts + "mask_embed.conv1.bias": (4,),
        prompts + "mask_embed.conv2.weight": (16, 4, 2, 2),
        prompts + "mask_embed.conv2.bias": (16,),
        prompts + "mask_embed.conv3.weight": (32, 16, 1, 1),
        prompts + "mask_embed.conv3.bias": (32,),
    }
    shapes |= {f"{prompts}point_embed.{index}.weight": (1, 32) for index in range(4)}
    shapes |= _norm(prompts + "mask_embed.layer_norm1", 4) | _norm(prompts + "mask_embed.layer_norm2", 16)
    shapes |= _norm(encoder + "neck.layer_norm1", 32) | _norm(encoder + "neck.layer_norm2", 32)
    for index, places in enumerate((5, 15)):  # offsets within a window of 3, and within the grid of 8
        layer = f"{encoder}layers.{index}."
        shapes |= _norm(layer + "layer_norm1", 32) | _norm(layer + "layer_norm2", 32)
        shapes |= _dense(layer + "attn.qkv", 96, 32) | _dense(layer + "attn.proj", 32, 32)
        shapes |= {layer + "attn.rel_pos_h": (places, 16), layer + "attn.rel_pos_w": (places, 16)}
        shapes |= _dense(layer + "mlp.lin1", 64, 32) | _dense(layer + "mlp.lin2", 32, 64)
    return shapes | _sam_decoder_shapes("mask_decoder.")


def _sam_decoder_shapes(decoder: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        decoder + "iou_token.weight": (1, 32),
        decoder + "mask_tokens.weight": (4, 32),
        decoder + "upscale_conv1.weight": (32, 8, 2, 2),
        decoder + "upscale_conv1.bias": (8,),
        decoder + "upscale_conv2.weight": (8, 4, 2, 2),
        decoder + "upscale_conv2.bias": (4,),
    }
    shapes |= _norm(decoder + "upscale_layer_norm", 8) | _norm(decoder + "transformer.layer_norm_final_attn", 32)
    attentions = {"transformer.final_attn_token_to_image": 16}
    for index in range(2):
        layer = f"transformer.layers.{index}."
        attentions |= {layer + "self_attn": 32}
        attentions |= {layer + "cross_attn_token_to_image": 16, layer + "cross_attn_image_to_token": 16}
        shapes |= _dense(decoder + layer + "mlp.lin1", 64, 32) | _dense(decoder + layer + "mlp.lin2", 32, 64)
        for place in range(1, 5):
            shapes |= _norm(f"{decoder}{layer}layer_norm{place}", 32)
    for name, inner in attentions.items():
        for part in "qkv":
            shapes |= _dense(f"{decoder}{name}.{part}_proj", inner, 32)
        shapes |= _dense(f"{decoder}{name}.out_proj", 32, inner)
    heads = {f"output_hypernetworks_mlps.{index}": 4 for index in range(4)} | {"iou_prediction_head": 4}
    for name, size in heads.items():
        shapes |= _dense(f"{decoder}{name}.proj_in", 32, 32) | _dense(f"{decoder}{name}.layers.0", 32, 32)
        shapes |= _dense(f"{decoder}{name}.proj_out", size, 32)
    return shapes
