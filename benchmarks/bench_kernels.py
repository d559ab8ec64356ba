"""Each kernel beside what one would call instead: ``pytest benchmarks/bench_kernels.py``.

Prints the ratio of the fastest rounds, since other work on the machine only ever adds time. Peers may use all cores,
the kernels use one.
"""

import json
import platform
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import PIL
import pytest
from PIL import Image
from pycocotools import mask as coco

from medreasoner import ops
from medreasoner.bundle import load_bundle
from medreasoner.errors import BundleError
from medreasoner.providers import RuntimeOptions
from medreasoner.reasoner.decoder import Decoder
from medreasoner.reasoner.rotary import text_positions
from medreasoner.reasoner.step import load_step
from medreasoner.sessions import decoder_session

try:
    import cv2  # pip install opencv-python-headless
except ImportError:
    cv2 = None  # type: ignore[assignment]

RNG = np.random.default_rng(0)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MEAN32, STD32 = np.array(MEAN, np.float32), np.array(STD, np.float32)
RADIOGRAPH = RNG.integers(0, 256, (2500, 2048), dtype=np.uint8)
SLICE = RNG.integers(-1024, 3000, (512, 512), dtype=np.int16)
PHOTO = RNG.integers(0, 256, (768, 1024, 3), dtype=np.uint8)
BICUBIC = Image.Resampling.BICUBIC


class Case(NamedTuple):
    ours: Callable[[], Any]
    peer: str
    theirs: Callable[[], Any]


def pillow_patches(image: np.ndarray, height: int, width: int) -> np.ndarray:
    resized = np.asarray(Image.fromarray(image).resize((width, height), BICUBIC).convert("RGB"))
    x = ((resized.astype(np.float32) / 255 - MEAN32) / STD32).transpose(2, 0, 1)
    x = x.reshape(3, height // 28, 2, 14, width // 28, 2, 14)
    return np.ascontiguousarray(x.transpose(1, 4, 2, 5, 0, 3, 6)).reshape(-1, 3 * 14 * 14)


def pillow_planes(image: np.ndarray, size: int) -> np.ndarray:
    resized = np.asarray(Image.fromarray(image).resize((size, size), BICUBIC).convert("RGB"))
    return np.ascontiguousarray(((resized.astype(np.float32) / 255 - MEAN32) / STD32).transpose(2, 0, 1))


def image_cases() -> dict[str, Case]:
    def patches(image: np.ndarray, side: int) -> Case:
        return Case(
            lambda: ops.preprocess_patches(image, side, side, mean=MEAN, std=STD, patch=14, merge=2),
            "Pillow + NumPy",
            lambda: pillow_patches(image, side, side),
        )

    def numpy_window() -> np.ndarray:
        x = (SLICE.astype(np.float32) - 39.5) / 399 + 0.5
        return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)

    return {
        "resize 2500x2048 grey to 840": Case(
            lambda: ops.resize_u8(RADIOGRAPH, 840, 840),
            "Pillow",
            lambda: np.asarray(Image.fromarray(RADIOGRAPH).resize((840, 840), BICUBIC)),
        ),
        "resize 768x1024 RGB to 252": Case(
            lambda: ops.resize_u8(PHOTO, 252, 252),
            "Pillow",
            lambda: np.asarray(Image.fromarray(PHOTO).resize((252, 252), BICUBIC)),
        ),
        "patches 2500x2048 grey to 252": patches(RADIOGRAPH, 252),
        "patches 2500x2048 grey to 840": patches(RADIOGRAPH, 840),
        "patches 768x1024 RGB to 252": patches(PHOTO, 252),
        "planes 768x1024 RGB to 256": Case(
            lambda: ops.preprocess_planes(PHOTO, 256, 256, mean=MEAN, std=STD),
            "Pillow + NumPy",
            lambda: pillow_planes(PHOTO, 256),
        ),
        "window 512x512 int16": Case(lambda: ops.window_u8(SLICE, 1, 0, 40, 400), "NumPy", numpy_window),
    }


def row_cases() -> dict[str, Case]:
    def cases(vocab: int, dim: int, n_rows: int) -> dict[str, Case]:
        hidden = RNG.standard_normal(dim).astype(np.float32)
        wide = RNG.standard_normal((vocab, dim), np.float32)
        narrow = (wide.view(np.uint32) >> 16).astype(np.uint16)
        rows = np.sort(RNG.choice(vocab, n_rows, replace=False)).astype(np.int32)
        ids = RNG.integers(0, vocab, 128)

        def numpy_select() -> tuple[int, float]:
            logits = wide[rows] @ hidden
            best = int(logits.argmax())
            return int(rows[best]), float(-np.log(np.exp(logits - logits[best]).sum()))

        def numpy_full() -> tuple[int, float]:
            """All logits, then a mask: what a logits processor does."""
            logits = np.full(vocab, -np.inf, np.float32)
            logits[rows] = (wide @ hidden)[rows]
            best = int(logits.argmax())
            return best, float(-np.log(np.exp(logits - logits[best]).sum()))

        name = f"{n_rows} of {vocab} x {dim}"
        return {
            f"select {name}, bfloat16": Case(
                lambda: ops.select_token(hidden, narrow, "bfloat16", rows), "NumPy rows, float32", numpy_select
            ),
            f"select {name}, bfloat16, all": Case(
                lambda: ops.select_token(hidden, narrow, "bfloat16", rows), "NumPy all logits, float32", numpy_full
            ),
            f"project {vocab} x {dim}, bfloat16": Case(
                lambda: ops.project_rows(hidden, narrow, "bfloat16"), "NumPy float32", lambda: wide @ hidden
            ),
            f"gather 128 of {vocab} x {dim}, bfloat16": Case(
                lambda: ops.gather_rows(narrow, "bfloat16", ids),
                "NumPy",
                lambda: (narrow[ids].astype(np.uint32) << 16).view(np.float32),
            ),
        }

    return cases(2000, 256, 253) | cases(32_000, 1024, 10) | {"choose one of 10 of 152k x 2048": large_choice()}


def large_choice() -> Case:
    """A token of an answer at the vocabulary of a published model; the peer gets its mask as a gift."""

    @cache
    def head() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        matrix = np.full((151_936, 2048), 0x3F80, np.uint16)  # 0.6 GB, made when it is needed
        rows = np.sort(RNG.choice(len(matrix), 10, replace=False)).astype(np.int32)
        forbidden = np.full(len(matrix), -np.inf, np.float32)
        forbidden[rows] = 0
        return RNG.standard_normal(2048).astype(np.float32), matrix, rows, forbidden

    def ours() -> int:
        hidden, matrix, rows, _ = head()
        return ops.select_token(hidden, matrix, "bfloat16", rows)[0]

    def theirs() -> int:
        hidden, matrix, _, forbidden = head()
        return int((ops.project_rows(hidden, matrix, "bfloat16") + forbidden).argmax())

    return Case(ours, "all logits (ours), mask, argmax", theirs)


def disc(height: int, width: int) -> np.ndarray:
    y, x = np.indices((height, width))
    return (y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 4) ** 2


def mask_cases() -> dict[str, Case]:
    y, x = np.indices((256, 256)) - 128
    logits = (60 - np.hypot(y, x)).astype(np.float32)
    noise = RNG.standard_normal((64, 64), np.float32)
    mask = disc(2500, 2048)
    rle = ops.rle_encode(mask)

    def enlarge(logits: np.ndarray, height: int, width: int) -> Case:
        bilinear = Image.Resampling.BILINEAR
        return Case(
            lambda: ops.mask_from_logits(logits, crop=logits.shape, height=height, width=width),
            "Pillow",
            lambda: np.asarray(Image.fromarray(logits).resize((width, height), bilinear)) > 0,
        )

    def numpy_box() -> tuple[int, ...]:
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1

    def whole_way() -> Any:
        return ops.rle_encode(ops.mask_from_logits(logits, crop=logits.shape, height=2048, width=2048))

    def their_way() -> Any:
        large = cv2.resize(logits, (2048, 2048), interpolation=cv2.INTER_LINEAR)
        return coco.encode(np.asfortranarray((large > 0).view(np.uint8)))

    together = {}
    if cv2 is not None:
        together = {"mask 256 to 2048x2048, and its RLE": Case(whole_way, "OpenCV + pycocotools", their_way)}
    return together | {
        "mask 256 to 2500x2048": enlarge(logits, 2500, 2048),
        "mask 64 to 512x512, noise": enlarge(noise, 512, 512),
        "box of 2500x2048": Case(lambda: ops.mask_box(mask), "NumPy", numpy_box),
        "RLE encode 2500x2048": Case(
            lambda: ops.rle_encode(mask), "pycocotools", lambda: coco.encode(np.asfortranarray(mask.view(np.uint8)))
        ),
        "RLE decode 2500x2048": Case(
            lambda: ops.rle_decode(rle),
            "pycocotools",
            lambda: np.ascontiguousarray(coco.decode({"size": rle["size"], "counts": rle["counts"]})).view(np.bool_),
        ),
    }


ANSWER = '<think>{}</think><answer>{{"bbox": [12, 34, 156, 178], "points_1": [60, 70], "points_2": [99, 120]}}</answer>'
REPLY = ANSWER.format("the left lung is on the right of the picture " * 20)


def answer_cases() -> dict[str, Case]:
    def parse() -> str:
        parser = ops.AnswerParser()
        parser.feed(REPLY)
        return parser.result().status

    def parse_by_json() -> tuple[str, Any]:
        thought = re.search(r"<think>(.*?)</think>", REPLY, re.DOTALL)
        answer = re.search(r"<answer>(.*?)</answer>", REPLY, re.DOTALL)
        return thought[1], json.loads(answer[1].replace("'", '"'))

    grammar = ops.AnswerGrammar(
        [[1, 2, 3], *[[4]] * 3, [5, 6], [4], [5, 7], [4], [8, 9]], [[100 + v] for v in range(253)], [1, 2, 10]
    )
    start = grammar.start(252, 252)
    start.forced()
    start.accept(3)
    whole = np.zeros(2000, np.bool_)

    def allowed_by_numpy() -> np.ndarray:
        whole[:] = False
        whole[100 : 100 + 252] = True
        return np.flatnonzero(whole)

    return {
        "parse a reply of 1000 characters": Case(parse, "re + json", parse_by_json),
        "allowed tokens of a coordinate": Case(start.allowed, "NumPy mask of 2000", allowed_by_numpy),
    }


def step_cases() -> dict[str, Case]:
    """Tokens of an answer through nano's decoder, after a prompt; none in a build without nano."""
    try:
        bundle = load_bundle("nano")
    except BundleError:
        return {}
    spec = bundle.spec.reasoner
    if spec.step is None:
        return {}
    session = decoder_session(bundle.path(spec.graphs.decoder), RuntimeOptions(device="cpu", n_threads=1))
    step = load_step(bundle.path(spec.step.file), spec, spec.step)
    plain, stepping = Decoder(session, spec), Decoder(session, spec, step)

    def case(n: int) -> Case:
        embeds = RNG.standard_normal((n, spec.hidden_dim), np.float32)
        positions = text_positions(110, n)

        def run(decoder: Decoder) -> Callable[[], Any]:
            cache = decoder.open_cache()

            def once() -> Any:
                cache.length = 110
                return decoder.run([decoder.step(cache, embeds, positions)])

            return once

        return Case(run(stepping), "ONNX Runtime, 1 thread", run(plain))

    return {f"decoder of nano, {n} tokens after 110": case(n) for n in (1, 2, 9, 20)}


CASES = image_cases() | row_cases() | mask_cases() | answer_cases() | step_cases()


@pytest.fixture(scope="module")
def fastest(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], float]]:
    times: dict[tuple[str, str], float] = {}
    yield times
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        machine = f"{platform.machine()}, {ops.simd_level()}, NumPy {np.__version__}, Pillow {PIL.__version__}"
        print(f"\n\n{machine}\n{'kernel':<42}{'ours us':>10}{'theirs us':>11}{'ratio':>7}  peer")
        for name, case in CASES.items():
            if (name, "ours") in times and (name, "theirs") in times:
                ours, theirs = times[name, "ours"] * 1e6, times[name, "theirs"] * 1e6
                print(f"{name:<42}{ours:>10.1f}{theirs:>11.1f}{theirs / ours:>7.1f}  {case.peer}")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools 2.0 on NumPy 2
@pytest.mark.parametrize("side", ["ours", "theirs"])
@pytest.mark.parametrize("name", CASES)
def test_kernel(benchmark: Any, fastest: dict[tuple[str, str], float], name: str, side: str) -> None:
    benchmark.group = name
    benchmark(CASES[name].ours if side == "ours" else CASES[name].theirs)
    if benchmark.stats is not None:  # --benchmark-disable
        fastest[name, side] = benchmark.stats.stats.min
