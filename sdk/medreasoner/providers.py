"""ONNX Runtime: which one is installed, on which device it runs, and sessions that read and write bound buffers."""

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from medreasoner._text import one_line
from medreasoner.engine_cache import EngineCache
from medreasoner.errors import ProviderError
from medreasoner.session import Buffer

__all__ = [
    "Device",
    "HostBuffer",
    "OrtSession",
    "RuntimeOptions",
    "fallback_warnings",
    "is_cpu_only",
    "provider_list",
    "require_runtime",
    "usable_cores",
]

Device = Literal["auto", "cpu", "cuda", "tensorrt"]
Array: TypeAlias = NDArray[Any]
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


def _engine_cache(path: Path, options: RuntimeOptions, asked: Sequence[Provider]) -> EngineCache | None:
    """Of a graph that TensorRT may build an engine of."""
    if asked[0][0] != TENSORRT or options.engine_cache_dir is None:
        return None
    cache = EngineCache(options.engine_cache_dir, f"{path.parent.name}_{path.stem}")
    asked[0][1]["trt_engine_cache_prefix"] = cache.prefix
    return cache


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


class OrtBuffer:
    """A `Buffer` of ONNX Runtime, bound by its address; on the CPU it shares the memory of a NumPy array.

    Parameters
    ----------
    owner
        The tensor, which may have more rows.
    host
        Array that shares these rows' memory; None on a GPU.
    start, shape, dtype
        The first row, and the rows' shape and element type.
    """

    def __init__(
        self, owner: Any, host: Array | None, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self._owner, self.host, self._start = owner, host, start
        self.shape, self.dtype = shape, dtype
        self.address = owner.data_ptr() + start * int(np.prod(shape[1:])) * dtype.itemsize

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: type[np.generic], device: Literal["cpu", "cuda"]) -> "OrtBuffer":
        """A new one."""
        import onnxruntime as ort

        host = np.zeros(shape, dtype)
        owner = ort.OrtValue.ortvalue_from_numpy(host, device, 0)
        return cls(owner, host if device == "cpu" else None, 0, shape, host.dtype)

    def rows(self, start: int, stop: int) -> "OrtBuffer":
        """Some rows of the same memory."""
        host = None if self.host is None else self.host[start:stop]
        return OrtBuffer(self._owner, host, self._start + start, (stop - start, *self.shape[1:]), self.dtype)

    def save(self, n_positions: int) -> Array:
        """Copy of the leading positions, on the host."""
        return self._content()[:, :, :n_positions].copy()

    def restore(self, saved: Array) -> None:
        """Write saved positions back."""
        if self.host is not None:
            self.host[:, :, : saved.shape[2]] = saved
            return
        whole = self._owner.numpy()  # ONNX Runtime updates a device tensor as a whole
        whole[self._start : self._start + self.shape[0], :, : saved.shape[2]] = saved
        self._owner.update_inplace(whole)

    def _content(self) -> Array:
        if self.host is not None:
            return self.host
        whole: Array = self._owner.numpy()
        return whole[self._start : self._start + self.shape[0]]


class HostBuffer:
    """Keys or values in ordinary memory: a `Buffer`."""

    def __init__(self, host: Array) -> None:
        self.host = host

    def rows(self, start: int, stop: int) -> "HostBuffer":
        """Some rows of the same memory."""
        return HostBuffer(self.host[start:stop])

    def save(self, n_positions: int) -> Array:
        """Copy of the leading positions."""
        return self.host[:, :, :n_positions].copy()

    def restore(self, saved: Array) -> None:
        """Write saved positions back."""
        self.host[:, :, : saved.shape[2]] = saved


class OrtSession:
    """A graph on ONNX Runtime.

    Parameters
    ----------
    path
        The graph.
    options
        Device and threads.
    on_cpu
        The graph that is taken instead where nothing but the CPU runs it; None: the same.

    Raises
    ------
    ProviderError
        If the graph cannot be loaded on the device asked for.
    """

    def __init__(self, path: Path, options: RuntimeOptions, on_cpu: Path | None = None) -> None:
        import onnxruntime as ort

        asked = provider_list(options, ort.get_available_providers())
        if asked[0][0] != CPU:
            _load_cuda()
        cache = _engine_cache(path, options, asked)
        with cache.watching() if cache else nullcontext():
            self._session, self.path, cause = _start(path, options, asked, on_cpu or path)
        got = tuple(self._session.get_providers())
        self._cache = cache if got[0] == TENSORRT else None
        self.warnings = fallback_warnings(path.stem, options, [name for name, _ in asked], got, cause)
        self.providers = got
        self.inputs = {each.name: tuple(each.shape) for each in self._session.get_inputs()}
        self._halves = {each.name for each in self._session.get_inputs() if each.type == "tensor(float16)"}
        self.outputs = tuple(each.name for each in self._session.get_outputs())
        self._device: Literal["cpu", "cuda"] = "cpu" if got[0] == CPU else "cuda"
        rows = self._session.get_modelmeta().custom_metadata_map.get("max_rows", "")
        self._max_rows = int(rows) if rows.isdecimal() and int(rows) else None
        self._plain = OrtRun(self._session, self.outputs)

    @property
    def max_rows(self) -> int | None:
        """Any number will do, unless the graph says otherwise: some round all images of a run by one scale."""
        return self._max_rows

    cuts_rows = True

    def element_type(self, name: str) -> type[np.generic]:
        """Of a real-valued graph input: float32 or float16."""
        return np.float16 if name in self._halves else np.float32

    def allocate(self, shape: tuple[int, ...], dtype: type[np.generic]) -> OrtBuffer:
        """Zeroed buffer on the session's device."""
        return OrtBuffer.zeros(shape, dtype, self._device)

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> "OrtBinding | OrtRun":
        """Run state whose named inputs and outputs stay in these buffers; one thread at a time may use it."""
        if not inputs and not outputs and self._device == "cpu":
            return self._plain
        binding = self._session.io_binding()
        for call, buffers in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, buffer in buffers.items():
                if not isinstance(buffer, OrtBuffer):
                    raise ProviderError("ONNX Runtime takes only buffers that a session of its own allocated")
                call(name, self._device, 0, buffer.dtype, buffer.shape, buffer.address)
        free = [name for name in self.outputs if name not in outputs]
        kept = (*inputs.values(), *outputs.values())  # a binding knows addresses only
        return OrtBinding(self._session, binding, bound=list(outputs), free=free, cache=self._cache, kept=kept)


class OrtRun:
    """A run on the CPU with nothing bound: a binding made for it costs as much as some of a small graph's nodes."""

    def __init__(self, session: Any, outputs: tuple[str, ...]) -> None:
        self._session, self._outputs = session, outputs

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs.

        Raises
        ------
        ProviderError
            If the run fails.
        """
        try:
            given = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
            return dict(zip(self._outputs, self._session.run(self._outputs, given), strict=True))
        except Exception as err:  # ONNX Runtime raises classes of its own, without a common base
            raise ProviderError(f"ONNX Runtime failed: {err!s:.300}") from err


class OrtBinding:
    """One user's state of an `OrtSession`."""

    def __init__(
        self,
        session: Any,
        binding: Any,
        *,
        bound: list[str],
        free: list[str],
        cache: EngineCache | None,
        kept: tuple[Buffer, ...],
    ) -> None:
        self._session, self._binding, self._cache, self._kept = session, binding, cache, kept
        self._free = free
        self._order = [*bound, *free]  # ONNX Runtime returns outputs in the order in which they were first bound

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs, on the host, that are not bound to buffers; `inputs` are those that are not bound.

        Raises
        ------
        ProviderError
            If the run fails.
        """
        try:
            for name, array in inputs.items():
                self._binding.bind_cpu_input(name, np.ascontiguousarray(array))
            for name in self._free:  # their shapes may change from run to run
                self._binding.bind_output(name, "cpu")
            with self._cache.watching() if self._cache else nullcontext():
                self._session.run_with_iobinding(self._binding)
            values = dict(zip(self._order, self._binding.get_outputs(), strict=True))
            return {name: values[name].numpy() for name in self._free}
        except Exception as err:  # ONNX Runtime raises classes of its own, without a common base
            raise ProviderError(f"ONNX Runtime failed: {err!s:.300}") from err


_CUDA_LOCK = threading.Lock()


def _load_cuda() -> None:
    """Load the CUDA and cuDNN that pip put beside onnxruntime-gpu, once: the system's loader does not look there."""
    with _CUDA_LOCK:  # sessions are made in threads
        _preload()


@cache
def _preload() -> None:
    import onnxruntime as ort

    # What is missing is said by `fallback_warnings`, and a program's output may be JSON: these words are dropped.
    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(StringIO()):
            ort.preload_dlls()


def _start(path: Path, options: RuntimeOptions, asked: Sequence[Provider], on_cpu: Path) -> tuple[Any, Path, str]:
    """A session on the first of the providers that starts, its graph, and why the very first did not.

    ONNX Runtime's own fall-back prints on standard output.

    Raises
    ------
    ProviderError
        If none does.
    """
    import onnxruntime as ort

    def load(graph: Path, providers: Sequence[Provider]) -> Any:
        return ort.InferenceSession(str(graph), _session_options(options), providers=list(providers), enable_fallback=0)

    *others, last = asked
    cause = ""
    for first in range(len(others)):
        try:
            session = load(path, asked[first:])
        except Exception as err:  # ONNX Runtime raises classes of its own, without a common base
            cause = cause or one_line(err)
            continue
        if path == on_cpu or session.get_providers()[0] != CPU:
            return session, path, cause
        break  # a library that is missing may drop a provider without an error: the CPU has a graph of its own
    graph = on_cpu if last[0] == CPU else path
    try:
        return load(graph, [last]), graph, cause
    except Exception as err:
        raise ProviderError(f"{graph.name}: ONNX Runtime cannot load it: {err!s:.300}") from err


def _session_options(options: RuntimeOptions) -> Any:
    import onnxruntime as ort

    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = options.n_threads or usable_cores()
    chosen.inter_op_num_threads = 1
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Several sessions share the cores: a thread that spins in one takes a core from the others.
    chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
    chosen.log_severity_level = 3  # errors; fall-backs are reported by fallback_warnings
    return chosen
