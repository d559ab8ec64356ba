"""What a bundle's manifest says, as frozen records: the single truth for names, shapes and limits of its graphs.

Fields have the names of the manifest's keys. Each record checks its own ranges; `medreasoner.manifest` reads the text,
checks the types and puts the path of the key before the message.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

from medreasoner._ranges import need, need_positive
from medreasoner.errors import BundleError
from medreasoner.kernel_spec import DrawingSpec, ImageTowerSpec, StepSpec, TowerSpec, WeightDtype

__all__ = [
    "ANSWER_FIELDS",
    "SCHEMA_VERSION",
    "AnswerSpec",
    "BundleSpec",
    "Coordinates",
    "FileSpec",
    "LicenceSpec",
    "PadResize",
    "PromptMode",
    "PromptSpec",
    "ReasonerCpuGraphs",
    "ReasonerGraphs",
    "ReasonerSpec",
    "Resize",
    "SegmenterCpuGraphs",
    "SegmenterGraphs",
    "SegmenterSpec",
    "SmartResize",
    "StretchResize",
    "Triple",
    "VisionSpec",
    "WeightDtype",
    "WeightSpec",
    "coordinate_scale",
]

SCHEMA_VERSION = 1

ANSWER_FIELDS = ("x1", "y1", "x2", "y2", "p1x", "p1y", "p2x", "p2y")
"""The numbers of an answer, in their order: a half-open box, then two points."""

Coordinates: TypeAlias = str
"""Numbers in an answer: ``"absolute"``, pixels of the image that the vision tower sees, or ``"relative_N"``, N-ths of
it (``"relative_1000"`` in Qwen3-VL and InternVL)."""

PromptMode = Literal["joint", "box", "points"]
"""What the segmenter is given of a reasoner's answer."""

Triple: TypeAlias = tuple[float, float, float]


@cache
def coordinate_scale(coordinates: Coordinates) -> int | None:
    """N of ``"relative_N"``, or None for ``"absolute"``.

    Raises
    ------
    BundleError
        If it is neither.

    Examples
    --------
    >>> coordinate_scale("relative_1000")
    1000
    """
    if coordinates == "absolute":
        return None
    name, _, number = coordinates.partition("_")
    is_number = number.isascii() and number.isdigit() and len(number) <= 7  # Python refuses thousands of digits
    if name == "relative" and is_number and 1 <= int(number) <= 1_000_000:
        return int(number)
    raise BundleError(f"coordinates: expected absolute or relative_N, got {coordinates!r:.80}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StretchResize:
    """Resize to one size, whatever the aspect ratio. Pixels."""

    width: int
    height: int

    def __post_init__(self) -> None:
        need_positive(self, "width", "height")

    @property
    def sides(self) -> tuple[int, ...]:
        """What the sides of the result are multiples of."""
        return (self.width, self.height)


@dataclass(frozen=True, slots=True, kw_only=True)
class SmartResize:
    """Nearly keep the aspect ratio, with sides that are multiples of `factor` and an area within limits. Pixels."""

    min_pixels: int
    max_pixels: int
    factor: int

    def __post_init__(self) -> None:
        need_positive(self, "min_pixels", "max_pixels", "factor")
        least = max(self.min_pixels, self.factor**2)
        need(self.max_pixels >= least, "max_pixels", f"at least {least}", self.max_pixels)

    @property
    def sides(self) -> tuple[int, ...]:
        """What the sides of the result are multiples of."""
        return (self.factor,)


@dataclass(frozen=True, slots=True, kw_only=True)
class PadResize:
    """Resize the longer side to `size` and pad the other at the bottom or the right. Pixels."""

    size: int

    def __post_init__(self) -> None:
        need_positive(self, "size")

    @property
    def sides(self) -> tuple[int, ...]:
        """What the sides of the result are multiples of."""
        return (self.size,)


Resize: TypeAlias = StretchResize | SmartResize | PadResize


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSpec:
    """SHA-256 (64 lower-case hexadecimal digits) and size of a file."""

    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        good = re.fullmatch(r"[0-9a-f]{64}", self.sha256) is not None
        need(good, "sha256", "64 lower-case hexadecimal digits", self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """A matrix (vocab_size, hidden_dim) kept outside the graphs, row after row, little endian."""

    file: str
    dtype: WeightDtype
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSpec:
    """The vision tower: sizes in pixels (`merge_size` in patches), mean and deviation on the scale 0 to 1."""

    patch_size: int
    merge_size: int
    window_size: int
    head_dim: int
    full_attention_layers: tuple[int, ...]
    image_mean: Triple
    image_std: Triple
    resize: Resize

    def __post_init__(self) -> None:
        need_positive(self, "patch_size", "merge_size", "head_dim")
        block = self.patch_size * self.merge_size
        need(self.window_size >= block, "window_size", f"at least {block}", self.window_size)
        need(self.head_dim % 4 == 0, "head_dim", "a multiple of 4", self.head_dim)
        need(min(self.image_std) > 0, "image_std", "positive numbers", self.image_std)
        good = all(side % block == 0 for side in self.resize.sides)
        need(good, "resize", f"multiples of {block} pixels", self.resize.sides)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSpec:
    """Text before the answer, with ``{image}`` and ``{query}`` once each, and the token repeated for the image."""

    template: str
    image_token: str

    def __post_init__(self) -> None:
        places = re.findall(r"\{(?:image|query)\}", self.template)
        need(places == ["{image}", "{query}"], "template", "{image} once and then {query} once", places)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSpec:
    """The exact texts that the reasoner was trained to emit; `present` holds `ANSWER_FIELDS` as ``{x1}`` and so on."""

    present: str
    absent: str | None
    think_open: str
    think_close: str
    end: str

    def __post_init__(self) -> None:
        places = re.findall(r"\{([a-z]\w*)\}", self.present)
        need(tuple(places) == ANSWER_FIELDS, "present", "the fields " + " ".join(ANSWER_FIELDS), places)
        for key in ("think_open", "think_close", "end"):
            need(bool(getattr(self, key)), key, "text", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasonerGraphs:
    """Files of the vision tower and the decoder."""

    vision: str
    decoder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasonerCpuGraphs:
    """Files that take the place of those in `ReasonerGraphs` on the CPU."""

    vision: str | None = None
    decoder: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasonerSpec:
    """The vision-language model: graphs, tokenizer, sizes, texts and limits (in tokens)."""

    architecture: Literal["qwen2_5_vl", "qwen2_vl"]
    graphs: ReasonerGraphs
    embedding: WeightSpec
    lm_head: WeightSpec
    tokenizer: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_length: int
    vision: VisionSpec
    prompt: PromptSpec
    answer: AnswerSpec
    coordinates: Coordinates
    absent_threshold: float | None
    max_query_tokens: int
    max_think_tokens: int
    step: StepSpec | None = None
    tower: TowerSpec | None = None
    cpu_graphs: ReasonerCpuGraphs = ReasonerCpuGraphs()

    def __post_init__(self) -> None:
        need_positive(self, "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size")
        need_positive(self, "rope_theta", "max_length", "max_query_tokens")
        need(sum(self.mrope_section) * 2 == self.head_dim, "mrope_section", "half of head_dim", self.mrope_section)
        need(self.n_heads % self.n_kv_heads == 0, "n_kv_heads", f"a divisor of {self.n_heads}", self.n_kv_heads)
        for key in ("embedding", "lm_head"):
            shape, expected = getattr(self, key).shape, (self.vocab_size, self.hidden_dim)
            need(shape == expected, f"{key}.shape", str(expected), shape)
        coordinate_scale(self.coordinates)
        threshold = self.absent_threshold
        need(threshold is None or 0 <= threshold <= 1, "absent_threshold", "a probability or null", threshold)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmenterGraphs:
    """Files of the image encoder and the mask decoder."""

    encoder: str
    decoder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmenterCpuGraphs:
    """Files that take the place of those in `SegmenterGraphs` on the CPU."""

    encoder: str | None = None
    decoder: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmenterSpec:
    """The promptable segmenter: graphs, input grid and mask grid (pixels), mean and deviation on the scale 0 to 1.

    `rescale` says what becomes 0 and 1 there: ``"fixed"`` the ends of the eight bits, ``"minmax"`` the smallest and the
    largest value of the resized image. `architecture` says what the decoder is given: for ``"sam"`` a padding point
    where there is no box, for ``"sam2"`` always one. Whatever the encoder gives, the decoder takes by the same names.
    """

    architecture: Literal["sam", "sam2"]
    graphs: SegmenterGraphs
    resize: Resize
    rescale: Literal["fixed", "minmax"]
    image_mean: Triple
    image_std: Triple
    mask_size: int
    n_masks: int
    prompts: PromptMode
    tower: ImageTowerSpec | None = None
    drawing: DrawingSpec | None = None
    cpu_graphs: SegmenterCpuGraphs = SegmenterCpuGraphs()

    def __post_init__(self) -> None:
        need_positive(self, "mask_size", "n_masks")
        need(min(self.image_std) > 0, "image_std", "positive numbers", self.image_std)
        need(not isinstance(self.resize, SmartResize), "resize.rule", "stretch or longest_pad", "smart")


@dataclass(frozen=True, slots=True, kw_only=True)
class LicenceSpec:
    """Licence of the weights, a line to show at the first load, and the file with the terms."""

    weights: str
    notice: str | None
    file: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfidenceSpec:
    """What the concord of several drawn answers is worth, found on held-out data.

    `knots` are pairs (concord, mean Dice coefficient) of answers drawn at `temperature`, both ascending.
    """

    temperature: float
    knots: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        need(self.temperature > 0, "temperature", "a positive number", self.temperature)
        xs, ys = [x for x, _ in self.knots], [y for _, y in self.knots]
        is_fine = len(xs) > 0 and xs == sorted(set(xs)) and ys == sorted(ys) and all(0 <= v <= 1 for v in (*xs, *ys))
        need(is_fine, "knots", "ascending pairs within [0, 1]", self.knots)


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleSpec:
    """A whole manifest.

    `producers`, `source`, `training` and `quality` are free mappings for people and tools; the runtime uses none.
    """

    schema_version: int
    name: str
    version: str
    description: str
    reasoner: ReasonerSpec
    segmenter: SegmenterSpec
    precision: str
    opset: int
    producers: Mapping[str, Any]
    source: Mapping[str, Any]
    licence: LicenceSpec
    training: Mapping[str, Any]
    quality: Mapping[str, Any]
    files: Mapping[str, FileSpec]
    confidence: ConfidenceSpec | None = None

    def __post_init__(self) -> None:
        unlisted = [name for name in self.used_files() if name not in self.files]
        need(not unlisted, "files", "every file that is used", unlisted)

    def cpu_graphs(self) -> dict[str, str]:
        """Of each graph that has a second one for the CPU, by its name the name of that."""
        reasoner, segmenter = self.reasoner, self.segmenter
        pairs = (
            (reasoner.graphs.vision, reasoner.cpu_graphs.vision),
            (reasoner.graphs.decoder, reasoner.cpu_graphs.decoder),
            (segmenter.graphs.encoder, segmenter.cpu_graphs.encoder),
            (segmenter.graphs.decoder, segmenter.cpu_graphs.decoder),
        )
        return {graph: second for graph, second in pairs if second is not None}

    def used_files(self) -> tuple[str, ...]:
        """Names of the files that the manifest mentions, each once."""
        reasoner, segmenter, licence = self.reasoner, self.segmenter, self.licence.file
        names = [reasoner.graphs.vision, reasoner.graphs.decoder, reasoner.embedding.file, reasoner.lm_head.file]
        names += [reasoner.tokenizer, segmenter.graphs.encoder, segmenter.graphs.decoder, *self.cpu_graphs().values()]
        names += [each.file for each in (reasoner.step, reasoner.tower, segmenter.tower, segmenter.drawing) if each]
        return tuple(dict.fromkeys([*names, licence] if licence else names))
