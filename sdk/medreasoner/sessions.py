"""Which session runs a graph: an engine that was built for this GPU, or ONNX Runtime, and then with the reason."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medreasoner.bundle import Bundle
from medreasoner.errors import ProviderError
from medreasoner.ort_session import OrtSession
from medreasoner.providers import CPU, RuntimeOptions
from medreasoner.session import Session

if TYPE_CHECKING:  # what runs engines is imported where there are some
    from medreasoner.engines import EngineFolder
    from medreasoner.reasoner.static_cache import StaticDecoder
    from medreasoner.trt_session import Gpu, TrtSession

__all__ = ["OpenedSession", "SessionOpener", "decoder_session"]

_ANY_CACHE = "past_key.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSession:
    """A session, the path in the bundle of the graph that it runs, and what was passed over on the way to it."""

    session: Session
    graph: str
    warnings: tuple[str, ...]


class SessionOpener:
    """Opens the sessions of a bundle's graphs.

    Parameters
    ----------
    bundle
        A verified bundle.
    options
        The device, and the folder of engines.

    Raises
    ------
    BundleError
        If the folder holds no readable ``engines.json``.
    """

    def __init__(self, bundle: Bundle, options: RuntimeOptions) -> None:
        self._bundle = bundle
        self._folder: EngineFolder | None = None
        self._gpu: Gpu | None = None
        self._reason = ""
        if options.engines_dir is None:
            return
        from medreasoner.engines import read_engines
        from medreasoner.trt_session import open_gpu

        self._folder = read_engines(options.engines_dir)
        try:
            self._gpu = open_gpu(self._folder.builder)
        except ProviderError as err:
            self._reason = str(err)

    def open(self, source: str, options: RuntimeOptions) -> OpenedSession:
        """Session of the graph at the path `source` in the bundle, or, on the CPU, of the one that it has for that.

        Raises
        ------
        BundleError
            If an engine's file is missing or altered.
        ProviderError
            If neither an engine nor ONNX Runtime runs it.
        """
        session, reason = self._engine(source)
        if session is not None:
            return OpenedSession(session=session, graph=source, warnings=())
        make = decoder_session if source == self._bundle.spec.reasoner.graphs.decoder else OrtSession
        second = self._bundle.spec.cpu_graphs().get(source, source)
        try:
            own = make(self._bundle.path(source), options, self._bundle.path(second))
        except ProviderError as err:
            if not reason:
                raise
            raise ProviderError(f"{err}; no engine runs it either: {reason}") from err
        passed_over = (f"{own.providers[0]} runs instead of an engine: {reason}",) if reason else ()
        graph = source if own.path == self._bundle.path(source) else second
        return OpenedSession(session=own, graph=graph, warnings=(*passed_over, *own.warnings))

    def _engine(self, source: str) -> tuple[Session | None, str]:
        """Session of a fitting engine, or the reason why there is none."""
        if self._folder is None or self._gpu is None:
            return None, self._reason
        record, reason = self._folder.fitting(
            self._bundle, source, architecture=self._gpu.architecture, runtime=self._gpu.runtime
        )
        if record is None:
            return None, reason
        from medreasoner.trt_session import TrtSession

        try:
            session = TrtSession(self._folder.read(record), record, self._gpu)
        except ProviderError as err:
            return None, str(err)
        return (session if source != self._bundle.spec.reasoner.graphs.decoder else _static(session)), ""


def _static(session: "TrtSession") -> "StaticDecoder":
    """The decoder's engine as the runtime drives decoders."""
    from medreasoner.reasoner.static_cache import StaticDecoder

    tensors = {each.name: each for each in session.record.inputs}
    if _ANY_CACHE not in tensors:
        raise ProviderError(f"{session.record.file}: no decoder's engine, {_ANY_CACHE} is missing; build it again")
    cache = tensors[_ANY_CACHE]
    return StaticDecoder(
        session,
        capacity=int(cache.shape[2]),
        chunk=max(profile["seq"][2] for profile in session.record.profiles if profile["batch"][0] <= 1),
        dtype=np.dtype(cache.dtype).type,
    )


def decoder_session(path: Path, options: RuntimeOptions, on_cpu: Path | None = None) -> OrtSession:
    """Session of a reasoner's decoder, on the CPU if its caches are float32.

    On a GPU, attention over shared caches takes float16 only. ONNX Runtime would place a float32 one on the CPU and
    copy its caches to and fro; what came back was wrong (seen with 1.31 on an H200).

    Raises
    ------
    ProviderError
        If another device was named.
    """
    session = OrtSession(path, options, on_cpu)
    if session.providers[0] == CPU or session.element_type(_ANY_CACHE) is np.float16:
        return session
    reason = "its caches are float32, and attention on a GPU takes float16: export it with --precision fp16"
    if options.device != "auto":
        raise ProviderError(f"{path.name} cannot run on device {options.device!r}: {reason}")
    session = OrtSession(path, replace(options, device="cpu"), on_cpu)
    session.warnings = (f"{path.stem} runs on {CPU}: {reason}",)
    return session
