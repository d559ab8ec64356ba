"""The one class and the one call: a loaded bundle that answers questions about images."""

import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TypeAlias, overload

from medreasoner.ask import Ask
from medreasoner.bundle import Bundle, Verify, load_bundle
from medreasoner.engine import Engine, Sharing, load_engine
from medreasoner.errors import QueryError
from medreasoner.image import ImageSource, read_image
from medreasoner.lists import answer_each, answer_one, read_timed
from medreasoner.opening import open_studies
from medreasoner.providers import Device, RuntimeOptions, require_runtime
from medreasoner.readings import CACHE_BYTES
from medreasoner.reasoner import Cancellation
from medreasoner.reasoner.model import MAX_WAITING
from medreasoner.result import Answer, Grounding, Thought
from medreasoner.study import Study, answer_all

__all__ = ["Grounder", "ground"]

Queries: TypeAlias = list[str] | tuple[str, ...]
Images: TypeAlias = "list[ImageSource] | tuple[ImageSource, ...]"


class Grounder:
    """A loaded bundle; made by `load`. A context manager, and safe to use from several threads.

    >>> with Grounder.load("nano") as grounder:                                    # doctest: +SKIP
    ...     result = grounder.ground("chest.dcm", "Where is the air-filled tissue?")
    """

    def __init__(self, engine: Engine, bundle: Bundle) -> None:
        self._engine, self.bundle = engine, bundle

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str] = "nano",
        *,
        device: Device = "auto",
        n_threads: int | None = None,
        verify: Verify = "auto",
        cache_dir: Path | None = None,
        engines: str | os.PathLike[str] | None = None,
        n_slots: int | None = None,
        max_waiting: int = MAX_WAITING,
        cache_bytes: int = CACHE_BYTES,
    ) -> "Grounder":
        """Load a bundle and prove its files.

        Parameters
        ----------
        bundle
            ``"nano"``, which ships with the package, or the path of a bundle's folder.
        device
            ``"auto"`` takes the first of TensorRT, CUDA and CPU that works; results say in their warnings what was
            passed over. A device asked for by name must work.
        n_threads
            Threads of a session on the CPU; None: the cores that this process may use, and one for small graphs that
            answer queries, where waking the others costs more than it gains.
        verify
            ``"full"`` hashes every file, ``"auto"`` skips those above 64 MB that were hashed before.
        cache_dir
            For engines and the list of verified files; None: ``~/.cache/medreasoner``.
        engines
            Folder that `medreasoner-cli export tensorrt` wrote for this bundle, with device ``"auto"`` or
            ``"tensorrt"``. Graphs whose engine fits the GPU run on it; results say in their warnings why another one
            does not.
        n_slots
            How many questions are decoded at once; each takes the memory of its keys and values. None: eight, or fewer
            where those would take more than 2 GiB.
        max_waiting
            How many may wait for that; more are refused with `QueueFullError`.
        cache_bytes
            Memory for images that were read, so that another question about the same pixels costs only its own tokens,
            also to a plain `ground`. The one that was not asked about for the longest goes first. 0: none are kept.

        Raises
        ------
        BundleError
            If the bundle is absent, malformed or altered, or so are the engines.
        ProviderError
            If there is no ONNX Runtime, or two, or the device does not work.
        """
        with ThreadPoolExecutor(1) as pool:  # hashing leaves the interpreter to the import of ONNX Runtime
            runtime = pool.submit(require_runtime)
            try:
                verified = load_bundle(bundle, verify=verify, cache_dir=cache_dir)
            finally:
                runtime.result()
        cache = (cache_dir or Path.home() / ".cache" / "medreasoner") / "engines" / verified.digest
        options = RuntimeOptions(
            device=device,
            n_threads=n_threads,
            engine_cache_dir=cache,
            engines_dir=None if engines is None else Path(engines),
        )
        sharing = Sharing(n_slots=n_slots, max_waiting=max_waiting, cache_bytes=cache_bytes)
        return cls(load_engine(verified, options, sharing), verified)

    def __enter__(self) -> "Grounder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def providers(self) -> Mapping[str, str]:
        """Of each graph in use, by its path in the bundle, what runs it: ONNX Runtime's provider, or TensorRT-RTX."""
        return self._engine.providers

    @property
    def kernels(self) -> Mapping[str, str]:
        """Of each graph that reads images or draws masks, and in whose place a kernel of this package runs on this CPU:
        the numbers that it multiplies, ``"bfloat16"`` or ``"int8"``.
        """
        return self._engine.kernels

    def close(self) -> None:
        """Let go of the models and the GPU; queries are refused from now on, also those of open studies."""
        self._engine.close()

    def open(self, image: ImageSource, *, frame: int | None = None) -> Study:
        """Read an image, for any number of queries.

        Parameters
        ----------
        image
            Path, bytes, array, Pillow picture, pydicom data set or `Image`; see `read_image`.
        frame
            Index from 0 of the frame, page or slice.

        Raises
        ------
        ImageReadError
            If the image cannot be read.
        """
        return open_studies(self._engine, [read_timed(image, frame)], Ask())[0]

    @overload
    def ground(
        self,
        image: ImageSource,
        query: str,
        *,
        think: bool = ...,
        frame: int | None = ...,
        unconstrained: bool = ...,
        samples: int = ...,
        temperature: float | None = ...,
        seed: int = ...,
        timeout_s: float | None = ...,
    ) -> Grounding: ...

    @overload
    def ground(
        self,
        image: "ImageSource | Images",
        query: Queries,
        *,
        think: bool = ...,
        frame: int | None = ...,
        unconstrained: bool = ...,
        samples: int = ...,
        temperature: float | None = ...,
        seed: int = ...,
        timeout_s: float | None = ...,
    ) -> list[Grounding]: ...

    def ground(
        self,
        image: "ImageSource | Images",
        query: str | Queries,
        *,
        think: bool = False,
        frame: int | None = None,
        unconstrained: bool = False,
        samples: int = 1,
        temperature: float | None = None,
        seed: int = 0,
        timeout_s: float | None = None,
    ) -> Grounding | list[Grounding]:
        """Answer questions about images.

        Questions of several threads, or of a list, are decoded together. That changes nothing in their answers.

        Parameters
        ----------
        image
            One image (see `read_image`), or a list or tuple of them.
        query
            One question; or a list of them, as many as images, or any number for one image.
        think
            Whether the reasoner reasons in words first.
        frame
            Index from 0 of the frame, page or slice of each image.
        unconstrained
            Whether it answers as free text that is then parsed, instead of following the grammar of answers: only to
            compare.
        samples, temperature, seed
            How many answers to draw for each question, and how; see `Study.ground`.
        timeout_s
            Seconds after which to give up, between two steps of the decoder; None: never.

        Returns
        -------
        Grounding or list of Grounding
            As many as queries, in their order.

        Raises
        ------
        ImageReadError
            If an image cannot be read.
        QueryError
            If a query is empty, no text or too long, or the lists do not fit.
        GenerationError
            If the reasoner gave no usable answer.
        QueueFullError
            If as many questions wait already as may.
        DeadlineError
            If the time was over.
        """
        ask = Ask.within(
            timeout_s, think=think, unconstrained=unconstrained, samples=samples, temperature=temperature, seed=seed
        )
        return self._ground(image, query, frame, ask)

    async def aground(
        self,
        image: ImageSource,
        query: str,
        *,
        think: bool = False,
        frame: int | None = None,
        samples: int = 1,
        temperature: float | None = None,
        seed: int = 0,
        timeout_s: float | None = None,
    ) -> Grounding:
        """Answer a question without holding up the event loop; cancelling the task gives the question up.

        Parameters and errors are those of `ground`.
        """
        import asyncio  # here, since a program without an event loop should not pay for its import

        cancellation = Cancellation()
        ask = Ask.within(
            timeout_s, think=think, samples=samples, temperature=temperature, seed=seed, cancellation=cancellation
        )
        try:
            return await asyncio.to_thread(answer_one, self._engine, image, query, frame, ask)
        except asyncio.CancelledError:
            cancellation.cancel()
            raise

    def _ground(
        self, image: "ImageSource | Images", query: str | Queries, frame: int | None, ask: Ask
    ) -> Grounding | list[Grounding]:
        images, queries = _pairs(image, query)
        if isinstance(query, str):
            return answer_one(self._engine, images[0], query, frame, ask)
        self._engine.check()
        if not queries:
            return []
        for each in queries:  # before any work
            self._engine.reasoner.prompt.check(each)
        if len(images) == 1:
            with open_studies(self._engine, [read_timed(images[0], frame)], ask)[0] as study:
                questions = [(study, each, number == 0) for number, each in enumerate(queries)]
                return answer_all(self._engine, questions, ask)
        return answer_each(self._engine, images, queries, frame, ask)

    def stream(
        self,
        image: ImageSource,
        query: str,
        *,
        think: bool = True,
        frame: int | None = None,
        unconstrained: bool = False,
        timeout_s: float | None = None,
    ) -> Iterator[Thought | Answer | Grounding]:
        """Answer a question, and tell on the way: pieces of the thought, the answer, and the result at the end.

        Parameters and errors are those of `ground`; they arise when the first event is asked for. A stream that is
        closed before its end gives the question up.
        """
        self._engine.check()
        self._engine.reasoner.prompt.check(query)
        ask = Ask.within(timeout_s, think=think, unconstrained=unconstrained)
        with open_studies(self._engine, [read_timed(image, frame)], ask)[0] as study:
            yield from study.ask(query, ask, is_first=True).events()


@overload
def ground(image: ImageSource, query: str, *, think: bool = ..., frame: int | None = ...) -> Grounding: ...


@overload
def ground(
    image: "ImageSource | Images", query: Queries, *, think: bool = ..., frame: int | None = ...
) -> list[Grounding]: ...


def ground(
    image: "ImageSource | Images", query: str | Queries, *, think: bool = False, frame: int | None = None
) -> Grounding | list[Grounding]:
    """Answer questions about images with the nano bundle, which is loaded once a process.

    Parameters, lists among them, and errors are those of `Grounder.load` and `Grounder.ground`.
    """
    if isinstance(image, list | tuple):
        with _loading.lock:
            grounder = _default_grounder(os.getpid())
        return grounder.ground(image, query, think=think, frame=frame)
    with ThreadPoolExecutor(1) as pool:  # the image is read while the models load
        reading = pool.submit(read_image, image, frame=frame)
        with _loading.lock:  # several threads may ask at once for the first time
            grounder = _default_grounder(os.getpid())
        return grounder.ground(reading.result(), query, think=think)


class _Loading:
    """Held while nano is loaded; a process that is forked off meanwhile gets a lock of its own."""

    def __init__(self) -> None:
        self.renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        self.lock = threading.Lock()


_loading = _Loading()


@lru_cache(maxsize=1)
def _default_grounder(_process: int) -> Grounder:
    return Grounder.load()


def _pairs(image: "ImageSource | Images", query: str | Queries) -> tuple[list[ImageSource], list[str]]:
    images = list(image) if isinstance(image, list | tuple) else [image]
    if isinstance(query, str):
        if isinstance(image, list | tuple):
            raise QueryError(f"one query for a list of {len(images)} images: give a list of as many queries")
        return images, [query]
    if not isinstance(query, list | tuple):
        raise QueryError(f"query: expected text or a list of texts, got {type(query).__name__}")
    if isinstance(image, list | tuple) and len(images) != len(query):
        raise QueryError(f"{len(images)} images and {len(query)} queries: lists must have one length")
    return images, list(query)
