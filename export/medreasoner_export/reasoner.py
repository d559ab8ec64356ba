"""A Qwen2.5-VL or Qwen2-VL checkpoint as two ONNX graphs, an embedding matrix and a description."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medreasoner._version import __version__
from medreasoner.errors import BundleError
from medreasoner.reasoner.prompt import load_tokenizer
from medreasoner.spec import ReasonerSpec
from medreasoner_export.checkpoint import Checkpoint, Progress, Weights, read_json
from medreasoner_export.config_section import naming
from medreasoner_export.folder import Build, build_key, building, describe, weights_stage
from medreasoner_export.graph import Precision, Storage, WeightsFile, are_large, save_graph, store, weights_file
from medreasoner_export.lora import with_adapter
from medreasoner_export.needs import check_needs, reasoner_needs
from medreasoner_export.qwen2_vision import Qwen2VisionTower
from medreasoner_export.qwen_config import Family, QwenConfig
from medreasoner_export.qwen_decoder import TEXT_PREFIXES, decoder_graph, step_section
from medreasoner_export.qwen_vision import VisionTower, vision_graph
from medreasoner_export.settings import check_section, reasoner_settings

__all__ = ["ReasonerExport", "ReasonerOptions", "export_reasoner", "source_storage"]

TOWERS: Mapping[Family, type[VisionTower]] = {"qwen2_5_vl": VisionTower, "qwen2_vl": Qwen2VisionTower}
"""The vision tower of each family; their decoders are the same."""

# What shapes an export beside the weights.
SMALL_FILES = (
    "config.json", "medreasoner.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
)  # fmt: skip

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
    settings
        Entries that replace those of ``medreasoner.json`` (see :mod:`medreasoner_export.settings`).
    fresh
        Do not use what a stopped build with the same options has left beside the output.
    """

    weights: Storage | Literal["source"] = "source"
    precision: Precision = "fp32"
    external_data: bool | None = None
    adapter: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False


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

    The folder appears when all of it is there. A build that was stopped leaves its finished stages in a hidden folder
    beside it, and the same call goes on from there (see :mod:`medreasoner_export.folder`).

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
    """
    options = options or ReasonerOptions()
    checkpoint: Weights = Checkpoint(checkpoint_dir)
    folder = checkpoint.path
    if options.adapter is not None:
        checkpoint = with_adapter(checkpoint, options.adapter)
    with naming(folder):
        config = QwenConfig.from_json(checkpoint.config)
    settings = reasoner_settings(folder, config, options.settings)
    embedding = checkpoint.prefix(TEXT_PREFIXES, "embed_tokens.weight") + "embed_tokens.weight"
    storage = source_storage(checkpoint, embedding, options.weights)
    external = options.external_data
    if external is None:
        external = are_large(checkpoint.shapes.values(), storage)
    section: dict[str, Any] = {
        "architecture": config.family,
        "graphs": {"vision": "vision.onnx", "decoder": "decoder.onnx"},
        "tokenizer": "tokenizer.json",
        **_sizes(config, settings),
        "step": None if external else step_section(config.text, storage, options.precision),
    }
    matrix = {"file": "embedding.bin", "dtype": storage, "shape": [config.text.vocab_size, config.text.hidden_dim]}
    check_section(ReasonerSpec, {**section, "embedding": matrix, "lm_head": matrix}, folder)
    checkpoint.expect(embedding, (config.text.vocab_size, config.text.hidden_dim))  # else it were told at the very end
    _check_same(folder, Path(out_dir))
    needs = reasoner_needs(checkpoint.shapes, storage, options.precision)
    options_key = repr(("reasoner", replace(options, fresh=False)))
    key = build_key(options_key, [*checkpoint.files, *(folder / name for name in SMALL_FILES)])
    with building(out_dir, key=key, fresh=options.fresh, announce=announce) as build:
        needs = replace(needs, disk=max(0, needs.disk - build.found_bytes))
        announce(f"{needs} are needed")
        check_needs(needs, build.out)
        checkpoint.progress = progress
        sha256 = str(build.stage("checksum", lambda _: {"sha256": checkpoint.sha256()})["sha256"])
        section |= _write_parts(
            build, checkpoint, config, options, storage=storage, sha256=sha256, embedding=embedding,
            external=external, steps=section["step"] is not None,
        )  # fmt: skip
        checkpoint.check_all_read(ignore=("inv_freq",))
        description = {"section": section, "sha256": sha256, "storage": storage, "precision": options.precision}
        describe(build, description)
    return ReasonerExport(folder=Path(out_dir), section=section, sha256=sha256, storage=storage)


def _write_parts(
    build: Build, checkpoint: Weights, config: QwenConfig, options: ReasonerOptions,
    *, storage: Storage, sha256: str, embedding: str, external: bool, steps: bool,
) -> dict[str, Any]:  # fmt: skip
    """Write tokenizer, graphs and matrices, each a stage; return the matrices' entries of the section."""
    metadata = {"exporter": f"medreasoner {__version__}", "source_sha256": sha256, "dialect": "ort"}
    common: dict[str, Any] = {"storage": storage, "metadata": metadata}

    def vision(out: Path) -> None:
        precision: Precision = "fp32" if options.precision == "int4" else options.precision
        with weights_file(out / "vision.onnx", wanted=external) as outside:
            graph = vision_graph(
                checkpoint, config, precision=precision, outside=outside, tower=TOWERS[config.family], **common
            )
        save_graph(graph, out / "vision.onnx")

    def decoder(out: Path) -> None:
        least = 0 if steps else WeightsFile.LEAST_BYTES  # for steps all weights are in one file, the small ones too
        with weights_file(out / "decoder.onnx", wanted=external or steps, least_bytes=least) as outside:
            graph = decoder_graph(checkpoint, config, precision=options.precision, outside=outside, **common)
        save_graph(graph, out / "decoder.onnx")

    build.stage("tokenizer", lambda out: _copy_tokenizer(checkpoint.path, config, out))
    weights_stage(build, checkpoint, "vision", vision)
    weights_stage(build, checkpoint, "decoder", decoder)
    return weights_stage(
        build, checkpoint, "embedding", lambda out: _matrices(checkpoint, config, embedding, storage, out)
    )


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


def _check_same(folder: Path, out: Path) -> None:
    if out.resolve() == folder.resolve():
        raise BundleError(f"{out} is the checkpoint's own folder; name another one to write")


def _copy_tokenizer(folder: Path, config: QwenConfig, out: Path) -> None:
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
