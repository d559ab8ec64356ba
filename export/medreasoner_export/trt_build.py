"""TensorRT-RTX as a builder of engines on a machine without a GPU, for architectures that it knows.

What its parser takes its builder may still refuse, so nothing here counts as good before it is built.

References
----------
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/ (building ahead of time for other compute capabilities)
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from medreasoner._extras import require
from medreasoner.errors import BundleError
from medreasoner_export import trt_worker
from medreasoner_export.trt_plan import EnginePlan, TensorSpec

__all__ = ["BuilderStoppedError", "build_engine", "builder_version", "check_architectures"]

# Of TensorRT's log, what an error quotes.
QUOTED = 400
# Signals that come from outside: SIGINT, SIGKILL (also where memory runs out), SIGTERM.
STOPPED = (2, 9, 15)
# What the worker gets of the environment: how to find Python, its packages and the system's libraries.
PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "HOME", "TMPDIR")


class BuilderStoppedError(BundleError):
    """The builder was ended from outside, for want of memory say: engines built before it are worth keeping."""

    resumable = True


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
                f"--keep-graphs leaves beside the engines of another architecture, such as {next(iter(known))}"
            )


def build_engine(graph: Path, plan: EnginePlan, architecture: str, engine: Path) -> bool:
    """Write the serialised engine of a graph for one architecture; return whether it is reproducible.

    Then the same graph gives the same bytes on the same machine (see :mod:`medreasoner_export.trt_worker`).

    Parameters
    ----------
    graph
        In the dialect that :func:`medreasoner_export.trt_dialect.trt_graph` writes.
    plan
        Its tensors and profiles: what TensorRT reads from the graph must be the same.
    architecture
        Such as ``"sm_86"``.
    engine
        File to write, in the folder of the graph.

    Raises
    ------
    BundleError
        If the graph is not taken, has other tensors than the plan, or cannot be built; with TensorRT's own words.
    """
    job = {
        "graph": graph.name,
        "engine": engine.name,
        "architecture": _label(architecture),
        "profiles": [{each.name: each.sizes(sizes) for each in plan.inputs} for sizes in plan.profiles],
    }
    result = _run(job, graph.parent, plan.source)
    words = " ".join(str(result["words"]).split())[:QUOTED] or "without a word"
    if result["failed"] == "parse":
        raise BundleError(f"{plan.source}: TensorRT-RTX does not take the graph ({words})")
    if result["failed"] == "profile":
        raise BundleError(f"{plan.source}: TensorRT-RTX refuses a profile of {job['profiles']!s:.200} ({words})")
    _compare(result, plan)
    if result["failed"]:
        raise BundleError(f"{plan.source}: TensorRT-RTX cannot build it for {architecture} ({words})")
    return bool(result["fixed"])


def _run(job: Mapping[str, Any], folder: Path, source: str) -> dict[str, Any]:
    """Result of the worker for a job."""
    # Few variables, since what a process holds decides where in its memory all else comes to lie.
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment |= {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # -P: the modules beside the worker must not be taken for others of their names
        [sys.executable, "-P", trt_worker.__file__],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    try:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError) as err:
        words = " ".join(done.stderr.split())[-QUOTED:]
        kind = BuilderStoppedError if -done.returncode in STOPPED else BundleError
        raise kind(f"{source}: TensorRT-RTX's builder ended with {done.returncode} ({words})") from err
    return result


def _compare(result: Mapping[str, Any], plan: EnginePlan) -> None:
    """Refuse a network whose tensors are not those of the plan."""
    for side in ("inputs", "outputs"):
        found = {name: (dtype, tuple(shape)) for name, dtype, shape in result[side]}
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
