"""What a reasoning trace says of place and size, held against the true mask.

Against the box that the model wrote, a trace would be right whenever the model agrees with itself.
"""

import dataclasses
import re

import numpy as np
import numpy.typing as npt

from medreasoner_train.language import place_of

__all__ = ["Claims", "TraceCheck", "check_trace", "claims_of"]

# The last clause that speaks of the picture: the evidence before it has small things and upper lobes as well.
_CLAUSE = re.compile(r"[^.;]*\bof the picture\b")
_SIZE = re.compile(r"\b(small|medium-sized|large)\b")
_VERTICAL = re.compile(r"\b(upper|lower)\b")
_HORIZONTAL = re.compile(r"\b(left|right)\b")


@dataclasses.dataclass(frozen=True, slots=True)
class Claims:
    """A trace's words for the size, and for the place in the picture: empty for the middle. None: nothing is said."""

    size: str | None
    vertical: str | None
    horizontal: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class TraceCheck:
    """Whether a trace names a place, and whether each of its words is right; a word that is missing is not."""

    placed: bool
    size: bool
    vertical: bool
    horizontal: bool


def claims_of(trace: str) -> Claims:
    """The words of a trace.

    >>> claims_of("Seen here as a small upper lobe; large, lower left of the picture.")
    Claims(size='large', vertical='lower', horizontal='left')
    >>> claims_of("Nothing in this picture shows it.")
    Claims(size=None, vertical=None, horizontal=None)
    """
    clauses = _CLAUSE.findall(trace)
    if not clauses:
        return Claims(None, None, None)
    size, vertical, horizontal = (word.search(clauses[-1]) for word in (_SIZE, _VERTICAL, _HORIZONTAL))
    return Claims(size[0] if size else None, vertical[0] if vertical else "", horizontal[0] if horizontal else "")


def check_trace(trace: str, mask: npt.NDArray[np.bool_]) -> TraceCheck:
    """Holds a trace against what is there, a non-empty (H, W) mask.

    >>> mask = np.zeros((10, 10), bool); mask[1:3, 7:9] = True
    >>> check_trace("small, upper left of the picture", mask)
    TraceCheck(placed=True, size=True, vertical=True, horizontal=False)
    """
    said, true = claims_of(trace), claims_of(place_of(mask))
    return TraceCheck(
        said.vertical is not None,
        said.size == true.size,
        said.vertical == true.vertical,
        said.horizontal == true.horizontal,
    )
