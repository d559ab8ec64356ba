"""The quick look during training: box IoU on validation groups with phrasings never trained on."""

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from medreasoner_train.augment import NO_CHANGE
from medreasoner_train.language import load_phrasings
from medreasoner_train.prior import box_iou

if TYPE_CHECKING:
    from medreasoner_train.sft_data import SftData
    from medreasoner_train.vocabulary import Vocabulary

__all__ = ["validate"]

logger = logging.getLogger(__name__)


def validate(model: Any, vocabulary: "Vocabulary", data: "SftData", *, size: int, batch: int = 24) -> dict[str, float]:
    """Mean box IoU over the validation samples, one held-out phrasing each, and the absent choice's two error rates."""
    from medreasoner_train.answering import answer

    phrasings = load_phrasings("heldout")
    rng = np.random.default_rng(1)
    rows = []
    for index, item in enumerate(data.stored):
        image, targets, masks = data.image(index, size, rng, NO_CHANGE)
        for category in masks:
            key = f"{item.record.modality}/{category}"
            queries = phrasings[key].queries
            geometry = targets.geometry[data.column(category)]
            rows.append((image, queries[int(rng.integers(len(queries)))], key, geometry))
        absent = data.absent_query(item, phrasings, rng)
        if absent is not None:
            query, near = absent
            rows.append((image, query, "absent (same region)" if near else "absent (elsewhere)", None))
    ious: dict[str, list[float]] = {}
    absents: dict[str, list[float]] = {}
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        numbers, p_absent = answer(model, vocabulary, torch.stack([row[0] for row in part]), [row[1] for row in part])
        for row, own, p in zip(part, numbers, p_absent, strict=True):
            if row[3] is None:
                absents.setdefault(row[2], []).append(float(p > 0.5))
                continue
            absents.setdefault("present", []).append(float(p > 0.5))
            truth = row[3][None, :4].astype(np.float64) * vocabulary.largest
            ious.setdefault(row[2], []).append(float(box_iou(own[None, :4], truth)[0]))
    for key, values in sorted(ious.items()):
        logger.info("  %-38s %4d  %.3f", key, len(values), np.mean(values))
    result = {"val_iou": float(np.mean([v for values in ious.values() for v in values]))}
    return result | {f"said_absent/{key}": float(np.mean(values)) for key, values in sorted(absents.items())}
