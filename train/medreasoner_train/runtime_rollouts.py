"""Our own ONNX runtime as an engine of rollouts: on CPUs, and under the grammar of answers."""

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medreasoner.engine import load_reasoner
from medreasoner.errors import GenerationError
from medreasoner.providers import Device, RuntimeOptions, require_runtime
from medreasoner.reasoner import Decoded, Prefix, Reasoner, Ticket
from medreasoner.reasoner.generate import Sampler
from medreasoner.reasoner.scheduler import gather
from medreasoner_train.policy_state import as_float32, policy_state
from medreasoner_train.prompt_maker import MadePrompt, PromptMaker, check_draws
from medreasoner_train.rollout import Completion, Prompt, Sampling, stream_of

__all__ = ["RuntimeRollouts"]

AT_ONCE = 16  # prompts whose images and questions are held as keys and values
WAITING = 2**20  # as many answers as anybody asks for


class RuntimeRollouts:
    """Draws answers with the runtime that users call; see :class:`medreasoner_train.rollout.Rollouts`.

    An image is read once for all prompts on it, a question once for all its answers, and answers of several prompts are
    decoded side by side. Under the grammar a completion marks the tokens that had no alternative; whether the target is
    there at all is drawn too, which users get by a threshold.

    Parameters
    ----------
    checkpoint
        Folder with ``config.json``, ``tokenizer.json`` and ``medreasoner.json``, and with the weights if answers are
        drawn before the first `refresh`.
    model
        Whose weights to begin with; None: the folder's.
    device, n_threads
        Of the sessions; None: the cores that this process may use.
    n_slots
        Answers that are decoded at once; each takes the memory of its keys and values. More gained nothing (nano).
    constrained
        Whether answers follow the grammar; else they are whatever the model writes after their opening tag.

    Raises
    ------
    BundleError
        If a file is missing or malformed.
    ProviderError
        If there is no ONNX Runtime, or the device does not work.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        model: Any = None,
        *,
        device: Device = "cpu",
        n_threads: int | None = None,
        n_slots: int = 16,
        constrained: bool = True,
    ) -> None:
        from medreasoner_export import LiveExport

        require_runtime()
        self._maker = PromptMaker(Path(checkpoint))
        self._export = LiveExport(checkpoint)
        self._options = RuntimeOptions(device=device, n_threads=n_threads)
        self._n_slots, self._constrained = n_slots, constrained
        self._reasoner: Reasoner | None = None
        self._load(model)

    def refresh(self, model: Any) -> None:
        """Take over a model's weights, or a state dict's; if that fails the engine keeps what it has.

        Raises
        ------
        BundleError
            If they are not of this architecture, or not finite; the message names the tensor.
        """
        self._check()
        self._load(model)

    def _load(self, model: Any) -> None:
        weights = None if model is None else {name: as_float32(each) for name, each in policy_state(model).items()}
        folder = Path(tempfile.mkdtemp(prefix="medreasoner-rollouts-"))
        try:
            spec = self._export.write(folder, weights)
            self._reasoner = load_reasoner(
                spec, folder, self._options, n_slots=self._n_slots, max_waiting=WAITING
            )  # fmt: skip
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # what is mapped stays as long as it is in use

    def _check(self) -> Reasoner:
        if self._reasoner is None:
            raise GenerationError("these rollouts are closed")
        return self._reasoner

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[list[Completion]]:
        """See :class:`medreasoner_train.rollout.Rollouts`.

        Raises
        ------
        QueryError, ImageReadError
            If the model does not accept a prompt; the message counts them from 1.
        GenerationError
            If a number of `sampling` is out of range, the weights give no finite logits, or the engine is closed.
        """
        check_draws(sampling, seed)
        reasoner, made = self._check(), self._maker.read(prompts)
        answers: list[list[Completion]] = []
        for start in range(0, len(prompts), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            images = self._images(reasoner, made[some])
            questions = gather(
                [reasoner.read_question(image, each.query) for image, each in zip(images, prompts[some], strict=True)]
            )
            draw = self._answers if self._constrained else self._texts
            drawn = draw(reasoner, list(zip(questions, prompts[some], strict=True)), sampling, seed)
            answers += [drawn[i : i + sampling.count] for i in range(0, len(drawn), sampling.count)]
        return answers

    def _images(self, reasoner: Reasoner, made: Sequence[MadePrompt]) -> list[Prefix]:
        """The image of each prompt as the decoder has read it, each image once; those of one grid together."""
        keys = [(each.pixels.shape, hashlib.sha256(each.pixels.tobytes()).digest()) for each in made]
        unique = dict(zip(keys, made, strict=True))
        read: dict[object, Prefix] = {}
        for grid in {(each.grid.rows, each.grid.columns) for each in made}:
            members = {key: each for key, each in unique.items() if (each.grid.rows, each.grid.columns) == grid}
            placements = [each.placement for each in members.values()]
            patches = np.stack([self._maker.patches(each) for each in members.values()])
            prefixes = reasoner.read_prefixes(reasoner.encode(patches, placements[0]), placements)
            read |= zip(members, prefixes, strict=True)
        return [read[key] for key in keys]

    def _answers(
        self, reasoner: Reasoner, questions: list[tuple[Prefix, Prompt]], sampling: Sampling, seed: int
    ) -> list[Completion]:
        tickets: list[Ticket[Decoded]] = [
            reasoner.answer(question, prompt.query, think=prompt.think, sampler=sampler)
            for (question, prompt), sampler in _draws(questions, sampling, seed)
        ]
        completions = []
        for decoded in gather(tickets):
            ids = (*decoded.ids, self._maker.end)[: sampling.max_tokens]  # nothing else may follow an answer
            completions.append(self._maker.told(ids, (*decoded.free, False)[: sampling.max_tokens]))
        return completions

    def _texts(
        self, reasoner: Reasoner, questions: list[tuple[Prefix, Prompt]], sampling: Sampling, seed: int
    ) -> list[Completion]:
        tickets = [
            reasoner.complete(
                question, prompt.query, think=prompt.think, limit=sampling.max_tokens, sampler=sampler
            )
            for (question, prompt), sampler in _draws(questions, sampling, seed)
        ]  # fmt: skip
        return [
            self._maker.told(ids, tuple(index >= given for index in range(len(ids)))) for ids, given in gather(tickets)
        ]

    def close(self) -> None:
        """Let go of the sessions and their memory."""
        self._reasoner = None


def _draws(
    questions: list[tuple[Prefix, Prompt]], sampling: Sampling, seed: int
) -> list[tuple[tuple[Prefix, Prompt], Sampler]]:
    """Each question as often as it is answered, each time with random numbers of its own."""
    return [
        (question, Sampler(sampling.temperature, seed, stream + index, draws_absent=True))
        for question in questions
        for stream in [stream_of(question[1].key) * sampling.count]
        for index in range(sampling.count)
    ]
