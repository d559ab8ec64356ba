"""A SAM checkpoint as two ONNX graphs and a description."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medreasoner._version import __version__
from medreasoner.errors import BundleError
from medreasoner_export.checkpoint import Weights
from medreasoner_export.folder import describe, writing_export
from medreasoner_export.graph import Storage, are_large, save_graph, weights_file
from medreasoner_export.reasoner import source_storage
from medreasoner_export.sam_config import SamConfig
from medreasoner_export.sam_decoder import sam_decoder_graph
from medreasoner_export.sam_encoder import encoder_graph
from medreasoner_export.sam_original import open_sam
from medreasoner_export.settings import SamArch, segmenter_settings
from medreasoner_export.tiny_vit import is_tiny_vit, tiny_vit_graph

__all__ = ["SegmenterExport", "SegmenterOptions", "export_segmenter"]

# Weights of the architecture that the graphs leave out: mask prompts, masks that were not asked for, and counters.
UNUSED = ("prompt_encoder.mask_embed.", "mask_decoder.output_hypernetworks_mlps.", "num_batches_tracked")
# A matrix that every family has.
PROBE = "mask_decoder.mask_tokens.weight"
# Older files hold the positions of the prompt encoder a second time.
TWICE = "prompt_encoder.shared_embedding.positional_embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmenterOptions:
    """How a segmenter is exported.

    Attributes
    ----------
    arch
        ``"medsam"`` for MedSAM, whose weights look like those of SAM but want other images; ``"auto"`` takes what the
        weights are: LiteMedSAM, SAM-Med2D if they have adapters, else SAM.
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
    precision: Literal["fp32", "fp16"] = "fp32"
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
    checkpoint_path: str | Path, out_dir: str | Path, *, options: SegmenterOptions | None = None
) -> SegmenterExport:
    """Write ``encoder.onnx``, ``decoder.onnx`` and ``export.json``.

    Parameters
    ----------
    checkpoint_path
        Folder of a transformers ``SamModel``: ``config.json`` and safetensors weights, optionally ``medreasoner.json``.
        Or the ``.pth`` file of a SAM, MedSAM, SAM-Med2D or LiteMedSAM as ``segment-anything`` stores it; its sizes are
        read from the weights.
    out_dir
        Folder to write into, made if absent.
    options
        Element type of the weights, and settings.

    Raises
    ------
    BundleError
        If the checkpoint is incomplete, malformed or of another architecture; the message names the file or tensor.
    """
    options = options or SegmenterOptions()
    checkpoint = open_sam(checkpoint_path)
    config = SamConfig.from_json(checkpoint.config)
    family, arch = _family(checkpoint, config, options.arch)
    settings = segmenter_settings(checkpoint.path, config.image_size, arch, options.settings)
    storage = source_storage(checkpoint, PROBE, options.weights)
    multimask, box_mask = bool(settings["multimask"]), bool(settings["box_mask"])
    sha256 = checkpoint.sha256()
    metadata = {
        "exporter": f"medreasoner {__version__}",
        "source_sha256": sha256,
        "multimask": str(multimask).lower(),
        "box_mask": str(box_mask).lower(),
    }
    section = {
        "architecture": "sam",
        "graphs": {"encoder": "encoder.onnx", "decoder": "decoder.onnx"},
        "resize": settings["resize"],
        "rescale": settings["rescale"],
        "image_mean": settings["image_mean"],
        "image_std": settings["image_std"],
        "mask_size": config.mask_size,
        "n_masks": config.n_masks if multimask else 1,
        "prompts": settings["prompts"],
    }
    make_encoder = tiny_vit_graph if is_tiny_vit(checkpoint) else encoder_graph
    common: dict[str, Any] = {"storage": storage, "metadata": metadata}
    with writing_export(out_dir) as out:
        large = are_large(checkpoint.shapes.values(), storage)
        with weights_file(out / "encoder.onnx", wanted=large) as outside:
            encoder = make_encoder(checkpoint, config, precision=options.precision, outside=outside, **common)
        save_graph(encoder, out / "encoder.onnx")
        decoder = sam_decoder_graph(checkpoint, config, multimask=multimask, box_mask=box_mask, **common)
        save_graph(decoder, out / "decoder.onnx")
        checkpoint.check_all_read(ignore=(*UNUSED, TWICE))
        describe(out, {"section": section, "sha256": sha256, "storage": storage, "precision": options.precision})
    form = "as transformers stores it" if checkpoint.path.is_dir() else "as segment-anything stores it"
    recognised = f"{family} {form}, {config.n_layers} layers of {config.hidden_dim}, images of {config.image_size} px"
    return SegmenterExport(folder=Path(out_dir), section=section, sha256=sha256, storage=storage, recognised=recognised)


def _family(weights: Weights, config: SamConfig, asked: SamArch) -> tuple[str, SamArch]:
    """Name of what the weights are, and whose images and prompts they want.

    Raises
    ------
    BundleError
        If something else was asked for.
    """
    found: tuple[str, SamArch] = ("SAM", "sam")
    if is_tiny_vit(weights):
        found = ("LiteMedSAM", "litemedsam")
    elif config.adapter_dim:
        found = ("SAM-Med2D", "sam-med2d")
    if asked == "medsam" and found[1] == "sam":  # only their training differs
        return "MedSAM", "medsam"
    if asked not in ("auto", found[1]):
        raise BundleError(f"{weights.path}: it was called {asked}, but the weights are those of {found[0]}")
    return found
