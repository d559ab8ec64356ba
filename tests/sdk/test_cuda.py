"""The driver's library, on a stand-in that records what it is asked: what a GPU does with it is not shown here."""

import ctypes
from typing import Any

import numpy as np
import pytest

from medreasoner import cuda
from medreasoner.cuda import CudaMemory, DeviceArray
from medreasoner.errors import ProviderError


class Driver:
    """``libcuda`` with one GPU of compute capability 8.6, whose memory is this process's."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.memory: dict[int, Any] = {}
        self.fails: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name in self.fails:
                return self.fails[name]
            action = getattr(self, f"on_{name}", None)
            if action is not None:
                action(*arguments)
            return 0

        if name.startswith("on_"):
            raise AttributeError(name)
        return call

    def on_cuDeviceGetAttribute(self, value: Any, which: int, _: Any) -> None:  # noqa: N802
        value._obj.value = {75: 8, 76: 6}[which]

    def on_cuStreamCreate(self, stream: Any, flags: int) -> None:  # noqa: N802
        assert flags == 1
        stream._obj.value = 99

    def on_cuMemAlloc_v2(self, address: Any, size: Any) -> None:  # noqa: N802
        block = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(block)
        self.memory[address._obj.value] = block

    def on_cuMemFree_v2(self, address: Any) -> None:  # noqa: N802
        del self.memory[address.value]

    def on_cuMemsetD8Async(self, address: Any, value: Any, size: Any, stream: Any) -> None:  # noqa: N802
        assert stream.value == 99
        ctypes.memset(address.value, value.value, size.value)

    def on_cuMemcpyHtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> None:  # noqa: N802
        assert stream.value == 99
        ctypes.memmove(target.value, source.value, size.value)

    on_cuMemcpyDtoHAsync_v2 = on_cuMemcpyHtoDAsync_v2  # noqa: N815

    def on_cuGetErrorString(self, code: int, text: Any) -> None:  # noqa: N802
        text._obj.value = {2: b"out of memory"}.get(code)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(cuda, "_library", lambda: found)
    return found


def test_the_gpu_is_opened_in_the_context_that_tensorrt_uses(driver: Driver) -> None:
    memory = CudaMemory()
    assert (memory.capability, memory.stream) == ((8, 6), 99)
    assert driver.calls[:2] == ["cuInit", "cuDeviceGet"]
    assert "cuDevicePrimaryCtxRetain" in driver.calls
    assert "cuCtxCreate_v2" not in driver.calls


def test_what_goes_up_comes_down_and_memory_goes_back(driver: Driver) -> None:
    memory = CudaMemory()
    array = DeviceArray(memory, 40)
    memory.zero(array.address, 40)
    memory.upload(array.address + 8, np.arange(4, dtype=np.float32))
    found = np.empty(10, np.float32)
    memory.download(found, array.address)
    driver.calls.clear()
    memory.synchronize()
    assert driver.calls == ["cuCtxSetCurrent", "cuStreamSynchronize"]  # any thread may come
    assert found.tolist() == [0, 0, 0, 1, 2, 3, 0, 0, 0, 0]
    assert len(driver.memory) == 1
    del array
    assert not driver.memory


def test_stream_and_context_go_back_behind_the_last_buffer(driver: Driver) -> None:
    memory = CudaMemory()
    array = DeviceArray(memory, 40)
    driver.calls.clear()
    del memory
    assert not driver.calls  # the buffer still needs it
    del array
    gone = ["cuCtxSetCurrent", "cuMemFree_v2", "cuCtxSetCurrent", "cuStreamDestroy_v2", "cuDevicePrimaryCtxRelease_v2"]
    assert driver.calls == gone


def test_the_capability_is_asked_for_without_taking_anything(driver: Driver) -> None:
    assert cuda.compute_capability() == (8, 6)
    assert set(driver.calls) == {"cuInit", "cuDeviceGet", "cuDeviceGetAttribute"}


@pytest.mark.parametrize(("code", "words"), [(2, "out of memory"), (999, "error 999")])
def test_a_failure_has_the_drivers_words(driver: Driver, code: int, words: str) -> None:
    memory = CudaMemory()
    driver.fails["cuMemAlloc_v2"] = code
    with pytest.raises(ProviderError, match=f"CUDA: cuMemAlloc_v2 failed: {words}"):
        memory.allocate(16)


def test_a_machine_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda.ctypes, "CDLL", missing)
    with pytest.raises(ProviderError, match="no NVIDIA driver: libcuda is not on this machine"):
        CudaMemory()
