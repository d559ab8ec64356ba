"""What every training stage shares: optimiser, learning rate, checkpoints that resume exactly, progress."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medreasoner._text import one_line
from medreasoner.errors import BundleError
from medreasoner_train.batches import batches
from medreasoner_train.files import appearing
from medreasoner_train.loop_options import LoopOptions
from medreasoner_train.muon import Muon
from medreasoner_train.run_log import RunLog
from medreasoner_train.sharded import gathered, like

__all__ = [
    "LoopOptions",
    "Optimiser",
    "batches",
    "load_checkpoint",
    "load_modules",
    "resume",
    "save_checkpoint",
    "train",
    "write_settings",
]

logger = logging.getLogger(__name__)


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
        """Clip, update at a `share` of the full rate and clear the gradients; returns their norm before clipping.

        The norm is that of the whole model, also where FSDP has split it.
        """
        norm = nn.utils.clip_grad_norm_(self._parameters, self._options.clip)
        for optimiser, rate in self._all:
            for group in optimiser.param_groups:
                group["lr"] = rate * share
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return torch.as_tensor(gathered(norm))

    def state_dict(self) -> list[dict[str, Any]]:
        """States of the two optimisers."""
        return [optimiser.state_dict() for optimiser, _ in self._all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore what :meth:`state_dict` gave."""
        for (optimiser, _), state in zip(self._all, states, strict=True):
            optimiser.load_state_dict(_as_parameters_are(optimiser, state))
            for group in optimiser.param_groups:  # the run's own wish, not that of the run before
                group["weight_decay"] = self._options.weight_decay


def _as_parameters_are(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's whole state, its moments split as its parameters are."""
    parameters = [each for group in optimiser.param_groups for each in group["params"]]
    own = {
        number: {
            name: like(value, parameters[number]) if isinstance(value, Tensor) and value.ndim else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": own}


def save_checkpoint(
    path: Path,
    *,
    step: int,
    modules: Mapping[str, nn.Module],
    optimiser: Optimiser,
    extra: Mapping[str, int] | None = None,
    write: bool = True,
) -> None:
    """Write a checkpoint beside and rename it, so that a killed run never leaves half a file.

    It is the same for any number of processes, and holds everything whole. Of several all take part, and one alone is
    told to `write`. `extra`: what else the stage must know to go on.
    """
    state = gathered({name: module.state_dict() for name, module in modules.items()}, keep=write)
    moments = gathered(optimiser.state_dict(), keep=write)
    if not write:
        return
    with appearing(path) as beside:
        torch.save({"step": step, "modules": state, "optimiser": moments, **(extra or {})}, beside)


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
            own = module.state_dict()
            saved = state["modules"][name].items()
            module.load_state_dict({key: like(value, own[key]) if key in own else value for key, value in saved})
    return state


def resume(last: Path, modules: Mapping[str, nn.Module], optimiser: Optimiser) -> dict[str, Any]:
    """Restore everything from a checkpoint, if it is there; returns all that it holds, at least ``"step"``.

    Raises
    ------
    BundleError
        If it is damaged or of another stage; the message names it.
    """
    if not last.exists():
        return {"step": 0}
    state = load_modules(last, modules)
    with _of_this_run(last):
        optimiser.load_state_dict(state["optimiser"])
        logger.info("resumed from %s at step %d", last, state["step"])
    return state


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
    start = int(resume(last, modules, optimiser)["step"])
    sums: dict[str, Tensor] = {}
    since = start  # the step after which `sums` began
    with RunLog(options, start=start) as log:
        prepared = batches(make_batch, start, options.steps, workers=options.workers)
        falls = options.progress(start) >= 1 - options.cooldown
        for step, batch in enumerate(prepared, start=start):
            spent = log.spent()
            if not falls and options.progress(step, spent) >= 1 - options.cooldown:
                falls = True
                save_checkpoint(options.out / "stable.pt", step=step, modules=modules, optimiser=optimiser)
            loss, parts = loss_of(moved(batch, device))
            loss.backward()  # type: ignore[no-untyped-call]
            parts |= {"norm": optimiser.step(options.rate(step, spent)), "loss": loss.detach()}
            for name, value in parts.items():  # read when they are written: each reading waits for the device
                sums[name] = sums[name] + value if name in sums else value
            done, spent = step + 1, log.spent()
            ended = options.progress(done, spent) >= 1
            if done % options.log_every == 0:
                row = {name: value.item() / (done - since) for name, value in sums.items()}
                log.write(done, row | log.pace(done, spent))
                sums.clear()
                since = done
            if done % options.save_every == 0 or ended:
                save_checkpoint(last, step=done, modules=modules, optimiser=optimiser)
            if evaluate is not None and eval_every and (done % eval_every == 0 or ended):
                log.write(done, evaluate(done))
            log.show(done, spent)
            if ended:
                break
