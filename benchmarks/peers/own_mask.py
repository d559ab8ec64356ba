"""Our side of ``large_mask.py``: a bundle's `Grounder`, from pixels and question to the mask.

After that its segmenter alone, for the peers; a second process with a SAM would take gigabytes more.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
from questions import random_image, read_questions
from serving import run_number, serve, versions

from medreasoner import Grounder
from medreasoner.image import read_image
from medreasoner.ops import simd_level
from medreasoner.result import Grounding


def main(folder: Path, questions: Path, threads: int) -> None:
    asked = read_questions(questions)

    def start() -> tuple[Mapping[str, Any], Callable[[str], Mapping[str, Any]]]:
        grounder = Grounder.load(folder, device="cpu", n_threads=threads, cache_dir=folder.parent / "cache")

        def run(line: str) -> Mapping[str, Any]:
            image = random_image(asked.side, run_number(line))
            answers = []
            for text in asked.texts:  # the second one finds what was made of the image
                begin = perf_counter()
                result = grounder.ground(image, text)
                spent = perf_counter() - begin
                stages = {stage: value / 1000 for stage, value in result.timings_ms.items() if stage != "total"}
                answers.append({"s": spent, "stages_s": stages, "tokens": dict(result.tokens)})
                assert result.found
                assert result.tokens["image"] == asked.n_image
            return {"answers": answers, "segmenter_s": draw(image, result)}

        def draw(image: npt.NDArray[np.uint8], result: Grounding) -> Mapping[str, float]:
            """Seconds of the segmenter alone, for an image and for the prompts of an answer."""
            segmenter, begin = grounder._engine.segmenter, perf_counter()
            embedded = segmenter.encode(read_image(image))
            read = perf_counter()
            corners, points = np.reshape(result.box, (2, 2)), np.array(result.points)
            logits, _ = segmenter.decode(embedded, corners=corners, points=points)
            mask = segmenter.mask(logits, embedded)
            spent = perf_counter() - read
            assert np.array_equal(mask, result.mask)
            return {"encode": read - begin, "decode": spent}

        spec = grounder.bundle.spec
        return {
            "versions": versions(["medreasoner", "onnxruntime", "numpy"]),
            "settings": f"{threads} threads, {simd_level()}; decoder {spec.precision}, tower and language head "
            f"{spec.reasoner.lm_head.dtype} in the file; follows the grammar of answers",
        }, run

    serve(start)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
