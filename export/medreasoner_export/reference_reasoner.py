"""A checkpoint that answers as the runtime does, in PyTorch: it reads another's answer, and then gives its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medreasoner._extras import require
from medreasoner.bundle import Bundle
from medreasoner.geometry import Placement
from medreasoner.ops import AnswerState
from medreasoner.reasoner.generate import choose
from medreasoner.reasoner.grammar import GrammarBook
from medreasoner.reasoner.prompt import Prompt, load_tokenizer
from medreasoner.reasoner.vision import VisionGrid
from medreasoner_export.streamed import prompt_inputs, streamed_qwen

__all__ = ["ReferenceReasoner", "Walk"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """An answer of n tokens, seen by the grammar.

    `agrees` has one item for each choice: whether the logits at hand call for the token that the answer has. `allowed`
    has one for each token: what could have stood there, one token if it was forced.
    """

    agrees: list[bool]
    allowed: list[Array]


class _Row:
    """Logits that are known, in the place of a language head."""

    def __init__(self, logits: Array) -> None:
        self._logits = logits

    def logits(self, _hidden: Array, rows: Array | None = None) -> Array:
        return self._logits if rows is None else self._logits[rows]

    def likeliest(self, _hidden: Array, rows: Array) -> int:
        return int(rows[int(np.argmax(self._logits[rows]))])


class ReferenceReasoner:
    """The checkpoint behind a bundle, with the bundle's prompt, grammar and threshold.

    Parameters
    ----------
    bundle
        A loaded bundle.
    folder, adapter
        Of the checkpoint, and of a LoRA adapter on it.

    Raises
    ------
    BundleError
        If the folder holds no such checkpoint.
    """

    def __init__(self, bundle: Bundle, folder: Path, adapter: Path | None = None) -> None:
        self._torch = require("torch", extra="export", feature="The parity check")
        self._spec = bundle.spec.reasoner
        self._model = streamed_qwen(folder, adapter=adapter)
        tokenizer = load_tokenizer(str(bundle.path(self._spec.tokenizer)))
        self._image_token = Prompt(tokenizer, self._spec).image_token
        self._grammars = GrammarBook(tokenizer, self._spec.answer)
        self._cache: Any = None
        self._n_prompt = 0

    def start(self, placement: Placement) -> AnswerState:
        """The grammar at the beginning of an answer about an image that lies so in the grid."""
        limits = placement.answer_limits(self._spec.coordinates)
        return self._grammars.grammar(max(limits)).start(*limits)

    def read(self, prompt: Sequence[int], answer: Sequence[int], patches: Array, grid: VisionGrid) -> Array:
        """Logits (n, vocab_size) of the answer's n tokens, each given the prompt and those before it.

        Parameters
        ----------
        prompt, answer
            Tokens.
        patches
            (n_patches, 3 * patch_size**2) float32 as the runtime makes them.
        grid
            The image's tokens.
        """
        inputs = prompt_inputs(self._model, [*prompt, *answer[:-1]], self._image_token, patches, grid)
        result = self._model(**inputs, use_cache=True, logits_to_keep=len(answer))
        self._cache, self._n_prompt = result.past_key_values, len(prompt)
        logits: Array = result.logits[0].numpy()
        return logits

    def walk(self, state: AnswerState, answer: Sequence[int], logits: Array) -> Walk:
        """Go through an answer with the logits at its tokens."""
        agrees: list[bool] = []
        allowed = [np.array([token]) for token in state.forced()]
        while not state.done:
            token = answer[len(allowed)]
            agrees.append(self._choice(state, logits[len(allowed)]) == token)
            allowed.append(state.allowed())
            state.accept(token)
            allowed += [np.array([each]) for each in state.forced()]
        return Walk(agrees=agrees, allowed=allowed)

    def answer(self, state: AnswerState, answer: Sequence[int], logits: Array) -> AnswerState:
        """The checkpoint's own answer, as the grammar's last state, after :meth:`read` gave `logits` at `answer`.

        As long as the two agree nothing is computed; from the first difference on, one run a choice.
        """
        ids, rows = state.forced(), list(logits)
        while not state.done:
            token = self._choice(state, rows[len(ids)])
            state.accept(token)
            new = [token, *state.forced()]
            if list(answer[: len(ids) + len(new)]) != [*ids, *new] and not state.done:
                rows = [*rows[: len(ids) + 1], *self._extend(len(ids), new)]
            ids = [*ids, *new]
        return state

    def _choice(self, state: AnswerState, logits: Array) -> int:
        return choose(state, logits, _Row(logits), self._spec.absent_threshold)[0]

    def _extend(self, n_kept: int, ids: list[int]) -> Array:
        """Logits after each of the tokens `ids`, which follow the first `n_kept` of the answer."""
        beyond = self._cache.get_seq_length() - self._n_prompt - n_kept
        if beyond:
            self._cache.crop(-beyond)
        result = self._model(
            input_ids=self._torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=len(ids)
        )
        self._cache = result.past_key_values
        logits: Array = result.logits[0].numpy()
        return logits
