"""What each engine of a bundle takes and returns, and between which sizes: read off the manifest, before any graph.

A dimension that the bundle fixes (the image's, the length of the key-value buffer) is a number. The others have names,
and a profile says for each name the least, the usual and the largest size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import onnx
from onnx import helper

from medreasoner.bundle import Bundle
from medreasoner.errors import BundleError
from medreasoner.spec import ReasonerSpec, SmartResize, StretchResize, VisionSpec
from medreasoner_export.stored import load_graph

__all__ = ["MASK", "PLACES", "EngineLimits", "EnginePlan", "GraphName", "Half", "Span", "TensorSpec", "engine_plans"]

GraphName: TypeAlias = Literal["vision", "decoder", "encoder", "mask_decoder"]
Half: TypeAlias = Literal["float16", "float32"]

MASK, PLACES = "attention_mask", "write_positions"
"""Inputs of the decoder's engine that stand for ONNX Runtime's lengths."""

MAX_POINTS = 8
PROMPT_POINTS = {"joint": 4, "box": 2, "points": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Largest sizes that engines accept.

    Parameters
    ----------
    max_batch
        Questions that are answered at once: rows of the decoder's step, and prompts of one image.
    max_images
        Images that are read at once.
    max_chunk
        Tokens that the decoder reads in one run, for one row. A longer prompt goes in chunks: the scores of one layer
        are (n_heads, max_chunk, max_length).
    image_size
        (width, height) in pixels of the only image that the vision engine takes, where the bundle keeps the aspect
        ratio; None: every size that the bundle allows.
    """

    max_batch: int = 8
    max_images: int = 4
    max_chunk: int = 512
    image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_images", "max_chunk"):
            if getattr(self, name) < 1:
                raise BundleError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Least, usual and largest size of a dimension; the engine is tuned for the usual one."""

    least: int
    usual: int
    most: int

    def to_json(self) -> list[int]:
        """The three numbers in order."""
        return [self.least, self.usual, self.most]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """An input or output: element type as NumPy names it, and shape with names for what varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def sizes(self, profile: Mapping[str, Span]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Least, usual and largest shape in a profile."""
        spans = [Span(least=d, usual=d, most=d) if isinstance(d, int) else profile[d] for d in self.shape]
        least, usual, most = zip(*(span.to_json() for span in spans), strict=True)
        return least, usual, most


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """One engine: the bundle's graph that it computes, its tensors, and its profiles.

    `head_dim` is that of a graph with rotary positions.
    """

    name: GraphName
    source: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Mapping[str, Span], ...]
    head_dim: int = 0


def engine_plans(bundle: Bundle, limits: EngineLimits, cache: Half = "float32") -> tuple[EnginePlan, ...]:
    """The plans of a bundle's four graphs, the smallest first.

    Parameters
    ----------
    bundle
        A loaded bundle.
    limits
        Largest sizes.
    cache
        Element type of the decoder's key-value buffers; all other numbers are float32 outside of the engine.

    Raises
    ------
    BundleError
        If the image's size is none that the bundle allows.
    """
    spec = bundle.spec
    reasoner, segmenter = spec.reasoner, spec.segmenter
    images = {"batch": _up_to(limits.max_images)}
    prompts = {
        "batch": _up_to(limits.max_batch),
        "n_points": Span(least=1, usual=PROMPT_POINTS[segmenter.prompts], most=MAX_POINTS),
        "image_batch": _up_to(1),  # a study's one image serves all its prompts
    }
    vision = {**images, **_vision_sizes(reasoner.vision, limits.image_size)}
    return (
        _same_tensors(bundle, "mask_decoder", segmenter.graphs.decoder, prompts),
        _same_tensors(bundle, "encoder", segmenter.graphs.encoder, images),
        _same_tensors(bundle, "vision", reasoner.graphs.vision, vision, head_dim=reasoner.vision.head_dim),
        _decoder(reasoner, limits, cache),
    )


def _up_to(most: int) -> Span:
    return Span(least=1, usual=1, most=most)


def _same_tensors(
    bundle: Bundle, name: GraphName, source: str, profile: Mapping[str, Span], *, head_dim: int = 0
) -> EnginePlan:
    """The plan of a graph whose engine has the same inputs and outputs, but for what the profile fixes."""
    graph = load_graph(bundle.path(source)).graph
    fixed = {key: span.most for key, span in profile.items() if span.least == span.most}

    def tensors(infos: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=info.name,
                dtype=helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type).name,
                shape=tuple(
                    fixed.get(each.dim_param, each.dim_param) if each.dim_param else int(each.dim_value)
                    for each in info.type.tensor_type.shape.dim
                ),
            )
            for info in infos
        )

    inputs, outputs = tensors(graph.input), tensors(graph.output)
    unknown = {d for each in inputs for d in each.shape if isinstance(d, str)} - set(profile)
    if unknown:
        raise BundleError(f"{source}: no profile has {', '.join(sorted(unknown))}; export the bundle with this release")
    varying = {key: span for key, span in profile.items() if key not in fixed}
    return EnginePlan(name=name, source=source, inputs=inputs, outputs=outputs, profiles=(varying,), head_dim=head_dim)


def _decoder(spec: ReasonerSpec, limits: EngineLimits, cache: Half) -> EnginePlan:
    """The decoder over a static buffer: one profile to step all rows by a token, one to read a row's chunk."""
    buffer = ("batch", spec.n_kv_heads, spec.max_length, spec.head_dim)
    names = [f"{kind}.{layer}" for layer in range(spec.n_layers) for kind in ("key", "value")]
    table = ("batch", "seq", spec.head_dim // 2)
    inputs = [
        TensorSpec(name="inputs_embeds", dtype="float32", shape=("batch", "seq", spec.hidden_dim)),
        TensorSpec(name="rotary_cos", dtype="float32", shape=table),
        TensorSpec(name="rotary_sin", dtype="float32", shape=table),
        TensorSpec(name=PLACES, dtype="int64", shape=("batch", "seq")),
        TensorSpec(name=MASK, dtype="bool", shape=("batch", "seq", spec.max_length)),
        *(TensorSpec(name=f"past_{name}", dtype=cache, shape=buffer) for name in names),
    ]
    outputs = [
        TensorSpec(name="hidden_states", dtype="float32", shape=("batch", "seq", spec.hidden_dim)),
        *(TensorSpec(name=f"present_{name}", dtype=cache, shape=buffer) for name in names),
    ]
    one, chunk = _up_to(1), min(limits.max_chunk, spec.max_length)
    step = {"batch": _up_to(limits.max_batch), "seq": one}
    read = {"batch": one, "seq": Span(least=1, usual=chunk, most=chunk)}
    return EnginePlan(
        name="decoder",
        source=spec.graphs.decoder,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        profiles=(step, read),
        head_dim=spec.head_dim,
    )


def _vision_sizes(vision: VisionSpec, image_size: tuple[int, int] | None) -> dict[str, Span]:
    """Patches and windows of the images that a bundle allows."""
    unit = vision.patch_size * vision.merge_size
    window = vision.window_size // unit  # tokens a side
    per_token = vision.merge_size**2
    size = _only_size(vision, image_size)
    if size is not None:
        width, height = (side // unit for side in size)
        windows = math.ceil(width / window) * math.ceil(height / window)
        fullest = min(width, window) * min(height, window)
        sizes = {"n_patches": width * height, "n_windows": windows, "window_tokens": fullest}
        factors = {"n_patches": per_token, "n_windows": 1, "window_tokens": per_token}
        return {k: Span(least=v * factors[k], usual=v * factors[k], most=v * factors[k]) for k, v in sizes.items()}
    assert isinstance(vision.resize, SmartResize)
    most = vision.resize.max_pixels // unit**2
    side = math.isqrt(most)
    windows = max(math.ceil(rows / window) * math.ceil(most // rows / window) for rows in range(1, most + 1))
    fullest = window**2 * per_token
    return {
        "n_patches": Span(least=per_token, usual=side**2 * per_token, most=most * per_token),
        "n_windows": Span(least=1, usual=math.ceil(side / window) ** 2, most=windows),
        "window_tokens": Span(least=per_token, usual=min(window, side) ** 2 * per_token, most=fullest),
    }


def _only_size(vision: VisionSpec, asked: tuple[int, int] | None) -> tuple[int, int] | None:
    """(width, height) where there is one: the bundle's, or the one that was asked for of those that it allows."""
    resize, unit = vision.resize, vision.patch_size * vision.merge_size
    if isinstance(resize, SmartResize):
        if asked is None:
            return None
        area, sides = asked[0] * asked[1], all(side > 0 and side % unit == 0 for side in asked)
        if not sides or not resize.min_pixels <= area <= resize.max_pixels:
            raise BundleError(
                f"image_size: expected multiples of {unit}, {resize.min_pixels} to {resize.max_pixels} pixels in all, "
                f"got {asked[0]} x {asked[1]}"
            )
        return asked
    own = (resize.width, resize.height) if isinstance(resize, StretchResize) else (resize.size, resize.size)
    if asked not in (None, own):
        raise BundleError(f"image_size: the bundle's images are always {own[0]} x {own[1]}, not {asked}")
    return own
