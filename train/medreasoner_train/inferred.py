"""Targets that a source leaves unlabelled and that follow from what it labels.

Sources label different structures of the same part of the body. A reasoner that is never asked for the heart on one
source's films takes every question about them for one of the lungs, and so it does on films like them. So organs that
another source labels beside the same structures are asked about too: one that is the union of two others exactly, any
other by a frame that their shapes predict. Only what the labelled images confirm is inferred.
"""

import dataclasses
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medreasoner_train.anatomy import REGIONS
from medreasoner_train.data import Sample, by_image, labelled_kinds, split
from medreasoner_train.prior import box_iou
from medreasoner_train.store import Stored, load_store
from medreasoner_train.targets import box_of, inscribed_points

__all__ = ["load_parts", "with_inferred"]

logger = logging.getLogger(__name__)

LEAST = 30  # groups, or images with a union, on which a rule is tried
ALWAYS = 0.95  # share of the images with its neighbours on which an organ is labelled, too
SAME = 0.98  # Dice of an organ and the union of two others, from which on it is that union
PART = 0.1  # of the whole, that each of the two is at least
GOOD = 0.7  # box IoU of predicted frames on images that the fit has not seen, from which on they are asked about
FOLDS = 8
GRID = 6
RIDGE = 100.0
REACH = 2.0  # deviations from the mean that a feature may have: beyond the labelled images nothing is known

Masks = Mapping[str, npt.NDArray[np.bool_]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """Predicts box and points of a structure from masks of others; coordinates are shares of the others' joint box."""

    mean: npt.NDArray[np.float64]
    deviation: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]

    def __call__(self, features: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """(N, F) -> (N, 8)."""
        return _scaled(features, self.mean, self.deviation) @ self.weights


def load_parts(samples: Sequence[Sample], *, cache: Path | None, infer: bool) -> tuple[list[Stored], list[Stored]]:
    """The images to train on, with what can be inferred if that is asked for, and those to validate on."""
    train, held = (load_store(by_image(part), cache=cache) for part in split(samples))
    return with_inferred(train) if infer else train, held


def with_inferred(stored: Sequence[Stored], *, learned_from: Sequence[Stored] | None = None) -> list[Stored]:
    """The images with what can be inferred, behind what is labelled.

    Rules are worked out on `learned_from`, by default on these images, so give those of one part of a split. What was
    inferred of which source, and how well it fits where it is labelled, is logged. Sources learn from each other whose
    modality and part of the body (:data:`medreasoner_train.anatomy.REGIONS`; unknown ones are their own) are the same,
    and only of organs (``super_category``).
    """
    families: dict[tuple[str, str], list[Stored]] = defaultdict(list)
    for item in stored if learned_from is None else learned_from:
        families[_family(item)].append(item)
    rules = {name: _Rules.of(family) for name, family in families.items()}
    result = [rules[_family(item)].applied(item) if _family(item) in rules else item for item in stored]
    found = Counter(
        (item.record.source, sample.category)
        for item, before in zip(result, stored, strict=True)
        for sample in item.record.samples[len(before.record.samples) :]
    )
    for (source, category), count in sorted(found.items()):
        logger.info("%s: %s inferred on %d images", source, category, count)
    if not found:
        logger.info("no organ of one source can be inferred from another's labels")
    return result


def _family(item: Stored) -> tuple[str, str]:
    return item.record.modality, REGIONS.get(item.record.source, item.record.source)


def _organs(item: Stored) -> Masks:
    """By category; a lesion or a device is where it is, whatever lies around it."""
    return {
        sample.category: mask
        for sample, mask in zip(item.record.samples, item.masks, strict=True)
        if sample.super_category == "organ"
    }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """What holds for the sources of one modality and part of the body.

    unions : parts by whole; frames : by source, then by organ and the neighbours that predict it, most neighbours
    first.
    """

    unions: Mapping[str, tuple[str, str]]
    frames: Mapping[str, Mapping[tuple[str, tuple[str, ...]], Frames]]

    @classmethod
    def of(cls, family: Sequence[Stored]) -> "_Rules":
        unions = _unions(family)
        kinds = labelled_kinds(
            sample for item in family for sample in item.record.samples if sample.super_category == "organ"
        )
        frames = {}
        for source in sorted(kinds):
            own: dict[tuple[str, tuple[str, ...]], Frames] = {}
            for category in sorted(frozenset().union(*kinds.values()) - kinds[source] - unions.keys()):
                labelling = [item for item in family if category in kinds.get(item.record.source, ())]
                sets = {tuple(sorted(kinds[source] & kinds[item.record.source])) for item in labelling}
                for shared in sorted(sets, key=lambda names: (-len(names), names)):
                    fitted = _fit([item for item in labelling if _organs(item).keys() >= set(shared)], shared, category)
                    if fitted is not None:
                        own[category, shared] = fitted
            frames[source] = own
        return cls(unions=unions, frames=frames)

    def applied(self, item: Stored) -> Stored:
        """An image with what its source leaves unlabelled."""
        masks = _organs(item)
        height, width = item.masks.shape[1:]
        found: list[tuple[str, npt.NDArray[np.bool_], npt.NDArray[np.float64]]] = []
        guessed: set[str] = set()
        for whole, parts in self.unions.items():
            if whole not in masks and masks.keys() >= set(parts):
                union = masks[parts[0]] | masks[parts[1]]
                found.append((whole, union, inscribed_points(union)))
        for (category, shared), predict in self.frames.get(item.record.source, {}).items():
            if category in guessed or not masks.keys() >= set(shared):
                continue
            corner, size = _joint(masks, shared)
            values = predict(_features(masks, shared)[None])[0].reshape(4, 2) * size + corner
            values = values.clip(0, [width, height])
            shape = _ellipse(values[:2].ravel(), height, width)
            if shape.any():
                found.append((category, shape, values[2:]))
                guessed.add(category)
        return _with(item, found, guessed) if found else item


def _with(
    item: Stored,
    found: Sequence[tuple[str, npt.NDArray[np.bool_], npt.NDArray[np.float64]]],
    guessed: Set[str],
) -> Stored:
    """An image with more organs: name, mask and points each."""
    first = item.record.samples[0]
    samples = tuple(
        dataclasses.replace(first, id=f"{first.group}/inferred {name}", category=name, super_category="organ")
        for name, _, _ in found
    )
    return dataclasses.replace(
        item,
        record=dataclasses.replace(item.record, samples=(*item.record.samples, *samples)),
        masks=np.concatenate([item.masks, np.stack([mask for _, mask, _ in found])]),
        boxes=np.concatenate([item.boxes, [box_of(mask) for _, mask, _ in found]]),
        points=np.concatenate([item.points, [points for _, _, points in found]]),
        guessed=item.guessed | guessed,
    )


def _unions(family: Sequence[Stored]) -> dict[str, tuple[str, str]]:
    """Organs that are two others, side by side, wherever the three are labelled."""
    fits: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    for item in family:
        masks = _organs(item)
        areas = {name: int(mask.sum()) for name, mask in masks.items()}
        for one, other in combinations(sorted(masks), 2):
            union = masks[one] | masks[other]
            both = int(union.sum())
            apart = areas[one] + areas[other] - both <= (1 - SAME) * both
            for whole in masks.keys() - {one, other}:
                dice = 2 * int((union & masks[whole]).sum()) / max(both + areas[whole], 1)
                large = min(areas[one], areas[other]) >= PART * areas[whole]
                fits[whole, one, other].append(apart and large and dice >= SAME)
    return {
        whole: (one, other)
        for (whole, one, other), own in sorted(fits.items())
        if len(own) >= LEAST and np.mean(own) >= ALWAYS
    }


def _fit(images: Sequence[Stored], shared: tuple[str, ...], category: str) -> Frames | None:
    """None if an organ is missing beside its neighbours, if there are few of them, or if frames that were left out of
    the fit, with all of their group, are not predicted well.
    """
    examples = [item for item in images if category in _organs(item)]
    groups = sorted({item.record.group for item in examples})
    if len(groups) < LEAST or len(shared) < 2 or len(examples) < ALWAYS * len(images):
        return None
    masks = [_organs(item) for item in examples]
    features = np.stack([_features(own, shared) for own in masks])
    origin, size = (np.stack(each) for each in zip(*(_joint(own, shared) for own in masks), strict=True))
    boxes = np.stack([box_of(own[category]) for own in masks])
    points = np.stack([inscribed_points(own[category]).ravel() for own in masks])
    truth = (np.hstack([boxes, points]) - np.tile(origin, 4)) / np.tile(size, 4)
    guessed = np.empty_like(truth)
    fold = np.array([groups.index(item.record.group) for item in examples]) % FOLDS
    for k in range(FOLDS):
        guessed[fold == k] = _ridge(features[fold != k], truth[fold != k])(features[fold == k])
    overlap = float(box_iou(guessed[:, :4], truth[:, :4]).mean())
    logger.info("%s from %s: box IoU %.3f on %d images", category, ", ".join(shared), overlap, len(truth))
    return _ridge(features, truth) if overlap >= GOOD else None


def _ridge(features: npt.NDArray[np.float64], truth: npt.NDArray[np.float64]) -> Frames:
    mean, deviation = features.mean(0), features.std(0) + 1e-3
    scaled = _scaled(features, mean, deviation)
    penalty = np.diag([0.0, *[RIDGE] * features.shape[1]])
    weights = np.linalg.solve(scaled.T @ scaled + penalty, scaled.T @ truth)
    return Frames(mean=mean, deviation=deviation, weights=np.asarray(weights, np.float64))


def _scaled(
    features: npt.NDArray[np.float64], mean: npt.NDArray[np.float64], deviation: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """(N, 1 + F) in deviations, behind a one."""
    near = np.clip((features - mean) / deviation, -REACH, REACH)
    return np.hstack([np.ones((len(features), 1)), near])


def _joint(masks: Masks, shared: Sequence[str]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Corner and size of the box around all of them: (2,) x, y each."""
    boxes = np.array([box_of(masks[name]) for name in shared])
    corner = boxes[:, :2].min(0)
    return corner, boxes[:, 2:].max(0) - corner


def _features(masks: Masks, shared: Sequence[str]) -> npt.NDArray[np.float64]:
    """(F,) the joint box's shape, each structure's box in it, and how much of each of its cells the structure fills."""
    corner, size = _joint(masks, shared)
    x, y = (np.linspace(corner[k], corner[k] + size[k], GRID + 1).astype(int) for k in (0, 1))
    found = [np.array([size[0] / size[1]])]
    for name in shared:
        found.append((np.array(box_of(masks[name])) - np.tile(corner, 2)) / np.tile(size, 2))
        sums = np.pad(masks[name].cumsum(0).cumsum(1), ((1, 0), (1, 0)))[np.ix_(y, x)]
        cells = np.outer(np.diff(y), np.diff(x))
        found.append((np.diff(np.diff(sums, axis=0), axis=1) / np.maximum(cells, 1)).ravel())
    return np.concatenate(found)


def _ellipse(box: npt.NDArray[np.float64], height: int, width: int) -> npt.NDArray[np.bool_]:
    """(height, width) bool: the ellipse that fills a box, for want of the shape."""
    centre, radii = (box[:2] + box[2:]) / 2, np.maximum((box[2:] - box[:2]) / 2, 0.5)
    y, x = np.ogrid[:height, :width]
    across, down = (x + 0.5 - centre[0]) / radii[0], (y + 0.5 - centre[1]) / radii[1]
    inside: npt.NDArray[np.bool_] = across**2 + down**2 <= 1
    return inside
