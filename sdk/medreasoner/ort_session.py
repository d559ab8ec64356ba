"""Sessions of ONNX Runtime that read and write bound buffers."""

import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from medreasoner._text import one_line
from medreasoner.engine_cache import EngineCache
from medreasoner.errors import ProviderError
from medreasoner.providers import (
    CPU,
    TENSORRT,
    Provider,
    RuntimeOptions,
    fallback_warnings,
    provider_list,
    usable_cores,
)
from medreasoner.session import Buffer

__all__ = ["OrtSession"]

Array: TypeAlias = NDArray[Any]


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


def _engine_cache(path: Path, options: RuntimeOptions, asked: Sequence[Provider]) -> EngineCache | None:
    """Of a graph that TensorRT may build an engine of."""
    if asked[0][0] != TENSORRT or options.engine_cache_dir is None:
        return None
    cache = EngineCache(options.engine_cache_dir, f"{path.parent.name}_{path.stem}")
    asked[0][1]["trt_engine_cache_prefix"] = cache.prefix
    return cache
