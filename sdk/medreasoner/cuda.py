"""Memory of an NVIDIA GPU through the driver's own library, by ctypes.

``libcuda`` comes with the driver and its interface does not change, so that no package is needed: neither a CUDA
toolkit nor cuda-python, whose versions would have to fit TensorRT's. The device's primary context is the one that
TensorRT uses too.

References
----------
https://docs.nvidia.com/cuda/cuda-driver-api/ (memory management, primary context, streams)
"""

import ctypes
import weakref
from typing import Any, Protocol, TypeAlias

from numpy.typing import NDArray

from medreasoner.errors import ProviderError

__all__ = ["CudaMemory", "DeviceArray", "DeviceMemory", "compute_capability"]

Array: TypeAlias = NDArray[Any]

_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


class DeviceMemory(Protocol):
    """Memory of one device, and the stream on which all that is done with it follows in order."""

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        ...

    def allocate(self, n_bytes: int) -> int:
        """Address of new memory, aligned as TensorRT wants it."""
        ...

    def free(self, address: int) -> None:
        """Give memory back."""
        ...

    def zero(self, address: int, n_bytes: int) -> None:
        """Fill with zeros, once the stream comes to it."""
        ...

    def upload(self, address: int, host: Array) -> None:
        """Copy a contiguous array to the device; it must live until the stream has come to it."""
        ...

    def download(self, host: Array, address: int) -> None:
        """Copy to a contiguous array; it is there after `synchronize`."""
        ...

    def synchronize(self) -> None:
        """Wait until the stream has done everything."""
        ...


class DeviceArray:
    """Memory that is given back when nobody needs it any more.

    Parameters
    ----------
    memory
        Of the device.
    n_bytes
        Size.
    """

    def __init__(self, memory: DeviceMemory, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self.address = memory.allocate(n_bytes)
        weakref.finalize(self, memory.free, self.address).atexit = False  # by then the driver may be gone


class CudaMemory:
    """`DeviceMemory` of a GPU.

    Parameters
    ----------
    index
        Of the GPU, as the driver counts.

    Raises
    ------
    ProviderError
        If there is no driver or no such GPU.
    """

    def __init__(self, index: int = 0) -> None:
        self._cuda = _library()
        self._call("cuInit", 0)
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), index)
        self.capability = (_attribute(self._cuda, _MAJOR, device), _attribute(self._cuda, _MINOR, device))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context
        self._enter()
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        self._stream = stream
        # When the last buffer is gone, which knows this object. At the end of the process the driver may be gone first.
        weakref.finalize(self, _release, self._cuda, context, stream, device).atexit = False

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return self._stream.value or 0

    def allocate(self, n_bytes: int) -> int:
        """Address of new memory, aligned to 256 bytes by the driver.

        Raises
        ------
        ProviderError
            If there is not enough.
        """
        self._enter()
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(n_bytes, 1)))
        return address.value

    def free(self, address: int) -> None:
        """Give memory back; waits for the device, so that nothing still uses it."""
        self._enter()
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def zero(self, address: int, n_bytes: int) -> None:
        """Fill with zeros, once the stream comes to it."""
        self._enter()
        size = ctypes.c_size_t(n_bytes)
        self._call("cuMemsetD8Async", ctypes.c_uint64(address), ctypes.c_ubyte(0), size, self._stream)

    def upload(self, address: int, host: Array) -> None:
        """Copy a contiguous array to the device."""
        self._enter()
        source, size = ctypes.c_void_p(host.ctypes.data), ctypes.c_size_t(host.nbytes)
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, size, self._stream)

    def download(self, host: Array, address: int) -> None:
        """Copy to a contiguous array; it is there after `synchronize`."""
        self._enter()
        target, size = ctypes.c_void_p(host.ctypes.data), ctypes.c_size_t(host.nbytes)
        self._call("cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(address), size, self._stream)

    def synchronize(self) -> None:
        """Wait until the stream has done everything."""
        self._enter()
        self._call("cuStreamSynchronize", self._stream)

    def _enter(self) -> None:
        """Make the context that of this thread: each thread has its own current one."""
        self._call("cuCtxSetCurrent", self._context)

    def _call(self, name: str, *arguments: Any) -> None:
        _call(self._cuda, name, *arguments)


def compute_capability(index: int = 0) -> tuple[int, int]:
    """Major and minor number of a GPU, such as (8, 6), without taking memory on it.

    Raises
    ------
    ProviderError
        If there is no driver or no such GPU.
    """
    cuda, device = _library(), ctypes.c_int()
    _call(cuda, "cuInit", 0)
    _call(cuda, "cuDeviceGet", ctypes.byref(device), index)
    return _attribute(cuda, _MAJOR, device), _attribute(cuda, _MINOR, device)


def _attribute(cuda: Any, which: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _call(cuda, "cuDeviceGetAttribute", ctypes.byref(value), which, device)
    return value.value


def _call(cuda: Any, name: str, *arguments: Any) -> None:
    code = getattr(cuda, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))
        words = text.value.decode() if text.value else f"error {code}"
        raise ProviderError(f"CUDA: {name} failed: {words}")


def _release(cuda: Any, context: ctypes.c_void_p, stream: ctypes.c_void_p, device: ctypes.c_int) -> None:
    """Give back what `CudaMemory` holds; nobody is there to hear that it failed."""
    cuda.cuCtxSetCurrent(context)
    cuda.cuStreamDestroy_v2(stream)
    cuda.cuDevicePrimaryCtxRelease_v2(device)


def _library() -> Any:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ProviderError("no NVIDIA driver: libcuda is not on this machine")
