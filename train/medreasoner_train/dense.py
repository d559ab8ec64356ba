"""First stage: teach the vision tower where everything is, before any language.

Each image token says, for every category, how much of its four patches the category covers, the box of the whole
structure and its two points; all categories learn from every image, which is many times denser than one answer a query.
The heads are dropped afterwards. Besides, each token tells its own place: the tower's rotary embedding is relative, and
the decoder must read absolute coordinates out of it.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["DenseHeads", "DenseTargets", "dense_loss", "giou", "mean_or_zero", "pooled_geometry"]


@dataclasses.dataclass(slots=True, kw_only=True)
class DenseTargets:
    """What is labelled in a batch.

    coverage : (B, C, g, g) float32 in [0, 1] on the patch grid; geometry : (B, C, 8) float32, box then points,
    relative; present : (B, C) bool; known : (B, C) bool, where the label or its absence can be trusted.
    """

    coverage: Tensor
    geometry: Tensor
    present: Tensor
    known: Tensor


class DenseHeads(nn.Module):
    """Linear read-outs of the image tokens; see the module docstring."""

    def __init__(self, hidden_dim: int, n_categories: int, merge: int = 2) -> None:
        super().__init__()
        self.merge = merge
        self.norm = nn.RMSNorm(hidden_dim)
        self.coverage = nn.Linear(hidden_dim, n_categories * merge * merge)
        self.geometry = nn.Linear(hidden_dim, n_categories * 8)
        self.place = nn.Linear(hidden_dim, 2)
        nn.init.constant_(self.coverage.bias, -3.0)

    def forward(self, embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> coverage logits (B, C, g, g), geometry (B, T, C, 8) in [0, 1], place (B, T, 2)."""
        batch, count, _ = embeds.shape
        side = int(count**0.5)
        x = self.norm(embeds)
        cells = self.coverage(x).view(batch, side, side, -1, self.merge, self.merge)
        coverage = cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, side * self.merge, side * self.merge)
        geometry = torch.sigmoid(self.geometry(x)).view(batch, count, -1, 8)
        return coverage, geometry, self.place(x)


def giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Generalised IoU and plain IoU of boxes (..., 4)."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    union = sum((t[..., 2:] - t[..., :2]).clamp(min=0).prod(-1) for t in (a, b)) - shared
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    iou = shared / (union + 1e-6)
    return iou - (hull - union) / (hull + 1e-6), iou


def pooled_geometry(coverage: Tensor, geometry: Tensor, merge: int = 2) -> Tensor:
    """(B, C, 8): each category's geometry, averaged over the tokens that claim to be covered by it."""
    weight = functional.avg_pool2d(coverage, merge).flatten(2).softmax(dim=-1)  # (B, C, T)
    return torch.einsum("bct,btcg->bcg", weight, geometry)


def mean_or_zero(values: Tensor) -> Tensor:
    """Mean of all elements, 0 if there are none: a small batch may show nothing, and NaN would ruin the weights."""
    return values.mean() if values.numel() else values.sum()


def dense_loss(heads: DenseHeads, embeds: Tensor, targets: DenseTargets) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the stage's losses and its parts, with the box IoU of the pooled read-out."""
    coverage, geometry, place = heads(embeds)
    side = int(embeds.shape[1] ** 0.5)
    present, known = targets.present, targets.known
    cells = functional.binary_cross_entropy_with_logits(coverage, targets.coverage, reduction="none").mean((2, 3))
    hit = torch.sigmoid(coverage)
    overlap = 2 * (hit * targets.coverage).sum((2, 3)) + 1
    dice = 1 - overlap / (hit.sum((2, 3)) + targets.coverage.sum((2, 3)) + 1)
    shown, other = present.float(), (known & ~present).float()
    n = shown.sum().clamp(min=1)
    loss_cells = ((2 * cells + dice) * shown).sum() / n + 4 * (cells * other).sum() / other.sum().clamp(min=1)

    share = functional.avg_pool2d(targets.coverage, heads.merge).flatten(2)  # (B, C, T)
    share = share / share.sum(-1, keepdim=True).clamp(min=1e-6)
    pairs = present.nonzero(as_tuple=True)
    truth = targets.geometry[pairs]  # (P, 8)
    own = geometry.transpose(1, 2)[pairs]  # (P, T, 8)
    l1 = (own - truth[:, None]).abs()
    loss_token = mean_or_zero(((l1[..., :4].mean(-1) + 0.3 * l1[..., 4:].mean(-1)) * share[pairs]).sum(-1))
    pooled = pooled_geometry(coverage, geometry, heads.merge)[pairs]
    g, iou = giou(pooled[:, :4], truth[:, :4])
    off = (pooled - truth).abs()
    loss_pooled = mean_or_zero(1 - g) + 2 * mean_or_zero(off[:, :4]) + 0.5 * mean_or_zero(off[:, 4:])

    steps = (torch.arange(side, device=place.device) + 0.5) / side
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).view(1, -1, 2).flip(-1)
    loss_place = (place - grid).abs().mean()
    loss = loss_cells + 4 * loss_token + loss_pooled + loss_place
    return loss, {
        "cells": loss_cells.detach(),
        "token": loss_token.detach(),
        "pooled": loss_pooled.detach(),
        "place": loss_place.detach(),
        "iou": mean_or_zero(iou).detach(),
    }
