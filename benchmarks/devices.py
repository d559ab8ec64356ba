"""A bundle on several devices: the same questions, their answers against the first device's, and the time they take::

    python benchmarks/devices.py GROUNDING_SET BUNDLE [BUNDLE ...] --devices cpu,cuda

One line of JSON for each pair of device and bundle. Needs no torch. A device that a bundle cannot run on says why.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import medreasoner as mr


def questions(data: Path, count: int) -> list[tuple[Any, str]]:
    """Images spread over the whole set, each with a held-out question."""
    text = resources.files("medreasoner_train").joinpath("queries", "heldout.json").read_text(encoding="utf-8")
    asked = {key: [q for part in own["queries"].values() for q in part] for key, own in json.loads(text).items()}
    rows = [json.loads(line) for line in (data / "index.jsonl").read_text(encoding="utf-8").splitlines()]
    found: list[tuple[Any, str]] = []
    for row in rows[:: max(1, len(rows) // (3 * count))]:
        own = asked.get(f"{row['modality']}/{row['category']}")
        if own and len(found) < count:
            with Image.open(data / row["image"]) as image:
                pixels = np.asarray(image.convert("L" if image.mode in ("L", "1", "I;16", "I") else "RGB"))
            found.append((pixels, own[len(found) % len(own)]))
    return found


def run(grounder: mr.Grounder, asked: Sequence[tuple[Any, str]]) -> tuple[list[mr.Grounding], float, float]:
    """The answers, and the median milliseconds of the first and of the next question on an image."""
    for image, query in asked[:3]:
        grounder.ground(image, query)
    answers, first, following = [], [], []
    for image, query in asked:
        start = time.perf_counter()
        with grounder.open(image) as study:
            answers.append(study.ground(query))
            between = time.perf_counter()
            study.ground(query)
            first.append(between - start)
            following.append(time.perf_counter() - between)
    return answers, 1e3 * statistics.median(first), 1e3 * statistics.median(following)


def compared(reference: Sequence[mr.Grounding], found: Sequence[mr.Grounding]) -> dict[str, float]:
    """How many answers are the same, and the masks' Dice where both found something."""
    both = [(a, b) for a, b in zip(reference, found, strict=True) if a.found and b.found]
    dice = [2 * int((a.mask & b.mask).sum()) / max(1, int(a.mask.sum()) + int(b.mask.sum())) for a, b in both]
    return {
        "questions": len(found),
        "same_answer": sum(a.answer == b.answer for a, b in zip(reference, found, strict=True)),
        "dice_mean": round(float(np.mean(dice)), 5) if dice else 0.0,
        "dice_min": round(min(dice, default=0.0), 5),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the grounding set")
    parser.add_argument("bundles", nargs="+", help="names or folders")
    parser.add_argument("--devices", default="cpu", help="such as cpu,cuda,auto")
    parser.add_argument("--count", type=int, default=40)
    options = parser.parse_args()
    asked = questions(options.data, options.count)
    reference: list[mr.Grounding] = []
    for device in options.devices.split(","):
        for bundle in options.bundles:
            try:
                with mr.Grounder.load(bundle, device=device) as grounder:
                    answers, first, following = run(grounder, asked)
                    where = sorted(set(grounder.providers.values()))
            except mr.MedReasonerError as err:
                print(f"{device} {bundle}: {err}", file=sys.stderr)
                continue
            reference = reference or answers
            row = {"device": device, "bundle": bundle, "first_ms": round(first, 1), "next_ms": round(following, 1)}
            warnings = sorted({line for answer in answers for line in answer.warnings if "runs on" in line})
            print(json.dumps({**row, **compared(reference, answers), "providers": where, "warnings": warnings}))


if __name__ == "__main__":
    main()
