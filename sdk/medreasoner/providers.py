"""ONNX Runtime: which one is installed, on which device it runs, and with what options."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from medreasoner._text import one_line
from medreasoner.errors import ProviderError

__all__ = [
    "Device",
    "Provider",
    "RuntimeOptions",
    "fallback_warnings",
    "is_cpu_only",
    "provider_list",
    "require_runtime",
    "usable_cores",
]

Device = Literal["auto", "cpu", "cuda", "tensorrt"]
Provider: TypeAlias = tuple[str, dict[str, str]]

TENSORRT, CUDA, CPU = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"
_CHAINS: Mapping[str, tuple[str, ...]] = {
    "auto": (TENSORRT, CUDA, CPU),
    "tensorrt": (TENSORRT, CUDA, CPU),
    "cuda": (CUDA, CPU),
    "cpu": (CPU,),
}
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions:
    """How sessions run.

    Parameters
    ----------
    device
        ``"auto"`` takes the first of TensorRT, CUDA and CPU that works.
    n_threads
        Threads of one session on the CPU; None: the usable cores.
    fp16
        Whether TensorRT may compute in half precision.
    cuda_graphs
        Whether a session on a GPU may be replayed as a graph; only for graphs whose shapes never change.
    engine_cache_dir
        Where TensorRT keeps its engines; None: built anew by every process.
    engines_dir
        Folder that `medreasoner-cli export tensorrt` wrote; its engines are preferred where they fit the GPU.
    """

    device: Device = "auto"
    n_threads: int | None = None
    fp16: bool = True
    cuda_graphs: bool = False
    engine_cache_dir: Path | None = None
    engines_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.device not in _CHAINS:
            raise ProviderError(f"device: expected one of {', '.join(_CHAINS)}, got {self.device!r:.80}")
        if self.n_threads is not None and self.n_threads < 1:
            raise ProviderError(f"n_threads: expected at least 1, got {self.n_threads}")
        if self.engines_dir is not None and self.device not in ("auto", "tensorrt"):
            raise ProviderError(
                f"engines run on device 'auto' or 'tensorrt', not {self.device!r}: leave out one of the two"
            )


def require_runtime() -> None:
    """Refuse to go on without exactly one ONNX Runtime that can be imported.

    Raises
    ------
    ProviderError
        If neither or both of onnxruntime and onnxruntime-gpu are installed: they share one import name, and together
        overwrite each other's files. Or if the one cannot be imported. The message gives the pip line.
    """
    found = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if not found:
        raise ProviderError(
            "no ONNX Runtime: pip install 'medreasoner[cpu]', or 'medreasoner[gpu]' on a machine with an NVIDIA GPU"
        )
    if len(found) == 2:
        raise ProviderError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'medreasoner[cpu]' or 'medreasoner[gpu]'"
        )
    try:
        import onnxruntime  # noqa: F401  # what is listed as installed may be damaged, or lack a library
    except Exception as err:
        raise ProviderError(
            f"{found[0]} is installed but cannot be imported ({type(err).__name__} {one_line(err)}): "
            f"pip install --force-reinstall {found[0]}"
        ) from err


def _is_installed(name: str) -> bool:
    import importlib.metadata  # here, since it costs as much as the rest of this package's import

    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def usable_cores(quota: str | None = None) -> int:
    """Cores that this process may use: its affinity, and the container's quota if that is lower.

    Parameters
    ----------
    quota
        Content of cgroup v2's ``cpu.max``, for example ``"150000 100000"``; None: read it.

    Examples
    --------
    >>> usable_cores("100000 100000")
    1
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if quota is None:
        try:
            quota = _CGROUP_QUOTA.read_text()
        except OSError:
            return cores
    parts = quota.split()
    if len(parts) == 2 and parts[0].isdigit() and parts[1].isdigit() and int(parts[1]) > 0:
        cores = min(cores, -(-int(parts[0]) // int(parts[1])))  # a broken core is rounded up
    return max(1, cores)


def provider_list(options: RuntimeOptions, available: Sequence[str]) -> list[Provider]:
    """Execution providers to ask for, in order, each with its options.

    Parameters
    ----------
    options
        The device, and what its providers may do.
    available
        What the installed ONNX Runtime was built with, which says nothing about the machine.

    Raises
    ------
    ProviderError
        If the device was named and this ONNX Runtime cannot serve it.
    """
    chain = _CHAINS[options.device]
    if options.device != "auto" and chain[0] not in available:
        raise ProviderError(
            f"device {options.device!r} needs {chain[0]}, which this ONNX Runtime lacks: "
            "pip uninstall -y onnxruntime, then pip install 'medreasoner[gpu]'"
        )
    make = {TENSORRT: _tensorrt_options, CUDA: _cuda_options, CPU: _cpu_options}
    return [(name, make[name](options)) for name in chain if name in available]


def is_cpu_only(options: RuntimeOptions) -> bool:
    """Whether nothing but the CPU will be asked to run a graph.

    >>> is_cpu_only(RuntimeOptions(device="cpu"))
    True
    """
    if options.engines_dir is not None or options.device not in ("auto", "cpu"):
        return False
    if options.device == "cpu":
        return True
    import onnxruntime as ort

    return {TENSORRT, CUDA}.isdisjoint(ort.get_available_providers())


def _tensorrt_options(options: RuntimeOptions) -> dict[str, str]:
    chosen = {
        "trt_fp16_enable": str(int(options.fp16)),
        "trt_cuda_graph_enable": str(int(options.cuda_graphs)),
    }
    if options.engine_cache_dir is not None:
        folder = str(options.engine_cache_dir)
        chosen |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": folder}
        chosen |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": folder}
    return chosen


def _cpu_options(_: RuntimeOptions) -> dict[str, str]:
    return {}


def _cuda_options(options: RuntimeOptions) -> dict[str, str]:
    return {
        "enable_cuda_graph": str(int(options.cuda_graphs)),
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles the arena and may take all memory
        "cudnn_conv_algo_search": "HEURISTIC",  # the default tries all on the first run of each shape
    }


def fallback_warnings(
    graph: str, options: RuntimeOptions, asked: Sequence[str], got: Sequence[str], cause: str = ""
) -> tuple[str, ...]:
    """One sentence if a graph does not run on every provider that was asked for, so that no fall-back is silent.

    Parameters
    ----------
    graph
        Its name, for the message.
    options
        The device that was chosen.
    asked, got
        Providers asked for and those that the session reports, in order.
    cause
        What ONNX Runtime said of the first one that failed, if it said something.

    Raises
    ------
    ProviderError
        If the device was named and did not start.

    Examples
    --------
    >>> fallback_warnings("vision", RuntimeOptions(), [CUDA, CPU], [CPU])
    ('vision runs on CPUExecutionProvider: CUDAExecutionProvider did not start',)
    """
    missing = [name for name in asked if name not in got]
    if not missing:
        return ()
    why = f" ({cause})" if cause else ""
    if options.device != "auto" and asked[0] in missing:
        raise ProviderError(
            f"{graph}: {missing[0]} did not start{why}; check the driver and the CUDA libraries, or device='cpu'"
        )
    return (f"{graph} runs on {got[0]}: {' and '.join(missing)} did not start{why}",)
