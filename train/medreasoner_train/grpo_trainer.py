"""One step of GRPO: answers are drawn, judged, compared within their group, and the policy moves towards the better."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from medreasoner_train.completions import chosen
from medreasoner_train.distributed import Processes
from medreasoner_train.episodes import Episode, is_telling, judged, summary, told, totals_of
from medreasoner_train.grpo import group_advantages, policy_loss
from medreasoner_train.grpo_config import GrpoConfig
from medreasoner_train.judge import MaskJudge
from medreasoner_train.loop import Optimiser
from medreasoner_train.rollout import Completion, Prompt, Rollouts
from medreasoner_train.tasks import Task

__all__ = ["GrpoTrainer", "Policy", "Round"]


class Policy(Protocol):
    """How a model's log-probabilities are worked out."""

    def log_probs(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        *,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """(N, L) log-probabilities of all completions' tokens, and which of these count."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Groups that were answered at a time, by all processes.

    episodes, places
        Those of this process, and their places among the `total` of all.
    spare
        One of this process, to keep it busy while others have more; None if `total` is 0.
    """

    episodes: list[Episode]
    places: list[int]
    total: int
    spare: Episode | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _MicroBatch:
    """N answers whose gradient is worked out at a time, by prompt, and their advantages (N,)."""

    prompts: list[Prompt]
    completions: list[Sequence[Completion]]
    advantages: Tensor


class GrpoTrainer:
    """The parts of a run, and its step.

    Parameters
    ----------
    model, policy
        What is trained, as the processes have prepared it, and how it is read.
    reference
        What it must stay near to, and how that is read; None if the loss has no KL term.
    rollouts, judge
        Who answers, and who makes masks of the answers (None: no reward on masks).
    processes
        Who else takes part.
    """

    def __init__(
        self,
        config: GrpoConfig,
        *,
        model: Any,
        reference: tuple[Any, Policy] | None,
        policy: Policy,
        rollouts: Rollouts,
        judge: MaskJudge | None,
        optimiser: Optimiser,
        processes: Processes,
    ) -> None:
        self._config, self._policy, self._rollouts, self._judge = config, policy, rollouts, judge
        self._reference, self._optimiser = reference, optimiser
        self.model, self.processes = model, processes

    def refresh(self) -> None:
        """Give the engine of the rollouts the model's present weights."""
        self._rollouts.refresh(self.processes.shared(self.model))

    def collect(self, batches: Iterator[list[Task]], *, seed: int) -> tuple[Round, int]:
        """Answered and judged groups, and how many batches of tasks were drawn for them.

        `batches` gives each process its own part of a batch. With dynamic sampling, batches are drawn until enough
        groups have answers of different worth; if there are not enough of them, the step is that much smaller.
        """
        options = self._config.train
        kept: list[tuple[int, Episode]] = []
        total = 0
        for drawn in range(1, options.dynamic + 2):
            tasks = next(batches)
            prompts = [task.prompt for task in tasks]
            answers = self._rollouts.sample(prompts, self._config.rollouts, seed=seed + drawn)
            episodes = judged(tasks, answers, self._config, self._judge)
            count = [not options.dynamic or is_telling(each, apart=options.apart) for each in episodes]
            # A batch was dealt out group by group, so it is put together in turns.
            for turn, all_counts in enumerate(itertools.zip_longest(*self.processes.everywhere(count))):
                for process, counts in enumerate(all_counts):
                    if counts and process == self.processes.index:
                        kept.append((total, episodes[turn]))
                    total += bool(counts)
            if total >= options.prompts:
                break
        total = min(total, options.prompts)
        kept = [each for each in kept if each[0] < total]
        return (
            Round(
                episodes=[episode for _, episode in kept],
                places=[place for place, _ in kept],
                total=total,
                spare=episodes[0] if total else None,
            ),
            drawn,
        )

    def update(self, drawn: Round, share: float) -> dict[str, float]:
        """Move the weights, at a `share` of the full learning rate; returns what to log, of all processes."""
        if drawn.spare is None:
            return {"groups": 0.0}
        size = self._config.train.mini_batch or drawn.total
        parts = [
            self._micro_batches([each for each, place in _placed(drawn) if start <= place < start + size])
            for start in range(0, drawn.total, size)
        ]
        spare = self._micro_batches([drawn.spare])[0]
        # With one update the policy is still the one that answered; with several it moves away from it.
        old = [None] * len(parts) if len(parts) == 1 else [self._read(part, spare) for part in parts]
        measured: dict[str, float] = {}
        for part, before in zip(parts, old, strict=True):
            for name, value in self._one_update(part, before, spare, share).items():
                measured[name] = measured.get(name, 0.0) + value / len(parts)
        self.refresh()
        everyone = self.processes.everywhere([told(episode, place) for episode, place in _placed(drawn)])
        return summary(sorted(itertools.chain(*everyone), key=lambda each: each.place)) | measured

    def _micro_batches(self, episodes: Sequence[Episode]) -> list[_MicroBatch]:
        """Whole groups, or parts of them if the settings say how many answers go at a time."""
        options = self._config
        most = options.scale.micro_batch or options.rollouts.count
        at_once = max(1, most // options.rollouts.count) if options.scale.micro_batch else options.train.micro_batch
        pieces = [
            (each.task.prompt, each.completions[start : start + most], advantages[start : start + most])
            for each, advantages in zip(episodes, self._advantages(episodes), strict=True)
            for start in range(0, len(each.completions), most)
        ]
        return [
            _MicroBatch(
                prompts=[prompt for prompt, _, _ in some],
                completions=[completions for _, completions, _ in some],
                advantages=torch.cat([advantages for _, _, advantages in some]),
            )
            for some in (pieces[start : start + at_once] for start in range(0, len(pieces), at_once))
        ]

    def _advantages(self, episodes: Sequence[Episode]) -> list[Tensor]:
        if not episodes:
            return []
        found = group_advantages(
            *totals_of([each.totals for each in episodes]), scale=self._config.loss.scale_by_deviation
        )
        return list(torch.split(found, [len(each.totals) for each in episodes]))

    @torch.no_grad()
    def _read(self, part: Sequence[_MicroBatch], spare: _MicroBatch) -> list[Tensor]:
        """Log-probabilities (N, L) of each micro-batch as the model is now, without gradients."""
        read = [
            (self._log_probs(self.model, self._policy, batch)[0], counts)
            for batch, counts in self.processes.even(part, spare)
        ]
        return [values for values, counts in read if counts]

    def _log_probs(self, model: Any, policy: Policy, batch: _MicroBatch) -> tuple[Tensor, Tensor]:
        bf16 = self._config.train.precision == "bf16"
        with torch.autocast(self.processes.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            return policy.log_probs(
                model, batch.prompts, batch.completions, temperature=self._config.rollouts.temperature
            )

    def _one_update(
        self, part: Sequence[_MicroBatch], old: list[Tensor] | None, spare: _MicroBatch, share: float
    ) -> dict[str, float]:
        mask = chosen([each for batch in part for own in batch.completions for each in own])
        weights = self.processes.token_weights(
            mask, self._config.loss.normalise, max_tokens=self._config.rollouts.max_tokens
        )
        rows = [len(batch.advantages) for batch in part]
        by_batch = list(torch.split(weights, rows)) if rows else []
        sums: dict[str, Tensor] = {}
        batches = list(self.processes.even(part, spare))
        for number, (batch, counts) in enumerate(batches):
            with self.processes.accumulating(self.model, last=number == len(batches) - 1):
                own = by_batch[number] if counts else None
                for name, value in self._gradient(batch, own, old[number] if old and counts else None).items():
                    sums[name] = sums[name] + value if name in sums else value
        found = self.processes.sums({name: float(value) for name, value in sums.items()})
        return found | {"norm": float(self._optimiser.step(share))}

    def _gradient(self, batch: _MicroBatch, weights: Tensor | None, old: Tensor | None) -> dict[str, Tensor]:
        """Add a micro-batch's gradient; without weights (N, more than L) it is zero."""
        reference = None
        if self._config.loss.kl:
            assert self._reference is not None
            with torch.no_grad():
                reference, _ = self._log_probs(*self._reference, batch)
        log_probs, free = self._log_probs(self.model, self._policy, batch)
        weight = torch.zeros_like(log_probs)
        if weights is not None:
            weight = weights[:, : log_probs.shape[1]].to(log_probs.device) * free
        before = log_probs.detach() if old is None else old
        gain = batch.advantages.to(log_probs.device)
        loss, measured = policy_loss(log_probs, before, reference, gain, weight, self._config.loss)
        self.processes.backward(loss)
        return measured | {"loss": loss.detach(), "log_prob": (log_probs.detach() * weight).sum()}


def _placed(drawn: Round) -> Iterator[tuple[Episode, int]]:
    return zip(drawn.episodes, drawn.places, strict=True)
