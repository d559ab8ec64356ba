"""What each precision costs and gains: one checkpoint, held-out questions, paired with float32::

    python benchmarks/precisions.py GROUNDING_SET models/nano/reasoner models/nano/segmenter --every 4

Exports reasoner and segmenter in every precision, rounds one graph at a time, asks each bundle the same questions, and
prints box IoU and mask Dice over the frequent categories, the Dice lost against float32 with the upper end of its
95 % interval (bootstrap over groups, paired by question), the size of the graphs, and the median time of the first and
of the next question on an image, the bundles taking turns.

"int4, calibrated" has levels chosen by questions about images of the training split, with float32's own answers. How
far a reasoner is from float32 before it decides is the divergence of the next token's distributions (Kullback-Leibler,
nats, mean over the tokens of float32's answers to some of the held-out questions).
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
from medreasoner.bundle import load_bundle
from medreasoner.engine import load_engine
from medreasoner.image import read_image
from medreasoner.providers import RuntimeOptions
from medreasoner.reasoner.prompt import load_tokenizer
from medreasoner_export import (
    CalibrationPrompt,
    ReasonerOptions,
    SegmenterOptions,
    build_bundle,
    export_reasoner,
    export_segmenter,
)
from medreasoner_train.data import ImageRecord, by_image, load_index, load_pixels, split
from medreasoner_train.evaluate import EvalOptions, Row, evaluate_bundle
from medreasoner_train.language import load_phrasings
from medreasoner_train.metrics import group_mean

Precisions: TypeAlias = tuple[str, str, str]
CALIBRATED = "int4, calibrated"
ROWS: tuple[Precisions, ...] = (
    ("fp32", "fp32", "fp32"),
    ("fp16", "fp16", "fp32"),
    ("int8", "fp32", "fp32"),
    ("fp32", "int8", "fp32"),
    ("fp32", "int4", "fp32"),
    ("fp32", CALIBRATED, "fp32"),
    ("fp32", "fp32", "fp16"),
    ("fp32", "fp32", "int8"),
    ("fp32", "fp32", "int4"),
    ("fp16", "fp16", "fp16"),
    ("int8", "fp16", "int8"),
)
"""Of vision tower, decoder and image encoder: one at a time, then what nano ships for GPUs and for the CPU."""
QUERIES = ("Which organ is asked for here?", "Where is the brightest structure?")


def questions(records: Sequence[ImageRecord], part: str, count: int) -> list[tuple[Path, str]]:
    """`count` images over all of the records, each with a phrasing for one of its structures."""
    phrasings, rng = load_phrasings(part), np.random.default_rng(0)
    found = []
    for place in np.linspace(0, len(records) - 1, count).astype(int):
        record = records[place]
        keys = [sample.key for sample in record.samples if sample.key in phrasings]
        if keys:
            queries = phrasings[keys[int(rng.integers(len(keys)))]].queries
            found.append((record.image, queries[int(rng.integers(len(queries)))]))
    return found


def bundles(reasoner: Path, segmenter: Path, work: Path, asked: Sequence[tuple[Path, str]]) -> dict[Precisions, Path]:
    """Folders by the precisions of vision tower, decoder and image encoder."""
    for name in ("fp32", "fp16", "int8", "int4"):
        export_reasoner(reasoner, work / f"r-{name}", options=ReasonerOptions(precision=name))  # type: ignore[arg-type]
        options = SegmenterOptions(precision=name)  # type: ignore[arg-type]
        export_segmenter(segmenter, work / f"s-{name}", options=options)
    folders: dict[Precisions, Path] = {}
    for vision, decoder, encoder in ROWS:
        if decoder == CALIBRATED:
            with mr.Grounder.load(folders[ROWS[0]], device="cpu") as grounder:
                prompts = [
                    CalibrationPrompt(image=image, query=query, answer=grounder.ground(image, query).answer)
                    for image, query in asked
                ]
            calibrated = ReasonerOptions(precision="int4", calibration=prompts)
            export_reasoner(reasoner, work / f"r-{decoder}", options=calibrated)
        own = vision == ("fp32" if decoder.startswith("int4") else decoder)  # the tower that the decoder's export has
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


def divergences(folders: Mapping[Any, Path], asked: Sequence[tuple[Path, str]]) -> dict[Any, float]:
    """Of each reasoner from the first, at the tokens of its answers."""
    answers: list[str] = []
    base: list[Any] = []
    found: dict[Any, float] = {}
    for key, folder in folders.items():
        bundle = load_bundle(folder)
        reasoner = load_engine(bundle, RuntimeOptions(device="cpu")).reasoner
        tokenizer = load_tokenizer(str(bundle.path(bundle.spec.reasoner.tokenizer)))
        if not answers:
            with mr.Grounder.load(folder, device="cpu") as grounder:
                answers = [grounder.ground(image, query).answer for image, query in asked]
        own = []
        for (path, query), answer in zip(asked, answers, strict=True):
            image = read_image(path)
            placement = reasoner.place(image)
            embeds = reasoner.encode(reasoner.preprocess(image, placement)[None], placement)[0]
            ids = tokenizer.encode(answer, add_special_tokens=False).ids
            logits = reasoner.logits(reasoner.read_prefix(embeds, placement), query, ids).astype(np.float64)
            own.append(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        base = base or own
        pairs = zip(base, own, strict=True)
        found[key] = float(np.mean(np.concatenate([(np.exp(a) * (a - b)).sum(1) for a, b in pairs])))
    return found


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
    parser.add_argument("--prompts", type=int, default=128, help="to calibrate with")
    options = parser.parse_args()
    train, held_out = (by_image(part) for part in split(load_index(options.data)))
    with tempfile.TemporaryDirectory(prefix="precisions-") as scratch:
        asked = questions(train, "train", options.prompts)
        folders = bundles(options.reasoner, options.segmenter, Path(scratch), asked)
        grounders = {key: mr.Grounder.load(folder, device="cpu") for key, folder in folders.items()}
        pictures = [load_pixels(record.image) for record in held_out[:: len(held_out) // 12]]
        timed = times(grounders, pictures, options.rounds)
        reasoners = {key: folder for key, folder in folders.items() if key[2] == "fp32"}
        apart = divergences(reasoners, questions(held_out, "heldout", 60))
        found = {key: answers(grounder, options.data, options.every) for key, grounder in grounders.items()}
        base = found[ROWS[0]]
        print(f"{len(base)} questions about {len({row.group for row in base})} groups\n")
        heads = (
            "vision",
            "decoder",
            "encoder",
            "divergence",
            "box IoU",
            "mask Dice",
            "Dice lost, at most",
            "graphs, MB",
        )
        print("| " + " | ".join((*heads, "first, ms", "next, ms")) + " |")
        print("|" + (len(heads) + 2) * "---|")
        for key, rows in found.items():
            lost = group_mean([a.dice - b.dice for a, b in zip(base, rows, strict=True)], [row.group for row in base])
            iou, dice = (float(np.mean([getattr(row, name) for row in rows])) for name in ("iou", "dice"))
            sizes, (first, following) = megabytes(grounders[key]), timed[key]
            divergence = f"{apart[key]:.5f}" if key in apart else ""
            print(
                f"| {' | '.join(key)} | {divergence} | {iou:.4f} | {dice:.4f} | {lost.mean:+.4f}, {lost.high:+.4f} "
                f"| {sizes[0]:.1f} + {sizes[1]:.1f} | {first:.1f} | {following:.1f} |"
            )


if __name__ == "__main__":
    main()
