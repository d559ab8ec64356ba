"""Prompts as tokens and pictures, by the settings that lie beside a checkpoint: what engines of rollouts share."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from medreasoner import ops
from medreasoner.errors import BundleError, GenerationError, ImageReadError, QueryError
from medreasoner.geometry import Placement, place
from medreasoner.reasoner.grammar import GrammarBook
from medreasoner.reasoner.prompt import Prompt as PromptText
from medreasoner.reasoner.prompt import load_tokenizer
from medreasoner.reasoner.vision import VisionGrid, image_patches, placed_grid
from medreasoner_train.rollout import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MadePrompt", "PromptMaker", "check_draws"]

U8 = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MadePrompt:
    """A prompt as a model reads it.

    ids
        Tokens up to the answer, the image's as often as it has them.
    opening
        The tag that the thought or the answer begins with, which is given.
    placement, grid
        Where the image lies in what the vision tower sees, and its tokens.
    pixels : (H, W) or (H, W, 3) uint8
        Of the image, as it came.
    """

    ids: tuple[int, ...]
    opening: tuple[int, ...]
    placement: Placement
    grid: VisionGrid
    pixels: U8


class PromptMaker:
    """Reads prompts for the checkpoint in a folder, and tells its completions.

    Parameters
    ----------
    checkpoint
        Folder with ``config.json``, ``tokenizer.json`` and ``medreasoner.json``.
    opens
        Whether answers are begun with their opening tag, as the runtime does; else the model writes it, too.

    Raises
    ------
    BundleError
        If a file is missing or malformed.
    """

    def __init__(self, checkpoint: Path, *, opens: bool = True) -> None:
        from medreasoner_export import LiveExport

        self.spec = LiveExport(checkpoint).spec
        self.tokenizer = load_tokenizer(str(checkpoint / "tokenizer.json"))
        self._text, self._opens = PromptText(self.tokenizer, self.spec), opens
        self.image_token = self._text.image_token
        end = self.tokenizer.token_to_id(self.spec.answer.end)
        if end is None:
            raise BundleError(f"{checkpoint}: answer.end {self.spec.answer.end!r} is not in the vocabulary")
        self.end: int = end
        think = self.tokenizer.encode(self.spec.answer.think_open, add_special_tokens=False).ids
        self._openings = {True: tuple(think), False: tuple(GrammarBook(self.tokenizer, self.spec.answer).opening())}

    def read(self, prompts: Sequence[Prompt]) -> list[MadePrompt]:
        """The prompts, in their order.

        Raises
        ------
        QueryError, ImageReadError
            If the model does not accept one; the message counts prompts from 1.
        """
        made = []
        for number, prompt in enumerate(prompts, 1):
            try:
                made.append(self._read(prompt))
            except (QueryError, ImageReadError) as err:
                raise type(err)(f"prompt {number} of {len(prompts)}: {err}") from err
        return made

    def _read(self, prompt: Prompt) -> MadePrompt:
        height, width = prompt.pixels.shape[:2]
        placement = place(self.spec.vision.resize, height=height, width=width)
        grid = placed_grid(self.spec.vision, placement)
        ids = self._text.whole(prompt.query, grid.n_tokens)
        opening = self._openings[prompt.think] if self._opens else ()
        if len(ids) + len(opening) >= self.spec.max_length:
            raise QueryError(
                f"{len(ids)} tokens with its image leave no room for an answer within {self.spec.max_length}"
            )
        return MadePrompt(ids=tuple(ids), opening=opening, placement=placement, grid=grid, pixels=prompt.pixels)

    def patches(self, made: MadePrompt) -> npt.NDArray[np.float32]:
        """(n_patches, 3 * patch_size**2) float32 patches in merge order."""
        return image_patches(self.spec.vision, made.pixels, made.placement)

    def picture(self, made: MadePrompt) -> "Image":
        """The image as the vision tower's grid holds it, RGB, for engines that cut and normalise it themselves."""
        from PIL import Image as PilImage

        where = made.placement
        small = ops.resize_u8(made.pixels, where.content_height, where.content_width)
        rgb = np.zeros((where.grid_height, where.grid_width, 3), np.uint8)
        rgb[: where.content_height, : where.content_width] = small if small.ndim == 3 else small[..., None]
        return PilImage.fromarray(rgb)

    def completion(self, made: MadePrompt, drawn: Sequence[int], *, max_tokens: int) -> Completion:
        """What an engine drew after the opening tag, up to the first end token."""
        own = list(drawn)
        if self.end in own:
            own = own[: own.index(self.end) + 1]
        ids = (*made.opening, *own)[:max_tokens]
        given = len(made.opening)
        free = tuple(index >= given for index in range(len(ids))) if given else None
        return self.told(ids, free)

    def told(self, ids: Sequence[int], free: tuple[bool, ...] | None) -> Completion:
        """A completion with its text; it is finished if the end token is its last."""
        finished = len(ids) > 0 and ids[-1] == self.end
        text = self.tokenizer.decode(list(ids[:-1] if finished else ids), skip_special_tokens=False)
        return Completion(ids=tuple(ids), text=text, free=free, finished=finished)


def check_draws(sampling: Sampling, seed: int) -> None:
    """Refuse what no engine can draw.

    Raises
    ------
    GenerationError
        If a number is out of its range; the message names it.
    """
    for name, value, good in (
        ("count", sampling.count, sampling.count >= 1),
        ("temperature", sampling.temperature, 0 < sampling.temperature < float("inf")),
        ("max_tokens", sampling.max_tokens, sampling.max_tokens >= 1),
        ("seed", seed, 0 <= seed < 2**63),
    ):
        if not good:
            raise GenerationError(f"rollouts: {name}: expected a positive number (a seed may be 0), got {value}")
