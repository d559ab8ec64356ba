"""A Qwen2.5-VL or Qwen2-VL checkpoint as two ONNX graphs, an embedding matrix and a description."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medreasoner._version import __version__
from medreasoner.errors import BundleError
from medreasoner.manifest import read_record
from medreasoner.reasoner.prompt import load_tokenizer
from medreasoner.spec import ReasonerSpec
from medreasoner_export.checkpoint import Checkpoint, Progress, Weights, read_json
from medreasoner_export.checkpoint_spec import spec_sizes
from medreasoner_export.config_section import naming
from medreasoner_export.folder import Build, build_key, building, describe, weights_stage
from medreasoner_export.graph import (
    Precision,
    Rounding,
    Storage,
    WeightsFile,
    are_large,
    save_graph,
    store,
    weights_file,
)
from medreasoner_export.layerwise import LayerwiseRounding
from medreasoner_export.lora import with_adapter
from medreasoner_export.needs import check_needs, reasoner_needs
from medreasoner_export.prompts import CalibrationPrompt, PromptReader
from medreasoner_export.quantise import quantise
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
        If a prompt to calibrate with does not fit, or the precision has no levels to choose.
    ImageReadError, QueryError
        If a prompt to calibrate with cannot be read.
    """
    options = options or ReasonerOptions()
    if options.calibration and options.precision != "int4":
        raise BundleError(f"prompts to calibrate with are for precision int4, not {options.precision}")
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
        **spec_sizes(config, settings),
        "step": None,
    }
    if not external or options.precision == "int4":
        section["step"] = step_section(config.text, storage, options.precision)
    matrix = {"file": "embedding.bin", "dtype": storage, "shape": [config.text.vocab_size, config.text.hidden_dim]}
    check_section(ReasonerSpec, {**section, "embedding": matrix, "lm_head": matrix}, folder)
    checkpoint.expect(embedding, (config.text.vocab_size, config.text.hidden_dim))  # else it were told at the very end
    _check_same(folder, Path(out_dir))
    needs = reasoner_needs(checkpoint.shapes, storage, options.precision, calibrated=bool(options.calibration))
    images = [each.image for each in options.calibration]
    are_files = all(isinstance(image, str | Path) for image in images)  # of others no digest says whether they changed
    key = build_key(
        repr(("reasoner", replace(options, fresh=False))),
        [*checkpoint.files, *(folder / name for name in SMALL_FILES), *(map(Path, images) if are_files else ())],
    )
    with building(out_dir, key=key, fresh=options.fresh or not are_files, announce=announce) as build:
        needs = replace(needs, disk=max(0, needs.disk - build.found_bytes))
        announce(f"{needs} are needed")
        check_needs(needs, build.out)
        checkpoint.progress = progress
        sha256 = str(build.stage("checksum", lambda _: {"sha256": checkpoint.sha256()})["sha256"])
        parts = _Parts(build, checkpoint, config, options, storage=storage, sha256=sha256, section=section)
        parts.write(embedding, external=external, announce=announce)
        checkpoint.check_all_read(ignore=("inv_freq",))
        description = {"section": section, "sha256": sha256, "storage": storage, "precision": options.precision}
        describe(build, {**description, **parts.notes})
    return ReasonerExport(folder=Path(out_dir), section=section, sha256=sha256, storage=storage)


class _Parts:
    """Writes tokenizer, graphs and matrices, each a stage; what the matrices are is added to `section`."""

    def __init__(
        self, build: Build, checkpoint: Weights, config: QwenConfig, options: ReasonerOptions,
        *, storage: Storage, sha256: str, section: dict[str, Any],
    ) -> None:  # fmt: skip
        self.build, self.checkpoint, self.config, self.options = build, checkpoint, config, options
        self.storage, self.section = storage, section
        self.metadata = {"exporter": f"medreasoner {__version__}", "source_sha256": sha256, "dialect": "ort"}
        self.notes: dict[str, Any] = {}

    def write(self, embedding: str, *, external: bool, announce: Callable[[str], None]) -> None:
        build, checkpoint = self.build, self.checkpoint
        build.stage("tokenizer", lambda out: _copy_tokenizer(checkpoint.path, self.config, out))

        def matrices() -> None:
            def make(out: Path) -> dict[str, Any]:
                return _matrices(checkpoint, self.config, embedding, self.storage, out)

            self.section.update(weights_stage(build, checkpoint, "embedding", make))

        reader = None
        if self.options.calibration:  # the prompts are looked at first: they may be at fault
            matrices()
            reader = self._reader(announce)
        weights_stage(build, checkpoint, "vision", lambda out: self._vision(out, external))
        weights_stage(build, checkpoint, "decoder", lambda out: self._decoder(out, external, reader))
        if reader is None:
            matrices()

    def _reader(self, announce: Callable[[str], None]) -> PromptReader:
        reader = PromptReader(read_record(ReasonerSpec, self.section, "reasoner"), self.build.path)
        prompts = self.options.calibration
        tokens = self.build.stage("prompts", lambda _: {"tokens": reader.check(prompts)})["tokens"]
        announce(f"calibrating on {len(prompts)} prompts of {tokens} tokens")
        self.notes["calibration"] = {"prompts": len(prompts), "tokens": tokens}
        return reader

    def _vision(self, out: Path, external: bool) -> None:
        precision: Precision = "fp32" if self.options.precision == "int4" else self.options.precision
        with weights_file(out / "vision.onnx", wanted=external) as outside:
            graph = vision_graph(
                self.checkpoint, self.config, precision=precision, outside=outside,
                tower=TOWERS[self.config.family], storage=self.storage, metadata=self.metadata,
            )  # fmt: skip
        save_graph(graph, out / "vision.onnx")

    def _decoder(self, out: Path, external: bool, reader: PromptReader | None) -> None:
        rounding: Rounding = quantise
        if reader is not None:
            rounding = LayerwiseRounding(
                self.checkpoint, self.config, self.storage, spec=reader.spec,
                states=reader.states(self.options.calibration), scratch=out,
            )  # fmt: skip
        steps = self.section["step"] is not None  # then all weights are in one file, the small ones too
        least = 0 if steps else WeightsFile.LEAST_BYTES
        with weights_file(out / "decoder.onnx", wanted=external or steps, least_bytes=least) as outside:
            graph = decoder_graph(
                self.checkpoint, self.config, precision=self.options.precision, outside=outside, rounding=rounding,
                storage=self.storage, metadata=self.metadata,
            )  # fmt: skip
        save_graph(graph, out / "decoder.onnx")


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
