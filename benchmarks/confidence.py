"""Does the agreement of drawn answers say how good a mask is?::

    python benchmarks/confidence.py GROUNDING_SET --bundle nano -o confidence/

Asks held-out questions with ``samples=8``. One half of the groups gives the knots of ``confidence`` in a manifest (a
rising line from concord to the mean Dice coefficient); the other half is what the figures are of: how far confidence is
from Dice in each tenth of the answers, and what Dice is left if only the most confident share is kept. Writes
``confidence.json`` (for ``export bundle --card``), ``rows.jsonl`` and ``confidence.png``, and prints the table.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

import medreasoner as mr
from medreasoner.consensus import expected_dice
from medreasoner_train.data import by_image, load_index, load_mask, load_pixels, split
from medreasoner_train.language import load_phrasings
from medreasoner_train.metrics import dice

Floats = npt.NDArray[np.float64]
N_KNOTS = 6
N_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An answer: what it agreed on, the segmenter's own score, and the Dice of it and of the likeliest answer."""

    group: str
    concord: float
    score: float
    dice: float
    greedy_dice: float


def ask(grounder: mr.Grounder, data: Path, *, every: int, samples: int, temperature: float) -> list[Row]:
    """Rows of all structures in the held-out images that are found."""
    phrasings, rng = load_phrasings("heldout"), np.random.default_rng(0)
    rows = []
    for record in by_image(split(load_index(data))[1])[::every]:
        with grounder.open(load_pixels(record.image)) as study:
            for sample in record.samples:
                if sample.key not in phrasings:
                    continue
                queries = phrasings[sample.key].queries
                query = queries[int(rng.integers(len(queries)))]
                drawn = study.ground(query, samples=samples, temperature=temperature)
                if not drawn.found or drawn.concord is None:
                    continue
                truth = load_mask(sample.mask)
                rows.append(
                    Row(
                        group=record.group,
                        concord=drawn.concord,
                        score=drawn.score,
                        dice=dice(drawn.mask, truth),
                        greedy_dice=dice(study.ground(query).mask, truth),
                    )
                )
    return rows


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of one half of the groups, and of the other."""
    groups = sorted({row.group for row in rows})
    np.random.default_rng(1).shuffle(groups)
    chosen = set(groups[: len(groups) // 2])
    return [row for row in rows if row.group in chosen], [row for row in rows if row.group not in chosen]


def fit(concord: Floats, values: Floats) -> list[tuple[float, float]]:
    """Knots of a rising line: means of equal shares of the answers, neighbours that fall joined (isotonic)."""
    order = np.argsort(concord, kind="stable")
    blocks: list[npt.NDArray[np.intp]] = []
    for part in np.array_split(order, N_KNOTS):
        blocks += [part] if part.size else []
        while len(blocks) > 1 and values[blocks[-2]].mean() >= values[blocks[-1]].mean():
            blocks[-2:] = [np.concatenate(blocks[-2:])]
    return [(round(float(concord[block].mean()), 4), round(float(values[block].mean()), 4)) for block in blocks]


def correlation(a: Floats, b: Floats) -> float:
    """Of ranks."""
    ranks = [np.argsort(np.argsort(each, kind="stable"), kind="stable") for each in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def covered(order_by: Floats, values: Floats) -> Floats:
    """Mean of the values of the highest 1, 2, ... answers."""
    ordered = values[np.argsort(-order_by, kind="stable")]
    return np.cumsum(ordered) / np.arange(1, len(ordered) + 1)


def bins(confidence: Floats, values: Floats) -> list[tuple[float, float, int]]:
    """Mean confidence, mean Dice and number of answers, by tenths of the answers."""
    parts = np.array_split(np.argsort(confidence, kind="stable"), N_BINS)
    return [(float(confidence[part].mean()), float(values[part].mean()), part.size) for part in parts if part.size]


def picture(found: Sequence[tuple[float, float, int]], curves: dict[str, Floats], path: Path) -> None:
    """Reliability on the left, Dice over coverage on the right."""
    side, edge = 420, 60
    image = Image.new("RGB", (2 * (side + 2 * edge), side + 2 * edge), "white")
    draw = ImageDraw.Draw(image)

    def axes(left: int, title: str, across: str, up: str) -> None:
        draw.rectangle((left, edge, left + side, edge + side), outline="black")
        draw.text((left, edge - 40), title, fill="black")
        draw.text((left, edge - 20), up, fill="black")
        draw.text((left + side - 8 * len(across), edge + side + 28), across, fill="black")
        for k in range(6):
            at = edge + side - k * side // 5
            draw.line((left, at, left + side, at), fill="#dddddd")
            draw.text((left - 28, at - 6), f"{k / 5:.1f}", fill="black")
            draw.text((left + k * side // 5 - 8, edge + side + 8), f"{k / 5:.1f}", fill="black")

    def place(left: int, x: float, y: float) -> tuple[float, float]:
        return left + x * side, edge + side - y * side

    axes(edge, "Reliability: tenths of the answers", "confidence", "mean Dice")
    draw.line((*place(edge, 0, 0), *place(edge, 1, 1)), fill="#999999")
    points = [place(edge, x, y) for x, y, _ in found]
    draw.line(points, fill="#1f5fa8", width=2)
    for x, y in points:
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill="#1f5fa8")
    right = 3 * edge + side
    axes(right, "Risk and coverage: the most confident share is kept", "share kept", "mean Dice")
    for (name, curve), colour, line in zip(curves.items(), ("#1f5fa8", "#c0392b", "#777777"), range(3), strict=False):
        shares = np.arange(1, len(curve) + 1) / len(curve)
        draw.line([place(right, x, y) for x, y in zip(shares, curve, strict=True)], fill=colour, width=2)
        draw.text((right + 12, edge + side - 60 + 16 * line), name, fill=colour)
    image.save(path)


def main() -> None:
    """Print the figures and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the grounding set")
    parser.add_argument("--bundle", default="nano")
    parser.add_argument("--every", type=int, default=1, help="take each n-th image only")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    with mr.Grounder.load(options.bundle, device="cpu") as grounder:
        rows = ask(
            grounder, options.data, every=options.every, samples=options.samples, temperature=options.temperature
        )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "rows.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    one, other = halves(rows)
    knots = fit(np.array([row.concord for row in one]), np.array([row.dice for row in one]))
    card = {"confidence": {"temperature": options.temperature, "knots": knots}}
    (options.output / "confidence.json").write_text(json.dumps(card, indent=1) + "\n")
    values, scores = np.array([row.dice for row in other]), np.array([row.score for row in other])
    confidence = np.array([expected_dice(row.concord, knots) for row in other])
    agreed = np.array([row.concord for row in other])
    found = bins(agreed, values)
    found = [(expected_dice(x, knots), y, n) for x, y, n in found]
    curves = {
        "by agreement": covered(agreed, values),
        "by the segmenter's score": covered(scores, values),
        "by Dice itself, the best there is": covered(values, values),
    }
    picture(found, curves, options.output / "confidence.png")
    apart = float(np.average([abs(x - y) for x, y, _ in found], weights=[n for *_, n in found]))
    print(f"{len(rows)} answers about {len({row.group for row in rows})} groups, {options.samples} samples each")
    print(f"knots from {len(one)} of them: {knots}; all that follows is of the other {len(other)}\n")
    print("| | by agreement | by the segmenter's score |\n|---|---|---|")
    print(f"| rank correlation with Dice | {correlation(agreed, values):.3f} | {correlation(scores, values):.3f} |")
    for share in (1.0, 0.8, 0.5, 0.3):
        at = int(share * len(values)) - 1
        names = list(curves)[:2]
        print(f"| Dice of the first {share:.0%} | " + " | ".join(f"{curves[name][at]:.3f}" for name in names) + " |")
    print(f"\nconfidence is {apart:.3f} from Dice on average over tenths; ", end="")
    print(f"mean {confidence.mean():.3f}, Dice {values.mean():.3f}")
    agreeing, greedy = (float(np.mean([getattr(row, name) for row in rows])) for name in ("dice", "greedy_dice"))
    print(f"Dice of what the samples agree on {agreeing:.4f}, of the likeliest answer {greedy:.4f}")


if __name__ == "__main__":
    main()
