"""What stands between the trainer and whatever writes the answers: one interface, several engines."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Completion", "Pixels", "Prompt", "Rollouts", "Sampling"]

Pixels = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question about an image, to be answered several times.

    pixels : (H, W) or (H, W, 3) uint8, grey or RGB, before the reasoner's own resizing.
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
        """``sampling.count`` completions of each prompt; the same seed and weights give the same completions."""

    def close(self) -> None:
        """Give back what the engine holds."""
