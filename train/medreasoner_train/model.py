"""The nano reasoner: transformers' Qwen2.5-VL, small, with the batched passes that training needs.

The weights live in transformers' own classes, so a checkpoint of ours is an ordinary Qwen2.5-VL checkpoint. Two passes
are written again for speed: the vision tower on a batch of images of one grid (transformers attends window by window in
a Python loop), and the decoder on several queries that share one image (the image's keys and values are worked out
once). Tests hold both equal to transformers.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

__all__ = ["NANO", "NanoConfig", "build_reasoner", "rotate_half", "to_tensor", "tower"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NanoConfig:
    """Sizes of the nano reasoner. Image side and window are pixels of the resized image."""

    image_size: int = 252
    patch_size: int = 14
    merge_size: int = 2
    window_size: int = 84
    vision_hidden_dim: int = 256
    vision_mlp_dim: int = 768
    vision_layers: int = 5
    vision_heads: int = 4
    full_attention_layers: tuple[int, ...] = (1, 3, 4)
    hidden_dim: int = 256
    mlp_dim: int = 768
    n_layers: int = 5
    n_heads: int = 4
    n_kv_heads: int = 2
    mrope_section: tuple[int, int, int] = (8, 12, 12)
    rope_theta: float = 10_000.0
    max_length: int = 512


NANO = NanoConfig()


def build_reasoner(config: NanoConfig, *, vocab_size: int, tokens: dict[str, int]) -> Any:
    """A randomly initialised ``Qwen2_5_VLForConditionalGeneration`` of the sizes in `config`.

    Parameters
    ----------
    config
        Sizes.
    vocab_size
        Rows of the embedding.
    tokens
        Ids of Qwen's special tokens by name (see :mod:`medreasoner_train.tokenizer`).
    """
    head_dim = config.hidden_dim // config.n_heads
    if sum(config.mrope_section) * 2 != head_dim:
        raise ValueError(f"mrope_section {config.mrope_section} must sum to half the head dimension {head_dim}")
    qwen = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": config.hidden_dim,
            "intermediate_size": config.mlp_dim,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.n_kv_heads,
            "max_position_embeddings": config.max_length,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": config.rope_theta,
                "mrope_section": list(config.mrope_section),
            },
            "bos_token_id": None,
            "eos_token_id": tokens["<|im_end|>"],
            "pad_token_id": tokens["<|endoftext|>"],
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
        vision_config={
            "depth": config.vision_layers,
            "hidden_size": config.vision_hidden_dim,
            "intermediate_size": config.vision_mlp_dim,
            "num_heads": config.vision_heads,
            "patch_size": config.patch_size,
            "spatial_merge_size": config.merge_size,
            "temporal_patch_size": 2,
            "window_size": config.window_size,
            "out_hidden_size": config.hidden_dim,
            "fullatt_block_indexes": list(config.full_attention_layers),
        },
        image_token_id=tokens["<|image_pad|>"],
        video_token_id=tokens["<|video_pad|>"],
        vision_start_token_id=tokens["<|vision_start|>"],
        vision_end_token_id=tokens["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(qwen)


def to_tensor(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """(S, S, 3) uint8 -> (3, S, S) float32 in [-1, 1]."""
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1.0)


def merge_order(side: int, merge: int) -> Tensor:
    """(side * side, 2) row and column of each patch; the patches of a `merge` x `merge` block follow each other."""
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), dim=-1)
    blocks = places.view(side // merge, merge, side // merge, merge, 2).permute(0, 2, 1, 3, 4)
    return blocks.reshape(-1, 2)


def patchify(images: Tensor, *, patch: int, merge: int) -> Tensor:
    """(B, 3, S, S) -> (B, n_patches, 3 * patch * patch), patches in merge order."""
    batch, channels, size, _ = images.shape
    side = size // patch
    cut = images.view(batch, channels, side // merge, merge, patch, side // merge, merge, patch)
    # (B, block row, block column, row, column, channel, y, x)
    return cut.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch, side * side, channels * patch * patch)


def rotate_half(x: Tensor) -> Tensor:
    """The second half of the last axis, negated, before the first: what rotary embeddings turn towards."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotary(places: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables (n_patches, head_dim): a quarter for rows, a quarter for columns, twice."""
    quarter = head_dim // 4
    frequencies = 1.0 / 10_000.0 ** (torch.arange(quarter, dtype=torch.float32, device=places.device) / quarter)
    angles = (places[:, :, None] * frequencies).flatten(1)  # (n_patches, head_dim / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _attend(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Full attention within each row of x (B, T, D); cos and sin are (T, head_dim) or (B, T, head_dim)."""
    batch, length, dim = x.shape
    qkv = attention.qkv(x).view(batch, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    cos, sin = (t.unsqueeze(-3) for t in (cos, sin))
    q, k = (t * cos + rotate_half(t) * sin for t in (qkv[0], qkv[1]))
    out = functional.scaled_dot_product_attention(q, k, qkv[2])  # (B, heads, T, head_dim)
    projected: Tensor = attention.proj(out.transpose(1, 2).reshape(batch, length, dim))
    return projected


def tower(visual: Any, images: Tensor) -> Tensor:
    """Image embeddings of a batch of square images of one size.

    Parameters
    ----------
    visual
        The ``visual`` module of a Qwen2.5-VL model, whose windows must divide the image.
    images : (B, 3, S, S) float32
        In [-1, 1].

    Returns
    -------
    embeds : (B, n_tokens, hidden_dim) float32, tokens row by row
    """
    config = visual.config
    merge, patch = config.spatial_merge_size, config.patch_size
    side, window = images.shape[-1] // patch, config.window_size // patch
    places = merge_order(side, merge).to(images.device)
    cos, sin = _rotary(places, config.hidden_size // config.num_heads)
    weight = visual.patch_embed.proj.weight.sum(dim=2).flatten(1)  # an image is its own second frame
    x = functional.linear(patchify(images, patch=patch, merge=merge), weight)
    # A window holds whole merge blocks: put its patches side by side, once, and run every layer in that order.
    key = (places[:, 0] // window) * (side // window) + places[:, 1] // window
    order = torch.argsort(key, stable=True)
    back = torch.argsort(order)
    x, cos, sin = x[:, order], cos[order], sin[order]
    batch, count, dim = x.shape
    n_windows, length = (side // window) ** 2, window * window
    wcos, wsin = (t.view(n_windows, length, -1).repeat(batch, 1, 1) for t in (cos, sin))
    for index, block in enumerate(visual.blocks):
        y = block.norm1(x)
        if index in config.fullatt_block_indexes:
            x = x + _attend(block.attn, y, cos, sin)
        else:
            y = _attend(block.attn, y.reshape(batch * n_windows, length, dim), wcos, wsin)
            x = x + y.view(batch, count, dim)
        x = x + block.mlp(block.norm2(x))
    merged: Tensor = visual.merger(x[:, back].reshape(batch * count, dim))
    return merged.view(batch, count // merge**2, -1)
