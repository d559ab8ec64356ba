"""The settings of ``medreasoner-cli train grpo``, a TOML file: data, policy, rollouts, reward, loss and train."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from medreasoner_train.config import ConfigError, read_section, read_toml
from medreasoner_train.distributed import ScaleOptions
from medreasoner_train.grpo import LossOptions
from medreasoner_train.lora import LoraOptions
from medreasoner_train.rollout import Sampling

__all__ = [
    "DataOptions",
    "GrpoConfig",
    "PolicyOptions",
    "RewardOptions",
    "RolloutOptions",
    "TrainOptions",
    "read_config",
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """What is asked.

    Parameters
    ----------
    path
        The data set: a grounding set, U-MRG parquet or a folder with a CSV (:mod:`medreasoner_train.examples`).
    bad_rows
        ``"refuse"`` or ``"skip"`` rows that cannot be used; of the two latter forms.
    without
        Sources that are left out, to measure on them later.
    absent, plain, named
        Shares of the questions for something that is not there, that are some name of their target, and that are a
        usual name, mostly in an ordinary sentence; of a grounding set, which has no questions of its own.
    think
        Share of the questions that are answered with a thought first.
    per_image
        How many of a step's questions are about one image, of a grounding set: each image is read once for all of them.
    infer
        Ask too for organs that an image's source leaves unlabelled, of a grounding set: see
        :mod:`medreasoner_train.inferred`. Of some of them only box and points are judged, whatever `[reward] mask` is.
    cache
        Folder for what takes long to work out of the images.
    """

    path: Path
    bad_rows: Literal["refuse", "skip"] = "refuse"
    without: tuple[str, ...] = ()
    absent: float = 0.15
    plain: float = 0.1
    named: float = 0.15
    think: float = 0.0
    per_image: int = 1
    infer: bool = False
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("absent", "plain", "named", "think"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, from 0 to 1")
        if self.per_image < 1:
            raise ValueError("per_image is at least 1")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """What is trained.

    Parameters
    ----------
    checkpoint
        Folder of a finished reasoner, which is the frozen reference too: any Qwen2.5-VL that ``export reasoner`` reads.
    kind
        ``"packed"``: one pass over an image for all its answers, for reasoners of nano's kind (square images, one token
        a coordinate); ``"hub"``: any other, by transformers' own forward; ``"auto"``: whichever fits.
    frozen_vision, frozen_embeddings
        Whether the vision tower, and the tokens' embeddings (with the language head, where that is the same table), are
        left as they are. A batch asks few of a vocabulary's words, and AdamW moves each of their rows by the full rate.
        With `lora` both are left in any case.
    gradient_checkpointing
        Whether layers are run again for the gradient instead of being kept.
    lora
        Adapters that are trained in the place of the weights; the reference is then the model without them.
    """

    checkpoint: Path
    kind: Literal["auto", "packed", "hub"] = "auto"
    frozen_vision: bool = False
    frozen_embeddings: bool = False
    gradient_checkpointing: bool = False
    lora: LoraOptions | None = None

    def __post_init__(self) -> None:
        if self.lora is not None and self.kind == "packed":
            raise ValueError('lora: adapters are trained by kind = "hub"')


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RolloutOptions(Sampling):
    """Who writes the answers, and how.

    Parameters
    ----------
    engine
        ``"torch"``: the model itself, freely, for policies of kind packed; ``"runtime"``: our ONNX runtime, by the
        grammar of answers, for any, and much faster on a CPU; ``"transformers"``, ``"vllm"``: of these, freely;
        ``"ray:"`` before the last three: Ray workers with one each; ``"auto"``: torch if it can, else the runtime.
    """

    engine: Literal[
        "auto", "torch", "runtime", "transformers", "vllm", "ray:runtime", "ray:transformers", "ray:vllm"
    ] = "auto"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RewardOptions:
    """What an answer is worth: the paper's rewards, and times `mask` the Dice of the frozen segmenter's mask.

    Parameters
    ----------
    mode
        Of the paper.
    mask
        Weight of the mask's Dice; 0: no masks are made.
    judge
        ``"runtime"``: the segmenter of the bundle `segmenter`; ``"torch"``: nano's, whose checkpoint folder it is.
    segmenter
        Name or folder.
    compat
        ``"paper-code"``: with the published code's faults.
    """

    mode: Literal["base", "soft", "hard"] = "soft"
    mask: float = 0.0
    judge: Literal["runtime", "torch"] = "runtime"
    segmenter: str = "nano"
    compat: Literal["paper-code"] | None = None

    def __post_init__(self) -> None:
        if self.mask < 0:
            raise ValueError("mask: a weight is not negative")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Length, pace and place of the run.

    Parameters
    ----------
    out
        Folder for checkpoints, metrics and pictures.
    steps, minutes
        The run ends at whichever comes first.
    prompts
        Groups that are answered at a time.
    mini_batch
        Groups of an update of the weights; 0: all. Several updates follow one round of answers.
    micro_batch
        Groups whose gradient is worked out at a time.
    lr, warmup, cooldown, weight_decay, clip
        Of AdamW: peak rate, steps to reach it, share of the run over which it falls to zero, decay, largest norm of
        the gradient.
    dynamic
        Further rounds of prompts that may be drawn until `prompts` groups have answers of different worth (DAPO's
        dynamic sampling); 0: groups that teach nothing stay in.
    apart
        By how much a group's best answer must be worth more than its worst one to count there. The least of it drops
        groups of equal answers; more keeps the steps for questions about whose meaning the policy is not sure.
    precision
        ``"bf16"``: mixed precision.
    """

    out: Path
    steps: int
    minutes: float = float("inf")
    prompts: int = 32
    mini_batch: int = 0
    micro_batch: int = 8
    lr: float = 1e-4
    warmup: int = 10
    cooldown: float = 0.3
    weight_decay: float = 0.0
    clip: float = 1.0
    dynamic: int = 0
    apart: float = 1e-6
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"
    workers: int = 0
    seed: int = 0
    save_every: int = 50
    log_every: int = 1
    eval_every: int = 0
    pictures_every: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "prompts", "micro_batch", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1")
        if self.apart < 0:
            raise ValueError("apart: a distance is not negative")
        if self.mini_batch and self.prompts % self.mini_batch:
            raise ValueError(f"mini_batch: {self.prompts} prompts do not divide into parts of {self.mini_batch}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GrpoConfig:
    """One run."""

    data: DataOptions
    policy: PolicyOptions
    train: TrainOptions
    rollouts: RolloutOptions = dataclasses.field(default_factory=RolloutOptions)
    reward: RewardOptions = dataclasses.field(default_factory=RewardOptions)
    loss: LossOptions = dataclasses.field(default_factory=LossOptions)
    scale: ScaleOptions = dataclasses.field(default_factory=ScaleOptions)


def read_config(path: Path) -> GrpoConfig:
    """Read the file; relative paths in it are in the working folder.

    Raises
    ------
    ConfigError
        If it cannot be read, or a key is unknown, missing or of the wrong kind; the message names it.
    """
    tables = read_toml(path)
    kinds: dict[str, type[Any]] = {
        "data": DataOptions,
        "policy": PolicyOptions,
        "rollouts": RolloutOptions,
        "reward": RewardOptions,
        "loss": LossOptions,
        "train": TrainOptions,
        "scale": ScaleOptions,
    }
    if unknown := sorted(tables.keys() - kinds.keys()):
        raise ConfigError(f"{path}: unknown table {', '.join(unknown)}; there are {', '.join(kinds)}")
    needed = {"data", "policy", "train"}
    if missing := sorted(needed - tables.keys()):
        raise ConfigError(f"{path}: the tables {', '.join(missing)} must be given")
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} is a table: write [{name}]")
    sections: dict[str, Any] = {
        name: read_section(kinds[name], table, f"{path}: [{name}]") for name, table in tables.items()
    }
    return GrpoConfig(**sections)
