"""Which questions are near-copies of one another: the same words in other clothes, or nearly the same letters."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from math import ceil

import numpy as np
from scipy import sparse

__all__ = ["near_copies"]

SAME_WORDS = 0.75
SAME_LETTERS = 0.8
_ROUNDING = 1e-9  # 0.75 of 4 members are 3, whatever a product of floats says
_PAIRS_AT_ONCE = 200_000

# Words that ask, point or fill, and say nothing of what is meant.
FILLER = frozenset(
    re.findall(
        r"\w+",
        """a an and are as at be box by can could do does find for from get give has have highlight i identify image in
        into is it its label let locate mark mask me my now of on onto one only or our out outline picture please point
        segment show that the there these this those to trace us was we what where which with would you your""",
    )
)


def near_copies(queries: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of questions that are near-copies.

    They are by either of two measures: the Jaccard index of the words that carry meaning (case, marks, the s of a
    plural and :data:`FILLER` left out), from 0.75 on; the Dice index of triples of letters of those words in their
    order, from 0.8 on.

    >>> near_copies(["the aorta", "Which vessel leaves the left ventricle?", "Show me the aorta."])
    [(0, 2)]
    """
    spoken = [_content(query) for query in queries]
    by_words = _alike([frozenset(own) for own in spoken], SAME_WORDS)
    by_letters = _alike([_triples(" ".join(own)) for own in spoken], SAME_LETTERS / (2 - SAME_LETTERS))
    return sorted(by_words | by_letters)


def _alike(sets: Sequence[frozenset[str]], least: float) -> set[tuple[int, int]]:
    """Pairs of sets whose Jaccard index is at least `least`; 20,000 questions take seconds.

    Sets of such an index share at least `least` of the larger. So neither is much smaller, and they share one of the
    rarest members of each, of which as many are compared as can be missing, and one more (Chaudhuri, Ganti and Kaushik
    2006: prefix filtering).
    """
    often = Counter(member for own in sets for member in own)
    number = {member: place for place, member in enumerate(sorted(often, key=lambda member: (often[member], member)))}
    ordered = [sorted(number[member] for member in own) for own in sets]
    rare = [own[: len(own) - ceil(least * len(own) - _ROUNDING) + 1] for own in ordered]
    near = sparse.triu(_table(rare, len(number)) @ _table(rare, len(number)).T, 1).tocoo()
    whole, sizes = _table(ordered, len(number)), np.array([len(own) for own in ordered])
    smaller, larger = (choose(sizes[near.row], sizes[near.col]) for choose in (np.minimum, np.maximum))
    fit = smaller >= least * larger - _ROUNDING
    first, second = near.row[fit], near.col[fit]
    found: set[tuple[int, int]] = set()
    for start in range(0, len(first), _PAIRS_AT_ONCE):
        i, j = first[start : start + _PAIRS_AT_ONCE], second[start : start + _PAIRS_AT_ONCE]
        shared = np.asarray(whole[i].multiply(whole[j]).sum(1)).ravel()
        alike = shared >= least * (sizes[i] + sizes[j] - shared) - _ROUNDING
        found.update(zip(i[alike].tolist(), j[alike].tolist(), strict=True))
    return found


def _table(rows: Sequence[Sequence[int]], width: int) -> sparse.csr_matrix:
    """(len(rows), width), 1 at the numbers of each row."""
    ends = np.cumsum([0, *map(len, rows)])
    flat = np.fromiter(itertools.chain.from_iterable(rows), np.int64, count=ends[-1])
    return sparse.csr_matrix((np.ones(len(flat), np.int32), flat, ends), shape=(len(rows), max(width, 1)))


def _content(query: str) -> list[str]:
    words = re.findall(r"[^\W_]+", query.lower().replace("'s", ""))
    kept = [word for word in words if word not in FILLER] or words or [query]
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in kept]


def _triples(text: str) -> frozenset[str]:
    text = f" {text} "
    return frozenset(text[i : i + 3] for i in range(len(text) - 2))
