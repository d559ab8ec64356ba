"""What a checkpoint was trained to read and write, beyond its sizes: prompt, answer, coordinates, resizing, limits.

A checkpoint folder may state it in ``medreasoner.json``, with the keys of a manifest's ``reasoner`` section. Without
it, the defaults are those of MedReasoner-7B: Qwen's chat, an answer in single quotes, pixels of the resized image.

References
----------
MedReasoner, arXiv 2508.08177, section on the output format; Qwen2.5-VL's ``chat_template`` and preprocessor.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from medreasoner.errors import BundleError
from medreasoner.manifest import read_record
from medreasoner_export.checkpoint import read_json
from medreasoner_export.qwen_config import QwenConfig

__all__ = ["SamArch", "image_side", "reasoner_settings", "segmenter_settings", "stated_image_side", "stated_resize"]

SamArch: TypeAlias = Literal["auto", "sam", "medsam", "sam-med2d", "litemedsam", "sam2", "medsam2"]

FILE = "medreasoner.json"

# The normalisation of CLIP, which Qwen2.5-VL keeps.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# The normalisation of ImageNet, which SAM keeps.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MEDREASONER_7B: Mapping[str, Any] = {
    "prompt": {
        "template": (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{query}<|im_end|>\n<|im_start|>assistant\n"
        ),
        "image_token": "<|image_pad|>",
    },
    "answer": {
        "present": (
            "<answer>{'bbox': [{x1}, {y1}, {x2}, {y2}], "
            "'points_1': [{p1x}, {p1y}], 'points_2': [{p2x}, {p2y}]}</answer>"
        ),
        "absent": None,
        "think_open": "<think>",
        "think_close": "</think>",
        "end": "<|im_end|>",
    },
    "coordinates": "absolute",
    "absent_threshold": None,
    "max_query_tokens": 512,
    "max_think_tokens": 1024,
}
DEFAULT_MAX_LENGTH = 4096
ANSWER_TOKENS = 256  # of the prompt's frame and the answer
# Qwen2.5-VL's own limits: 4 to 1280 merged tokens of 28 x 28 pixels.
DEFAULT_MIN_PIXELS = 4 * 28 * 28
DEFAULT_MAX_PIXELS = 1280 * 28 * 28


def reasoner_settings(folder: Path, config: QwenConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a reasoner checkpoint: `overrides`, before ``medreasoner.json``, before the defaults.

    Returns
    -------
    settings
        Keys ``prompt``, ``answer``, ``coordinates``, ``absent_threshold``, ``max_length``, ``max_query_tokens``,
        ``max_think_tokens``, ``resize``, ``image_mean``, ``image_std``.

    Raises
    ------
    BundleError
        If a key is unknown, or the file is malformed.
    """
    images = _preprocessor(folder)
    factor = config.vision.patch_size * config.vision.merge_size
    defaults = {
        **MEDREASONER_7B,
        "max_length": min(config.text.max_length, DEFAULT_MAX_LENGTH),
        "resize": {
            "rule": "smart",
            "min_pixels": _limit(images, "min_pixels", "shortest_edge") or DEFAULT_MIN_PIXELS,
            "max_pixels": _limit(images, "max_pixels", "longest_edge") or DEFAULT_MAX_PIXELS,
            "factor": factor,
        },
        "image_mean": images.get("image_mean", CLIP_MEAN),
        "image_std": images.get("image_std", CLIP_STD),
    }
    settings = _merge(folder, defaults, overrides)
    for key in ("max_length", "max_query_tokens", "max_think_tokens"):
        if not isinstance(settings[key], int) or isinstance(settings[key], bool):
            raise BundleError(f"{key}: expected an integer, got {settings[key]!r:.80}")
    if settings["resize"] == defaults["resize"]:
        settings["resize"]["max_pixels"] = _fitting(settings, factor)
    if settings["max_length"] > config.text.max_length:
        raise BundleError(
            f"max_length: {settings['max_length']} exceeds the model's positions {config.text.max_length}"
        )
    return settings


def segmenter_settings(
    path: Path, image_size: int, arch: SamArch, overrides: Mapping[str, Any], *, points_alone: bool = False
) -> dict[str, Any]:
    """The settings of a SAM checkpoint: `overrides`, before ``medreasoner.json``, before those of `arch`.

    A single file has none of its own beside it. MedSAM's weights look like SAM's, but were trained on images stretched
    to the whole square, with values from 0 to 1 in each, and on boxes alone; LiteMedSAM on such values and boxes too.
    SAM-Med2D and SAM 2 stretch, and take the best of their alternatives. A finished graph may take `points_alone` and
    give the alternatives alone.

    Returns
    -------
    settings
        Keys ``resize``, ``rescale``, ``image_mean``, ``image_std``, ``prompts``, ``multimask``, ``box_mask``.

    Raises
    ------
    BundleError
        If a key is unknown, the file is malformed, or the image encoder does not take what ``resize`` makes.
    """
    images = _preprocessor(path)
    defaults: dict[str, Any] = {
        "resize": {"rule": "longest_pad", "size": image_size},
        "rescale": "fixed",
        "image_mean": images.get("image_mean", IMAGENET_MEAN),
        "image_std": images.get("image_std", IMAGENET_STD),
        "prompts": "joint",
        "multimask": False,
        "box_mask": False,
    }
    stretched = {"rule": "stretch", "width": image_size, "height": image_size}
    if arch in ("sam-med2d", "sam2", "medsam2"):
        defaults |= {"resize": stretched, "multimask": True}
    if arch in ("medsam", "litemedsam"):
        defaults |= {"rescale": "minmax", "image_mean": [0.0] * 3, "image_std": [1.0] * 3, "prompts": "box"}
    if arch == "medsam":
        defaults["resize"] = stretched
    fixed = {"prompts": "points", "multimask": True, "box_mask": False} if points_alone else {}
    settings = _merge(path, defaults | fixed, overrides)
    changed = [key for key, value in fixed.items() if settings[key] != value]
    if changed:
        raise BundleError(
            f"{path}: {changed[0]}: its decoder takes points alone and gives several masks, so it must be "
            f"{json.dumps(fixed[changed[0]])}, got {settings[changed[0]]!r:.80}; export the checkpoint that the graphs "
            "were made from for anything else"
        )
    if image_side(settings["resize"]) != image_size:
        raise BundleError(
            f"{path}: resize: its image encoder takes squares of {image_size} px, got {settings['resize']!r:.120}"
        )
    return settings


def check_section(spec: type, section: Mapping[str, Any], path: Path) -> None:
    """Refuse settings that the runtime would refuse, before anything is made of them.

    Parameters
    ----------
    spec
        What the runtime reads the section as.
    section
        Of a manifest.
    path
        The checkpoint, for messages.

    Raises
    ------
    BundleError
        Naming the key.
    """
    try:
        read_record(spec, json.loads(json.dumps(section)), "")
    except BundleError as err:
        raise BundleError(f"{path}: {err}; correct {FILE} there, or give --settings") from err


def stated_resize(path: Path, overrides: Mapping[str, Any]) -> Any:
    """The ``resize`` that `overrides` or the checkpoint's ``medreasoner.json`` gives; None if neither does."""
    return {**_stated(path), **overrides}.get("resize")


def image_side(resize: Any) -> int | None:
    """Side in pixels of the square that a ``resize`` setting fills; None if it is no such setting.

    >>> image_side({"rule": "stretch", "width": 512, "height": 512}), image_side({"rule": "longest_pad", "size": 1024})
    (512, 1024)
    """
    if not isinstance(resize, Mapping):
        return None
    sides = {resize[key] for key in ("size", "width", "height") if isinstance(resize.get(key), int)}
    return sides.pop() if len(sides) == 1 else None


def stated_image_side(path: Path) -> int | None:
    """Side in pixels of the images that a checkpoint folder's image processor makes; None if it says none."""
    size = _preprocessor(path).get("size")
    return image_side(size if isinstance(size, Mapping) else {"size": size})


def _stated(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    return read_json(path) if path.is_file() else {}


def _merge(folder: Path, defaults: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    path, stated = folder / FILE, _stated(folder)
    for source, values in ((str(path), stated), ("options", overrides)):
        unknown = sorted(set(values) - set(defaults))
        if unknown:
            raise BundleError(f"{source}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(defaults))}")
    # Through JSON: tuples become lists, and what a manifest cannot hold is found here.
    settings: dict[str, Any] = json.loads(json.dumps({**defaults, **stated, **overrides}))
    return settings


def _limit(images: Mapping[str, Any], key: str, edge: str) -> int | None:
    """A limit on pixels under its older name, or under the newer one, where an "edge" is an area too."""
    size = images.get("size")
    found = images.get(key) or (size.get(edge) if isinstance(size, dict) else None)
    return found if isinstance(found, int) else None


def _fitting(settings: Mapping[str, Any], factor: int) -> int:
    """The checkpoint's own `max_pixels`, lowered so that image, query, thought and answer fit `max_length`.

    Published files state 16384 image tokens, more than there is room for here.
    """
    length = int(settings["max_length"])
    words = int(settings["max_query_tokens"]) + int(settings["max_think_tokens"]) + ANSWER_TOKENS
    room = max(length - words, length // 2)  # an image is worth half of a short model
    resize = settings["resize"]
    return max(int(resize["min_pixels"]), min(int(resize["max_pixels"]), room * factor**2))


def _preprocessor(folder: Path) -> dict[str, Any]:
    """Settings of the image processor, which newer releases of transformers save inside of the processor's."""
    path = folder / "preprocessor_config.json"
    if path.is_file():
        return read_json(path)
    path = folder / "processor_config.json"
    images = read_json(path).get("image_processor") if path.is_file() else None
    return images if isinstance(images, dict) else {}
