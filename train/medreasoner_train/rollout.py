"""What stands between the trainer and whatever writes the answers: one interface, several engines."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Completion", "Pixels", "Prompt", "Rollouts", "Sampling", "shown_once", "stream_of"]

Pixels = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question about an image, to be answered several times.

    key
        Its name among those that are asked beside it.
    pixels : (H, W) or (H, W, 3) uint8
        Grey or RGB, before the reasoner's own resizing.
    """

    key: str
    pixels: Pixels
    query: str
    think: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One answer.

    ids
        The tokens after the prompt, the end token last unless the answer was cut off.
    text
        The same as text, without the end token.
    free
        Which of the tokens were chosen; the others were the only ones that a grammar allowed, and teach nothing. None:
        all of them.
    finished
        Whether it came to its end within the tokens that were allowed.
    """

    ids: tuple[int, ...]
    text: str
    free: tuple[bool, ...] | None = None
    finished: bool = True

    @property
    def places(self) -> list[int]:
        """Where among its tokens those stand that were chosen."""
        return [place for place in range(len(self.ids)) if self.free is None or self.free[place]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How answers are drawn: so many a prompt, at this temperature, up to `max_tokens` each."""

    count: int = 16
    temperature: float = 1.0
    max_tokens: int = 128


class Rollouts(Protocol):
    """An engine that answers with the policy's present weights."""

    def refresh(self, model: Any) -> None:
        """Take over the weights of the model that is trained (a transformers model)."""

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[list[Completion]]:
        """``sampling.count`` completions of each prompt; the same seed and weights give the same completions.

        Engines that can do so give a prompt the same ones whatever else is asked beside it (:func:`stream_of`).
        """

    def close(self) -> None:
        """Give back what the engine holds."""


def shown_once(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[int]]:
    """A prompt for each picture, and which of these each prompt shows; pictures that are one array are the same."""
    numbers: dict[int, int] = {}
    first: list[Prompt] = []
    for prompt in prompts:
        if numbers.setdefault(id(prompt.pixels), len(first)) == len(first):
            first.append(prompt)
    return first, [numbers[id(prompt.pixels)] for prompt in prompts]


def stream_of(key: str) -> int:
    """Number of the random numbers that a prompt's answers are drawn by, beside a seed; in [0, 2**32).

    They go by the prompt's name and not by its place, so that many processes draw what one does.
    """
    return zlib.crc32(key.encode())
