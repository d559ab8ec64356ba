"""What a bundle says of organs that an image's source leaves unlabelled: ``train sft --infer`` is for them::

    python benchmarks/inferred_organs.py GROUNDING_SET
    python benchmarks/inferred_organs.py GROUNDING_SET build/bundle another/bundle

Frames are predicted from the labelled neighbours on the validation images, by rules of the training groups
(:mod:`medreasoner_train.inferred`), and held-out questions asked. No radiologist drew these frames: where the organ is
labelled, they overlap the truth as the log says. Prints, for each organ, the mean box IoU with the predicted frame, how
often it is called absent, and how often a labelled neighbour is framed in its place (IoU above 0.6).
"""

import argparse
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from medreasoner import Grounder, Study
from medreasoner_train.data import load_index
from medreasoner_train.inferred import load_parts, with_inferred
from medreasoner_train.language import Phrasings, load_phrasings
from medreasoner_train.prior import box_iou
from medreasoner_train.store import Stored

QUESTIONS = 4  # about each organ of an image
INSTEAD = 0.6

Answer = tuple[str, float, bool, bool]


def ask(study: Study, item: Stored, phrasings: Mapping[str, Phrasings], rng: np.random.Generator) -> Iterator[Answer]:
    """Of each unlabelled organ of an image: key, box IoU, if it is called absent, if a neighbour is framed."""
    frames = list(zip(item.record.samples, item.boxes, strict=True))
    labelled = np.array([box for sample, box in frames if sample.category not in item.guessed])
    for sample, box in frames:
        if sample.category not in item.guessed:
            continue
        for query in rng.choice(phrasings[sample.key].queries, QUESTIONS):
            answer = study.ground(str(query)).box
            if answer is None:
                yield sample.key, 0.0, True, False
                continue
            framed = np.array(answer)[None]
            instead = bool(box_iou(framed.repeat(len(labelled), 0), labelled).max() > INSTEAD)
            yield sample.key, float(box_iou(framed, box[None])[0]), False, instead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the grounding set")
    parser.add_argument("bundles", nargs="*", default=["nano"], help="names or folders; nano by default")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train, held = load_parts(load_index(options.data), cache=None, infer=False)
    images = [item for item in with_inferred(held, learned_from=train) if item.guessed]
    phrasings = load_phrasings("heldout")
    for bundle in options.bundles:
        rng = np.random.default_rng(0)
        found = defaultdict(list)
        with Grounder.load(bundle) as grounder:
            for item in images:
                with grounder.open(item.pixels) as study:
                    for key, *values in ask(study, item, phrasings, rng):
                        found[key].append(values)
        for key, own in sorted(found.items()):
            iou, absent, instead = np.mean(own, axis=0)
            means = f"box IoU {iou:.3f}, absent {absent:.2f}, neighbour {instead:.2f}"
            print(f"{bundle}: {key}, {len(own)} questions: {means}")


if __name__ == "__main__":
    main()
