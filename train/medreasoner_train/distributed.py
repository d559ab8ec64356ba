"""Many processes that train one model: accelerate, with DDP or FSDP2, on one node or many.

Groups are split whole over the processes, so advantages need no exchange. What a loss is divided by is counted over all
processes, and gradients are summed: a step is that of one process with the whole batch, whoever has more tokens.

References
----------
Y. Zhao et al., "PyTorch FSDP" (arXiv 2304.11277).
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from medreasoner.errors import MedReasonerError
from medreasoner_train.grpo import Normalise, token_weights

__all__ = ["Processes", "ProcessesError", "ScaleOptions"]

T = TypeVar("T")
LAYERS = ("Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock")  # each is a unit of FSDP


class ProcessesError(MedReasonerError, ValueError):
    """The processes that were started are not those that the settings ask for."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScaleOptions:
    """The processes of a run; ``accelerate launch`` or ``torchrun`` starts them.

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


class Processes:
    """The processes of the run, seen from one of them.

    Parameters
    ----------
    options
        What the settings ask for.
    precision
        ``"bf16"``: mixed precision; the weights that are trained stay in float32.
    cpu
        Whether to use CPUs and gloo although there is a GPU.

    Raises
    ------
    ProcessesError
        If another number of processes was started.
    """

    def __init__(
        self, options: ScaleOptions, *, precision: Literal["fp32", "bf16"] = "fp32", cpu: bool = False
    ) -> None:
        from accelerate import Accelerator

        cpu = cpu or not torch.cuda.is_available()
        self._accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="bf16" if precision == "bf16" else "no",
            fsdp_plugin=_fsdp_plugin(options, precision) if options.fsdp else None,
        )
        if options.fsdp and cpu and self._accelerator.num_processes > 1:
            _fsdp_on_cpu(_fsdp_plugin(options, precision))
        self._fsdp = options.fsdp
        self.count, self.index = self._accelerator.num_processes, self._accelerator.process_index
        if self.count != options.processes:
            raise ProcessesError(
                f"[scale] asks for {options.processes} processes and {self.count} were started; "
                f"start them with: accelerate launch --num_machines {options.nodes} --num_processes {options.processes}"
            )

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        found: torch.device = self._accelerator.device
        return found

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return bool(self._accelerator.is_main_process)

    def prepare(self, model: Any, optimiser: Any) -> tuple[Any, Any]:
        """The model as DDP or FSDP has it, and the optimiser of its parts; before any weights have moved."""
        model, optimiser = self._accelerator.prepare(model, optimiser)
        return model, optimiser

    def frozen(self, model: Any) -> Any:
        """The reference, split like the model that is trained or moved to the device as a whole; without gradients."""
        model = model.requires_grad_(False).eval()
        if self._fsdp and self.count > 1:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            return fsdp2_prepare_model(self._accelerator, model)
        return model.to(self.device)

    def own(self, groups: Sequence[T]) -> list[T]:
        """The groups of the whole batch that are this process's: every process is given the same batch."""
        return list(groups[self.index :: self.count])

    def even(self, batches: Sequence[T], spare: T) -> Iterator[tuple[T, bool]]:
        """As many micro-batches in each process as in the one with most, and whether each counts.

        FSDP's processes gather weights together, so none may stop before the others. `spare` is a micro-batch that a
        process runs in place of one that it does not have; give its tokens the weight 0.
        """
        most = int(max(self.everywhere(len(batches))))
        yield from ((each, True) for each in batches)
        yield from itertools.repeat((spare, False), most - len(batches))

    def everywhere(self, value: T) -> list[T]:
        """The values of all processes, in their order: numbers, or what else can be pickled."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        found: list[T] = gather_object([value])
        return found

    def means(self, values: dict[str, float], count: int) -> dict[str, float]:
        """Means over the processes' samples, of each of which `values` are the means over `count` samples."""
        all_values, counts = self.everywhere(values), self.everywhere(count)
        total = max(1, sum(counts))
        return {
            name: sum(each[name] * own for each, own in zip(all_values, counts, strict=True) if own) / total
            for name in sorted({name for each in all_values for name in each})
        }

    def sums(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over the processes, as of losses whose weights add up over the whole batch."""
        everyone = self.everywhere(values)
        names = sorted({name for each in everyone for name in each})
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
        with contextlib.nullcontext() if last or self._fsdp else self._accelerator.no_sync(model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Gradients of the sum of all processes' losses: DDP and FSDP make the mean of them."""
        self._accelerator.backward(loss * self.count)

    def clip(self, model: Any, norm: float) -> Tensor:
        """Scale the gradients down to a `norm` over the whole model; returns theirs before."""
        found: Any = self._accelerator.clip_grad_norm_(model.parameters(), norm)
        return torch.as_tensor(found.full_tensor() if hasattr(found, "full_tensor") else found)

    def weights(self, model: Any) -> dict[str, Tensor]:
        """The whole weights under the model's own names; all processes take part, and with FSDP the first gets them."""
        found: dict[str, Tensor] = self._accelerator.get_state_dict(model)
        return {name.removeprefix("module."): value for name, value in found.items()}

    def save(self, folder: str) -> None:
        """Write model, optimiser and random states, each process its own part; :meth:`load` reads them."""
        self._accelerator.save_state(folder)
        self.wait()  # nobody reads what the first is still writing

    def load(self, folder: str) -> None:
        """Restore what :meth:`save` wrote, with as many processes."""
        self._accelerator.load_state(folder)

    def wait(self) -> None:
        """Until all processes are here."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the others."""
        self._accelerator.end_training()


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
