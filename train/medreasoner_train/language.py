"""Questions, thoughts and answers: what the reasoner reads and is taught to write."""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "ABSENT",
    "PRESENT",
    "PRESENT_TEXT",
    "TEMPLATE",
    "Phrasings",
    "answer_text",
    "between_numbers",
    "fixed_texts",
    "keys_by_category",
    "load_phrasings",
    "place_of",
    "read_queries",
    "thought_text",
]

TEMPLATE = "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{query}<|im_end|>\n<|im_start|>assistant\n"
PRESENT = (
    '<answer>{{"bbox": [{x1}, {y1}, {x2}, {y2}], "points_1": [{p1x}, {p1y}], "points_2": [{p2x}, {p2y}]}}</answer>'
)
PRESENT_TEXT = PRESENT.replace("{{", "{").replace("}}", "}")  # with its fields as a bundle names them
ABSENT = '<answer>{"bbox": null, "points_1": null, "points_2": null}</answer>'
MIN_WORDS = 4  # that are left of a question
_TURNS = re.compile(  # words without which a question asks for something else, with the marks around them
    r"\W*(?:(?:left|right)(?:-\w+)?|both|not|no|never|nor|neither|none|nothing|nobody|cannot|without|unlike|other"
    r"|opposite|instead|rather|but|than|except|\w+n't)\W*",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Phrasings:
    """What was written for one (modality, category): questions, plain names among them, and the parts of a thought.

    named : the category's usual names, most of them in ordinary sentences ("Please outline the right lung").
    """

    queries: tuple[str, ...]
    named: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    identify: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()


def load_phrasings(part: str) -> dict[str, Phrasings]:
    """Phrasings by key.

    `part` is ``"train"``, or ``"heldout"``: written by another author and never trained on, or ``"named"``: questions
    by name alone, in sentences that are never trained on.
    """
    table = read_queries("train" if part == "named" else part)
    named = _named(table, "train" if part == "train" else "heldout")
    if part == "named":
        return {key: Phrasings(queries=own, named=own) for key, own in named.items()}
    return {
        key: Phrasings(
            queries=tuple(query for cluster in entry["queries"].values() for query in cluster),
            named=named[key],
            plain=tuple(entry["queries"].get("plain", ())),
            identify=tuple(entry.get("identify", ())),
            evidence=tuple(entry.get("evidence", ())),
        )
        for key, entry in table.items()
    }


def read_queries(name: str) -> dict[str, Any]:
    """What is in ``queries/NAME.json``."""
    text = resources.files("medreasoner_train").joinpath("queries", f"{name}.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def _named(keys: Iterable[str], part: str) -> dict[str, tuple[str, ...]]:
    """For each key every sentence of a part with every usual name of its category.

    Some questions that are held out are such sentences, too, and are left out of those to train on.
    """
    table = read_queries("named")
    held: set[str] = set()
    if part == "train":
        entries = read_queries("heldout").values()
        held = {_bare(query) for entry in entries for cluster in entry["queries"].values() for query in cluster}
    made = {}
    for key in keys:
        category = key.partition("/")[2]
        names = table["names"].get(category, {"one": [category]})
        sentences = (
            sentence.format(name=name, **{"is": "is" if number == "one" else "are"})
            for number, own in names.items()
            for name in own
            for sentence in table[part]
        )
        made[key] = tuple(sentence for sentence in sentences if _bare(sentence) not in held)
    return made


def _bare(query: str) -> str:
    """Without what `vary` may change."""
    return query.lower().rstrip("?.")


def keys_by_category(phrasings: Mapping[str, Phrasings]) -> dict[str, list[str]]:
    """The keys of each category, over all modalities that have phrasings for it."""
    keys: dict[str, list[str]] = {}
    for key in phrasings:
        keys.setdefault(key.partition("/")[2], []).append(key)
    return keys


def vary(query: str, rng: np.random.Generator, *, whole: bool = False) -> str:
    """A question as people type it: other case, no mark at its end; in half of the cases, words are missing.

    The missing words keep a model from learning whole questions by heart, and make it use what the image shows. None
    is missing of a `whole` one, nor a side or a negation, which turn a question's meaning.
    """
    words = query.split(" ")
    if not whole and len(words) > MIN_WORDS and rng.random() < 0.5:
        rate = rng.uniform(0.0, 0.4)
        kept = [word for word in words if rng.random() >= rate or _TURNS.fullmatch(word)]
        if len(kept) >= MIN_WORDS:
            words = kept
    query = " ".join(words)
    draw = rng.random()
    if draw < 0.2:
        query = query.lower()
    elif draw < 0.6:
        query = query[:1].upper() + query[1:]
    if rng.random() < 0.3:
        query = query.rstrip("?.")
    return query


def answer_text(geometry: npt.NDArray[np.float64] | None) -> str:
    """The answer as text; `geometry` (8,) integers x1, y1, x2, y2, two points; None: absent."""
    if geometry is None:
        return ABSENT
    names = ("x1", "y1", "x2", "y2", "p1x", "p1y", "p2x", "p2y")
    return PRESENT.format(**{name: int(value) for name, value in zip(names, geometry, strict=True)})


def fixed_texts() -> list[str]:
    """What is written alike every time: the end of a prompt, and an answer up to, between and behind its numbers.

    Cut where the ways part: before the bracket of the first number, or the null of an absent target.
    """
    before, *between = between_numbers()
    shared = before.removesuffix("[")
    prompt = TEMPLATE.rpartition("<|im_end|>")[2]
    return [prompt, shared, "[", ABSENT.removeprefix(shared), *dict.fromkeys(between)]


def between_numbers() -> list[str]:
    """What stands before, between and behind the eight numbers of an answer: nine texts."""
    return re.split(r"\{[a-z\d]+\}", PRESENT_TEXT)


def place_of(mask: npt.NDArray[np.bool_]) -> str:
    """Where a mask lies and how large it is, in words, worked out from the mask itself.

    >>> m = np.zeros((10, 10), bool); m[1:3, 7:9] = True
    >>> place_of(m)
    'small, upper right of the picture'
    """
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    y, x = (rows.mean() + 0.5) / height, (columns.mean() + 0.5) / width
    share = mask.mean()
    size = "small" if share < 0.05 else "medium-sized" if share < 0.25 else "large"
    vertical = "upper" if y < 0.4 else "lower" if y > 0.6 else ""
    horizontal = "left" if x < 0.4 else "right" if x > 0.6 else ""
    place = " ".join(part for part in (vertical, horizontal) if part)
    return f"{size}, {place} of the picture" if place else f"{size}, in the middle of the picture"


def thought_text(own: Phrasings, mask: npt.NDArray[np.bool_] | None, rng: np.random.Generator) -> str:
    """A short reasoning trace: what is asked, what shows it, and where the mask has it."""
    asked = own.identify[int(rng.integers(len(own.identify)))]
    if mask is None:
        return f"<think>This asks for {asked}. Nothing in this picture shows it.</think>"
    shown = own.evidence[int(rng.integers(len(own.evidence)))]
    return f"<think>This asks for {asked}. Seen here as {shown}; {place_of(mask)}.</think>"


def texts(phrasings: Sequence[Phrasings]) -> Iterator[str]:
    """Everything that the tokenizer is trained on."""
    skeleton = "{image}".join(TEMPLATE.split("{image}")) + PRESENT_TEXT + ABSENT
    for own in phrasings:
        for query in own.queries:
            yield query
            yield query.lower()
        for clause in own.identify:
            yield f"This asks for {clause}. Nothing in this picture shows it."
        for clause in own.evidence:
            for size in ("small", "medium-sized", "large"):
                yield f"Seen here as {clause}; {size}, upper left of the picture, lower right, in the middle."
        yield skeleton
