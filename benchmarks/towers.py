"""What reads images for a bundle, by its graphs and by the kernels that take their place, in turns::

    python benchmarks/towers.py nano --rounds 8

First each alone, by one thread and by all cores: medians in milliseconds, and how far what comes out is from the main
graph's. Then whole first questions about noise, by Grounders with and without kernels. Nothing else should run
meanwhile.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from medreasoner import Grounder, _kernels
from medreasoner.bundle import Bundle, load_bundle
from medreasoner.image_tower import load_image_tower
from medreasoner.ort_session import OrtSession
from medreasoner.providers import RuntimeOptions, usable_cores
from medreasoner.reasoner.tower import load_tower
from medreasoner.reasoner.vision import vision_grid
from medreasoner.spec import StretchResize

QUERY = "Which organs fill with air?"
Run = Callable[[], Mapping[str, np.ndarray]]


def feeds(bundle: Bundle) -> dict[str, dict[str, np.ndarray]]:
    """Noise for both models, in the size that they stretch images to."""
    rng = np.random.default_rng(0)
    vision, (height, width) = bundle.spec.reasoner.vision, bundle.spec.segmenter.resize.sides
    if not isinstance(vision.resize, StretchResize):
        raise SystemExit("this is for bundles that stretch their images")
    grid = vision_grid(
        height=vision.resize.height, width=vision.resize.width, patch=vision.patch_size, merge=vision.merge_size,
        window=vision.window_size, head_dim=vision.head_dim,
    )  # fmt: skip
    shape = (1, grid.n_tokens * vision.merge_size**2, 3 * vision.patch_size**2)
    return {
        "vision": {"patches": 0.3 * rng.standard_normal(shape).astype(np.float32), **grid.inputs()},
        "encoder": {"pixel_values": rng.standard_normal((1, 3, height, width)).astype(np.float32)},
    }


def sessions(bundle: Bundle, n_threads: int) -> Iterator[tuple[str, str, str, Any]]:
    """Model, what runs it, the road that must be taken meanwhile, and the session."""
    spec, options = bundle.spec, RuntimeOptions(device="cpu", n_threads=n_threads)
    best = _kernels.tile_road()
    graphs = {
        "vision": (spec.reasoner.graphs.vision, spec.reasoner.cpu_graphs.vision),
        "encoder": (spec.segmenter.graphs.encoder, spec.segmenter.cpu_graphs.encoder),
    }
    for model, names in graphs.items():
        for words, name in zip(("graph", "graph for the CPU"), names, strict=True):
            if name is not None:
                yield model, words, best, OrtSession(bundle.path(name), options)
    tower, encoder = spec.reasoner.tower, spec.segmenter.tower
    for road in _kernels.tile_roads()[1:]:
        _kernels.set_tile_road(road)
        for products in ("bfloat16", "int8") if road != "amx-bf16" else ("bfloat16",):
            if tower is not None:
                own, out_dim = replace(tower, products=products), spec.reasoner.hidden_dim
                path, vision = bundle.path(own.file), spec.reasoner.vision
                session = load_tower(path, own, vision, out_dim=out_dim, n_threads=n_threads)
                yield "vision", f"{products}, {road}", road, session
            if encoder is not None:
                other = replace(encoder, products=products)
                kernel = load_image_tower(bundle.path(other.file), spec.segmenter, other, n_threads=n_threads)
                yield "encoder", f"{products}, {road}", road, kernel
    _kernels.set_tile_road(best)


def alone(bundle: Bundle, rounds: int) -> None:
    """Prints a line for each."""
    given, counts = feeds(bundle), sorted({1, usable_cores()})
    opened = {(*key, n): (road, session) for n in counts for *key, road, session in sessions(bundle, n)}
    spent: dict[tuple[Any, ...], list[float]] = {key: [] for key in opened}
    found = {}
    for _ in range(rounds):
        for key, (road, session) in opened.items():
            _kernels.set_tile_road(road)
            for _ in range(3):
                begin = time.perf_counter()
                outputs = session.bind({}, {}).run(given[key[0]])
                spent[key].append(1e3 * (time.perf_counter() - begin))
            (found[key],) = outputs.values()
    for model, words, n in sorted(opened):
        exact = found[model, "graph", 1]
        error = np.linalg.norm(found[model, words, n] - exact) / np.linalg.norm(exact)
        print(
            f"{model:8} {words:22} {n} threads {statistics.median(spent[model, words, n]):8.2f} ms  error {error:.4f}"
        )


def first_questions(bundle: Bundle, rounds: int) -> None:
    """Prints the medians, and the quartiles of the ratios."""
    best, rng = _kernels.tile_road(), np.random.default_rng(1)
    grounders = {}
    for words, road in (("graphs", "none"), ("kernels", best)):
        _kernels.set_tile_road(road)
        grounders[words] = Grounder.load(bundle.root, device="cpu")
    _kernels.set_tile_road(best)
    spent: dict[str, list[float]] = {words: [] for words in grounders}
    for number in range(6 * rounds + 1):
        image = rng.integers(0, 256, (600, 700), dtype=np.uint8)
        for words, grounder in grounders.items():
            begin = time.perf_counter()
            grounder.ground(image, QUERY)
            if number:  # the first one warms up
                spent[words].append(1e3 * (time.perf_counter() - begin))
    low, middle, high = statistics.quantiles(
        (ours / theirs for ours, theirs in zip(spent["kernels"], spent["graphs"], strict=True)), n=4
    )
    medians = ", ".join(f"{words} {statistics.median(values):.1f} ms" for words, values in spent.items())
    print(f"first question: {medians}; {middle:.2f} ({low:.2f} - {high:.2f}) times as long")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default="nano")
    parser.add_argument("--rounds", type=int, default=8)
    chosen = parser.parse_args()
    bundle = load_bundle(chosen.bundle)
    alone(bundle, chosen.rounds)
    first_questions(bundle, chosen.rounds)


if __name__ == "__main__":
    main()
