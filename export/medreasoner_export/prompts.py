"""Prompts that a reasoner's four-bit levels are chosen by: images, questions and answers.

An answer's tokens are where a model decides. Levels chosen without them were worse there than rounded to the nearest
(nano: 0.15 against 0.12 in the root mean square of the logits' error, and 0.06 with answers).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medreasoner._extras import require
from medreasoner.errors import BundleError, ImageReadError, QueryError
from medreasoner.geometry import Placement, place
from medreasoner.image import read_image
from medreasoner.reasoner.prompt import Prompt, load_tokenizer
from medreasoner.reasoner.rotary import prompt_positions, rotary_tables
from medreasoner.reasoner.vision import VisionGrid, image_patches, placed_grid
from medreasoner.reasoner.weights import load_weight
from medreasoner.spec import ReasonerSpec

__all__ = ["CalibrationPrompt", "PromptReader", "State", "read_prompts"]

KEYS = ("image", "query", "answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationPrompt:
    """A prompt as users would give it, and what the model makes of it.

    Attributes
    ----------
    image
        File, or what else :func:`medreasoner.image.read_image` takes.
    query
        The question.
    answer
        The raw text that the model answers with, such as `medreasoner.Grounding.answer` of a bundle in float32.
    """

    image: Any
    query: str
    answer: str


@dataclass(slots=True, kw_only=True)
class State:
    """A prompt on its way through the decoder: hidden (1, n, hidden_dim) float32, positions (3, n) int64."""

    hidden: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int64]

    def inputs(self, spec: ReasonerSpec) -> dict[str, npt.NDArray[Any]]:
        """What a graph of the decoder is given of it, but for the caches."""
        n = self.positions.shape[1]
        cos, sin = rotary_tables(
            self.positions, head_dim=spec.head_dim, theta=spec.rope_theta, sections=spec.mrope_section
        )
        return {
            "inputs_embeds": self.hidden,
            "rotary_cos": cos,
            "rotary_sin": sin,
            "rotary_ids": np.arange(n)[None],
            "seqlens_k": np.array([n - 1], np.int32),
            "total_sequence_length": np.array(n, np.int32),
        }


def read_prompts(path: str | Path) -> tuple[CalibrationPrompt, ...]:
    """Prompts of a file with one JSON object a line: ``image`` (a path, from the file's folder), ``query``, ``answer``.

    Raises
    ------
    BundleError
        If the file cannot be read, is empty, or a line is no such object of texts; the message names file and line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as err:
        raise BundleError(f"{path}: prompts to calibrate with cannot be read ({err})") from err
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in KEYS):
            raise BundleError(f"{path}:{number}: expected a JSON object with the texts image, query and answer")
        image = path.parent / row["image"]
        prompts.append(CalibrationPrompt(image=image, query=row["query"], answer=row["answer"]))
    if not prompts:
        raise BundleError(f"{path}: it holds no prompts to calibrate with")
    return tuple(prompts)


class PromptReader:
    """Makes the decoder's inputs of prompts, as the runtime does.

    Parameters
    ----------
    spec
        Of the reasoner.
    find
        Where the files are that the spec names.
    """

    def __init__(self, spec: ReasonerSpec, find: Callable[[str], Path]) -> None:
        self.spec, self._find = spec, find
        self._tokenizer = load_tokenizer(str(find(spec.tokenizer)))
        self._prompt = Prompt(self._tokenizer, spec)
        self._embedding = load_weight(find(spec.embedding.file), spec.embedding)

    def check(self, prompts: Sequence[CalibrationPrompt]) -> int:
        """Read every image and question once; return how many tokens they are.

        Raises
        ------
        BundleError
            If there is none, or one is longer than the model takes; the message counts prompts from 1.
        ImageReadError, QueryError
            If one cannot be read.
        """
        if not prompts:
            raise BundleError("calibration needs at least one image with a question")
        total = 0
        for number, prompt in enumerate(prompts, 1):
            try:
                ids, _, _, _ = self._read(prompt)
            except (ImageReadError, QueryError) as err:
                raise type(err)(f"prompt {number} to calibrate with: {err}") from err
            if len(ids) > self.spec.max_length:
                raise BundleError(
                    f"prompt {number} to calibrate with: {len(ids)} tokens with its image, "
                    f"{self.spec.max_length} have room (max_length); shorten it or take a smaller image"
                )
            total += len(ids)
        return total

    def states(self, prompts: Sequence[CalibrationPrompt]) -> list[State]:
        """What the decoder's first layer is given, of each prompt; the vision graph must be there by now."""
        ort = require("onnxruntime", extra="cpu", feature="Calibration")
        path = self._find(self.spec.graphs.vision)
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return [self._state(session, prompt) for prompt in prompts]

    def _state(self, session: Any, prompt: CalibrationPrompt) -> State:
        ids, pixels, placement, grid = self._read(prompt)
        image_token = self._prompt.image_token
        patches = image_patches(self.spec.vision, pixels, placement)
        hidden = self._embedding.embed(np.array(ids, np.int64))
        hidden[np.array(ids) == image_token] = session.run(None, {"patches": patches[None], **grid.inputs()})[0][0]
        positions, _ = prompt_positions(ids, image_token, grid.rows, grid.columns)
        return State(hidden=hidden[None], positions=positions)

    def _read(self, prompt: CalibrationPrompt) -> tuple[list[int], npt.NDArray[np.uint8], Placement, VisionGrid]:
        image, vision = read_image(prompt.image), self.spec.vision
        placement = place(vision.resize, height=image.height, width=image.width)
        grid = placed_grid(vision, placement)
        ids = self._prompt.whole(prompt.query, grid.n_tokens)
        ids += self._tokenizer.encode(prompt.answer, add_special_tokens=False).ids
        return ids, image.pixels, placement, grid
