"""The trainer's own model as the engine of rollouts: no copy of the weights, all answers side by side."""

from collections.abc import Sequence
from typing import Any

import torch

from medreasoner_train.packed_policy import PackedPolicy
from medreasoner_train.rollout import Completion, Prompt, Sampling

__all__ = ["TorchRollouts"]

IMAGES = 512  # that are read at a time


class TorchRollouts:
    """Draws with :meth:`PackedPolicy.sample`; see :class:`medreasoner_train.rollout.Rollouts`.

    `at_once` is the number of answers that are written together, to no more than 512 images: memory against speed.
    `bf16`: in mixed precision, as the trainer's passes may be.
    """

    def __init__(self, policy: PackedPolicy, model: Any, *, at_once: int = 4096, bf16: bool = False) -> None:
        self._policy, self._model, self._at_once, self._bf16 = policy, model, at_once, bf16

    def refresh(self, model: Any) -> None:
        """The weights are shared already; another model takes the place of this one."""
        self._model = model

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[list[Completion]]:
        """See :class:`medreasoner_train.rollout.Rollouts`."""
        device = self._model.model.language_model.embed_tokens.weight.device
        answers: list[list[Completion]] = []
        groups = max(1, min(IMAGES, self._at_once // sampling.count))
        for start in range(0, len(prompts), groups):
            some = prompts[start : start + groups]
            with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
                answers += self._policy.sample(self._model, some, sampling, seed=seed)
        return answers

    def close(self) -> None:
        """Nothing to give back."""
