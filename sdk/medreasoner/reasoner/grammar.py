"""The grammar of answers, from the bundle's tokenizer and the exact texts that its checkpoint was trained to emit."""

import re
from typing import TYPE_CHECKING

from medreasoner.errors import BundleError
from medreasoner.ops import AnswerGrammar
from medreasoner.spec import ANSWER_FIELDS, AnswerSpec

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

__all__ = ["GrammarBook", "answer_text"]

_FIELD = re.compile(r"\{(?:" + "|".join(ANSWER_FIELDS) + r")\}")
_ROUND_UP = 256  # limits are rounded up, so that images of nearly one size share a grammar


def answer_text(present: str, values: list[int]) -> str:
    """Text of an answer with these eight numbers.

    >>> answer_text("[{x1},{y1},{x2},{y2}] [{p1x},{p1y}] [{p2x},{p2y}]", [1, 2, 3, 4, 5, 6, 7, 8])
    '[1,2,3,4] [5,6] [7,8]'
    """
    pieces = _FIELD.split(present)
    return "".join(piece + str(value) for piece, value in zip(pieces, values, strict=False)) + pieces[-1]


class GrammarBook:
    """Grammars by the largest number that they name; built when first asked for.

    Parameters
    ----------
    tokenizer
        Of the bundle.
    spec
        The answers' texts.
    """

    def __init__(self, tokenizer: "Tokenizer", spec: AnswerSpec) -> None:
        self._tokenizer, self._spec = tokenizer, spec
        self._numbers: list[list[int]] = []
        self._grammars: dict[str, tuple[int, AnswerGrammar]] = {}

    def grammar(self, limit: int, *, written: str = "") -> AnswerGrammar:
        """Grammar with the numbers from 0 to at least `limit`.

        Parameters
        ----------
        limit
            Largest number that an answer may name.
        written
            How much of the answer's text the reasoner has already written on its own.

        Raises
        ------
        BundleError
            If the tokenizer does not split answers at their numbers, always in the same way.
        """
        known = self._grammars.get(written)
        if known is None or known[0] < limit:
            limit = -(-limit // _ROUND_UP) * _ROUND_UP
            known = (limit, _build(self._tokenizer, self._spec, limit, len(written)))
            self._grammars[written] = known
        return known[1]

    def opening(self) -> list[int]:
        """Tokens of the answer's first tag, from which an unconstrained answer goes on; or one that reaches beyond."""
        tag = re.match(r"<[^>]*>", self._spec.present)
        if tag is None:
            return []
        encoding = _encode(self._tokenizer, answer_text(self._spec.present, [0] * len(ANSWER_FIELDS)))
        within = sum(end <= tag.end() for _, end in encoding.offsets)
        return list(encoding.ids[: max(within, 1)])


def _encode(tokenizer: "Tokenizer", text: str) -> "Encoding":
    return tokenizer.encode(text, add_special_tokens=False)


def _build(tokenizer: "Tokenizer", spec: AnswerSpec, limit: int, skip: int) -> AnswerGrammar:
    numbers: list[list[int]] = [[] for _ in range(limit + 1)]
    literals: list[list[int]] = []
    width = len(ANSWER_FIELDS)
    # Every number is tokenised inside a whole answer, at two of its eight places.
    for shift in (0, 3):
        for start in range(shift, limit + 1 + shift, width):
            values = [value % (limit + 1) for value in range(start, start + width)]
            around, inside = _split(tokenizer, spec.present[skip:], values)
            literals = literals or around
            if around != literals:
                raise BundleError("reasoner.answer.present: its text is tokenised differently around some numbers")
            for value, tokens in zip(values, inside, strict=True):
                numbers[value] = numbers[value] or tokens
                if numbers[value] != tokens:
                    raise BundleError(f"reasoner.answer.present: {value} is tokenised differently in some places")
    absent = None if spec.absent is None else list(_encode(tokenizer, spec.absent[skip:]).ids)
    try:
        return AnswerGrammar(literals=literals, numbers=numbers, absent=absent)
    except ValueError as err:
        raise BundleError(f"reasoner.answer: {err}") from err


def _split(tokenizer: "Tokenizer", present: str, values: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids between and of the numbers of one answer."""
    spans, end = [], 0
    for piece, value in zip(_FIELD.split(present), values, strict=False):
        start = end + len(piece)
        end = start + len(str(value))
        spans.append((start, end))
    encoding = _encode(tokenizer, answer_text(present, values))
    around: list[list[int]] = [[] for _ in range(len(spans) + 1)]
    inside: list[list[int]] = [[] for _ in spans]
    at = 0
    for token, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
        while at < len(spans) and first >= spans[at][1]:
            at += 1
        if at == len(spans) or last <= spans[at][0]:
            around[at].append(token)
        elif spans[at][0] <= first and last <= spans[at][1]:
            inside[at].append(token)
        else:
            raise BundleError("reasoner.answer.present: a token holds both a number and text beside it")
    if not all(inside):
        raise BundleError("reasoner.answer.present: a number has no token of its own")
    return around, inside
