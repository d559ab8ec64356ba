"""Which questions are near-copies of one another: the same words in other clothes, or nearly the same letters."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse

__all__ = ["near_copies", "nearness"]

SAME_WORDS = 0.75
SAME_LETTERS = 0.8

# Words that ask, point or fill, and say nothing of what is meant.
FILLER = frozenset(
    re.findall(
        r"\w+",
        """a an and are as at be box by can could do does find for from get give has have highlight i identify image in
        into is it its label let locate mark mask me my now of on onto one only or our out outline picture please point
        segment show that the there these this those to trace us was we what where which with would you your""",
    )
)


def nearness(queries: Sequence[str]) -> npt.NDArray[np.float64]:
    """How near each of N questions is to each other; from 1.0 on they are near-copies.

    The larger of two measures, each over its threshold: the Jaccard index of the words that carry meaning (case, marks,
    the s of a plural and :data:`FILLER` left out), over 0.75; the Dice index of triples of letters of those words in
    their order, over 0.8.

    Returns
    -------
    nearness : (N, N) float64

    >>> nearness(["Where is the left lung?", "left lung, please", "Which lung is smaller?"])[0].round(2).tolist()
    [1.33, 1.33, 0.48]
    """
    spoken = [_content(query) for query in queries]
    words = _overlap([set(own) for own in spoken])
    sizes = words.diagonal()
    jaccard = words / (sizes[:, None] + sizes[None] - words)
    letters = _overlap([_triples(" ".join(own)) for own in spoken])
    sizes = letters.diagonal()
    dice = 2 * letters / (sizes[:, None] + sizes[None])
    found: npt.NDArray[np.float64] = np.maximum(jaccard / SAME_WORDS, dice / SAME_LETTERS)
    return found


def near_copies(queries: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of questions that are near-copies.

    >>> near_copies(["the aorta", "Which vessel leaves the left ventricle?", "Show me the aorta."])
    [(0, 2)]
    """
    rows, columns = np.nonzero(np.triu(nearness(queries), 1) >= 1)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def _content(query: str) -> list[str]:
    words = re.findall(r"[^\W_]+", query.lower().replace("'s", ""))
    kept = [word for word in words if word not in FILLER] or words or [query]
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in kept]


def _triples(text: str) -> set[str]:
    text = f" {text} "
    return {text[i : i + 3] for i in range(len(text) - 2)}


def _overlap(items: Sequence[Iterable[str]]) -> npt.NDArray[np.float64]:
    """(N, N) number of members that two of N sets share."""
    column: dict[str, int] = {}
    places = [[column.setdefault(name, len(column)) for name in own] for own in items]
    rows = np.repeat(np.arange(len(items)), [len(own) for own in places])
    flat = np.array([place for own in places for place in own], dtype=np.int64)
    table = sparse.csr_matrix((np.ones(len(flat)), (rows, flat)), shape=(len(items), max(len(column), 1)))
    shared: npt.NDArray[np.float64] = (table @ table.T).toarray()
    return shared
