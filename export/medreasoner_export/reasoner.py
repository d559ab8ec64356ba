"""A Qwen2.5-VL or Qwen2-VL checkpoint as two ONNX graphs, an embedding matrix and a description."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medreasoner._version import __version__
from medreasoner.errors import BundleError
from medreasoner.manifest import read_record
from medreasoner.spec import ReasonerSpec
from medreasoner_export.checkpoint import Checkpoint, Progress, Weights
from medreasoner_export.folder import describe, writing_export
from medreasoner_export.graph import Precision, Rounding, Storage, are_large, save_graph, store, weights_file
from medreasoner_export.layerwise import LayerwiseRounding
from medreasoner_export.lora import with_adapter
from medreasoner_export.needs import check_needs, reasoner_needs
from medreasoner_export.prompts import CalibrationPrompt, PromptReader
from medreasoner_export.quantise import quantise
from medreasoner_export.qwen2_vision import Qwen2VisionTower
from medreasoner_export.qwen_config import Family, QwenConfig
from medreasoner_export.qwen_decoder import TEXT_PREFIXES, decoder_graph
from medreasoner_export.qwen_vision import VisionTower, vision_graph
from medreasoner_export.settings import reasoner_settings

__all__ = ["ReasonerExport", "ReasonerOptions", "export_reasoner", "source_storage"]

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
        ``"int8"`` rounds the matrices of both graphs to eight bits, ``"int4"`` those of the decoder to four; the rest,
        embedding and language head too, stays as it is. ``"fp16"``: both graphs compute in float16 and the decoder's
        caches are float16, as attention on a GPU needs them.
    external_data
        Whether the graphs' weights go into files beside them; None: where the checkpoint is too large for one file.
    adapter
        Folder of a LoRA adapter in peft's layout, to be merged.
    calibration
        Prompts by which the levels of ``"int4"`` are chosen; none: rounded to the nearest.
    settings
        Entries that replace those of ``medreasoner.json`` (see :mod:`medreasoner_export.settings`).
    """

    weights: Storage | Literal["source"] = "source"
    precision: Precision = "fp32"
    external_data: bool | None = None
    adapter: Path | None = None
    calibration: Sequence[CalibrationPrompt] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasonerExport:
    """An exported reasoner: its folder, and the ``reasoner`` section of a manifest with paths relative to it."""

    folder: Path
    section: Mapping[str, Any]
    sha256: str
    storage: Storage


def export_reasoner(
    checkpoint_dir: str | Path,
    out_dir: str | Path,
    *,
    options: ReasonerOptions | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> ReasonerExport:
    """Write ``vision.onnx``, ``decoder.onnx``, ``embedding.bin``, ``tokenizer.json`` and ``export.json``.

    Parameters
    ----------
    checkpoint_dir
        Folder with ``config.json``, safetensors weights, ``tokenizer.json`` and optionally ``medreasoner.json``.
    out_dir
        Folder to write into, made if absent.
    options
        Element type of the weights, and settings.
    progress
        Called for every tensor that has been read.
    announce
        Told in words what will be needed, before the work starts.

    Raises
    ------
    BundleError
        If the checkpoint is incomplete, malformed or of another architecture; the message names the file or tensor.
        If a prompt to calibrate with does not fit, or the precision has no levels to choose.
    ImageReadError, QueryError
        If a prompt to calibrate with cannot be read.
    """
    options = options or ReasonerOptions()
    if options.calibration and options.precision != "int4":
        raise BundleError(f"prompts to calibrate with are for precision int4, not {options.precision}")
    checkpoint: Weights = Checkpoint(checkpoint_dir)
    if options.adapter is not None:
        checkpoint = with_adapter(checkpoint, options.adapter)
    config = QwenConfig.from_json(checkpoint.config)
    settings = reasoner_settings(checkpoint.path, config, options.settings)
    embedding = checkpoint.prefix(TEXT_PREFIXES, "embed_tokens.weight") + "embed_tokens.weight"
    storage = source_storage(checkpoint, embedding, options.weights)
    needs = reasoner_needs(checkpoint.shapes, storage, options.precision, calibrated=bool(options.calibration))
    announce(f"{needs} are needed")
    check_needs(needs, Path(out_dir))
    checkpoint.progress = progress
    sha256 = checkpoint.sha256()
    metadata = {"exporter": f"medreasoner {__version__}", "source_sha256": sha256, "dialect": "ort"}
    external = options.external_data
    if external is None:
        external = are_large(checkpoint.shapes.values(), storage)
    common: dict[str, Any] = {"storage": storage, "metadata": metadata}
    section: dict[str, Any] = {
        "architecture": config.family,
        "graphs": {"vision": "vision.onnx", "decoder": "decoder.onnx"},
    }
    with writing_export(out_dir) as out:
        _copy_tokenizer(checkpoint.path, out)
        section |= _matrices(checkpoint, config, embedding, storage, out)
        section |= {"tokenizer": "tokenizer.json"} | _sizes(config, settings)
        description = {"section": section, "sha256": sha256, "storage": storage, "precision": options.precision}
        reader = None
        if options.calibration:
            spec = read_record(ReasonerSpec, section, "reasoner")
            reader = PromptReader(spec, out)
            counts = {"prompts": len(options.calibration), "tokens": reader.check(options.calibration)}
            announce(f"calibrating on {counts['prompts']} prompts of {counts['tokens']} tokens")
            description["calibration"] = counts
        with weights_file(out / "vision.onnx", wanted=external) as outside:
            precision: Precision = "fp32" if options.precision == "int4" else options.precision
            graph = vision_graph(
                checkpoint, config, precision=precision, outside=outside, tower=TOWERS[config.family], **common
            )
        save_graph(graph, out / "vision.onnx")
        rounding: Rounding = quantise
        if reader is not None:
            states = reader.states(options.calibration)
            rounding = LayerwiseRounding(checkpoint, config, storage, spec=spec, states=states, scratch=out)
        with weights_file(out / "decoder.onnx", wanted=external) as outside:
            graph = decoder_graph(
                checkpoint, config, precision=options.precision, outside=outside, rounding=rounding, **common
            )
        save_graph(graph, out / "decoder.onnx")
        checkpoint.check_all_read(ignore=("inv_freq",))
        describe(out, description)
    return ReasonerExport(folder=Path(out_dir), section=section, sha256=sha256, storage=storage)


def source_storage(checkpoint: Weights, probe: str, weights: Storage | Literal["source"]) -> Storage:
    """`weights`, or for ``"source"`` the element type of the tensor `probe`."""
    if weights != "source":
        return weights
    dtype = checkpoint.dtype(probe)
    return dtype if dtype in ("float16", "bfloat16") else "float32"  # type: ignore[return-value]


def _matrices(checkpoint: Weights, config: QwenConfig, embedding: str, storage: Storage, out: Path) -> dict[str, Any]:
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
        return {"file": name, "dtype": storage, "shape": list(shape)}

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


def _sizes(config: QwenConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rest of a manifest's ``reasoner`` section."""
    text, vision = config.text, config.vision
    return {
        "n_layers": text.n_layers,
        "n_heads": text.n_heads,
        "n_kv_heads": text.n_kv_heads,
        "head_dim": text.head_dim,
        "hidden_dim": text.hidden_dim,
        "vocab_size": text.vocab_size,
        "rope_theta": text.rope_theta,
        "mrope_section": list(text.mrope_section),
        "max_length": settings["max_length"],
        "vision": {
            "patch_size": vision.patch_size,
            "merge_size": vision.merge_size,
            "window_size": vision.window_size,
            "head_dim": vision.head_dim,
            "full_attention_layers": list(vision.full_attention_layers),
            "image_mean": settings["image_mean"],
            "image_std": settings["image_std"],
            "resize": settings["resize"],
        },
        "prompt": settings["prompt"],
        "answer": settings["answer"],
        "coordinates": settings["coordinates"],
        "absent_threshold": settings["absent_threshold"],
        "max_query_tokens": settings["max_query_tokens"],
        "max_think_tokens": settings["max_think_tokens"],
    }


def _copy_tokenizer(folder: Path, out: Path) -> None:
    source = folder / "tokenizer.json"
    if not source.is_file():
        raise BundleError(f"{source} is missing: save the tokenizer in its fast form beside the weights")
    shutil.copyfile(source, out / source.name)
