"""Runs the dense stage (see :mod:`medreasoner_train.dense`): ``medreasoner-cli train dense``."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from medreasoner_train.anatomy import AbsentRule
from medreasoner_train.augment import NO_CHANGE, Options, augment
from medreasoner_train.data import Sample, by_image, load_index, split
from medreasoner_train.dense import DenseHeads, DenseTargets, dense_loss, giou, pooled_geometry
from medreasoner_train.loop import LoopOptions, load_modules, moved, train
from medreasoner_train.model import NANO, build_reasoner, to_tensor, tower
from medreasoner_train.store import Stored, load_store, sampling_weights
from medreasoner_train.targets import box_of
from medreasoner_train.tokenizer import SPECIAL_TOKENS

__all__ = ["DenseData", "DenseOptions", "ImageTargets", "evaluate", "run", "stack"]

logger = logging.getLogger(__name__)


class DenseData:
    """Makes batches of augmented images with their dense targets."""

    def __init__(self, samples: Sequence[Sample], stored: Sequence[Stored], *, patch: int) -> None:
        self.stored = list(stored)
        self.categories = sorted({sample.category for sample in samples})
        self._column = {name: index for index, name in enumerate(self.categories)}
        self._rule = AbsentRule(samples)
        self._patch = patch
        self.weights = sampling_weights(self.stored)

    def column(self, category: str) -> int:
        """Index of a category in the dense targets."""
        return self._column[category]

    def image(
        self, index: int, size: int, rng: np.random.Generator, changes: Options
    ) -> tuple[torch.Tensor, "ImageTargets", dict[str, npt.NDArray[np.bool_]]]:
        """One image (3, size, size) normalised to [-1, 1], its dense targets and each category's mask in its grid."""
        item = self.stored[index]
        record = item.record
        changed = augment(
            item.pixels,
            item.masks,
            item.points,
            size=size,
            modality=record.modality,
            source=record.source,
            rng=rng,
            options=changes,
        )
        targets = ImageTargets(len(self.categories), size // self._patch)
        masks: dict[str, npt.NDArray[np.bool_]] = {}
        for sample, mask, points in zip(record.samples, changed.masks, changed.points, strict=True):
            if mask.any():
                masks[sample.category] = mask
                targets.add(self._column[sample.category], mask, points)
        for category in item.guessed:  # asked about, but of no known shape
            targets.present[self._column[category]] = False
        targets.known[:] = targets.present
        for category in (*self._rule.same_region(record), *self._rule.other_region(record)):
            targets.known[self._column[category]] = True
        return to_tensor(changed.pixels), targets, masks

    def batch(self, step: int, *, count: int, size: int, seed: int) -> tuple[torch.Tensor, DenseTargets]:
        """The batch of a step: images (B, 3, size, size) and their targets."""
        rng = np.random.default_rng([seed, step])
        chosen = rng.choice(len(self.stored), size=count, p=self.weights)
        rows = [self.image(int(index), size, rng, Options()) for index in chosen]
        return torch.stack([row[0] for row in rows]), stack([row[1] for row in rows])


class ImageTargets:
    """Dense targets of one image, in NumPy; see :class:`medreasoner_train.dense.DenseTargets`."""

    def __init__(self, n_categories: int, grid: int) -> None:
        self.coverage = np.zeros((n_categories, grid, grid), np.float32)
        self.geometry = np.zeros((n_categories, 8), np.float32)
        self.present = np.zeros(n_categories, bool)
        self.known = np.zeros(n_categories, bool)

    def add(self, column: int, mask: npt.NDArray[np.bool_], points: npt.NDArray[np.float64]) -> None:
        """Enter one category: its mask (size, size) and points (2, 2) in the model's grid."""
        grid, size = self.coverage.shape[1], mask.shape[0]
        cell = size // grid
        self.coverage[column] = mask.reshape(grid, cell, grid, cell).mean(axis=(1, 3))
        self.geometry[column, :4] = np.array(box_of(mask)) / size
        self.geometry[column, 4:] = np.clip(points.reshape(4) / size, 0, 1)
        self.present[column] = True


def stack(rows: Sequence[ImageTargets]) -> DenseTargets:
    """Join the targets of several images."""
    return DenseTargets(
        **{
            name: torch.from_numpy(np.stack([getattr(row, name) for row in rows]))
            for name in ("coverage", "geometry", "present", "known")
        }
    )


@torch.no_grad()
def evaluate(visual: torch.nn.Module, heads: DenseHeads, data: DenseData, *, size: int) -> dict[str, float]:
    """Mean box IoU of the pooled read-out over the samples of `data`, category given."""
    rng = np.random.default_rng(0)
    ious: dict[str, list[float]] = {}
    for start in range(0, len(data.stored), 32):
        rows = [data.image(i, size, rng, NO_CHANGE) for i in range(start, min(start + 32, len(data.stored)))]
        device = next(visual.parameters()).device
        coverage, geometry, _ = heads(tower(visual, torch.stack([row[0] for row in rows]).to(device)))
        targets = moved(stack([row[1] for row in rows]), device)
        _, iou = giou(pooled_geometry(coverage, geometry)[..., :4], targets.geometry[..., :4])
        for b, c in targets.present.nonzero().tolist():
            key = f"{data.stored[start + b].record.modality}/{data.categories[c]}"
            ious.setdefault(key, []).append(float(iou[b, c]))
    for key, own in sorted(ious.items()):
        logger.info("  %-38s %4d  %.3f", key, len(own), np.mean(own))
    return {"val_iou": float(np.mean([v for own in ious.values() for v in own]))}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DenseOptions:
    """One run of the dense stage; `size` is the image side in pixels."""

    data: Path
    loop: LoopOptions
    size: int = 168
    batch: int = 32
    start: Path | None = None
    compiled: bool = False
    cache: Path | None = None


def run(options: DenseOptions) -> None:
    """Train the vision tower on dense targets; the checkpoint holds ``visual`` and ``heads``."""
    torch.manual_seed(options.loop.seed)
    samples = load_index(options.data)
    train_samples, val_samples = split(samples)
    train_data = DenseData(samples, load_store(by_image(train_samples), cache=options.cache), patch=NANO.patch_size)
    val_data = DenseData(samples, load_store(by_image(val_samples), cache=options.cache), patch=NANO.patch_size)
    model = build_reasoner(NANO, vocab_size=64, tokens={n: i for i, n in enumerate(SPECIAL_TOKENS)})
    visual, heads = model.model.visual, DenseHeads(NANO.hidden_dim, len(train_data.categories))
    if options.start is not None:
        load_modules(options.start, {"visual": visual, "heads": heads})
    forward = torch.compile(lambda x: tower(visual, x)) if options.compiled else (lambda x: tower(visual, x))
    train(
        modules={"visual": visual, "heads": heads},
        make_batch=lambda step: train_data.batch(step, count=options.batch, size=options.size, seed=options.loop.seed),
        loss_of=lambda batch: dense_loss(heads, forward(batch[0]), batch[1]),
        options=options.loop,
        evaluate=lambda _: evaluate(visual, heads, val_data, size=options.size),
        eval_every=200,
    )
