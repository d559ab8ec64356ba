"""A Qwen2.5-VL or Qwen2-VL checkpoint as two ONNX graphs, an embedding matrix and a description."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from medreasoner.errors import BundleError
from medreasoner.manifest import read_record
from medreasoner.spec import ReasonerSpec
from medreasoner_export.checkpoint import Checkpoint, Progress, Weights
from medreasoner_export.config_section import naming
from medreasoner_export.folder import Build, build_key, building, describe, weights_stage
from medreasoner_export.graph import Storage, are_large
from medreasoner_export.lora import with_adapter
from medreasoner_export.needs import check_needs, reasoner_needs
from medreasoner_export.prompts import PromptReader
from medreasoner_export.qwen_config import QwenConfig
from medreasoner_export.reasoner_parts import (
    ReasonerGraphFiles,
    ReasonerOptions,
    copy_tokenizer,
    embedding_name,
    reasoner_matrices,
    reasoner_section,
)

__all__ = ["ReasonerExport", "ReasonerOptions", "export_reasoner", "source_storage"]

# What shapes an export beside the weights.
SMALL_FILES = (
    "config.json", "medreasoner.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
)  # fmt: skip


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
    embedding = embedding_name(checkpoint)
    storage = source_storage(checkpoint, embedding, options.weights)
    external = options.external_data
    if external is None:
        external = are_large(checkpoint.shapes.values(), storage)
    with_step = not external or options.precision == "int4"
    section = reasoner_section(folder, config, options, storage, with_step=with_step)
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
        self.graphs = ReasonerGraphFiles(checkpoint, config, options, storage=storage, sha256=sha256, section=section)
        self.notes: dict[str, Any] = {}

    def write(self, embedding: str, *, external: bool, announce: Callable[[str], None]) -> None:
        build, checkpoint = self.build, self.checkpoint
        build.stage("tokenizer", lambda out: copy_tokenizer(checkpoint.path, self.config, out))

        def matrices() -> None:
            def make(out: Path) -> dict[str, Any]:
                return reasoner_matrices(checkpoint, self.config, embedding, self.storage, out)

            self.section.update(weights_stage(build, checkpoint, "embedding", make))

        reader = None
        if self.options.calibration:  # the prompts are looked at first: they may be at fault
            matrices()
            reader = self._reader(announce)
        weights_stage(build, checkpoint, "vision", lambda out: self.graphs.vision(out, external))
        weights_stage(build, checkpoint, "decoder", lambda out: self.graphs.decoder(out, external, reader))
        if reader is None:
            matrices()

    def _reader(self, announce: Callable[[str], None]) -> PromptReader:
        reader = PromptReader(read_record(ReasonerSpec, self.section, "reasoner"), self.build.path)
        prompts = self.options.calibration
        tokens = self.build.stage("prompts", lambda _: {"tokens": reader.check(prompts)})["tokens"]
        announce(f"calibrating on {len(prompts)} prompts of {tokens} tokens")
        self.notes["calibration"] = {"prompts": len(prompts), "tokens": tokens}
        return reader


def source_storage(checkpoint: Weights, probe: str, weights: Storage | Literal["source"]) -> Storage:
    """`weights`, or for ``"source"`` the element type of the tensor `probe`."""
    if weights != "source":
        return weights
    dtype = checkpoint.dtype(probe)
    return dtype if dtype in ("float16", "bfloat16") else "float32"  # type: ignore[return-value]


def _check_same(folder: Path, out: Path) -> None:
    if out.resolve() == folder.resolve():
        raise BundleError(f"{out} is the checkpoint's own folder; name another one to write")
