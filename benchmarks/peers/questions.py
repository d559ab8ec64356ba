"""What every side of ``large_mask.py`` is asked, so that all read the same pixels and tokens; NumPy alone."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["Questions", "lengths", "random_image", "read_questions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """Two questions about an image of `side` x `side` pixels.

    `texts` are the questions, `prompts` the whole prompts as text, with ``{image}`` for the image; `before` the token
    ids before the image's `n_image` tokens, `after` those behind them, of each question.
    """

    side: int
    n_image: int
    texts: list[str]
    prompts: list[str]
    before: list[int]
    after: list[list[int]]


def read_questions(path: Path) -> Questions:
    """As ``large_mask.py`` wrote them."""
    return Questions(**json.loads(path.read_text()))


def random_image(side: int, run: int) -> npt.NDArray[np.uint8]:
    """(side, side, 3), the same in every process and another one in every run, so that nobody answers from a cache."""
    return np.random.default_rng(run).integers(0, 256, (side, side, 3), np.uint8)


def lengths(line: str) -> list[int]:
    """Behind the number of the run: how many tokens each answer has."""
    return [int(each) for each in line.split()[1:]]
