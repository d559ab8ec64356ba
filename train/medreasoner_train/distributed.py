"""Many processes that train one model: accelerate, with DDP or FSDP2, on one node or many.

Groups are split whole over the processes, so advantages need no exchange. What a loss is divided by is counted over all
processes, and gradients are summed: a step is that of one process with the whole batch, whoever has more tokens.

References
----------
Y. Zhao et al., "PyTorch FSDP" (arXiv 2304.11277).
"""

import contextlib
import dataclasses
import datetime
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from medreasoner.errors import MedReasonerError
from medreasoner_train.grpo import Normalise, token_weights
from medreasoner_train.lora import merged_weights
from medreasoner_train.sharded import gathered

__all__ = ["Processes", "ProcessesError", "ScaleOptions", "launch_line", "started"]

T = TypeVar("T")
LAYERS = ("Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock")  # each is a unit of FSDP
PATIENCE = datetime.timedelta(hours=2)  # for processes whose answers take longer, or that read the data


class ProcessesError(MedReasonerError, ValueError):
    """The processes that were started are not those that the settings ask for."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScaleOptions:
    """The processes of a run: started by the command itself on one machine, by ``torchrun`` on several.

    Parameters
    ----------
    nodes, processes
        Machines, and processes on all of them together: one a GPU.
    fsdp
        Whether weights, gradients and the optimiser's state are split over the processes (FSDP2) or each holds all of
        them (DDP).
    reshard
        With FSDP: whether a layer's weights are let go after its forward pass and gathered again for the backward one.
    micro_batch
        Answers whose gradient a process works out at a time; 0: those of whole groups, as [train] has it.
    """

    nodes: int = 1
    processes: int = 1
    fsdp: bool = False
    reshard: bool = True
    micro_batch: int = 0

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.processes < 1:
            raise ValueError("nodes and processes are at least 1")
        if self.processes % self.nodes:
            raise ValueError(f"processes: {self.processes} do not divide evenly over {self.nodes} nodes")
        if self.micro_batch < 0:
            raise ValueError(f"micro_batch: 0 or more, not {self.micro_batch}")


def started() -> int:
    """Processes of this run, as ``torchrun``, ``accelerate launch`` or :mod:`medreasoner_train.launch` started them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launch_line(options: ScaleOptions, config: str = "CONFIG") -> str:
    """What to type for a run of these processes, on each of its machines."""
    if options.nodes == 1:
        return f"medreasoner-cli train grpo {config}"
    return (
        f"torchrun --nnodes {options.nodes} --nproc-per-node {options.processes // options.nodes} "
        f"--rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500 -m medreasoner_cli train grpo {config}"
    )


class Processes:
    """The processes of the run, seen from one of them; a single one needs neither accelerate nor a network.

    Parameters
    ----------
    options
        What the settings ask for.
    precision
        ``"bf16"``: mixed precision; the weights that are trained stay in float32.
    device
        torch's name of where to compute; of ``"cuda"`` each process takes the GPU of its number on its machine.

    Raises
    ------
    ProcessesError
        If another number of processes was started, or they are all to use one GPU.
    """

    def __init__(
        self, options: ScaleOptions, *, precision: Literal["fp32", "bf16"] = "fp32", device: str = "cpu"
    ) -> None:
        self.count, self.index = started(), 0
        if self.count != options.processes:
            raise ProcessesError(
                f"[scale] asks for {options.processes} processes and {self.count} were started; "
                f"start them with: {launch_line(options)}"
            )
        self._fsdp = options.fsdp and self.count > 1
        self._accelerator: Any = None
        self.device = torch.device(device)
        if self.count > 1:
            if self.device.index is not None:
                raise ProcessesError(f"{self.count} processes cannot share {device}; give the device without a number")
            local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if self.device.type == "cuda" and local >= gpus:
                raise ProcessesError(f"no GPU is left for process {local + 1} of this machine, which has {gpus}")
            self._accelerator = _accelerator(options, precision, cpu=self.device.type == "cpu")
            self.index, self.device = self._accelerator.process_index, self._accelerator.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.index == 0

    def prepare(self, model: Any) -> Any:
        """The model, on the CPU, as DDP or FSDP has it, on the device; make the optimiser of what this returns."""
        if self._fsdp:
            return self._split(model)
        model = model.to(self.device)
        return model if self.count == 1 else self._accelerator.prepare_model(model)

    def inner(self, model: Any) -> Any:
        """What :meth:`prepare` was given, by whose names checkpoints go; split, if it is."""
        return model if self._fsdp or self.count == 1 else model.module

    def frozen(self, model: Any) -> Any:
        """The reference, split like the model that is trained or moved to the device as a whole; without gradients."""
        model = model.requires_grad_(False).eval()
        return self._split(model) if self._fsdp else model.to(self.device)

    def _split(self, model: Any) -> Any:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(self._accelerator, model)

    def own(self, count: int) -> range:
        """The places, of `count` groups of a whole batch, that are this process's."""
        return range(self.index, count, self.count)

    def even(self, batches: Sequence[T], spare: T) -> Iterator[tuple[T, bool]]:
        """As many micro-batches in each process as in the one with most, and whether each counts.

        Processes gather weights or exchange gradients together, so none may stop before the others. `spare` is a
        micro-batch that a process runs in place of one that it does not have; give its tokens the weight 0.
        """
        most = max(self.everywhere(len(batches)))
        yield from ((each, True) for each in batches)
        yield from itertools.repeat((spare, False), most - len(batches))

    def everywhere(self, value: T) -> list[T]:
        """The values of all processes, in their order: numbers, or what else can be pickled."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        found: list[T] = gather_object([value])
        return found

    def agreed(self, value: float) -> float:
        """The first process's value, in all of them: of clocks, by which they must do the same."""
        return self.everywhere(value)[0]

    def sums(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over the processes, as of losses whose weights add up over the whole batch."""
        everyone = self.everywhere(values)
        names = dict.fromkeys(name for each in everyone for name in each)
        return {name: sum(each.get(name, 0.0) for each in everyone) for name in names}

    def token_weights(self, mask: Tensor, normalise: Normalise, *, max_tokens: int) -> Tensor:
        """:func:`medreasoner_train.grpo.token_weights` of this process's tokens (N, L) in the whole batch."""
        totals = torch.tensor(self.everywhere((len(mask), int(mask.sum())))).sum(0)
        return token_weights(mask, normalise, max_tokens=max_tokens, totals=(int(totals[0]), int(totals[1])))

    @contextlib.contextmanager
    def accumulating(self, model: Any, *, last: bool) -> Iterator[None]:
        """Run a micro-batch's passes in this: DDP then exchanges gradients at the last one alone.

        FSDP does it each time: it would keep the whole model's gradients in every process instead.
        """
        with contextlib.nullcontext() if last or self._fsdp or self.count == 1 else model.no_sync():
            yield

    def backward(self, loss: Tensor) -> None:
        """Gradients of the sum of all processes' losses: DDP and FSDP make the mean of them."""
        (loss * self.count).backward()  # type: ignore[no-untyped-call]

    def shared(self, model: Any) -> Any:
        """What an engine of rollouts takes over: the model, or with FSDP its whole weights, in every process.

        They are on the CPU: with FSDP that takes the size of the model in each process.
        """
        if not self._fsdp:
            return self.inner(model)
        return gathered(merged_weights(model) if hasattr(model, "get_base_model") else model.state_dict())

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the others."""
        if self.count > 1:
            self._accelerator.end_training()


def _accelerator(options: ScaleOptions, precision: str, *, cpu: bool) -> Any:
    from accelerate import Accelerator, InitProcessGroupKwargs

    plugin = _fsdp_plugin(options, precision) if options.fsdp else None
    found = Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if precision == "bf16" else "no",
        fsdp_plugin=plugin,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if plugin is not None and cpu:
        _fsdp_on_cpu(plugin)
    return found


def _fsdp_plugin(options: ScaleOptions, precision: str) -> Any:
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # Not accelerate's own policy: it would sum gradients in bfloat16 and round each log-probability to 8 bits, which
    # changes ratios by several hundredths.
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=list(LAYERS),
        reshard_after_forward=options.reshard,
        mixed_precision_policy=bf16 if precision == "bf16" else None,
        state_dict_type="SHARDED_STATE_DICT",
    )


def _fsdp_on_cpu(plugin: Any) -> None:
    """Make accelerate use FSDP over gloo, as tests do: it takes its plugin on accelerators alone, torch does not."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
