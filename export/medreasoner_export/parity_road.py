"""The whole road, from image and question to mask: a bundle through the runtime, its checkpoints through PyTorch.

Both sides get the runtime's patches and prompt. The bundle writes its answer; the checkpoint reads it in one pass,
which gives its logits at every token, and then goes on with its own tokens where it would have chosen others. Its box
and mask are compared with the bundle's.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medreasoner._extras import require
from medreasoner.bundle import Bundle
from medreasoner.engine import Engine, load_engine
from medreasoner.geometry import Placement
from medreasoner.image import Image
from medreasoner.kernel_session import multiplies_integers, runs_without_graph
from medreasoner.providers import RuntimeOptions
from medreasoner.reasoner.model import Decoded
from medreasoner.reasoner.prompt import load_tokenizer
from medreasoner.reasoner.vision import VisionGrid
from medreasoner.segmenter import encoder_input
from medreasoner_export.needs import give_back_memory
from medreasoner_export.reference_reasoner import ReferenceReasoner
from medreasoner_export.report import ParityStage, compare, stated

__all__ = [
    "LIMITS",
    "Answered",
    "Limits",
    "Question",
    "Segment",
    "bundle_answers",
    "own_questions",
    "road_stages",
]

Array = npt.NDArray[Any]
Segment = Callable[[Array, Any, Array, Array], npt.NDArray[np.bool_]]
"""A checkpoint's mask (H, W) of pixels (3, S, S), their placement, corners (2, 2) and points (2, 2) in the image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a bundle may differ by from its checkpoints, over all questions together.

    Attributes
    ----------
    logits
        Largest difference of a logit at the answers' tokens, relative to the largest logit; the mean may be a tenth.
    tokens
        Share of the answers' free tokens that the checkpoint would have chosen otherwise.
    found
        Share of the answers that say present where the checkpoint says absent, or the reverse.
    box
        Mean of the largest difference of a box's sides, in shares of the image's longer side.
    dice
        Mean of one minus the masks' Dice coefficient.
    """

    logits: float
    tokens: float
    found: float
    box: float
    dice: float


LIMITS = {
    "fp32": Limits(logits=1e-3, tokens=0.0, found=0.0, box=1e-4, dice=0.01),
    "fp16": Limits(logits=0.02, tokens=0.1, found=0.0, box=0.02, dice=0.05),
    "int8": Limits(logits=0.1, tokens=0.2, found=0.1, box=0.03, dice=0.08),
    "int4": Limits(logits=0.5, tokens=0.5, found=0.2, box=0.1, dice=0.25),
}
"""By the precision of a graph; the loosest of a bundle's graphs decides. Few bits change what a model says, here within
reason; `medreasoner-cli eval` says what they cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """An image with a question about it."""

    image: Image
    query: str


def own_questions(seed: int = 0) -> list[Question]:
    """Two images of smooth shapes, one wide and one tall, with a question each: for who gives none of his own."""
    generator = np.random.default_rng(seed)
    questions = []
    for height, width, query in (
        (180, 250, "Which structure is the brightest here?"),
        (231, 172, "Which organ fills with air when the patient breathes in?"),
    ):
        y, x = np.mgrid[:height, :width] / max(height, width)
        field = np.zeros((height, width))
        for _ in range(7):
            (cx, cy), size = generator.uniform(0, 1, 2), generator.uniform(0.05, 0.25)
            field += generator.uniform(0.3, 1) * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / size**2)
        pixels = (255 * field / field.max()).astype(np.uint8)
        questions.append(Question(image=Image(pixels=pixels, source="array"), query=query))
    return questions


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compared:
    """One question. `found`, `expected`: (n, vocab_size) logits at the n tokens of the bundle's answer; of each, what
    the grammar `lost`, (n,), and whether it is the `likeliest`, (n,). `off` is the box's distance in pixels and in
    shares of the longer side, and the lost Dice; None where one side or both found nothing.
    """

    found: Array
    expected: Array
    agrees: list[bool]
    lost: Array
    likeliest: Array
    differs: bool
    off: tuple[float, float, float] | None


def bundle_answers(bundle: Bundle, questions: Sequence[Question]) -> list["Answered"]:
    """What a bundle makes of questions, through the runtime on the CPU.

    Does without torch, and gives its memory back: a large bundle, torch and a reference do not fit a small machine
    together.

    Parameters
    ----------
    bundle
        A loaded bundle.
    questions
        At least one.
    """
    engine = load_engine(bundle, RuntimeOptions(device="cpu"))
    tokenizer = load_tokenizer(str(bundle.path(bundle.spec.reasoner.tokenizer)))
    answers = [_answer(engine, tokenizer, question) for question in questions]
    engine.close()
    del engine
    give_back_memory()
    return answers


def road_stages(
    bundle: Bundle,
    answers: Sequence["Answered"],
    reasoner_dir: Path,
    segment: Segment,
    *,
    adapter: Path | None = None,
) -> Iterator[ParityStage]:
    """Compare logits, tokens, boxes and masks of whole answers; `LIMITS` of the graphs' precisions decide.

    Parameters
    ----------
    bundle
        A loaded bundle.
    answers
        From :func:`bundle_answers`.
    reasoner_dir
        The checkpoint of its reasoner as it is: a four-bit bundle is not compared with rounded weights here.
    segment
        The checkpoint of its segmenter.
    adapter
        LoRA adapter on the reasoner.
    """
    torch = require("torch", extra="export", feature="The parity check")
    reference = ReferenceReasoner(bundle, reasoner_dir, adapter)
    with torch.inference_mode():
        compared = [_compare(bundle, answer, reference, segment) for answer in answers]
    yield from _stages(compared, LIMITS[_loosest(bundle)])


def _loosest(bundle: Bundle) -> str:
    """The roughest precision among a bundle's graphs, as they state it, the main one of each."""
    reasoner, segmenter = bundle.spec.reasoner.graphs, bundle.spec.segmenter.graphs
    found = {bundle.spec.precision}
    if bundle.spec.reasoner.step is not None and bundle.spec.reasoner.step.products == "int8":
        found.add("int8")
    spec = bundle.spec
    for weights in (spec.reasoner.tower, spec.segmenter.tower, spec.segmenter.drawing):
        if weights is not None and runs_without_graph(weights):
            found.add("int8" if multiplies_integers(weights) else "fp16")
    for name in (reasoner.vision, reasoner.decoder, segmenter.encoder, segmenter.decoder):
        found.add(stated(bundle.path(name), "precision") or bundle.spec.precision)
    return max(found & LIMITS.keys(), key=list(LIMITS).index, default="fp32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What a bundle makes of a question.

    `patches` are what its reasoner saw, `prompt` the tokens it read, `found` its (n, vocab_size) logits at the n tokens
    `ids` of the answer, `mask` (H, W) what its segmenter made of that, or None if it found nothing.
    """

    image: Image
    placement: Placement
    patches: Array
    grid: VisionGrid
    prompt: list[int]
    decoded: Decoded
    ids: list[int]
    found: Array
    mask: npt.NDArray[np.bool_] | None


def _answer(engine: Engine, tokenizer: Any, question: Question) -> Answered:
    reasoner, segmenter, image = engine.reasoner, engine.segmenter, question.image
    placement = reasoner.place(image)
    patches = reasoner.preprocess(image, placement)
    prefix = reasoner.read_prefix(reasoner.encode(patches[None], placement)[0], placement)
    decoded = reasoner.answer(prefix, question.query, think=False).result()
    ids = list(tokenizer.encode(decoded.text, add_special_tokens=False).ids)
    mask = None
    if decoded.corners is not None and decoded.points is not None:
        embedded = segmenter.encode(image)
        logits, _ = segmenter.decode(embedded, corners=decoded.corners, points=decoded.points)
        mask = segmenter.mask(logits, embedded)
    return Answered(
        image=image,
        placement=placement,
        patches=patches,
        grid=prefix.grid,
        prompt=reasoner.prompt.whole(question.query, prefix.grid.n_tokens),
        decoded=decoded,
        ids=ids,
        found=reasoner.logits(prefix, question.query, ids),
        mask=mask,
    )


def _compare(bundle: Bundle, answer: Answered, reference: ReferenceReasoner, segment: Segment) -> _Compared:
    found, ids, image, placement = answer.found, answer.ids, answer.image, answer.placement
    expected = reference.read(answer.prompt, ids, answer.patches, answer.grid)
    walk = reference.walk(reference.start(placement), ids, expected)
    own = reference.answer(reference.start(placement), ids, expected)
    off = None
    if answer.mask is not None and answer.decoded.corners is not None and not own.absent:
        pairs = np.reshape(np.array(own.values, np.float64), (4, 2))
        corners, points = np.split(placement.from_answer(pairs, bundle.spec.reasoner.coordinates), 2)
        pixels = float(np.abs(corners - answer.decoded.corners).max())
        planes, grid = encoder_input(bundle.spec.segmenter, image)
        theirs = segment(planes, grid, corners, points)
        off = (pixels, pixels / max(image.height, image.width), 1.0 - _dice(answer.mask, theirs))
    return _Compared(
        found=found,
        expected=expected,
        agrees=walk.agrees,
        lost=np.array(
            [
                np.logaddexp.reduce(row) - np.logaddexp.reduce(row[rows])
                for row, rows in zip(found.astype(np.float64), walk.allowed, strict=True)
            ]
        ),
        likeliest=found.argmax(axis=1) == np.array(ids),
        differs=own.absent != (answer.decoded.corners is None),
        off=off,
    )


def _dice(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    """Dice coefficient of two masks; 1 if both are empty."""
    total = int(a.sum()) + int(b.sum())
    return 2.0 * int((a & b).sum()) / total if total else 1.0


def _stages(answers: Sequence[_Compared], limits: Limits) -> Iterator[ParityStage]:
    found, expected = (np.concatenate([getattr(each, name) for each in answers]) for name in ("found", "expected"))
    largest = compare("whole answers: logits", found, expected, limits.logits)
    yield largest
    mean = float(np.abs(found - expected).mean())
    yield ParityStage(
        name="whole answers: logits", error=mean, scale=largest.scale, tolerance=limits.logits / 10, unit="mean abs"
    )
    yield _share(
        "whole answers: free tokens that the checkpoint would choose otherwise",
        [not each for answer in answers for each in answer.agrees],
        limits.tokens,
    )
    differs = [each.differs for each in answers]
    yield _share("whole answers: present on one side, absent on the other", differs, limits.found)
    both = [each.off for each in answers if each.off is not None]
    if both:
        pixels, shares, lost = np.mean(both, axis=0).tolist()
        yield ParityStage(
            name=f"whole answers: box, {pixels:.3g} px on average",
            error=shares, scale=1.0, tolerance=limits.box, unit="of the longer side",
        )  # fmt: skip
        yield ParityStage(name="whole answers: mask", error=lost, scale=1.0, tolerance=limits.dice, unit="1 - Dice")
    free = np.concatenate([~each.likeliest for each in answers])
    yield _share("whole answers: tokens that free decoding would choose otherwise", free, np.inf)
    cost = float(np.concatenate([each.lost for each in answers]).mean())
    yield ParityStage(
        name="whole answers: log-probability that the grammar costs",
        error=cost, scale=1.0, tolerance=np.inf, unit="mean a token",
    )  # fmt: skip


def _share(name: str, wrong: npt.ArrayLike, tolerance: float) -> ParityStage:
    values = np.asarray(wrong, dtype=bool)
    share = float(values.mean()) if values.size else 0.0
    return ParityStage(
        name=f"{name}, {int(values.sum())} of {values.size}", error=share, scale=1.0, tolerance=tolerance, unit="share"
    )
