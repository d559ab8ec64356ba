"""The language model's pass, written again so that several queries share one image in training.

Image tokens stand before the query and attend causally, so they are the same whatever is asked. A training row is
therefore the prefix once, then one branch a query; a branch sees the prefix and itself. Where the branches are answers
to one query, that is read once too, behind the prefix.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from medreasoner_train.model import rotate_half

__all__ = ["Packed", "block_mask", "language_pass", "pack", "prefix_positions"]


@dataclasses.dataclass(slots=True, kw_only=True)
class Packed:
    """Rows of prefix and branches, padded on the right.

    ids : (B, T) int64; positions : (3, B, T) int64 (time, row, column); branch : (B, T) int64, 0 for what all branches
    of the row see, 1..K for the branches, -1 for padding; image : (B, T) bool.
    """

    ids: Tensor
    positions: Tensor
    branch: Tensor
    image: Tensor


def prefix_positions(before: int, side: int, after: int) -> Tensor:
    """(3, n) positions of `before` text tokens, a side x side image and `after` text tokens, as Qwen2.5-VL counts."""
    text = torch.arange(before).expand(3, -1)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image = torch.stack([torch.zeros(side * side, dtype=torch.int64), rows.flatten(), columns.flatten()]) + before
    rest = torch.arange(after).expand(3, -1) + before + side
    return torch.cat([text, image, rest], dim=1)


def pack(
    prefix: Sequence[int],
    positions: Tensor,
    image_token: int,
    branches: Sequence[Sequence[Sequence[int]]],
    pad: int,
    *,
    trunks: Sequence[Sequence[int]] | None = None,
) -> Packed:
    """Join one prefix (for all rows), each row's trunk (for all its branches; empty if not given) and branches."""
    n = len(prefix)
    trunks = trunks or [[]] * len(branches)
    lengths = [n + len(trunk) + sum(map(len, row)) for trunk, row in zip(trunks, branches, strict=True)]
    shape = (len(branches), max(lengths))
    ids = torch.full(shape, pad, dtype=torch.int64)
    where = torch.zeros((3, *shape), dtype=torch.int64)
    branch_of = torch.full(shape, -1, dtype=torch.int64)
    ids[:, :n], where[:, :, :n], branch_of[:, :n] = torch.tensor(prefix), positions[:, None], 0
    behind = int(positions.max()) + 1
    for b, (trunk, row) in enumerate(zip(trunks, branches, strict=True)):
        at = n
        for k, tokens in enumerate((trunk, *row)):
            first = behind + (len(trunk) if k else 0)
            stop = at + len(tokens)
            ids[b, at:stop] = torch.tensor(tokens, dtype=torch.int64)
            where[:, b, at:stop] = torch.arange(first, first + len(tokens))
            branch_of[b, at:stop] = k
            at = stop
    # A question and a policy may write an image's token too, which stands for no image.
    image = ids == image_token
    image[:, n:] = False
    return Packed(ids=ids, positions=where, branch=branch_of, image=image)


def block_mask(branch: Tensor) -> Tensor:
    """(B, 1, T, T) bool: which key each query position sees."""
    count = branch.shape[1]
    causal = torch.ones(count, count, dtype=torch.bool, device=branch.device).tril()
    same = branch[:, :, None] == branch[:, None, :]
    prefix = (branch == 0)[:, None, :]
    # A padding position sees itself only: an all-false row would give NaN.
    return ((causal & (same | prefix)) | torch.eye(count, dtype=torch.bool, device=branch.device))[:, None]


def rotary(positions: Tensor, head_dim: int, theta: float, sections: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, T, head_dim) of multimodal positions (3, B, T)."""
    half = head_dim // 2
    device = positions.device
    frequencies = 1.0 / theta ** (torch.arange(half, dtype=torch.float32, device=device) / half)
    # (half,); a plain list, since lengths that only the device knows would stop it
    axis = torch.tensor([axis for axis, count in enumerate(sections) for _ in range(count)], device=device)
    angles = positions[axis].permute(1, 2, 0).float() * frequencies  # (B, T, half)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def language_pass(
    language: Any,
    embeds: Tensor,
    positions: Tensor,
    mask: Tensor,
    cache: list[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Hidden states after the final norm.

    Parameters
    ----------
    language
        The ``language_model`` of a Qwen2.5-VL model.
    embeds : (B, S, D) float32
        Embeddings of the new tokens.
    positions : (3, B, S) int64
        Their places in time, rows and columns.
    mask : (B, 1, S, past + S) bool
        Which key each of them sees.
    cache
        Keys and values of the tokens before, extended in place; an empty list starts one.
    """
    config = language.config
    head_dim = config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    cos, sin = rotary(positions, head_dim, rope["rope_theta"], rope["mrope_section"])
    past = list(cache) if cache else [None] * len(language.layers)
    if cache is not None:
        cache.clear()
    x = embeds
    batch, count, _ = x.shape
    for layer, before in zip(language.layers, past, strict=True):
        y = layer.input_layernorm(x)
        q, k, v = (
            project(y).view(batch, count, -1, head_dim).transpose(1, 2)
            for project in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
        if before is not None:
            k, v = torch.cat((before[0], k), dim=2), torch.cat((before[1], v), dim=2)
        if cache is not None:
            cache.append((k, v))
        groups = q.shape[1] // k.shape[1]
        # Repeating the few key heads is faster on a CPU than enable_gqa, which leaves the fused kernel.
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + layer.self_attn.o_proj(out.transpose(1, 2).reshape(batch, count, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    final: Tensor = language.norm(x)
    return final
