"""A serialised TensorRT engine behind the `Session` protocol: device pointers, and buffers that stay on the device.

Written against TensorRT's Python interface, which TensorRT-RTX shares. An engine may not write the buffer that it
reads, so a buffer that goes in and comes out again is two pieces of memory that change places after each run.

References
----------
https://docs.nvidia.com/deeplearning/tensorrt/latest/ (Python: Runtime, ICudaEngine, IExecutionContext)
"""

import importlib
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from medreasoner.cuda import CudaMemory, DeviceArray, DeviceMemory
from medreasoner.engines import EngineRecord, TensorRecord
from medreasoner.errors import ProviderError
from medreasoner.session import Buffer

__all__ = ["Gpu", "TrtBinding", "TrtBuffer", "TrtSession", "open_gpu"]

logger = logging.getLogger(__name__)

Array: TypeAlias = NDArray[Any]

# Of each builder's module what people call it, and how it is installed.
_RUNTIMES = {
    "tensorrt_rtx": ("TensorRT-RTX", "pip install 'medreasoner[tensorrt-rtx]'"),
    "tensorrt": ("TensorRT", "pip install 'medreasoner[tensorrt]', or JetPack's own on a Jetson"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """The GPU, and the TensorRT that runs engines on it.

    `tensorrt` is the module, `runtime` its name and version, `architecture` that of the GPU, such as ``"sm_86"``,
    `provider` what people call the module.
    """

    tensorrt: Any
    runtime: str
    architecture: str
    memory: DeviceMemory
    provider: str = "TensorRT-RTX"


def open_gpu(builder: str) -> Gpu:
    """The first GPU of this machine, and the TensorRT that may run what `builder` built.

    Parameters
    ----------
    builder
        As ``engines.json`` has it, such as ``"tensorrt_rtx 1.7.1.116"``. Whether the version is the same is found out
        with the engines.

    Raises
    ------
    ProviderError
        If that TensorRT, the driver or the GPU is missing.
    """
    module = builder.partition(" ")[0]
    if module not in _RUNTIMES:
        raise ProviderError(f"the engines were built by {builder!r:.80}, which this release cannot run")
    title, advice = _RUNTIMES[module]
    try:
        trt: Any = importlib.import_module(module)
    except Exception as err:  # installed, it may still lack a library
        raise ProviderError(f"{title} cannot be imported ({type(err).__name__}): {advice}") from err
    memory = CudaMemory()
    major, minor = memory.capability
    return Gpu(
        tensorrt=trt,
        runtime=f"{module} {trt.__version__}",
        architecture=f"sm_{major}{minor}",
        memory=memory,
        provider=title,
    )


class TrtBuffer:
    """A `Buffer` on the device, of which a second piece is made when an engine first writes it."""

    def __init__(self, memory: DeviceMemory, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        self._memory, self.shape, self._dtype = memory, shape, np.dtype(dtype)
        self._front = self._new()
        self._back: DeviceArray | None = None

    def _new(self) -> DeviceArray:
        size = int(np.prod(self.shape)) * self._dtype.itemsize
        array = DeviceArray(self._memory, size)
        self._memory.zero(array.address, size)
        return array

    @property
    def address(self) -> int:
        """Of the content."""
        return self._front.address

    @property
    def next_address(self) -> int:
        """Where the next content is written."""
        if self._back is None:
            self._back = self._new()
        return self._back.address

    def flip(self) -> None:
        """Make what was written the content."""
        assert self._back is not None
        self._front, self._back = self._back, self._front

    @property
    def host(self) -> None:
        """Its memory is the GPU's."""

    def rows(self, start: int, stop: int) -> "TrtBuffer":
        """Not there: a run writes its rows to the second piece, where the others would be old."""
        raise ProviderError("an engine's buffers cannot be cut into rows")

    def save(self, n_positions: int) -> Array:
        """Copy of the leading positions, on the host."""
        saved = np.empty((*self.shape[:2], n_positions, *self.shape[3:]), self._dtype)
        for plane, address in self._planes(saved):
            self._memory.download(plane, address)
        self._memory.synchronize()
        return saved

    def restore(self, saved: Array) -> None:
        """Write saved positions back, to the same places."""
        kept = np.ascontiguousarray(saved, self._dtype)
        for plane, address in self._planes(kept):
            self._memory.upload(address, plane)
        self._memory.synchronize()  # `kept` may go

    def _planes(self, array: Array) -> list[tuple[Array, int]]:
        """Each head's part of a host array, which is contiguous there and here, and its address."""
        planes = array.reshape(-1, *array.shape[2:])
        step = int(np.prod(self.shape[2:])) * self._dtype.itemsize
        return [(plane, self.address + index * step) for index, plane in enumerate(planes) if plane.size]


class TrtSession:
    """An engine that is ready to run.

    Parameters
    ----------
    content
        The serialised engine, from a file whose hash was checked.
    record
        What it is said to be: its tensors must be the same.
    gpu
        Where it runs.

    Raises
    ------
    ProviderError
        If TensorRT does not take it on this GPU, or its tensors are others.
    """

    warnings: tuple[str, ...] = ()
    cuts_rows = False

    def __init__(self, content: bytes, record: EngineRecord, gpu: Gpu) -> None:
        self.record, self._gpu = record, gpu
        self.providers: tuple[str, ...] = (gpu.provider,)
        trt = gpu.tensorrt
        log = _logger(trt)
        self._runtime = trt.Runtime(log)
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise ProviderError(
                f"{record.file}: {gpu.runtime} does not take it on this GPU, {gpu.architecture} ({log.last})"
            )
        self._check_tensors()
        self._contexts: dict[int, Any] = {}
        self._scratch: dict[str, DeviceArray] = {}
        self._lock = threading.Lock()  # contexts and scratch memory are one run's at a time

    def _check_tensors(self) -> None:
        names = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        for each in (*self.record.inputs, *self.record.outputs):
            if each.name not in names:
                raise ProviderError(f"{self.record.file}: the engine has no {each.name}")
            found = np.dtype(self._gpu.tensorrt.nptype(self._engine.get_tensor_dtype(each.name))).name
            if found != each.dtype:
                raise ProviderError(f"{self.record.file}: {each.name} is {found}, and not {each.dtype}")

    @property
    def max_rows(self) -> int | None:
        """The largest batch of all profiles; None if the batch is fixed."""
        return max((profile["batch"][2] for profile in self.record.profiles if "batch" in profile), default=None)

    def element_type(self, name: str) -> type[np.generic]:
        """Of a graph input, as ``engines.json`` has it."""
        return np.dtype(next(each.dtype for each in self.record.inputs if each.name == name)).type

    def allocate(self, shape: tuple[int, ...], dtype: type[np.generic]) -> TrtBuffer:
        """Zeroed buffer on the device."""
        return TrtBuffer(self._gpu.memory, shape, dtype)

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> "TrtBinding":
        """Run state whose named inputs and outputs stay in these buffers; one thread at a time may use it."""
        return TrtBinding(self, _own(inputs), _own(outputs))

    def run(
        self, inputs: Mapping[str, Array], bound: Mapping[str, TrtBuffer], written: Mapping[str, TrtBuffer]
    ) -> dict[str, Array]:
        """Run once, with one synchronisation: outputs, on the host, that are not bound."""
        memory = self._gpu.memory
        hosts = {each.name: _host(inputs[each.name], each) for each in self.record.inputs if each.name not in bound}
        shapes = {name: each.shape for name, each in hosts.items()} | {name: b.shape for name, b in bound.items()}
        with self._lock:
            context = self._context(self._profile(shapes))
            for name, host in hosts.items():
                memory.upload(self._scratch_for(name, host.nbytes), host)
            for name, shape in shapes.items():
                address = bound[name].address if name in bound else self._scratch[name].address
                self._need(context.set_input_shape(name, shape), f"{name} of {shape}")
                self._need(context.set_tensor_address(name, address), name)
            results = self._place_outputs(context, written)
            self._need(context.execute_async_v3(memory.stream), "a run")
            for name, host in results.items():
                memory.download(host, self._scratch[name].address)
            memory.synchronize()
        for buffer in written.values():
            buffer.flip()
        return results

    def _place_outputs(self, context: Any, written: Mapping[str, TrtBuffer]) -> dict[str, Array]:
        """Give each output its memory; host arrays for those that are not bound."""
        results: dict[str, Array] = {}
        for each in self.record.outputs:
            if each.name in written:
                address = written[each.name].next_address
            else:
                results[each.name] = np.empty(tuple(context.get_tensor_shape(each.name)), each.dtype)
                address = self._scratch_for(each.name, results[each.name].nbytes)
            self._need(context.set_tensor_address(each.name, address), each.name)
        return results

    def _scratch_for(self, name: str, n_bytes: int) -> int:
        """Address of memory for a tensor that is copied from or to the host, kept for the next run."""
        if name not in self._scratch or self._scratch[name].n_bytes < n_bytes:
            self._scratch[name] = DeviceArray(self._gpu.memory, n_bytes)
        return self._scratch[name].address

    def _profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The first profile that holds these shapes."""
        sizes: dict[str, int] = {}
        for each in self.record.inputs:
            found = each.sizes(shapes[each.name])
            if found is None or any(sizes.setdefault(name, size) != size for name, size in found.items()):
                raise ProviderError(f"{self.record.file}: {each.name} of {shapes[each.name]} does not fit {each.shape}")
        for index, profile in enumerate(self.record.profiles):
            if all(profile[name][0] <= size <= profile[name][2] for name, size in sizes.items()):
                return index
        raise ProviderError(
            f"{self.record.file}: no profile holds {sizes}; build the engines for larger sizes "
            "('medreasoner-cli export tensorrt --help')"
        )

    def _context(self, profile: int) -> Any:
        """The context of a profile: changing one's profile would wait for the device."""
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None:
                raise ProviderError(f"{self.record.file}: the GPU's memory does not hold what a run needs")
            stream = self._gpu.memory.stream
            self._need(context.set_optimization_profile_async(profile, stream), f"profile {profile}")
            self._contexts[profile] = context
        return self._contexts[profile]

    def _need(self, went_well: bool, what: str) -> None:
        if not went_well:
            raise ProviderError(f"{self.record.file}: {self._gpu.runtime} refused {what}")


class TrtBinding:
    """One user's state of a `TrtSession`."""

    def __init__(self, session: TrtSession, inputs: Mapping[str, TrtBuffer], outputs: Mapping[str, TrtBuffer]) -> None:
        self._session, self._inputs, self._outputs = session, inputs, outputs

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs, on the host, that are not bound to buffers; `inputs` are those that are not bound.

        Raises
        ------
        ProviderError
            If a shape fits no profile of the engine, or the run fails.
        """
        return self._session.run(inputs, self._inputs, self._outputs)


@lru_cache(maxsize=2)
def _logger(trt: Any) -> Any:
    """TensorRT's words as log records, and the last error for our own message; it keeps one logger a process."""

    class Log(trt.ILogger):  # type: ignore[misc]
        last = "without a word"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.last = " ".join(message.split())[:200]
                logger.info("TensorRT: %s", self.last)

    return Log()


def _own(buffers: Mapping[str, Buffer]) -> dict[str, TrtBuffer]:
    own = {name: each for name, each in buffers.items() if isinstance(each, TrtBuffer)}
    if len(own) < len(buffers):
        raise ProviderError("an engine takes only buffers that its own session allocated")
    return own


def _host(array: Array, tensor: TensorRecord) -> Array:
    """The array as the engine reads it; `set_tensor_address` knows no types, so a wrong one would go unnoticed."""
    if array.dtype != tensor.dtype:
        raise ProviderError(f"{tensor.name}: expected {tensor.dtype}, got {array.dtype}")
    return np.ascontiguousarray(array)
