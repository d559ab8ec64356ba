"""Completions as tables: a row each, filled up to the longest."""

from collections.abc import Sequence

import torch
from torch import Tensor

from medreasoner_train.rollout import Completion

__all__ = ["as_rows", "chosen"]


def chosen(completions: Sequence[Completion]) -> Tensor:
    """(N, L) bool: the tokens that were chosen, L those of the longest completion."""
    longest = max((len(each.ids) for each in completions), default=0)
    mask = torch.zeros((len(completions), longest), dtype=torch.bool)
    for row, each in zip(mask, completions, strict=True):
        row[: len(each.ids)] = True if each.free is None else torch.tensor(each.free)
    return mask


def as_rows(flat: Tensor, completions: Sequence[Completion]) -> tuple[Tensor, Tensor]:
    """Values of all tokens, one completion after the other, as rows (N, L) float32, 0 behind an end; and `chosen`."""
    mask = chosen(completions)
    index = torch.full(mask.shape, len(flat), dtype=torch.int64)  # the place of the zero
    start = 0
    for row, each in zip(index, completions, strict=True):
        own = len(each.ids)
        row[:own] = torch.arange(start, start + own)
        start += own
    padded = torch.cat([flat.float(), flat.new_zeros(1, dtype=torch.float32)])
    return padded[index.to(flat.device)], mask.to(flat.device)
