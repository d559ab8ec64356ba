"""Builds one engine, in a process of its own: a job in JSON on the standard input, its result on the standard output.

TensorRT-RTX 1.7 orders the outputs of an engine by where they lie in its memory, so that the same graph gave other
bytes from build to build. Here the process is new, its addresses are not randomised, the builder's threads run one
after another, and nothing but the builder is loaded: then they were the same in 28 of 28 builds of nano's decoder on a
loaded machine, without the order of threads in 13 of 14. It also keeps a crash of the builder, and its memory, away
from who asked.

TensorRT proper (``tensorrt`` as the only argument) chooses kernels by timing them on this machine's GPU. Its builds
differ however the process runs, so that none of this is done for it; it gets all cores, and a file of timings instead.

Job: ``graph`` and ``engine``, names of files in the current folder; ``profiles``, for each a mapping of inputs to their
least, usual and largest shape; for TensorRT-RTX ``architecture`` such as ``"SM86"``; for TensorRT ``timing_cache``, a
file to read and write, and ``workspace``, the most bytes that a layer may take on the GPU. Result: ``failed``, the step
that failed (``parse``, ``profile``, ``build`` or ``write``, with the system's ``errno``) or null; ``words``; ``inputs``
and ``outputs``, [name, element type, shape] each; ``fixed``, whether addresses were.
"""

import contextlib
import ctypes
import json
import os
import sys
from typing import Any

_NO_RANDOMISATION = 0x0040000  # ADDR_NO_RANDOMIZE of Linux' personality(2)
_ASK = 0xFFFFFFFF


def _fix_addresses() -> bool:
    """Start this program anew without address randomisation; False where the system does not have or allow that."""
    personality = getattr(ctypes.CDLL(None), "personality", None) if sys.platform == "linux" else None
    if personality is None:
        return False
    now = personality(_ASK)
    if now != -1 and now & _NO_RANDOMISATION:
        return True
    if now == -1 or personality(now | _NO_RANDOMISATION) == -1 or not personality(_ASK) & _NO_RANDOMISATION:
        return False
    os.execv(sys.executable, sys.orig_argv)


def _one_after_another() -> None:
    """Let the builder's own short threads run in order: on one core, each until it ends or waits."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _build(job: dict[str, Any], proper: bool) -> dict[str, Any]:
    if proper:
        import tensorrt as trt
    else:
        import tensorrt_rtx as trt

    log = _logger(trt)
    builder = trt.Builder(log)
    if not proper:
        builder.max_threads = 1  # several take memory in an order that changes from run to run
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["graph"]):
        words = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        return {"failed": "parse", "words": words}
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    if proper:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace"])
        timings = _timing_cache(config, job["timing_cache"])  # must live until the engine is built
    else:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, job["architecture"]), 0)
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, sizes in shapes.items():
            profile.set_shape(name, *sizes)
        if config.add_optimization_profile(profile) < 0:
            return {"failed": "profile", "words": "; ".join(log.lines)}
    tensors = {
        "inputs": [_tensor(trt, network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [_tensor(trt, network.get_output(index)) for index in range(network.num_outputs)],
    }
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return {"failed": "build", "words": "; ".join(log.lines), **tensors}
    try:
        with open(job["engine"], "wb") as file:  # noqa: PTH123  # pathlib would be one more import
            file.write(memoryview(engine))
    except OSError as err:
        return {"failed": "write", "words": err.strerror, "errno": err.errno, **tensors}
    if proper:
        _keep_timings(timings, job["timing_cache"])
    return {"failed": None, "words": "", **tensors}


def _timing_cache(config: Any, path: str) -> Any:
    """Give the builder what was timed before; nothing where that is of another GPU, driver or release."""
    content = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:  # noqa: PTH123
        content = file.read()
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _keep_timings(cache: Any, path: str) -> None:
    """Write them whole; without them the next build only takes longer."""
    scratch = f"{path}.{os.getpid()}"
    with contextlib.suppress(OSError):
        with open(scratch, "wb") as file:  # noqa: PTH123
            file.write(memoryview(cache.serialize()))
        os.replace(scratch, path)  # noqa: PTH105


def _tensor(trt: Any, tensor: Any) -> list[Any]:
    return [tensor.name, trt.nptype(tensor.dtype).__name__, list(tensor.shape)]


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.lines.append(message)

    return Log()


if __name__ == "__main__":
    proper = sys.argv[1:] == ["tensorrt"]
    fixed = not proper and _fix_addresses()
    if not proper:
        _one_after_another()
    print(json.dumps({"fixed": fixed, **_build(json.load(sys.stdin), proper)}))  # noqa: T201  # the result
