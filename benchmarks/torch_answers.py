"""Box IoU of nano as trained, in torch and float32, beside the bundle's as it runs: every question of an evaluation::

    medreasoner-cli eval nano GROUNDING_SET -o runs/eval
    python benchmarks/torch_answers.py models/nano/reasoner GROUNDING_SET runs/eval/rows.jsonl

Prints both means over the categories with 20 samples or more, their difference in points (hundredths of IoU), and its
95 % interval (bootstrap over groups, paired by question). The threshold on "absent" is that of the bundle `nano`.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medreasoner.bundle import load_bundle
from medreasoner.reasoner.prompt import load_tokenizer
from medreasoner_train.answering import answer
from medreasoner_train.augment import NO_CHANGE, augment
from medreasoner_train.data import Sample, load_index, load_mask, load_pixels
from medreasoner_train.hub_policy import load_hub_model
from medreasoner_train.metrics import group_mean
from medreasoner_train.model import to_tensor
from medreasoner_train.prior import box_iou
from medreasoner_train.targets import box_of
from medreasoner_train.vocabulary import Vocabulary

SIZE = 252
FREQUENT = 20
AT_ONCE = 24


def picture(sample: Sample) -> torch.Tensor:
    """(3, S, S) in [-1, 1], by the resizing of training."""
    pixels = load_pixels(sample.image)
    none = np.zeros((0, *pixels.shape[:2]), bool)
    plain = augment(
        pixels, none, np.zeros((0, 2, 2)), size=SIZE, modality=sample.modality, source=sample.source,
        rng=np.random.default_rng(0), options=NO_CHANGE,
    )  # fmt: skip
    return to_tensor(plain.pixels)


def relative_box(sample: Sample) -> npt.NDArray[np.float64]:
    """(4,) the true box in shares of the image's sides."""
    mask = load_mask(sample.mask)
    height, width = mask.shape
    return np.array(box_of(mask)) / [width, height, width, height]


def torch_ious(model: Any, vocabulary: Vocabulary, asked: list[tuple[Sample, str]], threshold: float) -> list[float]:
    """Of each question's answer; 0 where it says that nothing is there."""
    found: list[float] = []
    for start in range(0, len(asked), AT_ONCE):
        part = asked[start : start + AT_ONCE]
        images = torch.stack([picture(sample) for sample, _ in part])
        numbers, p_absent = answer(model, vocabulary, images, [query for _, query in part])
        truth = np.stack([relative_box(sample) for sample, _ in part])
        found += np.where(p_absent > threshold, 0.0, box_iou(numbers[:, :4] / SIZE, truth)).tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("checkpoint", "nano's"), ("data", "the grounding set"), ("rows", "rows.jsonl of `eval`")):
        parser.add_argument(name, type=Path, help=what)
    options = parser.parse_args()
    samples = {sample.id: sample for sample in load_index(options.data)}
    counts = Counter(sample.key for sample in samples.values())
    rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["kind"] == "present" and counts[samples[row["id"]].key] >= FREQUENT]

    tokenizer = load_tokenizer(str(options.checkpoint / "tokenizer.json"))
    model = load_hub_model(options.checkpoint)
    threshold = load_bundle("nano").spec.reasoner.absent_threshold
    asked = [(samples[row["id"]], row["query"]) for row in rows]
    mine = torch_ious(model.eval(), Vocabulary(tokenizer, SIZE), asked, 0.5 if threshold is None else threshold)
    bundle = [row["iou"] or 0.0 for row in rows]
    difference = group_mean(np.array(bundle) - np.array(mine), [row["group"] for row in rows])
    print(f"{len(rows)} questions: torch {np.mean(mine):.4f}, the bundle {np.mean(bundle):.4f}")
    low, mean, high = (100 * value for value in (difference.low, difference.mean, difference.high))
    print(f"the bundle's difference in points: {mean:+.2f} [{low:+.2f}, {high:+.2f}]")


if __name__ == "__main__":
    main()
