"""TensorRT-RTX as a builder of engines on a machine without a GPU, and TensorRT proper as one for the GPU at hand.

What its parser takes its builder may still refuse, so nothing here counts as good before it is built.

References
----------
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/ (building ahead of time for other compute capabilities)
https://docs.nvidia.com/deeplearning/tensorrt/latest/ (Python: Builder, IBuilderConfig, ITimingCache)
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from medreasoner._extras import require
from medreasoner.cuda import compute_capability
from medreasoner.errors import BundleError, MissingExtraError
from medreasoner_export import trt_worker
from medreasoner_export.trt_plan import EnginePlan, TensorSpec

__all__ = [
    "WORKSPACE_BYTES",
    "BuilderName",
    "BuilderStoppedError",
    "build_engine",
    "builder_version",
    "check_architectures",
    "find_builder",
]

# Of TensorRT's log, what an error quotes.
QUOTED = 400
# Signals that come from outside: SIGINT, SIGKILL (also where memory runs out), SIGTERM.
STOPPED = (2, 9, 15)
# What the worker gets of the environment: how to find Python, its packages and the system's libraries.
PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "HOME", "TMPDIR")


@dataclass(frozen=True, slots=True)
class _Builder:
    """What Python imports, what messages call it, and what pip installs."""

    module: str
    title: str
    package: str


BuilderName: TypeAlias = Literal["tensorrt-rtx", "tensorrt"]

# In the order in which they are looked for.
BUILDERS: Mapping[BuilderName, _Builder] = {
    "tensorrt-rtx": _Builder("tensorrt_rtx", "TensorRT-RTX", "tensorrt-rtx-cu13"),
    "tensorrt": _Builder("tensorrt", "TensorRT", "tensorrt"),
}

WORKSPACE_BYTES = 2**31


class BuilderStoppedError(BundleError):
    """The builder was ended from outside, for want of memory say: engines built before it are worth keeping."""

    resumable = True


def find_builder(asked: BuilderName | None = None) -> BuilderName:
    """The builder that was asked for, or the one that is installed.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    if asked is not None:
        _trt(asked)
        return asked
    for name in BUILDERS:
        with suppress(MissingExtraError):
            _trt(name)
            return name
    _trt(next(iter(BUILDERS)))  # says what to install
    raise AssertionError("one of them was found after all")


def builder_version(name: BuilderName) -> str:
    """Module and version of a builder, such as ``"tensorrt_rtx 1.7.1.116"``: what runs its engines must be the same.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    return f"{BUILDERS[name].module} {_trt(name).__version__}"


def check_architectures(architectures: tuple[str, ...], builder: BuilderName) -> tuple[str, ...]:
    """The architectures to build for; those that the installed builder cannot target are refused.

    Parameters
    ----------
    architectures
        Such as ``"sm_86"``. TensorRT proper builds for the GPU of this machine alone, which need not be named.
    builder
        Which one.

    Raises
    ------
    BundleError
        With what it can target, and where the others' engines are built.
    ProviderError
        If there is no GPU, and TensorRT proper needs one.
    """
    for architecture in architectures:
        if not re.fullmatch(r"sm_\d+", architecture):
            raise BundleError(f"arch: expected names such as sm_86, got {architecture!r:.40}")
    if builder == "tensorrt":
        return _own_architecture(architectures)
    if not architectures or len(set(architectures)) < len(architectures):
        raise BundleError(
            f"arch: expected one or more, each once, such as sm_86,sm_89, got {','.join(architectures)!r}"
        )
    known = [_name(capability) for capability in _capabilities()]
    for architecture in architectures:
        if architecture not in known:
            raise BundleError(
                f"{architecture}: {builder_version(builder)} builds ahead of time for {', '.join(known)} only; engines "
                "for a Jetson or a data-centre GPU are built on that machine, by its own TensorRT: there, "
                "'medreasoner-cli export tensorrt --builder tensorrt'"
            )
    return architectures


def _own_architecture(architectures: tuple[str, ...]) -> tuple[str, ...]:
    major, minor = compute_capability()
    own = f"sm_{major}{minor}"
    if set(architectures) - {own}:
        raise BundleError(
            f"arch: TensorRT builds for the GPU of this machine alone, {own}, not for {','.join(architectures)}; leave "
            "--arch out, or build on a machine with that GPU, or with --builder tensorrt-rtx"
        )
    return (own,)


def build_engine(
    graph: Path, plan: EnginePlan, architecture: str, engine: Path, *,
    builder: BuilderName = "tensorrt-rtx", timings: Path | None = None, workspace: int = WORKSPACE_BYTES,
) -> bool:  # fmt: skip
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
    builder
        Which one; TensorRT proper builds for the GPU of this machine.
    timings
        File in which TensorRT proper keeps what it timed, so that the next build is faster.
    workspace
        Most bytes that a layer may take on the GPU, with TensorRT proper.

    Raises
    ------
    OSError
        If the disk is full.
    BundleError
        If the graph is not taken, has other tensors than the plan, or cannot be built; with TensorRT's own words.
    """
    title = BUILDERS[builder].title
    target: dict[str, Any] = {"architecture": _label(architecture)}
    if builder == "tensorrt":
        target = {"timing_cache": str(timings or graph.with_suffix(".timings")), "workspace": workspace}
    job = {
        "graph": graph.name,
        "engine": engine.name,
        **target,
        "profiles": [{each.name: each.sizes(sizes) for each in plan.inputs} for sizes in plan.profiles],
    }
    result = _run(job, graph.parent, plan.source, builder)
    if result["failed"] == "write":
        raise OSError(result["errno"], result["words"])
    words = " ".join(str(result["words"]).split())[:QUOTED] or "without a word"
    if result["failed"] == "parse":
        raise BundleError(f"{plan.source}: {title} does not take the graph ({words})")
    if result["failed"] == "profile":
        raise BundleError(f"{plan.source}: {title} refuses a profile of {job['profiles']!s:.200} ({words})")
    _compare(result, plan, title)
    if result["failed"]:
        raise BundleError(f"{plan.source}: {title} cannot build it for {architecture} ({words})")
    return bool(result["fixed"])


def _run(job: Mapping[str, Any], folder: Path, source: str, builder: BuilderName) -> dict[str, Any]:
    """Result of the worker for a job."""
    # Few variables, since what a process holds decides where in its memory all else comes to lie.
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment |= {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # -P: the modules beside the worker must not be taken for others of their names
        [sys.executable, "-P", trt_worker.__file__, *(["tensorrt"] if builder == "tensorrt" else [])],
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
        raise kind(f"{source}: {BUILDERS[builder].title}'s builder ended with {done.returncode} ({words})") from err
    return result


def _compare(result: Mapping[str, Any], plan: EnginePlan, title: str) -> None:
    """Refuse a network whose tensors are not those of the plan."""
    for side in ("inputs", "outputs"):
        found = {name: (dtype, tuple(shape)) for name, dtype, shape in result[side]}
        expected = {each.name: (each.dtype, _sizes(each)) for each in getattr(plan, side)}
        if side == "outputs":  # some of their sizes TensorRT knows only when it runs
            expected = {
                name: (dtype, _known(shape, found.get(name, ("", ()))[1])) for name, (dtype, shape) in expected.items()
            }
        if found != expected:
            raise BundleError(f"{plan.source}: {title} reads other {side} than planned: {found} not {expected}")


def _sizes(tensor: TensorSpec) -> tuple[int, ...]:
    """The shape as TensorRT writes it: -1 for what varies."""
    return tuple(size if isinstance(size, int) else -1 for size in tensor.shape)


def _known(expected: tuple[int, ...], found: tuple[int, ...]) -> tuple[int, ...]:
    """`expected`, with -1 where only `found` leaves a size open or already knows one."""
    if len(expected) != len(found):
        return expected
    return tuple(b if -1 in (a, b) else a for a, b in zip(expected, found, strict=True))


@lru_cache(maxsize=2)
def _trt(name: BuilderName) -> Any:
    builder = BUILDERS[name]
    feature = "Building engines without a GPU" if name == "tensorrt-rtx" else "Building engines for this GPU"
    return require(builder.module, extra=name, feature=feature, package=builder.package)


@lru_cache(maxsize=1)
def _capabilities() -> dict[str, Any]:
    """Compute capabilities by name, in order of their number, without the one of this machine."""
    members = dict(_trt("tensorrt-rtx").ComputeCapability.__members__)
    known = [name for name in members if re.fullmatch(r"SM\d+", name)]
    return {name: members[name] for name in sorted(known, key=lambda name: int(name[2:]))}


def _name(label: str) -> str:
    return f"sm_{label[2:]}"


def _label(architecture: str) -> str:
    return f"SM{architecture[3:]}"
