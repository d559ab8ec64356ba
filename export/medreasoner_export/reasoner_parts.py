"""What the files of an exported reasoner are made from, and how each is written, wherever the weights come from."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medreasoner._version import __version__
from medreasoner.errors import BundleError
from medreasoner.reasoner.prompt import load_tokenizer
from medreasoner.spec import ReasonerSpec
from medreasoner_export.checkpoint import Weights, read_json
from medreasoner_export.checkpoint_spec import spec_sizes
from medreasoner_export.graph import Precision, Rounding, Storage, save_graph, store, weights_file
from medreasoner_export.layerwise import LayerwiseRounding
from medreasoner_export.prompts import CalibrationPrompt, PromptReader
from medreasoner_export.quantise import quantise
from medreasoner_export.qwen2_vision import Qwen2VisionTower
from medreasoner_export.qwen_config import Family, QwenConfig
from medreasoner_export.qwen_decoder import TEXT_PREFIXES, decoder_graph, step_section
from medreasoner_export.qwen_vision import VisionTower, tower_section, vision_graph
from medreasoner_export.settings import check_section, reasoner_settings

__all__ = [
    "ReasonerGraphFiles",
    "ReasonerOptions",
    "copy_tokenizer",
    "embedding_name",
    "matrix_record",
    "reasoner_matrices",
    "reasoner_section",
]

TOWERS: Mapping[Family, type[VisionTower]] = {"qwen2_5_vl": VisionTower, "qwen2_vl": Qwen2VisionTower}
"""The vision tower of each family; their decoders are the same."""

# Rows of the embedding converted at a time, to bound memory at vocabularies of 152k.
ROWS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasonerOptions:
    """How a reasoner is exported.

    Attributes
    ----------
    weights
        Element type of matrices in the files; ``"source"`` keeps the checkpoint's own. Arithmetic is float32.
    precision
        ``"int8"`` rounds the matrices of both graphs to eight bits, and the vision tower multiplies integers, for CPUs;
        ``"int4"`` rounds those of the decoder to four. The rest, embedding and language head too, stays as it is.
        ``"fp16"``: both graphs compute in float16 and the decoder's
        caches are float16, as attention on a GPU needs them.
    external_data
        Whether the graphs' weights go into files beside them; None: where the checkpoint is too large for one file.
    adapter
        Folder of a LoRA adapter in peft's layout, to be merged.
    calibration
        Prompts by which the levels of ``"int4"`` are chosen; none: rounded to the nearest.
    settings
        Entries that replace those of ``medreasoner.json`` (see :mod:`medreasoner_export.settings`).
    fresh
        Do not use what a stopped build with the same options has left beside the output.
    """

    weights: Storage | Literal["source"] = "source"
    precision: Precision = "fp32"
    external_data: bool | None = None
    adapter: Path | None = None
    calibration: Sequence[CalibrationPrompt] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False


def embedding_name(checkpoint: Weights) -> str:
    """Name of the token embedding in a checkpoint of any layout."""
    return checkpoint.prefix(TEXT_PREFIXES, "embed_tokens.weight") + "embed_tokens.weight"


def matrix_record(file: str, config: QwenConfig, storage: Storage) -> dict[str, Any]:
    """What a manifest says of the embedding or the language head."""
    return {"file": file, "dtype": storage, "shape": [config.text.vocab_size, config.text.hidden_dim]}


def vision_precision(options: ReasonerOptions) -> Precision:
    """The vision tower's: in four bits it would see too little."""
    return "fp32" if options.precision == "int4" else options.precision


def reasoner_section(
    folder: Path, config: QwenConfig, options: ReasonerOptions, storage: Storage, *, with_step: bool
) -> dict[str, Any]:
    """A manifest's ``reasoner`` section but for the matrices, proved to be one."""
    settings = reasoner_settings(folder, config, options.settings)
    section: dict[str, Any] = {
        "architecture": config.family,
        "graphs": {"vision": "vision.onnx", "decoder": "decoder.onnx"},
        "tokenizer": "tokenizer.json",
        **spec_sizes(config, settings),
        "step": step_section(config.text, storage, options.precision) if with_step else None,
        "tower": tower_section(config, storage, vision_precision(options)),
    }
    matrix = matrix_record("embedding.bin", config, storage)
    check_section(ReasonerSpec, {**section, "embedding": matrix, "lm_head": matrix}, folder)
    return section


class ReasonerGraphFiles:
    """Writes ``vision.onnx`` and ``decoder.onnx`` of a checkpoint, as `section` describes them."""

    def __init__(
        self, checkpoint: Weights, config: QwenConfig, options: ReasonerOptions,
        *, storage: Storage, sha256: str, section: dict[str, Any],
    ) -> None:  # fmt: skip
        self.checkpoint, self.config, self.options = checkpoint, config, options
        self.storage, self.section = storage, section
        self.metadata = {"exporter": f"medreasoner {__version__}", "source_sha256": sha256, "dialect": "ort"}

    def vision(self, out: Path, external: bool) -> None:
        """Write the vision tower into a folder, its weights beside it if `external`."""
        every = self.section["tower"] is not None
        with weights_file(out / "vision.onnx", wanted=external, every=every) as outside:
            graph = vision_graph(
                self.checkpoint, self.config, precision=vision_precision(self.options), outside=outside,
                tower=TOWERS[self.config.family], storage=self.storage, metadata=self.metadata,
            )  # fmt: skip
        save_graph(graph, out / "vision.onnx")

    def decoder(self, out: Path, external: bool, reader: PromptReader | None) -> None:
        """Write the decoder, its levels chosen on what `reader` reads, if there are any to choose."""
        rounding: Rounding = quantise
        if reader is not None:
            rounding = LayerwiseRounding(
                self.checkpoint, self.config, self.storage, spec=reader.spec,
                states=reader.states(self.options.calibration), scratch=out,
            )  # fmt: skip
        every = self.section["step"] is not None
        with weights_file(out / "decoder.onnx", wanted=external, every=every) as outside:
            graph = decoder_graph(
                self.checkpoint, self.config, precision=self.options.precision, outside=outside, rounding=rounding,
                storage=self.storage, metadata=self.metadata,
            )  # fmt: skip
        save_graph(graph, out / "decoder.onnx")


def reasoner_matrices(
    checkpoint: Weights, config: QwenConfig, embedding: str, storage: Storage, out: Path
) -> dict[str, Any]:
    """Write the token embedding and, if it is another matrix, the output projection."""
    shape = (config.text.vocab_size, config.text.hidden_dim)

    def chunks(tensor: str) -> Iterator[Any]:
        array = checkpoint.tensor(tensor, shape)
        return (np.asarray(array[start : start + ROWS]) for start in range(0, len(array), ROWS))

    def write(name: str, tensor: str) -> dict[str, Any]:
        """Write a matrix row by row, and describe it."""
        with (out / name).open("wb") as file:
            for chunk in chunks(tensor):
                file.write(store(chunk, storage, tensor).tobytes())
        return matrix_record(name, config, storage)

    described = {"embedding": write("embedding.bin", embedding)}
    if "lm_head.weight" in checkpoint:
        # Some files hold the tied matrix twice. Where the two differ, transformers ties nothing, whatever the flag.
        pairs = zip(chunks(embedding), chunks("lm_head.weight"), strict=True)
        tied = all(np.array_equal(first, second) for first, second in pairs)
    else:
        tied = config.text.tied
    if tied:
        return described | {"lm_head": described["embedding"]}
    return described | {"lm_head": write("lm_head.bin", "lm_head.weight")}


def copy_tokenizer(folder: Path, config: QwenConfig, out: Path) -> None:
    """The same tokenizer without the layout of its file, which may be more than half of it."""
    source = folder / "tokenizer.json"
    if not source.is_file():
        raise BundleError(f"{source} is missing: save the tokenizer in its fast form beside the weights")
    n_tokens = load_tokenizer(str(source)).get_vocab_size()
    if not 0 < n_tokens <= config.text.vocab_size:
        raise BundleError(
            f"{source}: {n_tokens} tokens, and config.json says vocab_size {config.text.vocab_size}; "
            "save the tokenizer of this checkpoint beside the weights"
        )
    content = json.dumps(read_json(source), ensure_ascii=False, separators=(",", ":"))
    (out / source.name).write_text(content, encoding="utf-8")
