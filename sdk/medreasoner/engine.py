"""A loaded bundle: the two models, the threads that they share, and what is known about them."""

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

from medreasoner.bundle import Bundle
from medreasoner.drawing import DrawingSession, load_drawing
from medreasoner.errors import MedReasonerError, ProviderError
from medreasoner.image_tower import load_image_tower
from medreasoner.kernel_session import ReadingSession, runs_without_graph
from medreasoner.ort_session import OrtSession
from medreasoner.providers import CPU, RuntimeOptions, is_cpu_only, require_runtime, usable_cores
from medreasoner.readings import CACHE_BYTES, ReadingCache
from medreasoner.reasoner import Reasoner
from medreasoner.reasoner.model import MAX_WAITING
from medreasoner.reasoner.prompt import load_tokenizer
from medreasoner.reasoner.step import StepKernel, load_step, needs_no_graph, no_graph, steps_pay
from medreasoner.reasoner.tower import load_tower
from medreasoner.reasoner.weights import load_weight
from medreasoner.segmenter import Segmenter
from medreasoner.session import Session
from medreasoner.sessions import OpenedSession, SessionOpener, decoder_session
from medreasoner.spec import ConfidenceSpec, ReasonerSpec, SegmenterSpec

__all__ = ["Engine", "Sharing", "Towers", "load_engine", "load_reasoner", "load_segmenter", "step_options"]

# Waking the other threads of a session costs tens of microseconds an operator. A step of the decoder is one vector
# times a matrix, and a small mask decoder has few tokens: below these sizes one thread is twice as fast as two.
_SPLIT_FROM_HIDDEN_DIM = 1024
_SPLIT_FROM_MASK_SIZE = 128
# Our own step wakes nobody between its products: of a small decoder's weights two cores keep half each in their caches.
_SMALL_STEP_THREADS = 2
_SECOND_SESSION_BYTES = 64 * 2**20
_KERNELS = (ReadingSession, DrawingSession)
_CLOSED = "this Grounder is closed"

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Models:
    reasoner: Reasoner
    segmenter: Segmenter


@dataclass(frozen=True, slots=True, kw_only=True)
class Towers:
    """Sessions of one thread that read images, for callers that run side by side on so many cores."""

    vision: Session
    encoder: Session
    n_cores: int


@dataclass(slots=True, kw_only=True)
class Engine:
    """A bundle that is ready to run."""

    models: _Models | None
    pool: ThreadPoolExecutor
    model_name: str
    model_version: str
    model_digest: str
    providers: Mapping[str, str]  # of each graph, the one that runs it
    kernels: Mapping[str, str]  # in the place of graphs, and what they multiply
    warnings: tuple[str, ...]
    readings: ReadingCache
    confidence: ConfidenceSpec | None
    open_towers: Callable[[], Towers | None]  # the same ones each time; None where they would not pay
    process: int = field(default_factory=os.getpid)

    @property
    def reasoner(self) -> Reasoner:
        """The model that reads the question.

        Raises
        ------
        MedReasonerError
            If closed.
        """
        return self._open().reasoner

    @property
    def segmenter(self) -> Segmenter:
        """The model that draws the mask.

        Raises
        ------
        MedReasonerError
            If closed.
        """
        return self._open().segmenter

    @property
    def is_on_cpu(self) -> bool:
        """Whether all graphs run on the CPU."""
        return all(each == CPU for each in self.providers.values())

    def _open(self) -> _Models:
        models = self.models
        if models is None:
            raise MedReasonerError(_CLOSED)
        return models

    def close(self) -> None:
        """Let go of the sessions, their memory and the GPU; who is in the middle of a run keeps them until its end."""
        self.models, self.open_towers = None, lambda: None
        self.readings.clear()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def check(self) -> None:
        """Refuse to work when closed, or in a process that was forked off after loading.

        Raises
        ------
        ProviderError
            After a fork: the threads of ONNX Runtime do not exist in the child, and a run would hang.
        MedReasonerError
            If closed.
        """
        if self.process != os.getpid():
            raise ProviderError(
                "this Grounder was loaded before the process was forked and cannot run here; "
                "load it in the child, or start processes with 'spawn'"
            )
        self._open()

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Run a call in the engine's threads.

        Raises
        ------
        MedReasonerError
            If closed, be it at this very moment by another thread.
        """
        try:
            return self.pool.submit(call, *args, **kwargs)
        except RuntimeError:
            raise MedReasonerError(_CLOSED) from None


def step_options(options: RuntimeOptions, *, splits: bool) -> RuntimeOptions:
    """Options of a graph that answers queries: one thread, unless its operators are worth splitting or a number is set.

    >>> step_options(RuntimeOptions(), splits=False).n_threads
    1
    """
    return options if splits or options.n_threads is not None else replace(options, n_threads=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How callers share a model.

    `n_slots` sequences are decoded at once, None: as many as a few gigabytes of keys and values allow, at most eight;
    `max_waiting` may wait for a slot; `cache_bytes` are kept of images that were read.
    """

    n_slots: int | None = None
    max_waiting: int = MAX_WAITING
    cache_bytes: int = CACHE_BYTES

    def __post_init__(self) -> None:
        for name, least in (("n_slots", 1), ("max_waiting", 0), ("cache_bytes", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ProviderError(f"{name}: expected at least {least}, got {value}")


def load_engine(bundle: Bundle, options: RuntimeOptions, sharing: Sharing | None = None) -> Engine:
    """Engine of a verified bundle; its sessions are made in threads, the longest first."""
    sharing = sharing or Sharing()
    spec = bundle.spec
    reasoner, segmenter = spec.reasoner, spec.segmenter
    splits = reasoner.hidden_dim >= _SPLIT_FROM_HIDDEN_DIM
    decoding = step_options(options, splits=splits)
    n_cores = options.n_threads or usable_cores()
    n_threads = n_cores if splits else 1  # of what runs without a session
    step_threads = n_cores if splits else min(n_cores, _SMALL_STEP_THREADS)
    opener = SessionOpener(bundle, options)
    with ThreadPoolExecutor(5) as pool:
        vision = pool.submit(_open_vision, reasoner, bundle.path, opener.open, options, n_cores)
        encoder = pool.submit(_open_encoder, bundle, opener, options)
        decoder = pool.submit(_open_decoder, reasoner, bundle.path, opener.open, decoding, step_threads)
        mask_decoder = pool.submit(_open_masks, bundle, opener, options)
        tokenizer = pool.submit(load_tokenizer, str(bundle.path(reasoner.tokenizer)))
        embedding = load_weight(bundle.path(reasoner.embedding.file), reasoner.embedding)
        lm_head = load_weight(bundle.path(reasoner.lm_head.file), reasoner.lm_head, n_threads=n_threads)
        opened_decoder, step = decoder.result()
        opened = (vision.result(), encoder.result(), opened_decoder, mask_decoder.result())
        warnings = dict.fromkeys(line for each in opened for line in each.warnings)
        return Engine(
            models=_Models(
                Reasoner(
                    reasoner,
                    vision=opened[0].session,
                    decoder=opened_decoder.session,
                    tokenizer=tokenizer.result(),
                    embedding=embedding,
                    lm_head=lm_head,
                    step=step,
                    n_slots=sharing.n_slots,
                    max_waiting=sharing.max_waiting,
                    n_threads=1 if splits else n_cores,
                ),
                Segmenter(segmenter, encoder=opened[1].session, decoder=opened[3].session, n_threads=n_cores),
            ),
            pool=ThreadPoolExecutor(2, thread_name_prefix="medreasoner"),
            model_name=spec.name,
            model_version=spec.version,
            model_digest=bundle.digest,
            providers={each.graph: each.session.providers[0] for each in opened},
            kernels={each.graph: each.session.products for each in opened if isinstance(each.session, _KERNELS)},
            warnings=tuple(warnings),
            readings=ReadingCache(sharing.cache_bytes),
            confidence=spec.confidence,
            open_towers=_tower_opener(bundle, options, opener, n_cores=n_cores, graphs=(opened[0], opened[1])),
        )


def _tower_opener(
    bundle: Bundle,
    options: RuntimeOptions,
    opener: SessionOpener,
    *,
    n_cores: int,
    graphs: tuple[OpenedSession, OpenedSession],
) -> Callable[[], Towers | None]:
    """Opens second sessions of the graphs that read images, once: of small ones on a CPU with several cores."""
    names = tuple(each.graph for each in graphs)
    # Weights of a large graph lie in a file beside it; its operators are worth splitting, and its memory is not there.
    n_bytes = sum(file.size_bytes for name, file in bundle.spec.files.items() if name.startswith(names))
    pays = n_cores > 1 and n_bytes <= _SECOND_SESSION_BYTES and all(each.session.providers[0] == CPU for each in graphs)

    lock, opened = threading.Lock(), list[Towers]()

    def open_towers() -> Towers | None:
        with lock:
            if pays and not opened:
                for name in names:
                    bundle.check(name)
                one, spec = replace(options, n_threads=1), bundle.spec
                vision, encoder = (
                    each.session.alone() if isinstance(each.session, ReadingSession) else opener.open(name, one).session
                    for each, name in zip(graphs, (names[0], spec.segmenter.graphs.encoder), strict=True)
                )
                opened.append(Towers(vision=vision, encoder=encoder, n_cores=n_cores))
            return opened[0] if opened else None

    return open_towers


def load_reasoner(
    spec: ReasonerSpec, folder: Path, options: RuntimeOptions, *, n_slots: int, max_waiting: int
) -> Reasoner:
    """The reasoner alone, of a folder that an export wrote; whoever calls vouches for the files.

    Its threads are those of the options, also where a question alone would not be worth waking them.

    Raises
    ------
    BundleError
        If the tokenizer, texts and sizes do not fit together.
    ProviderError
        If the device does not work.
    """

    def open_session(name: str, options: RuntimeOptions) -> OpenedSession:
        make = decoder_session if name == spec.graphs.decoder else OrtSession
        session = make(folder / name, options)
        return OpenedSession(session=session, graph=name, warnings=session.warnings)

    n_threads = options.n_threads or usable_cores()
    with ThreadPoolExecutor(2) as pool:
        vision = pool.submit(_open_vision, spec, lambda name: folder / name, open_session, options, n_threads)
        tokenizer = pool.submit(load_tokenizer, str(folder / spec.tokenizer))
        decoder, step = _open_decoder(spec, lambda name: folder / name, open_session, options, n_threads)
        return Reasoner(
            spec,
            vision=vision.result().session,
            decoder=decoder.session,
            tokenizer=tokenizer.result(),
            embedding=load_weight(folder / spec.embedding.file, spec.embedding),
            lm_head=load_weight(folder / spec.lm_head.file, spec.lm_head, n_threads=n_threads),
            step=step,
            n_slots=n_slots,
            max_waiting=max_waiting,
        )


def load_segmenter(bundle: Bundle, options: RuntimeOptions) -> Segmenter:
    """The segmenter alone, of a verified bundle: for masks of boxes and points that come from elsewhere.

    Raises
    ------
    ProviderError
        If there is no ONNX Runtime, or two, or the device does not work.
    """
    require_runtime()
    spec, opener = bundle.spec.segmenter, SessionOpener(bundle, options)
    return Segmenter(
        spec,
        encoder=_open_encoder(bundle, opener, options).session,
        decoder=_open_masks(bundle, opener, options).session,
        n_threads=options.n_threads or usable_cores(),
    )


def _mask_options(segmenter: SegmenterSpec, options: RuntimeOptions) -> RuntimeOptions:
    return step_options(options, splits=_splits_masks(segmenter))


def _splits_masks(segmenter: SegmenterSpec) -> bool:
    """Whether the mask decoder's operators are worth splitting."""
    return segmenter.mask_size >= _SPLIT_FROM_MASK_SIZE


def _open_vision(
    reasoner: ReasonerSpec,
    find: Callable[[str], Path],
    open_session: Callable[[str, RuntimeOptions], OpenedSession],
    options: RuntimeOptions,
    n_threads: int,
) -> OpenedSession:
    """The vision tower's session, or on a CPU the kernel that does without its graph."""
    tower, graph = reasoner.tower, reasoner.graphs.vision
    if tower is None or not runs_without_graph(tower):
        return open_session(graph, options)

    def load() -> Session:
        path, out_dim = find(tower.file), reasoner.hidden_dim
        return load_tower(path, tower, reasoner.vision, out_dim=out_dim, n_threads=n_threads)

    return _kernel_on_cpu(graph, open_session, options, load)


def _open_encoder(bundle: Bundle, opener: SessionOpener, options: RuntimeOptions) -> OpenedSession:
    """The image encoder's session, or on a CPU the kernel that does without its graph."""
    spec = bundle.spec.segmenter
    tower, graph = spec.tower, spec.graphs.encoder
    if tower is None or not runs_without_graph(tower):
        return opener.open(graph, options)

    def load() -> Session:
        n_threads = options.n_threads or usable_cores()
        return load_image_tower(bundle.path(tower.file), spec, tower, n_threads=n_threads)

    return _kernel_on_cpu(graph, opener.open, options, load)


def _open_masks(bundle: Bundle, opener: SessionOpener, options: RuntimeOptions) -> OpenedSession:
    """The mask decoder's session, or on a CPU the kernel that does without its graph and keeps to one core."""
    spec = bundle.spec.segmenter
    drawing, graph, options = spec.drawing, spec.graphs.decoder, _mask_options(spec, options)
    splits = _splits_masks(spec) and (options.n_threads or usable_cores()) > 1
    if drawing is None or splits or spec.cpu_graphs.decoder is not None or not runs_without_graph(drawing):
        return opener.open(graph, options)
    return _kernel_on_cpu(graph, opener.open, options, lambda: load_drawing(bundle.path(drawing.file), spec, drawing))


def _kernel_on_cpu(
    graph: str,
    open_session: Callable[[str, RuntimeOptions], OpenedSession],
    options: RuntimeOptions,
    load: Callable[[], Session],
) -> OpenedSession:
    """The kernel, unless something else than the CPU runs the graph."""
    warnings: tuple[str, ...] = ()
    if not is_cpu_only(options):
        opened = open_session(graph, options)
        if opened.session.providers[0] != CPU:
            return opened
        warnings = opened.warnings
        del opened  # known now: the graph's memory is let go before the kernel takes its own
    return OpenedSession(session=load(), graph=graph, warnings=warnings)


def _open_decoder(
    reasoner: ReasonerSpec,
    find: Callable[[str], Path],
    open_session: Callable[[str, RuntimeOptions], OpenedSession],
    options: RuntimeOptions,
    n_threads: int,
) -> tuple[OpenedSession, StepKernel | None]:
    """The decoder's session, and what runs steps in its place; a kernel that runs all needs no session."""
    step = reasoner.step if reasoner.cpu_graphs.decoder is None and steps_pay() else None
    graph = reasoner.graphs.decoder
    if step is not None and needs_no_graph(step):
        opened = _kernel_on_cpu(graph, open_session, options, lambda: no_graph(step))
    else:
        opened = open_session(graph, options)
    if step is None or opened.session.providers[0] != CPU:
        return opened, None
    return opened, load_step(find(step.file), reasoner, step, n_threads=n_threads)
