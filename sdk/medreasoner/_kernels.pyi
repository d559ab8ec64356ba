"""Compiled kernels; use them through medreasoner.ops."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class AnswerState:
    """A place in one answer."""

    @property
    def absent(self) -> bool: ...
    @property
    def at_absent_choice(self) -> bool: ...
    @property
    def done(self) -> bool: ...
    @property
    def values(self) -> list[int]: ...
    def accept(self, token: int) -> None: ...
    def allowed(self) -> NDArray[np.int32]: ...
    def copy(self) -> AnswerState: ...
    def forced(self) -> list[int]: ...

class AnswerGrammar:
    """Answers as an automaton over token ids."""

    def __init__(
        self, literals: Sequence[Sequence[int]], numbers: Sequence[Sequence[int]], absent: Sequence[int] | None
    ) -> None: ...
    def start(self, width: int, height: int) -> AnswerState: ...

class ParsedAnswer:
    """What a text says."""

    @property
    def absent(self) -> bool: ...
    @property
    def bbox(self) -> tuple[float, float, float, float] | None: ...
    @property
    def missing(self) -> list[str]: ...
    @property
    def points_1(self) -> tuple[float, float] | None: ...
    @property
    def points_2(self) -> tuple[float, float] | None: ...
    @property
    def status(self) -> str: ...
    @property
    def thought(self) -> str | None: ...

class AnswerParser:
    """Incremental parser of a model's text."""

    def __init__(self) -> None: ...
    def feed(self, text: str) -> None: ...
    def result(self) -> ParsedAnswer: ...

class AnswerWriting:
    """One answer under way."""

    def __init__(
        self,
        state: AnswerState,
        sequence: DecoderSequence,
        past: int,
        position: int,
        hidden: NDArray[np.float32] | None,
        pending: Sequence[int],
        temperature: float,
        shares: Sequence[float],
        decides_absent: bool = ...,
        threshold: float | None = ...,
        ahead: Sequence[int] = ...,
    ) -> None: ...
    @property
    def absent_share(self) -> float | None: ...
    @property
    def ahead(self) -> list[int]: ...
    @property
    def hidden(self) -> NDArray[np.float32] | None: ...
    @property
    def is_stuck(self) -> bool: ...
    @property
    def n_chosen(self) -> int: ...
    @property
    def n_runs(self) -> int: ...
    @property
    def past(self) -> int: ...
    @property
    def pending(self) -> list[int]: ...
    @property
    def position(self) -> int: ...
    @property
    def seconds_to_hidden(self) -> float: ...
    @property
    def written(self) -> list[int]: ...

class DecoderSequence:
    """A decoder and one sequence's keys and values."""

class DecoderStep:
    """The weights of a decoder, and the threads that run it."""

    def __init__(
        self,
        dtype: str,
        heads: int,
        kv_heads: int,
        epsilon: float,
        matrices: Iterable[Sequence[NDArray[Any]]],
        vectors: Sequence[Sequence[NDArray[np.float32]]],
        final_norm: NDArray[np.float32],
        pack: bool = ...,
        n_threads: int = ...,
    ) -> None: ...
    def open(self, keys: Sequence[NDArray[Any]], values: Sequence[NDArray[Any]]) -> DecoderSequence: ...

class ImageEncoder:
    """The weights of SAM's image encoder as tiles, and the threads that run it."""

    def __init__(
        self,
        dtype: str,
        weights: Mapping[str, NDArray[Any]],
        heads: int,
        patch: int,
        grid: int,
        windows: Sequence[int],
        epsilon: float,
        pack: bool = ...,
        n_threads: int = ...,
    ) -> None: ...
    def run(self, pixels: NDArray[np.float32], alone: bool = ...) -> NDArray[np.float32]: ...

class PromptDecoder:
    """The weights of a mask decoder as tiles."""

    def __init__(
        self,
        dtype: str,
        weights: Mapping[str, NDArray[Any]],
        heads: int,
        grid: int,
        image_size: float,
        n_layers: int,
        iou_depth: int,
        first_mask: int,
        n_masks: int,
        epsilon: float,
        prompt_epsilon: float,
    ) -> None: ...
    def run(
        self, embedding: NDArray[np.float32], points: NDArray[np.float32], labels: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...

class VisionTower:
    """The weights of a vision tower as tiles, and the threads that run it."""

    def __init__(
        self,
        dtype: str,
        patches_dtype: str,
        heads: int,
        merged: int,
        epsilon: float,
        patches: NDArray[Any],
        matrices: Sequence[Sequence[NDArray[Any]]],
        vectors: Sequence[Sequence[NDArray[np.float32]]],
        is_full: Sequence[bool],
        last_matrices: Sequence[NDArray[Any]],
        last_vectors: Sequence[NDArray[np.float32]],
        pack: bool = ...,
        n_threads: int = ...,
    ) -> None: ...
    def run(
        self,
        patches: NDArray[np.float32],
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
        order: NDArray[np.int64],
        window_starts: NDArray[np.int64],
        alone: bool = ...,
    ) -> NDArray[np.float32]: ...

class Interrupt:
    """Says to whoever runs that there is something else to do."""

    def __init__(self) -> None: ...
    def clear(self) -> None: ...
    def set(self) -> None: ...

def count_masks(
    logits: NDArray[np.float32],
    *,
    crop: tuple[float, float],
    height: int,
    width: int,
    threshold: float,
    n_threads: int = ...,
) -> NDArray[np.uint8]: ...
def cpu_features() -> list[str]: ...
def decoder_step(
    sequences: Sequence[DecoderSequence],
    pasts: Sequence[int],
    counts: Sequence[int],
    embeds: NDArray[np.float32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    n_out: Sequence[int] | None = ...,
) -> NDArray[np.float32]: ...
def absent_share(logits: NDArray[np.float32], leads_to_absent: NDArray[np.bool_]) -> float: ...
def draw_token(logits: NDArray[np.float32], temperature: float, share: float) -> int: ...
def gather_rows(weight: NDArray[Any], dtype: str, ids: NDArray[np.int64]) -> NDArray[np.float32]: ...
def mask_box(mask: NDArray[np.bool_]) -> list[int] | None: ...
def mask_from_logits(
    logits: NDArray[np.float32], *, crop: tuple[float, float], height: int, width: int, threshold: float
) -> NDArray[np.bool_]: ...
def preprocess_patches(
    pixels: NDArray[np.uint8],
    height: int,
    width: int,
    *,
    content: tuple[int, int] | None,
    mean: Sequence[float],
    std: Sequence[float],
    patch: int,
    merge: int,
) -> NDArray[np.float32]: ...
def preprocess_planes(
    pixels: NDArray[np.uint8],
    height: int,
    width: int,
    *,
    content: tuple[int, int] | None,
    mean: Sequence[float],
    std: Sequence[float],
) -> NDArray[np.float32]: ...
def project_rows(
    hidden: NDArray[np.float32],
    weight: NDArray[Any],
    dtype: str,
    rows: NDArray[np.int32] | None,
    n_threads: int = ...,
) -> NDArray[np.float32]: ...
def resize_u8(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]: ...
def rle_decode(counts: str, height: int, width: int) -> NDArray[np.bool_]: ...
def rle_encode(mask: NDArray[np.bool_]) -> str: ...
def select_token(
    hidden: NDArray[np.float32], weight: NDArray[Any], dtype: str, rows: NDArray[np.int32]
) -> tuple[int, float]: ...
def set_simd_level(name: str) -> None: ...
def simd_level() -> str: ...
def simd_levels() -> list[str]: ...
def window_u8(
    values: NDArray[Any],
    slope: float,
    intercept: float,
    center: float,
    width: float,
    *,
    function: str,
    invert: bool,
) -> NDArray[np.uint8]: ...
def write_answers(
    answers: Sequence[AnswerWriting],
    embedding: NDArray[Any],
    embedding_dtype: str,
    head: NDArray[Any],
    head_dtype: str,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    interrupt: Interrupt,
    seconds: float | None,
    n_threads: int,
) -> None: ...
def distances(window: int) -> int: ...
def has_tiles() -> bool: ...
def tile_road() -> str: ...
def tile_roads() -> list[str]: ...
def set_tile_road(name: str) -> None: ...
