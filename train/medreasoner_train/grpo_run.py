"""Runs GRPO from a settings file: ``medreasoner-cli train grpo CONFIG``."""

import logging
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from medreasoner._extras import require
from medreasoner_train.checkpoint import save_like
from medreasoner_train.config import ConfigError
from medreasoner_train.distributed import Processes
from medreasoner_train.episodes import Episode
from medreasoner_train.files import appearing
from medreasoner_train.grpo_config import GrpoConfig
from medreasoner_train.grpo_setup import Look, make_judge, make_setup, make_tasks, rollouts_of
from medreasoner_train.grpo_trainer import GrpoTrainer
from medreasoner_train.hub_policy import bare
from medreasoner_train.loop import Optimiser, batches, resume, save_checkpoint
from medreasoner_train.loop_options import LoopOptions
from medreasoner_train.lora import merged_weights, save_adapter
from medreasoner_train.pictures import sheet
from medreasoner_train.plan import Plan, Workload, plan
from medreasoner_train.run_log import RunLog
from medreasoner_train.sharded import gathered
from medreasoner_train.tasks import Task, TaskSource

__all__ = ["run", "what_it_needs"]

logger = logging.getLogger(__name__)
MANY = 1_000_000  # more batches than any run draws
SHOWN = ("reward", "iou", "box", "points", "mask", "kl", "norm", "s_per_step", "eta_min")


def run(config: GrpoConfig, *, show: Callable[[float, str], None] | None = None) -> None:
    """Train from the last checkpoint (``out/last.pt``), or from the start, to the end; writes ``out/checkpoint``.

    Parameters
    ----------
    config
        What to do. With ``scale.processes`` above 1 each process of the run calls this, and is one of them.
    show
        Called after each step with how much of the run is over, in [0, 1], and words about it.

    Raises
    ------
    ProcessesError
        If other processes were started than the settings ask for.
    MedReasonerError
        If settings, data or a checkpoint cannot be used; the message names what.
    """
    options = config.train
    if options.tensorboard:  # before the data are read
        require("tensorboard", extra="tensorboard", feature="Writing for TensorBoard")
    if options.prompts < config.scale.processes:
        raise ConfigError(f"[train] prompts: {options.prompts} are too few for {config.scale.processes} processes")
    processes = Processes(config.scale, precision=options.precision, device=options.device)
    if not processes.first:
        logging.getLogger("medreasoner_train").setLevel(logging.WARNING)
    try:
        _run(config, processes, show)
    finally:
        processes.close()


def _run(config: GrpoConfig, processes: Processes, show: Callable[[float, str], None] | None) -> None:
    torch.manual_seed(config.train.seed)
    torch.set_flush_denormal(True)
    if processes.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: rewards and ratios are far coarser
    setup = make_setup(config, processes)
    rollouts = rollouts_of(config, setup)
    source, look = make_tasks(config, setup, rollouts, processes)
    loop = _loop(config, show)
    optimiser = Optimiser({"model": setup.model}, loop)
    trainer = GrpoTrainer(
        config,
        model=setup.model,
        reference=setup.reference,
        policy=setup.policy,
        rollouts=rollouts,
        judge=make_judge(config, processes.device),
        optimiser=optimiser,
        processes=processes,
    )
    try:
        _steps(config, trainer, source, optimiser, loop, look)
    finally:
        rollouts.close()
    _save(config, processes.inner(trainer.model), processes)


def _save(config: GrpoConfig, model: Any, processes: Processes) -> None:
    """The finished reasoner; of a model with adapters the sum, and these alone beside it."""
    out, lora = config.train.out, config.policy.lora is not None
    weights = gathered(merged_weights(model) if lora else model.state_dict(), keep=processes.first)
    adapter = gathered(model.state_dict(), keep=processes.first) if lora else None
    if processes.first:
        save_like(bare(model), config.policy.checkpoint, out / "checkpoint", weights=weights)
        if lora:
            save_adapter(model, out / "adapter", state=adapter)
    processes.wait()


def what_it_needs(config: GrpoConfig) -> Plan:
    """The memory that the run needs of each GPU; the checkpoint's ``config.json`` is read, no weights.

    Raises
    ------
    BundleError
        If there is no such file.
    """
    options = config.policy
    colocated = config.rollouts.count if config.rollouts.engine == "vllm" else 0
    return plan(
        options.checkpoint,
        scale=config.scale,
        work=Workload(
            answers=config.scale.micro_batch or config.train.micro_batch * config.rollouts.count,
            response_tokens=config.rollouts.max_tokens,
            rollouts=colocated,
        ),
        precision=config.train.precision,
        gradient_checkpointing=options.gradient_checkpointing,
        frozen_vision=options.frozen_vision,
        frozen_embeddings=options.frozen_embeddings,
        lora=options.lora,
        kl=config.loss.kl > 0,
    )


def _loop(config: GrpoConfig, show: Callable[[float, str], None] | None) -> LoopOptions:
    options = config.train
    return LoopOptions(
        steps=options.steps,
        out=options.out,
        minutes=options.minutes,
        device=options.device,
        lr=options.lr,
        matrix_lr=0.0,
        weight_decay=options.weight_decay,
        warmup=options.warmup,
        cooldown=options.cooldown,
        clip=options.clip,
        seed=options.seed,
        show=show,
    )


def _steps(
    config: GrpoConfig,
    trainer: GrpoTrainer,
    source: TaskSource,
    optimiser: Optimiser,
    loop: LoopOptions,
    look: Look,
) -> None:
    options, processes = config.train, trainer.processes
    modules, last = {"model": processes.inner(trainer.model)}, options.out / "last.pt"
    state = resume(last, modules, optimiser)
    start, drawn = int(state["step"]), int(state.get("drawn", 0))
    if start:
        trainer.refresh()
    with (
        closing(_batches(config, source, processes, drawn)) as tasks,
        RunLog(loop, start=start, tensorboard=options.tensorboard, silent=not processes.first) as log,
    ):
        if start == 0 and 0 < options.eval_every <= options.steps:
            log.write(0, look())
        for step in range(start, options.steps):
            spent = processes.agreed(log.spent())
            groups, used = trainer.collect(tasks, seed=options.seed * MANY + drawn)
            drawn += used
            row = trainer.update(groups, loop.rate(step, spent))
            done, spent = step + 1, processes.agreed(log.spent())
            ended = loop.progress(done, spent) >= 1
            log.write(done, row | log.pace(done, spent), names=SHOWN if done % options.log_every == 0 else ())
            if options.pictures_every and (done % options.pictures_every == 0 or ended) and processes.first:
                _picture(options.out, done, groups.episodes)
            if done % options.save_every == 0 or ended:
                extra = {"drawn": drawn}
                save_checkpoint(
                    last, step=done, modules=modules, optimiser=optimiser, extra=extra, write=processes.first
                )
            if options.eval_every and (done % options.eval_every == 0 or ended):
                log.write(done, look())
            log.show(done, spent)
            if ended:
                break


def _batches(config: GrpoConfig, source: TaskSource, processes: Processes, start: int) -> Generator[list[Task]]:
    """The part of each batch of tasks that is this process's."""
    options = config.train
    draw = partial(source.draw, count=options.prompts, seed=options.seed, places=processes.own(options.prompts))
    return batches(draw, start, MANY, workers=options.workers)


def _picture(out: Path, step: int, episodes: list[Episode]) -> None:
    if not episodes:
        return
    with appearing(out / f"samples-{step:06d}.png") as beside:
        sheet(episodes[:8]).save(beside, format="PNG")
