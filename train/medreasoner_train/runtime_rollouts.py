"""Our own ONNX runtime as the engine of rollouts: on a CPU many times as fast as drawing token by token in torch.

Answers follow the grammar, so that only their numbers and the choice between present and absent are drawn; the tokens
between are forced and teach nothing.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medreasoner import Grounder
from medreasoner.errors import QueryError
from medreasoner.reasoner import Decoded
from medreasoner.reasoner.generate import Sampler
from medreasoner.reasoner.prompt import load_tokenizer
from medreasoner_train.checkpoint import copy_beside, read_settings
from medreasoner_train.hub_policy import bare
from medreasoner_train.lora import merged_weights
from medreasoner_train.rollout import Completion, Prompt, Sampling

__all__ = ["RuntimeRollouts"]

# What is chosen in an answer: whether there is a box, and every number behind a bracket or a comma.
CHOSEN = re.compile(r'(?<="bbox": )(?:\[|null)|(?<=[\[ ])-?\d+(?=[,\]])')


class RuntimeRollouts:
    """Draws with a bundle that is made anew of the trainer's weights; see :class:`medreasoner_train.rollout.Rollouts`.

    Parameters
    ----------
    checkpoint
        Folder of the reasoner that is trained, whose settings and tokenizer are used.
    model
        Its present weights.
    """

    def __init__(self, checkpoint: Path, model: Any) -> None:
        from medreasoner_export import export_segmenter  # lazily: the rest of the trainer does without
        from medreasoner_export.checkpoint_spec import checkpoint_spec
        from medreasoner_export.toy import make_toy_segmenter

        self._start = checkpoint
        spec = checkpoint_spec(checkpoint)
        self._absent, self._end = spec.answer.absent, spec.answer.end
        self._tokenizer = load_tokenizer(str(checkpoint / "tokenizer.json"))
        self._folder = Path(tempfile.mkdtemp(prefix="medreasoner-rollouts-"))
        self._number = 0
        self._grounder: Grounder | None = None
        make_toy_segmenter(self._folder / "segmenter")  # a bundle has one; no answer needs it
        export_segmenter(self._folder / "segmenter", self._folder / "s")
        self.refresh(model)

    def refresh(self, model: Any) -> None:
        """Take over the weights: write them, make a bundle of them, load it in the place of the last."""
        from medreasoner_export import ReasonerOptions, build_bundle, export_reasoner

        own = self._folder / str(self._number)
        self._number += 1
        weights = merged_weights(model) if hasattr(model, "get_base_model") else model.state_dict()
        bare(model).save_pretrained(own / "checkpoint", state_dict={k: v.float() for k, v in weights.items()})
        copy_beside(self._start, own / "checkpoint")
        if self._absent is not None:  # never by a threshold: it is drawn, below
            settings = read_settings(own / "checkpoint") | {"absent_threshold": 1.0}
            (own / "checkpoint" / "medreasoner.json").write_text(json.dumps(settings), encoding="utf-8")
        export_reasoner(own / "checkpoint", own / "r", options=ReasonerOptions(precision="fp32"))
        build_bundle(own / "r", self._folder / "s", own / "bundle", name="rollouts", version="0")
        grounder = Grounder.load(own / "bundle", device="cpu", cache_bytes=0)
        self._drop()
        self._grounder = grounder

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[list[Completion]]:
        """See :class:`medreasoner_train.rollout.Rollouts`.

        Raises
        ------
        QueryError
            If a prompt asks for a thought: free text is not drawn by this engine.
        """
        if thinking := next((prompt.key for prompt in prompts if prompt.think), None):
            raise QueryError(f"{thinking}: the runtime draws answers without a thought; set [data] think = 0")
        return [self._one(prompt, sampling, [seed, index]) for index, prompt in enumerate(prompts)]

    def _one(self, prompt: Prompt, sampling: Sampling, seed: list[int]) -> list[Completion]:
        assert self._grounder is not None
        rng = np.random.default_rng(seed)
        samplers = [Sampler(sampling.temperature, int(rng.integers(2**62)), 0) for _ in range(sampling.count)]
        with self._grounder.open(prompt.pixels) as study:
            reasoner, prefix = self._grounder._engine.reasoner, study._reading.prefix
            drawn = reasoner.sample(prefix, prompt.query, samplers)
        if len(drawn) < sampling.count:  # certain that it is absent
            drawn = drawn * sampling.count
        texts = [self._text(each, sampling.temperature, rng) for each in drawn]
        return [self._completion(text) for text in texts]

    def _text(self, decoded: Decoded, temperature: float, rng: np.random.Generator) -> str:
        """The drawn answer, or that there is none, with the model's own probability at this temperature."""
        if self._absent and decoded.absent_probability is not None:
            p = min(max(decoded.absent_probability, 1e-12), 1 - 1e-12)
            odds = min(700.0, float(np.log1p(-p) - np.log(p)) / temperature)  # e to it is still a number
            share = 1 / (1 + float(np.exp(odds)))
            if rng.random() < share:
                return str(self._absent)
        return decoded.text

    def _completion(self, text: str) -> Completion:
        whole = self._tokenizer.encode(text + self._end, add_special_tokens=False)
        chosen = np.zeros(len(text) + len(self._end) + 1, np.bool_)
        for match in CHOSEN.finditer(text):
            chosen[match.start() : match.end()] = True
        free = tuple(bool(chosen[first:last].any()) for first, last in whole.offsets)
        return Completion(ids=tuple(whole.ids), text=text, free=free)

    def _drop(self) -> None:
        if self._grounder is not None:
            self._grounder.close()
            self._grounder = None
            shutil.rmtree(self._folder / str(self._number - 2), ignore_errors=True)

    def close(self) -> None:
        """Close the bundle and remove what was written."""
        if self._grounder is not None:
            self._grounder.close()
            self._grounder = None
        shutil.rmtree(self._folder, ignore_errors=True)
