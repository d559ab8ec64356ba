"""What `doctor` looks at. Each check is tried for real: a list of what should work is not proof that it does."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medreasoner_cli.failures import one_line

__all__ = ["Finding", "examine"]

State = Literal["ok", "note", "FAULT"]

_PACKAGES = ("medreasoner", "numpy", "pillow", "pydicom", "tokenizers", "typer")
_OPTIONAL = {
    "pydicom-data": "samples",
    "python-gdcm": "codecs",
    "highdicom": "dicom",
    "nibabel": "nifti",
    "torch": "export",
}
_GPU_ADVICE = {
    "cuda": "it wants an NVIDIA driver and CUDA's libraries: pip install 'onnxruntime-gpu[cuda,cudnn]'",
    "tensorrt": "it wants what CUDA wants, and TensorRT's libraries: pip install 'medreasoner[tensorrt]'",
}
_PROVIDERS = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "tensorrt"}
_SYNTAXES = {
    "RLE": ("1.2.840.10008.1.2.5",),
    "JPEG baseline": ("1.2.840.10008.1.2.4.50",),
    "JPEG lossless": ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"),
    "JPEG-LS": ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"),
    "JPEG 2000": ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"),
    "HTJ2K": tuple(f"1.2.840.10008.1.2.4.{n}" for n in (201, 202, 203)),
}
_CODEC_ADVICE = {"JPEG lossless": "pip install 'medreasoner[codecs]'"}
# y = x + x for one float32: the smallest graph that a device has to compute (ONNX, IR version 8, opset 17).
_GRAPH = (
    b'\x08\x08:5\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: FAULT means that no question can be answered."""

    name: str
    state: State
    detail: str
    advice: str = ""


def examine(bundle: str) -> list[Finding]:
    """All findings; `bundle` is the name or the folder of the model to check."""
    checks = (_python, _packages, _runtime, _devices, _machine, _codecs)
    return [finding for check in checks for finding in check()] + [_bundle(bundle)]


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _python() -> Iterator[Finding]:
    import platform

    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    yield Finding("packages", "ok", ", ".join(f"{name} {_version(name) or 'absent'}" for name in _PACKAGES))
    for name, extra in _OPTIONAL.items():
        found = _version(name)
        if found:
            yield Finding("optional", "ok", f"{name} {found}")
        else:
            yield Finding("optional", "note", f"{name} is not installed", f"pip install 'medreasoner[{extra}]'")


def _runtime() -> Iterator[Finding]:
    from medreasoner.errors import ProviderError
    from medreasoner.providers import require_runtime

    names = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    try:
        require_runtime()
        yield Finding("runtime", "ok", f"{names[0]} {_version(names[0])}")
    except ProviderError as err:
        found, _, advice = str(err).partition(": ")
        yield Finding("runtime", "FAULT", found, advice)


def _devices() -> Iterator[Finding]:
    """Run a real graph on each device; what ONNX Runtime says it was built for tells nothing about the machine."""
    try:
        import onnxruntime as ort
    except Exception:
        return  # said by _runtime
    available = ort.get_available_providers()
    for provider, device in _PROVIDERS.items():
        if provider in available:
            error = _try_provider(ort, provider)
            state: State = "ok" if error is None else "FAULT" if device == "cpu" else "note"
            advice = _GPU_ADVICE[device] if error and device != "cpu" else ""
            yield Finding("device", state, f"{device} works" if error is None else f"{device}: {error}", advice)
    if "CUDAExecutionProvider" not in available:
        seen = Path("/proc/driver/nvidia/version").exists()
        found = "there is an NVIDIA GPU, but this ONNX Runtime cannot use it" if seen else "no NVIDIA GPU is seen here"
        where = "" if seen else "on a machine with one: "
        yield Finding(
            "device", "note", found, f"{where}pip uninstall -y onnxruntime, then pip install 'medreasoner[gpu]'"
        )


def _try_provider(ort: Any, provider: str) -> str | None:
    """None if the provider computes 1 + 1; else why not."""
    import numpy as np

    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(_GRAPH, options, providers=[provider], enable_fallback=0)
        if session.get_providers()[0] != provider:
            return "it does not start"
        (total,) = session.run(None, {"x": np.ones(1, np.float32)})
        return None if total.tolist() == [2.0] else f"it computes 1 + 1 = {total.tolist()}"
    except Exception as err:  # ONNX Runtime raises classes of its own
        return one_line(err)[:200]


def _machine() -> Iterator[Finding]:
    from medreasoner.ops import cpu_features, simd_level
    from medreasoner.providers import usable_cores

    features = ", ".join(cpu_features()) or "none of those looked for"
    yield Finding("processor", "ok", f"{usable_cores()} usable cores; kernels use {simd_level()}; it has {features}")
    memory = Path("/proc/meminfo")
    if memory.exists():
        lines = (line.split() for line in memory.read_text().splitlines())
        sizes = {fields[0].rstrip(":"): int(fields[1]) / 2**20 for fields in lines if len(fields) > 1}
        yield Finding("memory", "ok", f"{sizes['MemAvailable']:.1f} of {sizes['MemTotal']:.1f} GiB available")


def _codecs() -> Iterator[Finding]:
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    for name, syntaxes in _SYNTAXES.items():
        decoders = [get_decoder(UID(syntax)) for syntax in syntaxes]
        if all(decoder.is_available for decoder in decoders):
            plugins = sorted({plugin for decoder in decoders for plugin in decoder.available_plugins})
            yield Finding("codec", "ok", f"{name} ({', '.join(plugins)})")
        else:
            advice = _CODEC_ADVICE.get(name, "pip install --force-reinstall medreasoner")
            yield Finding("codec", "note", f"{name}: no decoder", advice)


def _bundle(name: str) -> Finding:
    from medreasoner.bundle import load_bundle
    from medreasoner.errors import MedReasonerError
    from medreasoner_cli.folders import bundle_path

    try:
        bundle = load_bundle(bundle_path(name))
    except MedReasonerError as err:
        return Finding("bundle", "FAULT", one_line(err), "give another with --bundle or MEDREASONER_BUNDLE")
    return Finding(
        "bundle", "ok", f"{bundle.spec.name} {bundle.spec.version}, {len(bundle.spec.files)} files as stated"
    )
