"""Ray workers that share the prompts: rollouts on several GPUs or machines, by any of the other engines."""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from medreasoner._extras import require
from medreasoner.errors import GenerationError, MedReasonerError
from medreasoner_train.policy_state import policy_state
from medreasoner_train.prompt_maker import check_draws
from medreasoner_train.rollout import Completion, Prompt, Rollouts, Sampling

__all__ = ["RayRollouts"]

logger = logging.getLogger(__name__)


class _Worker:
    """An engine in a process of its own."""

    def __init__(self, make: Callable[[], Rollouts]) -> None:
        self._engine = make()

    def ready(self) -> None:
        """Answer when the engine is there."""

    def refresh(self, state: Mapping[str, Any]) -> None:
        self._engine.refresh(state)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> list[list[Completion]]:
        return self._engine.sample(prompts, sampling, seed=seed)


class RayRollouts:
    """Draws with several workers; see :class:`medreasoner_train.rollout.Rollouts`.

    Prompts are split into as many runs as there were workers at the start. A run's random numbers depend on its place
    and not on the worker, so that the same seed gives the same completions whoever answers, also after a worker has
    died: its run goes to another one, with a warning.

    Parameters
    ----------
    make
        Makes an engine, inside a worker; it is pickled, so a function of a module, or a partial of one.
    workers
        How many; at least 1.
    resources
        Of a worker, as ``ray.remote`` takes them, such as ``{"num_gpus": 1}``; None: one CPU.
    start_timeout_s
        Seconds within which all workers must have loaded their engine.

    Raises
    ------
    MissingExtraError
        If Ray is not installed.
    MedReasonerError
        What `make` raised in a worker.
    GenerationError
        If a worker did not come up in time: the cluster may have no room for it.

    Notes
    -----
    A cluster is joined, or one on this machine started, by ``ray.init``'s own rules (``RAY_ADDRESS``), unless the
    program has done so; `close` ends it only if it was started here.
    """

    def __init__(
        self,
        make: Callable[[], Rollouts],
        *,
        workers: int = 2,
        resources: Mapping[str, Any] | None = None,
        start_timeout_s: float = 600.0,
    ) -> None:
        if workers < 1:
            raise GenerationError(f"rollouts: workers: expected at least 1, got {workers}")
        self._ray: Any = require("ray", extra="ray", feature="Rollouts by Ray")
        self._owns = not self._ray.is_initialized()
        if self._owns:
            self._ray.init(include_dashboard=False, log_to_driver=False)
        actor = self._ray.remote(**(resources or {"num_cpus": 1}))(_Worker)
        self._n_runs = workers
        self._workers = [actor.remote(make) for _ in range(workers)]
        try:
            self._start(start_timeout_s)
        except BaseException:
            self.close()
            raise

    def _start(self, timeout_s: float) -> None:
        calls = [(worker, worker.ready.remote()) for worker in self._workers]
        refs = [ref for _, ref in calls]
        ready, _ = self._ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
        if len(ready) < len(refs):
            raise GenerationError(
                f"{len(ready)} of {len(refs)} rollout workers came up within {timeout_s:g} s: ask for fewer workers, "
                "or for less of each (resources)"
            )
        self._each(calls)

    def refresh(self, model: Any) -> None:
        """Take over a model's weights, or a state dict's: put into the cluster once, read by all workers."""
        state = self._ray.put(policy_state(model))
        self._each([(worker, worker.refresh.remote(state)) for worker in self._workers])

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[list[Completion]]:
        """See :class:`medreasoner_train.rollout.Rollouts`.

        Raises
        ------
        MedReasonerError
            What an engine raised; where it counts prompts, those of its run.
        GenerationError
            If a number of `sampling` is out of range, or no worker is left.
        """
        check_draws(sampling, seed)
        bounds = np.linspace(0, len(prompts), self._n_runs + 1).round().astype(int)
        runs = [list(prompts[start:stop]) for start, stop in itertools.pairwise(bounds)]
        waiting = [number for number, run in enumerate(runs) if run]
        idle, answers = list(self._workers), dict[int, list[list[Completion]]]()
        running: dict[Any, tuple[Any, int]] = {}
        errors: list[Exception] = []
        while waiting or running:
            while waiting and idle:
                worker, number = idle.pop(0), waiting.pop(0)
                running[worker.sample.remote(runs[number], sampling, seed)] = (worker, number)
            if not running:
                raise self._none_left()
            ref = self._ray.wait(list(running), num_returns=1)[0][0]
            worker, number = running.pop(ref)
            try:
                is_alive, result = self._get(worker, ref)
            except Exception as err:  # raised when the others are done, or their errors would be nobody's
                errors.append(err)
                waiting.clear()
                continue
            if is_alive:
                answers[number] = result
                idle.append(worker)
            else:
                waiting.insert(0, number)
        if errors:
            raise errors[0]
        return [completions for number in sorted(answers) for completions in answers[number]]

    def _each(self, calls: list[tuple[Any, Any]]) -> None:
        """Wait for all; who died is left out from now on."""
        errors, n_alive = [], 0
        for worker, ref in calls:
            try:
                n_alive += self._get(worker, ref)[0]
            except Exception as err:
                errors.append(err)
        if errors:
            raise errors[0]
        if not n_alive:
            raise self._none_left()

    def _get(self, worker: Any, ref: Any) -> tuple[bool, Any]:
        """Whether the worker lives, and what its call returned."""
        try:
            return True, self._ray.get(ref)
        except self._ray.exceptions.RayActorError as err:
            if cause := _ours(err):  # the engine could not be made
                raise cause from None
            self._workers.remove(worker)
            logger.warning("a rollout worker died; %d are left", len(self._workers))
            return False, None
        except self._ray.exceptions.RayTaskError as err:
            raise (_ours(err) or err) from None  # without the worker's trace, which the message would hold

    def _none_left(self) -> GenerationError:
        return GenerationError(
            f"all {self._n_runs} rollout workers have died; Ray's logs have the cause, often too little memory"
        )

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers = []
        if self._owns and self._ray.is_initialized():
            self._ray.shutdown()
        self._owns = False


def _ours(error: BaseException | None) -> MedReasonerError | None:
    """Our own error inside of Ray's."""
    seen = 0
    while error is not None and seen < 9:
        if type(error).__module__.startswith("medreasoner") and isinstance(error, MedReasonerError):
            return error
        error, seen = getattr(error, "cause", None) or error.__cause__, seen + 1
    return None
