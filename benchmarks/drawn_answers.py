"""What is in the answers that nano does not give: drawn ones beside the likeliest, question by question::

    medreasoner-cli eval nano GROUNDING_SET -o runs/eval
    python benchmarks/drawn_answers.py models/nano/reasoner GROUNDING_SET runs/eval/rows.jsonl

Draws 16 answers to every question of an evaluation and prints mean box IoU of: the likeliest answer (as evaluated), all
drawn ones, the one that agrees the most with the others, the box of median sides, and the best. Training by reward
makes likelier what is drawn and good: where the likeliest answer is ahead of what the drawn ones agree on, nothing is
gained by preferring among them what is good on average, only by telling images apart. An absent answer counts 0.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch_answers import SIZE, relative_box

from medreasoner_train.data import load_index, load_pixels
from medreasoner_train.prior import box_iou
from medreasoner_train.rewards import geometry_of
from medreasoner_train.rollout import Prompt, Sampling
from medreasoner_train.runtime_rollouts import RuntimeRollouts

AT_ONCE = 64
NAMES = ("likeliest", "drawn, mean", "drawn, the most agreed", "drawn, median", "drawn, best")
Boxes = npt.NDArray[np.float64]


def values(row: dict[str, Any], drawn: Boxes, count: int, truth: Boxes) -> tuple[float, ...]:
    """IoU with the true box, of each of NAMES; drawn : (N, 4) boxes of the `count` drawn answers that have one."""
    if not len(drawn):
        return (row["iou"] or 0.0, 0.0, 0.0, 0.0, 0.0)
    own = box_iou(drawn, np.broadcast_to(truth, drawn.shape))
    among = [box_iou(drawn, np.broadcast_to(box, drawn.shape)).mean() for box in drawn]
    median = box_iou(np.median(drawn, axis=0)[None], truth[None])[0]
    return (row["iou"] or 0.0, own.sum() / count, own[int(np.argmax(among))], median, own.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("checkpoint", "nano's"), ("data", "the grounding set"), ("rows", "rows.jsonl of `eval`")):
        parser.add_argument(name, type=Path, help=what)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--count", type=int, default=16)
    options = parser.parse_args()
    samples = {sample.id: sample for sample in load_index(options.data)}
    rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["kind"] == "present"]
    rollouts = RuntimeRollouts(options.checkpoint)
    sampling = Sampling(count=options.count, temperature=options.temperature)
    found = []
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        prompts = [
            Prompt(key=str(start + index), pixels=load_pixels(samples[row["id"]].image), query=row["query"])
            for index, row in enumerate(part)
        ]
        for row, answers in zip(part, rollouts.sample(prompts, sampling, seed=0), strict=True):
            geometries = [geometry_of(each.text) for each in answers]
            boxes = np.array([each[0] for each in geometries if each is not None]).reshape(-1, 4) / SIZE
            found.append(values(row, boxes, options.count, relative_box(samples[row["id"]])))
    print(f"{len(rows)} questions, {options.count} answers drawn at temperature {options.temperature}")
    for name, value in zip(NAMES, np.mean(found, axis=0), strict=True):
        print(f"{name:24s} {value:.3f}")


if __name__ == "__main__":
    main()
