"""What every training stage shares: optimiser, learning rate, checkpoints that resume exactly, progress."""

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from medreasoner._text import one_line
from medreasoner.errors import BundleError
from medreasoner_train.files import appearing
from medreasoner_train.muon import Muon

__all__ = [
    "LoopOptions",
    "Optimiser",
    "batches",
    "load_checkpoint",
    "load_modules",
    "save_checkpoint",
    "train",
    "write_settings",
]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """Length, pace and place of a stage.

    The rate warms up, stays, and falls linearly to zero over the last `cooldown` of the steps, so that a run can be
    prolonged from its last checkpoint before the cooldown. `minutes`: the time after which the run ends even if steps
    are left; the rate then falls over the last `cooldown` of that time. `device` is torch's name of one, such as
    ``cuda``; `workers` the processes that prepare batches (0: a thread, which is enough beside a CPU's steps).
    """

    steps: int
    out: Path
    minutes: float = float("inf")
    device: str = "cpu"
    workers: int = 0
    lr: float = 1e-3
    matrix_lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 100
    cooldown: float = 0.35
    clip: float = 1.0
    save_every: int = 200
    log_every: int = 20
    seed: int = 0

    def progress(self, step: int, seconds: float = 0.0) -> float:
        """How much of the run is over at `step`, that many seconds after it began or was resumed; 1 at its end."""
        return max(step / self.steps, seconds / 60 / self.minutes)

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """Share of the full learning rate at `step`, in [0, 1]."""
        left = max(0.0, 1 - self.progress(step, seconds))
        return min(1.0, (step + 1) / max(1, self.warmup), left / max(self.cooldown, 1 / self.steps))


class Optimiser:
    """Muon for the matrices inside the layers, AdamW for the rest (embeddings, norms, biases, heads).

    With a `matrix_lr` of 0, AdamW for all.
    """

    def __init__(self, modules: Mapping[str, nn.Module], options: LoopOptions) -> None:
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        seen: set[int] = set()
        for module in modules.values():
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                inner = options.matrix_lr > 0 and parameter.ndim == 2 and ("blocks." in name or "layers." in name)
                (matrices if inner else rest).append(parameter)
        self._options = options
        self._parameters = matrices + rest
        self._all: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(rest, lr=options.lr, betas=(0.9, 0.98), weight_decay=options.weight_decay), options.lr)
        ]
        if matrices:
            muon = Muon(matrices, lr=options.matrix_lr, weight_decay=options.weight_decay)
            self._all.append((muon, options.matrix_lr))

    def step(self, share: float) -> Tensor:
        """Clip, update at a `share` of the full rate and clear the gradients; returns their norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self._options.clip)
        for optimiser, rate in self._all:
            for group in optimiser.param_groups:
                group["lr"] = rate * share
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> list[dict[str, Any]]:
        """States of the two optimisers."""
        return [optimiser.state_dict() for optimiser, _ in self._all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore what :meth:`state_dict` gave."""
        for (optimiser, _), state in zip(self._all, states, strict=True):
            optimiser.load_state_dict(state)
            for group in optimiser.param_groups:  # the run's own wish, not that of the run before
                group["weight_decay"] = self._options.weight_decay


def save_checkpoint(
    path: Path,
    *,
    step: int,
    modules: Mapping[str, nn.Module],
    optimiser: Optimiser,
    extra: Mapping[str, int] | None = None,
) -> None:
    """Write a checkpoint beside and rename it, so that a killed run never leaves half a file.

    `extra`: what else the stage must know to go on.
    """
    state = {name: module.state_dict() for name, module in modules.items()}
    with appearing(path) as beside:
        torch.save({"step": step, "modules": state, "optimiser": optimiser.state_dict(), **(extra or {})}, beside)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without unpickling objects.

    Raises
    ------
    BundleError
        If it is damaged; the message names the file.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except IsADirectoryError as err:
        raise BundleError(f"{path} is a folder; give a stage's last.pt in it") from err
    except FileNotFoundError as err:
        raise BundleError(f"{path}: no such checkpoint") from err
    except Exception as err:  # torch raises many kinds for one cause
        raise BundleError(f"{path}: not a readable checkpoint ({type(err).__name__}); delete it to start anew") from err
    return state


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write ``medreasoner.json`` into a checkpoint folder."""
    (folder / "medreasoner.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def moved(value: Any, device: torch.device) -> Any:
    """A batch on another device: a tensor, or a tuple or dataclass of them; whatever else it holds stays as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: moved(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value


@dataclasses.dataclass(frozen=True, slots=True)
class _ByStep:
    """A data set whose item `step` is the batch of that step."""

    make: Callable[[int], Any]

    def __getitem__(self, step: int) -> Any:
        return self.make(step)


def batches(make: Callable[[int], Any], start: int, stop: int, *, ahead: int = 3, workers: int = 0) -> Iterator[Any]:
    """``make(step)`` for each step, prepared `ahead` of the use in a thread, or in `workers` processes.

    A batch depends on its step alone, so a resumed run sees the very batches that it would have seen.
    """
    if workers:
        # Forked processes share the decoded images; one thread each, or they fight over the cores.
        steps: Iterable[int] = range(start, stop)
        loader: DataLoader[Any] = DataLoader(
            _ByStep(make),  # type: ignore[arg-type]
            batch_size=None,
            sampler=steps,
            collate_fn=lambda batch: batch,  # the default makes lists of tuples
            num_workers=workers,
            prefetch_factor=ahead,
            multiprocessing_context="fork",
            worker_init_fn=lambda _: torch.set_num_threads(1),
        )
        yield from loader
        return
    queue: Queue[tuple[Any, BaseException | None]] = Queue(maxsize=ahead)
    stopped = threading.Event()

    def fill() -> None:
        for step in range(start, stop):
            if stopped.is_set():
                return
            try:
                queue.put((make(step), None))
            except BaseException as err:
                queue.put((None, err))
                return

    threading.Thread(target=fill, daemon=True).start()
    try:
        for _ in range(start, stop):
            batch, err = queue.get()
            if err is not None:
                raise err
            yield batch
    finally:
        stopped.set()
        while not queue.empty():
            queue.get_nowait()


@contextmanager
def _of_this_run(path: Path) -> Iterator[None]:
    """Whatever does not fit while a checkpoint is restored is the checkpoint's fault."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError, TypeError) as err:
        raise BundleError(f"{path}: a checkpoint of another stage or of other sizes ({one_line(err)})") from err


def load_modules(path: Path, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Restore modules by the names under which a checkpoint holds them; returns all that it holds.

    Raises
    ------
    BundleError
        If it is damaged, lacks a module or holds one of other sizes; the message names the file.
    """
    state = load_checkpoint(path)
    with _of_this_run(path):
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
    return state


def _resume(last: Path, modules: Mapping[str, nn.Module], optimiser: Optimiser) -> int:
    """Restore everything from a checkpoint; returns the steps that were done."""
    state = load_modules(last, modules)
    with _of_this_run(last):
        start = int(state["step"])
        optimiser.load_state_dict(state["optimiser"])
    logger.info("resumed from %s at step %d", last, start)
    return start


def train(
    *,
    modules: Mapping[str, nn.Module],
    make_batch: Callable[[int], Any],
    loss_of: Callable[[Any], tuple[Tensor, dict[str, Tensor]]],
    options: LoopOptions,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    eval_every: int = 0,
) -> None:
    """Run a stage from its last checkpoint (``out/last.pt``) to its end; metrics go to ``out/metrics.jsonl``."""
    torch.set_flush_denormal(True)  # moments of weights that rarely move decay into denormals, which are slow
    device = torch.device(options.device)
    for module in modules.values():
        module.to(device)
    optimiser = Optimiser(modules, options)
    last = options.out / "last.pt"
    start = _resume(last, modules, optimiser) if last.exists() else 0
    options.out.mkdir(parents=True, exist_ok=True)
    sums: dict[str, Tensor] = {}
    since = start  # the step after which `sums` began
    began = time.monotonic()
    with (options.out / "metrics.jsonl").open("a", encoding="utf-8") as metrics:

        def write(row: dict[str, float]) -> None:
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()
            logger.info(" ".join(f"{k}={v:.4g}" for k, v in row.items()))

        prepared = batches(make_batch, start, options.steps, workers=options.workers)
        falls = options.progress(start) >= 1 - options.cooldown
        for step, batch in enumerate(prepared, start=start):
            spent = time.monotonic() - began
            if not falls and options.progress(step, spent) >= 1 - options.cooldown:
                falls = True
                save_checkpoint(options.out / "stable.pt", step=step, modules=modules, optimiser=optimiser)
            loss, parts = loss_of(moved(batch, device))
            loss.backward()  # type: ignore[no-untyped-call]
            parts |= {"norm": optimiser.step(options.rate(step, spent)), "loss": loss.detach()}
            for name, value in parts.items():  # read when they are written: each reading waits for the device
                sums[name] = sums[name] + value if name in sums else value
            done, spent = step + 1, time.monotonic() - began
            ended = options.progress(done, spent) >= 1
            if done % options.log_every == 0:
                row = {name: value.item() / (done - since) for name, value in sums.items()}
                pace = spent / (done - start)
                left = min(pace * (options.steps - done) / 60, options.minutes - spent / 60)
                write({"step": done, **row, "s_per_step": pace, "eta_min": max(0.0, left)})
                sums.clear()
                since = done
            if done % options.save_every == 0 or ended:
                save_checkpoint(last, step=done, modules=modules, optimiser=optimiser)
            if evaluate is not None and eval_every and (done % eval_every == 0 or ended):
                write({"step": done, **evaluate(done)})
            if ended:
                break
