"""Checkpoints with random weights, small enough for tests: the whole road in a second, answers without meaning."""

import json
from pathlib import Path
from typing import Any

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
ANSWER = (
    '<answer>{"bbox": [{x1}, {y1}, {x2}, {y2}], "points_1": [{p1x}, {p1y}], "points_2": [{p2x}, {p2y}]}</answer>'
)
ABSENT = '<answer>{"bbox": null, "points_1": null, "points_2": null}</answer>'
TEMPLATE = (
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{query}<|im_end|>\n<|im_start|>assistant\n"
)
TEXTS = (ANSWER, ABSENT, TEMPLATE, "Which organ lies behind the stomach?", "Where is the heart in this image?")


def make_toy_reasoner(folder: str | Path, *, seed: int = 0, **text_config: Any) -> Path:
    """Write a tiny Qwen2.5-VL checkpoint with a tokenizer and ``medreasoner.json``; return its folder.

    Images are stretched to 252 pixels, 18 patches a side; windows are 8 patches, so that some are padded.

    Parameters
    ----------
    folder
        Made if absent.
    text_config
        Entries that replace those of the decoder's configuration.
    """
    torch = require("torch", extra="export", feature="Making a toy checkpoint")
    transformers = require("transformers", extra="export", feature="Making a toy checkpoint")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    config = _qwen_config(tokens, vocab_size=tokenizer.get_vocab_size(), text_config=text_config)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms near one; the rest wide enough that attention is not uniform and a fault in it shows.
            centre, spread = (1.0, 0.1) if "norm" in name or "ln_q" in name else (0.0, 0.15)
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    (folder / "medreasoner.json").write_text(json.dumps(_settings(), indent=1))
    return folder


def make_toy_segmenter(folder: str | Path, *, seed: int = 0) -> Path:
    """Write a tiny SAM checkpoint for images of 64 pixels and masks of 32; return its folder."""
    torch = require("torch", extra="export", feature="Making a toy checkpoint")
    transformers = require("transformers", extra="export", feature="Making a toy checkpoint")
    folder = Path(folder)
    config = transformers.SamConfig(
        vision_config={
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
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 8},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 32,
        },
    )
    model = transformers.SamModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # SamConfig's own range of 1e-10 gives denormals.
            centre, spread = (1.0, 0.1) if "norm" in name and name.endswith("weight") else (0.0, 0.1)
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
        model.shared_image_embedding.positional_embedding.mul_(10.0)
    model.save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

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


def _qwen_config(tokens: dict[str, int], *, vocab_size: int, text_config: dict[str, Any]) -> Any:
    transformers = require("transformers", extra="export", feature="Making a toy checkpoint")
    tied = text_config.get("tie_word_embeddings", True)
    return transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "intermediate_size": 96,
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
            **text_config,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "out_hidden_size": text_config.get("hidden_size", 64),
            "fullatt_block_indexes": [1],
        },
        image_token_id=tokens["<|image_pad|>"],
        video_token_id=tokens["<|endoftext|>"],
        vision_start_token_id=tokens["<|vision_start|>"],
        vision_end_token_id=tokens["<|vision_end|>"],
        tie_word_embeddings=tied,
    )


def _settings() -> dict[str, Any]:
    return {
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
