"""The peer: the same checkpoints in torch and transformers, as someone who knows both libraries would run them.

Models are loaded once, in eval and inference mode, float32, with sdpa attention. An image is resized and normalised
once; its SAM embedding is kept, and so are the keys and values of the prompt up to its last image token: `generate`
goes on from them for every further query. Greedy decoding ends at the token ``</answer>`` or the end token. Nothing of
medreasoner is imported, and nothing but a mask is made that the other side does not make.

As a program it answers one query in a new process::

    python transformers_pipeline.py REASONER SEGMENTER IMAGE QUERY THREADS
"""

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch.nn.functional import interpolate, pad
from transformers import DynamicCache, GenerationConfig, Qwen2_5_VLForConditionalGeneration, SamModel

__all__ = ["Pipeline", "PipelineAnswer", "PipelineStudy", "read_answer"]

MAX_NEW_TOKENS = 128
SETTINGS = (
    f"float32, eval, inference_mode, sdpa; generate: greedy, at most {MAX_NEW_TOKENS} tokens, stops at </answer>; "
    "kept between queries on an image: its prompt's KV cache and its SAM embedding"
)
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SEGMENTER = {"prompts": "joint", "multimask": False, "box_mask": False}

Pixels = npt.NDArray[np.uint8]


@dataclass(slots=True)
class PipelineStudy:
    """What is kept of an image between queries."""

    height: int
    width: int
    pixel_values: torch.Tensor = field(repr=False)
    embedding: torch.Tensor = field(repr=False)
    cache: Any = field(repr=False)
    rope_deltas: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineAnswer:
    """Plain text, its eight numbers if they are valid, else None, and with them the mask (height, width) bool."""

    text: str
    numbers: list[float] | None
    mask: npt.NDArray[np.bool_] | None

    @property
    def absent(self) -> bool:
        """Whether the text is the well-formed answer that the target is not there."""
        found = re.search(r"<answer>(.*?)</answer>", self.text, re.DOTALL)
        try:
            parts = json.loads(found[1].replace("'", '"')) if found else None
        except ValueError:
            return False
        return isinstance(parts, dict) and bool(parts) and all(value is None for value in parts.values())


class Pipeline:
    """Both models, from their Hugging Face folders.

    Parameters
    ----------
    reasoner, segmenter
        Folders with the weights and ``medreasoner.json``, which says how images are resized and what a prompt is.
    """

    def __init__(self, reasoner: Path, segmenter: Path) -> None:
        self.settings = CLIP | _settings(reasoner)
        options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(reasoner, **options).eval()
        self.sam = SamModel.from_pretrained(segmenter, **options).eval()
        size = self.sam.config.vision_config.image_size
        self.sam_settings: dict[str, Any] = IMAGENET | SEGMENTER | {"resize": {"rule": "longest_pad", "size": size}}
        self.sam_settings |= _settings(segmenter)
        self.size = int(size)
        self.tokenizer = Tokenizer.from_file(str(reasoner / "tokenizer.json"))
        resize, vision = self.settings["resize"], self.model.config.vision_config
        if resize["rule"] != "stretch":
            raise ValueError(f"this pipeline stretches images, the reasoner wants {resize['rule']}")
        self.width, self.height = resize["width"], resize["height"]
        self.patch, self.merge, self.frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        self.rows, self.columns = self.height // self.patch, self.width // self.patch
        self.grid = torch.tensor([[1, self.rows, self.columns]])
        self.image_token: int = self.tokenizer.token_to_id(self.settings["prompt"]["image_token"])  # type: ignore[assignment]
        # The image's tokens, repeated here once for all: the text of a prompt then only waits for its query.
        tokens = self.settings["prompt"]["image_token"] * (self.rows * self.columns // self.merge**2)
        # Without a thought answers begin with this tag, or with a token that reaches beyond it.
        present: str = self.settings["answer"]["present"]
        opening = re.match(r"<[^>]*>", present)
        first_token = self.tokenizer.encode(present, add_special_tokens=False).offsets[0]
        self.opening = present[: max(opening.end(), first_token[1])] if opening else ""
        self.template = self.settings["prompt"]["template"].replace("{image}", tokens) + self.opening
        vocabulary = self.tokenizer.get_vocab()
        end = vocabulary[self.settings["answer"]["end"]]
        self.generation = GenerationConfig(
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=[end, *(token for name, token in vocabulary.items() if name.endswith("</answer>"))],
            pad_token_id=end,
            use_cache=True,
        )

    def compile(self) -> None:
        """Let torch compile the four networks; lengths change from query to query, so that shapes are dynamic.

        What is left of Python is `generate` itself. The first calls compile, which takes minutes.
        """
        for network in (
            self.model.model.visual,
            self.model.model.language_model,
            self.sam.vision_encoder,
            self.sam.mask_decoder,
        ):
            network.compile(dynamic=True)

    @torch.inference_mode()
    def open(self, pixels: Pixels) -> PipelineStudy:
        """Prepare an image (H, W) or (H, W, 3) for both models, and let SAM read it; Qwen reads it with a query."""
        image = Image.fromarray(pixels)
        embedding = self.sam.get_image_embeddings(self._planes(image))
        return PipelineStudy(image.height, image.width, self._patches(image), embedding, DynamicCache())

    @torch.inference_mode()
    def ask(self, study: PipelineStudy, query: str) -> PipelineAnswer:
        """Answer a query; the first one on an image also runs the vision tower."""
        ids = self.tokenizer.encode(self.template.replace("{query}", query), add_special_tokens=False).ids
        tokens = torch.tensor([ids])
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if study.rope_deltas is None:
            kinds = tokens.eq(self.image_token).int()
            inputs |= {"pixel_values": study.pixel_values, "image_grid_thw": self.grid, "mm_token_type_ids": kinds}
        else:
            self.model.model.rope_deltas = study.rope_deltas  # the model holds those of the last image it saw
        out = self.model.generate(**inputs, past_key_values=study.cache, generation_config=self.generation)
        study.rope_deltas = self.model.model.rope_deltas
        shared = len(ids) - ids[::-1].index(self.image_token)
        study.cache.crop(shared - study.cache.get_seq_length())
        text = self.opening + self.tokenizer.decode(out[0, len(ids) :].tolist(), skip_special_tokens=False)
        numbers = read_answer(text)
        mask = None if numbers is None else self._mask(study, numbers)
        return PipelineAnswer(text=text, numbers=numbers, mask=mask)

    def _patches(self, image: Image.Image) -> torch.Tensor:
        """(n_patches, 3 * frames * patch * patch), blocks of merge x merge together, an image its own second frame."""
        planes = _normalised(image, self.height, self.width, self.settings)
        m, p = self.merge, self.patch
        blocks = planes.reshape(3, self.rows // m, m, p, self.columns // m, m, p).permute(1, 4, 2, 5, 0, 3, 6)
        patches = blocks.reshape(-1, 3, 1, p * p).expand(-1, -1, self.frames, -1)
        return patches.reshape(self.rows * self.columns, -1)

    def _content(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image in SAM's square."""
        if self.sam_settings["resize"]["rule"] == "stretch":
            return self.size, self.size
        scale = self.size / max(height, width)
        return int(height * scale + 0.5), int(width * scale + 0.5)

    def _planes(self, image: Image.Image) -> torch.Tensor:
        height, width = self._content(image.height, image.width)
        planes = _normalised(image, height, width, self.sam_settings)
        return pad(planes, (0, self.size - width, 0, self.size - height))[None]

    def _mask(self, study: PipelineStudy, numbers: list[float]) -> npt.NDArray[np.bool_]:
        height, width = self._content(study.height, study.width)
        # Numbers are pixels of the resized image ("absolute"), or parts of it ("relative_1000", of 1000 a side).
        parts = self.settings["coordinates"].removeprefix("relative_")
        across, down = (self.width, self.height) if parts == "absolute" else (int(parts), int(parts))
        scale = torch.tensor([width / across, height / down])
        pairs = torch.tensor(numbers).reshape(4, 2) * scale
        form = self.sam_settings["prompts"]
        box = pairs[:2].reshape(1, 1, 4) if form != "points" else None
        side = 4 * self.sam.config.prompt_encoder_config.image_embedding_size
        drawn = self.sam_settings["box_mask"] and box is not None
        result = self.sam(
            image_embeddings=study.embedding,
            input_points=pairs[2:].reshape(1, 1, 2, 2) if form != "box" else None,
            input_boxes=box,
            input_masks=_drawn(pairs[:2] * (side / self.size), side) if drawn else None,
            multimask_output=self.sam_settings["multimask"],
        )
        logits = result.pred_masks[:, 0, result.iou_scores[0, 0].argmax()][None]
        if (height, width) != (self.size, self.size):
            logits = interpolate(logits, (self.size, self.size), mode="bilinear")[..., :height, :width]
        full = interpolate(logits, (study.height, study.width), mode="bilinear")
        mask: npt.NDArray[np.bool_] = (full[0, 0] > 0).numpy()
        return mask


def read_answer(text: str) -> list[float] | None:
    """x1, y1, x2, y2 and two points x, y of an answer that is a box of some area and two points; else None.

    >>> read_answer("<answer>{'bbox': [1, 2, 3, 4], 'points_1': [1, 2], 'points_2': [2, 3]}</answer>")
    [1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 2.0, 3.0]
    """
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    try:
        parts = json.loads(found[1].replace("'", '"')) if found else {}
        box, one, two = (list(map(float, parts[key])) for key in ("bbox", "points_1", "points_2"))
    except (ValueError, KeyError, TypeError):
        return None
    if (len(box), len(one), len(two)) != (4, 2, 2) or box[2] <= box[0] or box[3] <= box[1]:
        return None
    return [*box, *one, *two]


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "medreasoner.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _normalised(image: Image.Image, height: int, width: int, settings: dict[str, Any]) -> torch.Tensor:
    """(3, height, width) float32; grey is resized once and then repeated."""
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC).convert("RGB"))
    mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("image_mean", "image_std"))
    return (torch.from_numpy(resized.copy()).permute(2, 0, 1).float() / 255 - mean) / std


def _drawn(corners: torch.Tensor, side: int) -> torch.Tensor:
    """(1, 1, side, side) mask prompt of a box: distance to its nearest side, clipped to [-4, 4] and halved."""
    centres = torch.arange(side) + 0.5
    (x1, y1), (x2, y2) = corners
    across, down = torch.minimum(centres - x1, x2 - centres), torch.minimum(centres - y1, y2 - centres)
    return (torch.minimum(across[None], down[:, None]).clamp(-4, 4) / 2)[None, None]


def main(reasoner: str, segmenter: str, path: str, query: str, threads: str) -> None:
    """Answer one query; print the text and the peak memory in KiB."""
    torch.set_num_threads(int(threads))
    pipeline = Pipeline(Path(reasoner), Path(segmenter))
    answer = pipeline.ask(pipeline.open(np.asarray(Image.open(path))), query)
    peak = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    print(json.dumps({"text": answer.text, "peak_kib": int(peak[1]) if peak else 0}))


if __name__ == "__main__":
    main(*sys.argv[1:])
