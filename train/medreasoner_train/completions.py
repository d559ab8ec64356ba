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
        row[each.places] = True
    return mask


def as_rows(flat: Tensor, completions: Sequence[Completion]) -> tuple[Tensor, Tensor]:
    """Values of the chosen tokens, one answer after the other, as rows (N, L) float32, 0 elsewhere; and `chosen`."""
    mask = chosen(completions).to(flat.device)
    return torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat.float()), mask
