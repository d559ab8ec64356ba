"""A loaded bundle: the two models, the threads that they share, and what is known about them."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np

from medreasoner.bundle import Bundle
from medreasoner.errors import MedReasonerError, ProviderError
from medreasoner.providers import CPU, OrtSession, RuntimeOptions
from medreasoner.reasoner import Reasoner
from medreasoner.reasoner.prompt import load_tokenizer
from medreasoner.reasoner.weights import load_weight
from medreasoner.segmenter import Segmenter

__all__ = ["Engine", "decoder_session", "load_engine", "step_options"]

# Waking the other threads of a session costs tens of microseconds an operator. A step of the decoder is one vector
# times a matrix, and a small mask decoder has few tokens: below these sizes one thread is twice as fast as two.
_SPLIT_FROM_HIDDEN_DIM = 1024
_SPLIT_FROM_MASK_SIZE = 128
_CLOSED = "this Grounder is closed"
_ANY_CACHE = "past_key.0"

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Engine:
    """A bundle that is ready to run."""

    reasoner: Reasoner
    segmenter: Segmenter
    pool: ThreadPoolExecutor
    model_name: str
    model_version: str
    model_digest: str
    providers: Mapping[str, str]  # of each graph, the one that runs it
    warnings: tuple[str, ...]
    process: int = field(default_factory=os.getpid)
    closed: bool = False

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
        if self.closed:
            raise MedReasonerError(_CLOSED)

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


def decoder_session(path: Path, options: RuntimeOptions) -> OrtSession:
    """Session of a reasoner's decoder, on the CPU if its caches are float32.

    On a GPU, attention over shared caches takes float16 only. ONNX Runtime would place a float32 one on the CPU and
    copy its caches to and fro; what came back was wrong (seen with 1.31 on an H200).

    Raises
    ------
    ProviderError
        If another device was named.
    """
    session = OrtSession(path, options)
    if session.providers[0] == CPU or session.element_type(_ANY_CACHE) is np.float16:
        return session
    reason = "its caches are float32, and attention on a GPU takes float16: export it with --precision fp16"
    if options.device != "auto":
        raise ProviderError(f"{path.name} cannot run on device {options.device!r}: {reason}")
    session = OrtSession(path, replace(options, device="cpu"))
    session.warnings = (f"{path.stem} runs on {CPU}: {reason}",)
    return session


def load_engine(bundle: Bundle, options: RuntimeOptions) -> Engine:
    """Engine of a verified bundle; its sessions are made in threads, the longest first."""
    spec = bundle.spec
    reasoner, segmenter = spec.reasoner, spec.segmenter
    graphs = (
        (reasoner.graphs.vision, options),
        (segmenter.graphs.encoder, options),
        (reasoner.graphs.decoder, step_options(options, splits=reasoner.hidden_dim >= _SPLIT_FROM_HIDDEN_DIM)),
        (segmenter.graphs.decoder, step_options(options, splits=segmenter.mask_size >= _SPLIT_FROM_MASK_SIZE)),
    )
    with ThreadPoolExecutor(len(graphs) + 1) as pool:
        kinds: dict[str, Callable[[Path, RuntimeOptions], OrtSession]] = {reasoner.graphs.decoder: decoder_session}
        sessions = [pool.submit(kinds.get(name, OrtSession), bundle.path(name), chosen) for name, chosen in graphs]
        tokenizer = pool.submit(load_tokenizer, str(bundle.path(reasoner.tokenizer)))
        embedding = load_weight(bundle.path(reasoner.embedding.file), reasoner.embedding)
        lm_head = load_weight(bundle.path(reasoner.lm_head.file), reasoner.lm_head)
        loaded = {name: session.result() for (name, _), session in zip(graphs, sessions, strict=True)}
        vision, encoder, decoder, mask_decoder = loaded.values()
        warnings = dict.fromkeys(line for session in loaded.values() for line in session.warnings)
        return Engine(
            reasoner=Reasoner(
                reasoner,
                vision=vision,
                decoder=decoder,
                tokenizer=tokenizer.result(),
                embedding=embedding,
                lm_head=lm_head,
            ),
            segmenter=Segmenter(segmenter, encoder=encoder, decoder=mask_decoder),
            pool=ThreadPoolExecutor(2, thread_name_prefix="medreasoner"),
            model_name=spec.name,
            model_version=spec.version,
            model_digest=bundle.digest,
            providers={name: session.providers[0] for name, session in loaded.items()},
            warnings=tuple(warnings),
        )
