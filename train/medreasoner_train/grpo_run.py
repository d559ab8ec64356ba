"""Runs GRPO from a settings file: ``medreasoner-cli train grpo CONFIG``."""

import copy
import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medreasoner._extras import require
from medreasoner_train.checkpoint import load_weights, save_like
from medreasoner_train.config import ConfigError
from medreasoner_train.data import by_image, leave_out, load_index, split
from medreasoner_train.examples import Example, load_examples, split_examples
from medreasoner_train.files import appearing
from medreasoner_train.grpo_config import GrpoConfig
from medreasoner_train.grpo_trainer import Episode, GrpoTrainer, Policy, look_at_tasks
from medreasoner_train.hub_policy import HubPolicy, bare, load_hub_model
from medreasoner_train.judge import MaskJudge, RuntimeJudge, TorchJudge
from medreasoner_train.language import load_phrasings
from medreasoner_train.loop import LoopOptions, Optimiser, batches, load_modules, save_checkpoint
from medreasoner_train.lora import AdapterReference, add_adapter, merged_weights, save_adapter
from medreasoner_train.packed_policy import PackedPolicy
from medreasoner_train.pictures import sheet
from medreasoner_train.plan import Plan, Workload, plan
from medreasoner_train.rollout import Rollouts
from medreasoner_train.rollout_engines import make_rollouts
from medreasoner_train.segmenter import build_segmenter
from medreasoner_train.sft_data import SftData, SftOptions
from medreasoner_train.store import load_store
from medreasoner_train.tasks import ExampleTasks, GroundingTasks, TaskSource
from medreasoner_train.torch_rollouts import TorchRollouts
from medreasoner_train.validation import validate

__all__ = ["run", "what_it_needs"]

logger = logging.getLogger(__name__)
MANY = 1_000_000  # more batches than any run draws


class _Log:
    """``metrics.jsonl`` and, if asked, TensorBoard's files beside it."""

    def __init__(self, out: Path, *, tensorboard: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"))
        self._file = (out / "metrics.jsonl").open("a", encoding="utf-8")

    def write(self, step: int, row: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def run(config: GrpoConfig) -> None:
    """Train from the last checkpoint (``out/last.pt``), or from the start, to the end; writes ``out/checkpoint``."""
    options = config.train
    if options.tensorboard:  # before the data are read
        require("tensorboard", extra="tensorboard", feature="Writing for TensorBoard")
    if config.scale.processes > 1:
        raise ConfigError(f"[scale] asks for {config.scale.processes} processes: this command trains in one, so far")
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    torch.set_flush_denormal(True)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: rewards and ratios are far coarser
    setup = _setup(config, device)
    rollouts = _rollouts(config, setup)
    source, look = _data(config, setup, rollouts)
    loop = _loop(config)
    optimiser = Optimiser({"model": setup.model}, loop)
    trainer = GrpoTrainer(
        config,
        model=setup.model,
        reference=setup.reference,
        policy=setup.policy,
        rollouts=rollouts,
        judge=_judge(config, device),
        optimiser=optimiser,
    )
    try:
        _steps(config, trainer, source, setup.model, optimiser, loop, look)
    finally:
        rollouts.close()
    _save(config, setup.model)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Setup:
    """What is trained and what it is held against; `packed` is the policy if it is of that kind."""

    model: Any
    policy: PackedPolicy | HubPolicy
    reference: tuple[Any, Policy] | None
    packed: PackedPolicy | None


def _setup(config: GrpoConfig, device: torch.device) -> _Setup:
    options, start = config.policy, config.policy.checkpoint
    packed = None
    if options.kind != "hub" and options.lora is None:
        packed = PackedPolicy.of(
            start, frozen_vision=options.frozen_vision, checkpointing=options.gradient_checkpointing
        )
        if packed is None and options.kind == "packed":
            raise ConfigError(f'{start}: not a reasoner with square images and one token a coordinate: kind = "hub"')
    policy = packed or HubPolicy(start, gradient_checkpointing=options.gradient_checkpointing)
    by_transformers = packed is None and options.gradient_checkpointing
    model = load_hub_model(start, frozen_vision=options.frozen_vision, gradient_checkpointing=by_transformers)
    reference: tuple[Any, Policy] | None = None
    if options.lora is not None:
        assert isinstance(policy, HubPolicy)
        model = add_adapter(model, options.lora)
        reference = (model, AdapterReference(policy))
    elif config.loss.kl:
        reference = (copy.deepcopy(model).to(device).eval().requires_grad_(False), policy)
    return _Setup(model=model.to(device), policy=policy, reference=reference, packed=packed)


def _save(config: GrpoConfig, model: Any) -> None:
    """The finished reasoner; of a model with adapters the sum, and these alone beside it."""
    out = config.train.out / "checkpoint"
    if config.policy.lora is None:
        save_like(model, config.policy.checkpoint, out)
        return
    save_like(bare(model), config.policy.checkpoint, out, weights=merged_weights(model))
    save_adapter(model, config.train.out / "adapter")


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
        lora=options.lora,
        kl=config.loss.kl > 0,
    )


def _loop(config: GrpoConfig) -> LoopOptions:
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
    )


def _data(config: GrpoConfig, setup: _Setup, rollouts: Rollouts) -> tuple[TaskSource, Callable[[], dict[str, float]]]:
    """What to ask, and a look at how the model does on the validation groups."""
    path, packed = config.data.path, setup.packed
    if packed is not None and path.is_dir() and (path / "index.jsonl").exists():
        return _grounding(config, packed, setup.model)
    loaded = load_examples(path, bad_rows=config.data.bad_rows, cache=config.data.cache)
    left_out = set(config.data.without)
    train, val = split_examples([each for each in loaded.examples if each.source not in left_out])
    if not train:
        raise ConfigError(f"{path}: no row to train on is left")
    logger.info("%d rows to train on, %d of other groups to look at", len(train), len(val))

    def tasks(part: list[Example], phrasings: str, *, think: float, augmented: bool) -> ExampleTasks:
        size = None if packed is None else packed.size
        return ExampleTasks(
            part,
            load_phrasings(phrasings),
            grid_of=setup.policy.grid_size,
            size=size,
            think=think,
            augmented=augmented,
        )

    held = tasks(val, "heldout", think=0.0, augmented=False)
    return tasks(train, "train", think=config.data.think, augmented=True), lambda: look_at_tasks(rollouts, held)


def _grounding(
    config: GrpoConfig, policy: PackedPolicy, model: Any
) -> tuple[TaskSource, Callable[[], dict[str, float]]]:
    """The same of the grounding set, with its phrasings, targets that are absent, and augmented images."""
    samples = leave_out(load_index(config.data.path), config.data.without)
    mixture = SftOptions(absent=config.data.absent, plain=config.data.plain, size=policy.size)
    points = None if config.data.cache is None else config.data.cache / "points.npz"
    phrasings = load_phrasings("train")
    train, val = (
        SftData(
            samples,
            load_store(by_image(part), cache=points),
            vocabulary=policy.vocabulary,
            phrasings=phrasings,
            options=mixture,
        )
        for part in split(samples)
    )

    def look() -> dict[str, float]:
        return validate(model, policy.vocabulary, val, size=policy.size)

    return GroundingTasks(train, think=config.data.think), look


def _rollouts(config: GrpoConfig, setup: _Setup) -> Rollouts:
    engine, packed = config.rollouts.engine, setup.packed
    if engine == "auto":
        engine = "runtime" if packed is None else "torch"
    if engine == "torch":
        if packed is None:
            raise ConfigError('[rollouts] engine "torch" draws for policies of kind "packed": use "runtime"')
        return TorchRollouts(packed, setup.model, bf16=config.train.precision == "bf16")
    return make_rollouts(engine, config.policy.checkpoint)


def _judge(config: GrpoConfig, device: torch.device) -> MaskJudge | None:
    options = config.reward
    if not options.mask:
        return None
    if options.judge == "runtime":
        return RuntimeJudge(options.segmenter)
    segmenter = build_segmenter()
    load_weights(Path(options.segmenter), segmenter)
    return TorchJudge(segmenter, device)


def _steps(
    config: GrpoConfig,
    trainer: GrpoTrainer,
    source: TaskSource,
    model: Any,
    optimiser: Optimiser,
    loop: LoopOptions,
    look: Callable[[], dict[str, float]],
) -> None:
    options = config.train
    last = options.out / "last.pt"
    start = drawn = 0
    if last.exists():
        state = load_modules(last, {"model": model})
        start, drawn = int(state["step"]), int(state["drawn"])
        optimiser.load_state_dict(state["optimiser"])
        logger.info("resumed from %s at step %d", last, start)
        trainer.refresh()
    log = _Log(options.out, tensorboard=options.tensorboard)
    tasks = batches(
        lambda number: source.draw(number, count=options.prompts, seed=options.seed),
        drawn,
        MANY,
        workers=options.workers,
    )
    began = time.monotonic()
    try:
        if start == 0 and 0 < options.eval_every <= options.steps:
            log.write(0, look())
        for step in range(start, options.steps):
            spent = time.monotonic() - began
            episodes, used = trainer.collect(tasks, seed=options.seed * MANY + drawn)
            drawn += used
            row = trainer.update(episodes, loop.rate(step, spent))
            done, spent = step + 1, time.monotonic() - began
            ended = loop.progress(done, spent) >= 1
            pace = spent / (done - start)
            left = max(0.0, min(pace * (options.steps - done) / 60, options.minutes - spent / 60))
            log.write(done, row | {"s_per_step": pace})
            if done % options.log_every == 0:
                shown = ("reward", "iou", "box", "points", "mask", "kl", "norm")
                text = " ".join(f"{name}={row[name]:.4g}" for name in shown if name in row)
                logger.info("%d/%d %s %.1f s a step, %.1f min left", done, options.steps, text, pace, left)
            if episodes and options.pictures_every and (done % options.pictures_every == 0 or ended):
                _picture(options.out, done, episodes)
            if done % options.save_every == 0 or ended:
                save_checkpoint(last, step=done, modules={"model": model}, optimiser=optimiser, extra={"drawn": drawn})
            if options.eval_every and (done % options.eval_every == 0 or ended):
                log.write(done, look())
            if ended:
                break
    finally:
        log.close()


def _picture(out: Path, step: int, episodes: list[Episode]) -> None:
    with appearing(out / f"samples-{step:06d}.png") as beside:
        sheet(episodes[:8]).save(beside, format="PNG")
