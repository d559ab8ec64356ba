"""A checkpoint of a SAM or SAM 2 as two ONNX graphs and a description."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medreasoner._version import __version__
from medreasoner_export.checkpoint import Progress
from medreasoner_export.folder import describe, writing_export
from medreasoner_export.graph import Precision, Storage, are_large, save_graph, weights_file
from medreasoner_export.needs import check_needs, segmenter_needs
from medreasoner_export.reasoner import source_storage
from medreasoner_export.sam_family import open_sam, recognise
from medreasoner_export.settings import SamArch, segmenter_settings

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
        Arithmetic of the image encoder. The mask decoder, a hundredth of the work, stays in float32: a prompt's place
        among a thousand pixels needs more digits than float16 has.
    settings
        Entries that replace those of ``medreasoner.json``: ``resize``, ``rescale``, ``image_mean``, ``image_std``,
        ``prompts``, ``multimask`` (the alternatives for ambiguous prompts instead of the single mask), ``box_mask``
        (the decoder also draws a box into SAM's mask prompt, as a segmenter was trained with).
    """

    arch: SamArch = "auto"
    weights: Storage | Literal["source"] = "source"
    precision: Precision = "fp32"
    settings: Mapping[str, Any] = field(default_factory=dict)


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
    checkpoint = open_sam(checkpoint_path)
    family = recognise(checkpoint, options.arch, options.settings)
    config = family.config
    settings = segmenter_settings(checkpoint.path, config.image_size, family.arch, options.settings)
    storage = source_storage(checkpoint, PROBE, options.weights)
    multimask, box_mask = bool(settings["multimask"]), bool(settings["box_mask"])
    needs = segmenter_needs(checkpoint.shapes, storage)
    announce(f"{family.recognised}; {needs} are needed")
    check_needs(needs, Path(out_dir))
    checkpoint.progress = progress
    sha256 = checkpoint.sha256()
    metadata = {
        "exporter": f"medreasoner {__version__}",
        "source_sha256": sha256,
        "multimask": str(multimask).lower(),
        "box_mask": str(box_mask).lower(),
    }
    section = {
        "architecture": family.architecture,
        "graphs": {"encoder": "encoder.onnx", "decoder": "decoder.onnx"},
        "resize": settings["resize"],
        "rescale": settings["rescale"],
        "image_mean": settings["image_mean"],
        "image_std": settings["image_std"],
        "mask_size": config.mask_size,
        "n_masks": config.n_masks if multimask else 1,
        "prompts": settings["prompts"],
    }
    common: dict[str, Any] = {"storage": storage, "metadata": metadata}
    with writing_export(out_dir) as out:
        large = are_large(checkpoint.shapes.values(), storage)
        with weights_file(out / "encoder.onnx", wanted=large) as outside:
            encoder = family.encoder(precision=options.precision, outside=outside, **common)
        save_graph(encoder, out / "encoder.onnx")
        save_graph(family.decoder(multimask=multimask, box_mask=box_mask, **common), out / "decoder.onnx")
        checkpoint.check_all_read(ignore=family.unused)
        describe(out, {"section": section, "sha256": sha256, "storage": storage, "precision": options.precision})
    return SegmenterExport(
        folder=Path(out_dir), section=section, sha256=sha256, storage=storage, recognised=family.recognised
    )
