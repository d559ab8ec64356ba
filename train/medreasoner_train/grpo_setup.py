"""The parts of a GRPO run, made as its settings say: policy, reference, data, engine of rollouts, judge of masks."""

import copy
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medreasoner_train.checkpoint import load_weights
from medreasoner_train.config import ConfigError
from medreasoner_train.data import leave_out, load_index
from medreasoner_train.distributed import Processes
from medreasoner_train.episodes import look_at_tasks
from medreasoner_train.examples import Example, load_examples, split_examples
from medreasoner_train.grpo_config import GrpoConfig
from medreasoner_train.grpo_trainer import Policy
from medreasoner_train.hub_policy import HubPolicy, bare, load_hub_model
from medreasoner_train.inferred import load_parts
from medreasoner_train.judge import MaskJudge, RuntimeJudge, TorchJudge
from medreasoner_train.language import load_phrasings
from medreasoner_train.lora import AdapterReference, add_adapter
from medreasoner_train.packed_policy import PackedPolicy
from medreasoner_train.rollout import Rollouts
from medreasoner_train.rollout_engines import make_rollouts
from medreasoner_train.segmenter import build_segmenter
from medreasoner_train.sft_data import SftData, SftOptions
from medreasoner_train.tasks import ExampleTasks, GroundingTasks, TaskSource
from medreasoner_train.torch_rollouts import TorchRollouts
from medreasoner_train.validation import validate

__all__ = ["Look", "Setup", "make_judge", "make_setup", "make_tasks", "rollouts_of"]

logger = logging.getLogger(__name__)
Look = Callable[[], dict[str, float]]
"""How the model does on the validation groups; all processes call it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is trained, as the processes have prepared it, and what it is held against.

    `packed` is the policy if it is of that kind.
    """

    model: Any
    policy: PackedPolicy | HubPolicy
    reference: tuple[Any, Policy] | None
    packed: PackedPolicy | None


def make_setup(config: GrpoConfig, processes: Processes) -> Setup:
    """Load the checkpoint and prepare it.

    Raises
    ------
    ConfigError, BundleError
        If the checkpoint does not fit the settings, or is none.
    """
    options, start = config.policy, config.policy.checkpoint
    packed = None
    if options.kind != "hub" and options.lora is None:
        packed = PackedPolicy.of(
            start, frozen_vision=options.frozen_vision, checkpointing=options.gradient_checkpointing
        )
        if packed is None and options.kind == "packed":
            raise ConfigError(f'{start}: not a reasoner with square images and one token a coordinate: kind = "hub"')
    if packed is not None and config.scale.fsdp and config.scale.processes > 1:
        raise ConfigError(
            '[scale] fsdp splits policies of kind "hub"; this one is small: leave fsdp out, or set that kind'
        )
    policy = packed or HubPolicy(start, gradient_checkpointing=options.gradient_checkpointing)
    by_transformers = packed is None and options.gradient_checkpointing
    model = load_hub_model(
        start,
        frozen_vision=options.frozen_vision,
        frozen_embeddings=options.frozen_embeddings,
        gradient_checkpointing=by_transformers,
    )
    if options.lora is not None:
        model = add_adapter(model, options.lora)
    before = copy.deepcopy(model) if config.loss.kl and options.lora is None else None
    model = processes.prepare(model)
    reference: tuple[Any, Policy] | None = None
    if options.lora is not None:
        assert isinstance(policy, HubPolicy)
        reference = (model, AdapterReference(policy))
    elif before is not None:
        reference = (processes.frozen(before), policy)
    return Setup(model=model, policy=policy, reference=reference, packed=packed)


def make_tasks(config: GrpoConfig, setup: Setup, rollouts: Rollouts, processes: Processes) -> tuple[TaskSource, Look]:
    """What to ask, and a look at how the model does on the validation groups.

    Raises
    ------
    MedReasonerError
        If the data cannot be used; the message names the file and the row.
    """
    path, packed = config.data.path, setup.packed
    if packed is not None and path.is_dir() and (path / "index.jsonl").exists():
        return _grounding(config, packed, bare(setup.model), processes)
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
    return tasks(train, "train", think=config.data.think, augmented=True), lambda: look_at_tasks(
        rollouts, held, processes
    )


def _grounding(config: GrpoConfig, policy: PackedPolicy, model: Any, processes: Processes) -> tuple[TaskSource, Look]:
    """The same of the grounding set, with its phrasings, targets that are absent, and augmented images."""
    samples = leave_out(load_index(config.data.path), config.data.without)
    mixture = SftOptions(absent=config.data.absent, plain=config.data.plain, named=config.data.named, size=policy.size)
    points = None if config.data.cache is None else config.data.cache / "points.npz"
    phrasings = load_phrasings("train")
    train, val = (
        SftData(
            samples,
            stored,
            vocabulary=policy.vocabulary,
            phrasings=phrasings,
            options=mixture,
        )
        for stored in load_parts(samples, cache=points, infer=config.data.infer)
    )

    def look() -> dict[str, float]:
        return validate(model, policy.vocabulary, val, size=policy.size) if processes.first else {}

    return GroundingTasks(train, think=config.data.think, per_image=config.data.per_image), look


def rollouts_of(config: GrpoConfig, setup: Setup) -> Rollouts:
    """The engine that answers, one in each process.

    Raises
    ------
    ConfigError
        If the policy is not of a kind that the engine knows.
    """
    engine, packed = config.rollouts.engine, setup.packed
    if engine == "auto":
        engine = "runtime" if packed is None else "torch"
    if engine == "torch":
        if packed is None:
            raise ConfigError('[rollouts] engine "torch" draws for policies of kind "packed": use "runtime"')
        return TorchRollouts(packed, bare(setup.model), bf16=config.train.precision == "bf16")
    options: dict[str, Any] = {}
    if engine == "vllm":  # beside the trainer on its GPU, with the share of it that the plan counts
        options = {"colocated": True, "gpu_memory_utilization": 0.3}
        if config.scale.processes > 1:
            options["distributed_executor_backend"] = "external_launcher"  # one engine in each process, on its own GPU
    return make_rollouts(engine, config.policy.checkpoint, **options)


def make_judge(config: GrpoConfig, device: torch.device) -> MaskJudge | None:
    """Who makes masks of the answers; None if there is no reward on masks."""
    options = config.reward
    if not options.mask:
        return None
    if options.judge == "runtime":
        return RuntimeJudge(options.segmenter)
    segmenter = build_segmenter()
    load_weights(Path(options.segmenter), segmenter)
    return TorchJudge(segmenter, device)
