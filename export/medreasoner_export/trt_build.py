"""TensorRT-RTX as a builder of engines on a machine without a GPU, for architectures that it knows.

What its parser takes its builder may still refuse, so nothing here counts as good before it is built.

References
----------
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/ (building ahead of time for other compute capabilities)
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from medreasoner._extras import require
from medreasoner.errors import BundleError
from medreasoner_export.trt_plan import EnginePlan, TensorSpec

__all__ = ["build_engine", "builder_version", "check_architectures"]

# Of TensorRT's log, what an error quotes.
QUOTED = 400


def builder_version() -> str:
    """Name and version of the builder.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    return f"tensorrt_rtx {_trt().__version__}"


def check_architectures(architectures: tuple[str, ...]) -> None:
    """Refuse architectures that the installed builder cannot target.

    Parameters
    ----------
    architectures
        Such as ``"sm_86"``.

    Raises
    ------
    BundleError
        With what it can target, and where the others' engines are built.
    """
    if not architectures or len(set(architectures)) < len(architectures):
        raise BundleError(
            f"arch: expected one or more, each once, such as sm_86,sm_89, got {','.join(architectures)!r}"
        )
    known = {_name(capability): capability for capability in _capabilities()}
    for architecture in architectures:
        if not re.fullmatch(r"sm_\d+", architecture):
            raise BundleError(f"arch: expected names such as sm_86, got {architecture!r:.40}")
        if architecture not in known:
            raise BundleError(
                f"{architecture}: {builder_version()} builds ahead of time for {', '.join(known)} only; engines for a "
                "Jetson or a data-centre GPU are built on that machine, by its own TensorRT from the graphs that "
                "--keep-graphs leaves"
            )


def build_engine(graph: Path, plan: EnginePlan, architecture: str) -> Any:
    """The serialised engine of a graph for one architecture, as a buffer of bytes.

    Parameters
    ----------
    graph
        In the dialect that :func:`medreasoner_export.trt_dialect.trt_graph` writes.
    plan
        Its tensors and profiles: what TensorRT reads from the graph must be the same.
    architecture
        Such as ``"sm_86"``.

    Raises
    ------
    BundleError
        If the graph is not taken, has other tensors than the plan, or cannot be built; with TensorRT's own words.
    """
    trt, log = _trt(), _log()
    log.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph.read_bytes(), str(graph)):
        errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise BundleError(f"{plan.source}: TensorRT-RTX does not take the graph ({_short(errors)})")
    _compare(network, plan)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    config.num_compute_capabilities = 1
    config.set_compute_capability(_capabilities()[_label(architecture)], 0)
    for sizes in plan.profiles:
        profile = builder.create_optimization_profile()
        for tensor in plan.inputs:
            profile.set_shape(tensor.name, *tensor.sizes(sizes))
        if config.add_optimization_profile(profile) < 0:
            raise BundleError(f"{plan.source}: TensorRT-RTX refuses the profile {sizes} ({_short(log.text())})")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BundleError(f"{plan.source}: TensorRT-RTX cannot build it for {architecture} ({_short(log.text())})")
    return engine


def _compare(network: Any, plan: EnginePlan) -> None:
    """Refuse a network whose tensors are not those of the plan."""
    read = {
        "inputs": [network.get_input(index) for index in range(network.num_inputs)],
        "outputs": [network.get_output(index) for index in range(network.num_outputs)],
    }
    for side, tensors in read.items():
        found = {each.name: (_trt().nptype(each.dtype).__name__, tuple(each.shape)) for each in tensors}
        expected = {each.name: (each.dtype, _sizes(each)) for each in getattr(plan, side)}
        if side == "outputs":  # some of their sizes TensorRT knows only when it runs
            expected = {
                name: (dtype, _known(shape, found.get(name, ("", ()))[1])) for name, (dtype, shape) in expected.items()
            }
        if found != expected:
            raise BundleError(f"{plan.source}: TensorRT-RTX reads other {side} than planned: {found} not {expected}")


def _sizes(tensor: TensorSpec) -> tuple[int, ...]:
    """The shape as TensorRT writes it: -1 for what varies."""
    return tuple(size if isinstance(size, int) else -1 for size in tensor.shape)


def _known(expected: tuple[int, ...], found: tuple[int, ...]) -> tuple[int, ...]:
    """`expected`, with -1 where only `found` leaves a size open or already knows one."""
    if len(expected) != len(found):
        return expected
    return tuple(b if -1 in (a, b) else a for a, b in zip(expected, found, strict=True))


@lru_cache(maxsize=1)
def _trt() -> Any:
    return require(
        "tensorrt_rtx",
        extra="tensorrt-rtx",
        feature="Building engines without a GPU",
        package="tensorrt-rtx-cu13",
    )


@lru_cache(maxsize=1)
def _capabilities() -> dict[str, Any]:
    """Compute capabilities by name, in order of their number, without the one of this machine."""
    members = dict(_trt().ComputeCapability.__members__)
    known = [name for name in members if re.fullmatch(r"SM\d+", name)]
    return {name: members[name] for name in sorted(known, key=lambda name: int(name[2:]))}


def _name(label: str) -> str:
    return f"sm_{label[2:]}"


def _label(architecture: str) -> str:
    return f"SM{architecture[3:]}"


@lru_cache(maxsize=1)
def _log() -> Any:
    """TensorRT's logger: it keeps the first that a process makes, so there is one, and it is emptied."""
    trt = _trt()

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.lines.append(message)

        def text(self) -> str:
            return "; ".join(self.lines)

        def clear(self) -> None:
            self.lines.clear()

    return Log()


def _short(text: str) -> str:
    return " ".join(text.split())[:QUOTED] or "without a word"
