"""A checkpoint of a SAM or SAM 2, or a SAM in optimum's two graphs, as two ONNX graphs and a description."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from medreasoner._version import __version__
from medreasoner.errors import BundleError
from medreasoner.spec import SegmenterSpec
from medreasoner_export.checkpoint import Progress
from medreasoner_export.folder import build_key, building, describe, weights_stage
from medreasoner_export.graph import Precision, Storage, are_large, save_graph, weights_file
from medreasoner_export.needs import PROGRAM_BYTES, Needs, check_needs, segmenter_needs
from medreasoner_export.optimum_sam import is_optimum, open_optimum
from medreasoner_export.reasoner import SMALL_FILES, source_storage
from medreasoner_export.sam_decoder import drawing_section
from medreasoner_export.sam_family import open_sam, recognise
from medreasoner_export.settings import SamArch, check_section, segmenter_settings

__all__ = ["SegmenterExport", "SegmenterOptions", "export_segmenter"]

# A matrix that every family has.
PROBE = "mask_decoder.mask_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmenterOptions:
    """How a segmenter is exported.

    Attributes
    ----------
    arch
        ``"medsam"`` for MedSAM, whose weights look like those of SAM but want other images, and ``"medsam2"`` for
        MedSAM2, which looks like SAM 2.1; ``"auto"`` takes what the weights are: SAM 2, LiteMedSAM, SAM-Med2D if they
        have adapters, else SAM.
    weights
        Element type of matrices in the files; ``"source"`` keeps the checkpoint's own.
    precision
        Arithmetic of the image encoder; ``"int8"``, for CPUs, has integer products. The mask decoder, a hundredth of
        the work, stays in float32: a prompt's place among a thousand pixels needs more digits than float16 has.
    settings
        Entries that replace those of ``medreasoner.json``: ``resize``, ``rescale``, ``image_mean``, ``image_std``,
        ``prompts``, ``multimask`` (the alternatives for ambiguous prompts instead of the single mask), ``box_mask``
        (the decoder also draws a box into SAM's mask prompt, as a segmenter was trained with).
    fresh
        Do not use what a stopped build with the same options has left beside the output.
    """

    arch: SamArch = "auto"
    weights: Storage | Literal["source"] = "source"
    precision: Precision = "fp32"
    settings: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmenterExport:
    """An exported segmenter: its folder, and the ``segmenter`` section of a manifest with paths relative to it.

    `recognised` says in words which architecture and size was found.
    """

    folder: Path
    section: Mapping[str, Any]
    sha256: str
    storage: Storage
    recognised: str


def export_segmenter(
    checkpoint_path: str | Path,
    out_dir: str | Path,
    *,
    options: SegmenterOptions | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> SegmenterExport:
    """Write ``encoder.onnx``, ``decoder.onnx`` and ``export.json``.

    Parameters
    ----------
    checkpoint_path
        Folder of a transformers ``SamModel``, ``Sam2Model`` or ``Sam2VideoModel``: ``config.json`` and safetensors
        weights, optionally ``medreasoner.json``. Or the ``.pth`` file of a SAM, MedSAM, SAM-Med2D or LiteMedSAM as
        ``segment-anything`` stores it, or the ``.pt`` file of a SAM 2 or MedSAM2; sizes are read from the weights.
        Or a folder with the two graphs that ``optimum`` makes of a ``SamModel``, and no safetensors.
    out_dir
        Folder to write into, made if absent.
    options
        Element type of the weights, and settings.
    progress
        Called for every tensor that has been read.
    announce
        Told in words what was recognised and what will be needed, before the work starts.

    Raises
    ------
    BundleError
        If the checkpoint is incomplete, malformed or of another architecture, or nothing tells the size of its images;
        the message names the file or tensor.
    """
    options = options or SegmenterOptions()
    if is_optimum(Path(checkpoint_path)):
        return _export_optimum(Path(checkpoint_path), out_dir, options, announce)
    checkpoint = open_sam(checkpoint_path)
    family = recognise(checkpoint, options.arch, options.settings)
    config = family.config
    settings = segmenter_settings(checkpoint.path, config.image_size, family.arch, options.settings)
    storage = source_storage(checkpoint, PROBE, options.weights)
    multimask, box_mask = bool(settings["multimask"]), bool(settings["box_mask"])
    needs = segmenter_needs(checkpoint.shapes, storage)
    n_masks = config.n_masks if multimask else 1
    section = _section(family.architecture, settings, mask_size=config.mask_size, n_masks=n_masks)
    if family.architecture == "sam":
        section["tower"] = family.tower(storage, options.precision)
        section["drawing"] = drawing_section(config, storage, multimask=multimask, box_mask=box_mask)
    check_section(SegmenterSpec, section, checkpoint.path)
    common: dict[str, Any] = {"storage": storage}

    def encoder(out: Path) -> None:
        large = are_large(checkpoint.shapes.values(), storage)
        every = section.get("tower") is not None
        with weights_file(out / "encoder.onnx", wanted=large, every=every) as outside:
            graph = family.encoder(precision=options.precision, outside=outside, metadata=metadata, **common)
        save_graph(graph, out / "encoder.onnx")

    def decoder(out: Path) -> None:
        with weights_file(out / "decoder.onnx", every=section.get("drawing") is not None) as outside:
            graph = family.decoder(multimask=multimask, box_mask=box_mask, outside=outside, metadata=metadata, **common)
        save_graph(graph, out / "decoder.onnx")

    options_key = repr(("segmenter", replace(options, fresh=False)))
    key = build_key(options_key, [*checkpoint.files, *(checkpoint.path / name for name in SMALL_FILES)])
    with building(out_dir, key=key, fresh=options.fresh, announce=announce) as build:
        needs = replace(needs, disk=max(0, needs.disk - build.found_bytes))
        announce(f"{family.recognised}; {needs} are needed")
        check_needs(needs, build.out)
        checkpoint.progress = progress
        sha256 = str(build.stage("checksum", lambda _: {"sha256": checkpoint.sha256()})["sha256"])
        metadata = _metadata(sha256, settings)
        weights_stage(build, checkpoint, "encoder", encoder)
        weights_stage(build, checkpoint, "decoder", decoder)
        checkpoint.check_all_read(ignore=family.unused)
        description = {"section": section, "sha256": sha256, "storage": storage, "precision": options.precision}
        describe(build, {**description, "box_mask": box_mask})
    return SegmenterExport(
        folder=Path(out_dir), section=section, sha256=sha256, storage=storage, recognised=family.recognised
    )


def _export_optimum(
    folder: Path, out_dir: str | Path, options: SegmenterOptions, announce: Callable[[str], None]
) -> SegmenterExport:
    """The same of two finished graphs, which keep their numbers as they are."""
    if (
        options.arch not in ("auto", "sam")
        or options.precision != "fp32"
        or options.weights not in ("source", "float32")
    ):
        raise BundleError(
            f"{folder}: ONNX graphs are taken as they are, a SAM in float32; for anything else export the checkpoint "
            "that they were made from"
        )
    graphs = open_optimum(folder)
    settings = segmenter_settings(folder, graphs.image_size, "sam", options.settings, points_alone=True)
    needs = Needs(disk=graphs.size_bytes, memory=PROGRAM_BYTES + 3 * graphs.inside_bytes)
    announce(f"{graphs.recognised}; {needs} are needed")
    sha256 = graphs.sha256()
    section = _section("sam", settings, mask_size=graphs.mask_size, n_masks=graphs.n_masks)
    check_section(SegmenterSpec, section, folder)
    metadata = _metadata(sha256, settings)

    def written(name: str, make: Callable[..., Any]) -> Callable[[Path], None]:
        def write(out: Path) -> None:
            with weights_file(out / name, wanted=graphs.weights_outside) as outside:
                graph = make(metadata, outside)
            save_graph(graph, out / name)

        return write

    key = build_key(repr(("optimum", sha256, replace(options, fresh=False))), [])
    with building(out_dir, key=key, fresh=options.fresh, announce=announce) as build:
        check_needs(needs, build.out)
        build.stage("encoder", written("encoder.onnx", graphs.encoder_graph))
        build.stage("decoder", written("decoder.onnx", graphs.decoder_graph))
        describe(build, {"section": section, "sha256": sha256, "storage": "float32", "precision": "fp32"})
    return SegmenterExport(
        folder=Path(out_dir), section=section, sha256=sha256, storage="float32", recognised=graphs.recognised
    )


def _metadata(sha256: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """What both graphs say of themselves."""
    return {
        "exporter": f"medreasoner {__version__}",
        "source_sha256": sha256,
        "multimask": str(bool(settings["multimask"])).lower(),
        "box_mask": str(bool(settings["box_mask"])).lower(),
    }


def _section(architecture: str, settings: Mapping[str, Any], *, mask_size: int, n_masks: int) -> dict[str, Any]:
    """The ``segmenter`` section of a manifest."""
    return {
        "architecture": architecture,
        "graphs": {"encoder": "encoder.onnx", "decoder": "decoder.onnx"},
        **{key: settings[key] for key in ("resize", "rescale", "image_mean", "image_std")},
        "mask_size": mask_size,
        "n_masks": n_masks,
        "prompts": settings["prompts"],
    }
