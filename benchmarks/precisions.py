"""What each precision costs and gains: one checkpoint, held-out questions, paired with float32::

    python benchmarks/precisions.py GROUNDING_SET models/nano/reasoner models/nano/segmenter --every 4

Exports reasoner and segmenter in every precision, rounds one graph at a time, asks each bundle the same questions, and
prints box IoU and mask Dice over the frequent categories, the Dice lost against float32 with the upper end of its
95 % interval (bootstrap over groups, paired by question), the size of the graphs, and the median time of the first and
of the next question on an image, the bundles taking turns.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

import medreasoner as mr
from medreasoner_export import ReasonerOptions, SegmenterOptions, build_bundle, export_reasoner, export_segmenter
from medreasoner_train.data import by_image, load_index, load_pixels, split
from medreasoner_train.evaluate import EvalOptions, Row, evaluate_bundle
from medreasoner_train.metrics import group_mean

Precisions: TypeAlias = tuple[str, str, str]
ROWS: tuple[Precisions, ...] = (
    ("fp32", "fp32", "fp32"),
    ("fp16", "fp16", "fp32"),
    ("int8", "fp32", "fp32"),
    ("fp32", "int8", "fp32"),
    ("fp32", "int4", "fp32"),
    ("fp32", "fp32", "fp16"),
    ("fp32", "fp32", "int8"),
    ("fp16", "fp16", "fp16"),
    ("int8", "fp16", "int8"),
)
"""Of vision tower, decoder and image encoder: one at a time, then what nano ships for GPUs and for the CPU."""
QUERIES = ("Which organ is asked for here?", "Where is the brightest structure?")


def bundles(reasoner: Path, segmenter: Path, work: Path) -> dict[Precisions, Path]:
    """Folders by the precisions of vision tower, decoder and image encoder."""
    for name in ("fp32", "fp16", "int8", "int4"):
        export_reasoner(reasoner, work / f"r-{name}", options=ReasonerOptions(precision=name))  # type: ignore[arg-type]
    for name in ("fp32", "fp16", "int8"):
        options = SegmenterOptions(precision=name)  # type: ignore[arg-type]
        export_segmenter(segmenter, work / f"s-{name}", options=options)
    folders = {}
    for vision, decoder, encoder in ROWS:
        own = vision == ("fp32" if decoder == "int4" else decoder)  # the tower that the decoder's export has
        name = f"{vision}-{decoder}-{encoder}"
        folders[vision, decoder, encoder] = build_bundle(
            work / f"r-{decoder}",
            work / f"s-{encoder}",
            work / name,
            name=name,
            cpu_reasoner=None if own else work / f"r-{vision}",
            cpu_graphs=("vision",),
        )
    return folders


def megabytes(grounder: mr.Grounder) -> tuple[float, float]:
    """Of the graphs of reasoner and segmenter that are used."""
    files = grounder.bundle.spec.files
    sizes = [
        sum(files[name].size_bytes for name in grounder.providers if name.startswith(part)) / 1e6
        for part in ("reasoner", "segmenter")
    ]
    return sizes[0], sizes[1]


def times(grounders: Mapping[Any, mr.Grounder], images: Sequence[Any], rounds: int) -> dict[Any, tuple[float, float]]:
    """Median milliseconds of the first and of the next question on an image."""
    spent: dict[Any, tuple[list[float], list[float]]] = {key: ([], []) for key in grounders}
    for turn in range(rounds + 1):
        for image in images:
            for key, grounder in grounders.items():
                start = time.perf_counter()
                with grounder.open(image) as study:
                    study.ground(QUERIES[0])
                    between = time.perf_counter()
                    study.ground(QUERIES[1])
                    end = time.perf_counter()
                if turn:  # the first warms up
                    spent[key][0].append(between - start)
                    spent[key][1].append(end - between)
    return {key: (1e3 * statistics.median(one), 1e3 * statistics.median(two)) for key, (one, two) in spent.items()}


def answers(grounder: mr.Grounder, data: Path, every: int) -> list[Row]:
    """What came of every question about something that is there, of the frequent categories."""
    rows, sets = evaluate_bundle(grounder, EvalOptions(data=data, every=every, controls=False))
    return [row for row in rows if row.kind == "present" and row.key in sets["all"]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the grounding set")
    parser.add_argument("reasoner", type=Path, help="folder of its checkpoint")
    parser.add_argument("segmenter", type=Path, help="folder or file of its checkpoint")
    parser.add_argument("--every", type=int, default=1, help="take each n-th image only")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="precisions-") as scratch:
        folders = bundles(options.reasoner, options.segmenter, Path(scratch))
        grounders = {key: mr.Grounder.load(folder, device="cpu") for key, folder in folders.items()}
        records = by_image(split(load_index(options.data))[1])
        timed = times(
            grounders, [load_pixels(record.image) for record in records[:: len(records) // 12]], options.rounds
        )
        found = {key: answers(grounder, options.data, options.every) for key, grounder in grounders.items()}
        base = found[ROWS[0]]
        print(f"{len(base)} questions about {len({row.group for row in base})} groups\n")
        heads = ("vision", "decoder", "encoder", "box IoU", "mask Dice", "Dice lost, at most", "graphs, MB")
        print("| " + " | ".join((*heads, "first, ms", "next, ms")) + " |")
        print("|---|---|---|---|---|---|---|---|---|")
        for key, rows in found.items():
            lost = group_mean([a.dice - b.dice for a, b in zip(base, rows, strict=True)], [row.group for row in base])
            iou, dice = (float(np.mean([getattr(row, name) for row in rows])) for name in ("iou", "dice"))
            sizes, (first, following) = megabytes(grounders[key]), timed[key]
            print(
                f"| {' | '.join(key)} | {iou:.4f} | {dice:.4f} | {lost.mean:+.4f}, {lost.high:+.4f} "
                f"| {sizes[0]:.1f} + {sizes[1]:.1f} | {first:.1f} | {following:.1f} |"
            )


if __name__ == "__main__":
    main()
