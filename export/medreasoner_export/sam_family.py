"""Which segmenter a checkpoint is, whatever form it is stored in: its graphs, its sizes, and whose images it wants."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx

from medreasoner.errors import BundleError
from medreasoner_export.checkpoint import Checkpoint, Weights
from medreasoner_export.config_section import naming
from medreasoner_export.graph import Precision, Storage
from medreasoner_export.optimum_sam import is_optimum
from medreasoner_export.sam2_config import SAM2_TYPES, Sam2Config, image_sizes
from medreasoner_export.sam2_decoder import sam2_decoder_graph
from medreasoner_export.sam2_encoder import sam2_encoder_graph
from medreasoner_export.sam2_original import is_sam2_file, sam2_name, sam2_weights
from medreasoner_export.sam_config import DecoderConfig, SamConfig
from medreasoner_export.sam_decoder import sam_decoder_graph
from medreasoner_export.sam_encoder import encoder_graph, image_tower_section
from medreasoner_export.sam_original import sam_weights
from medreasoner_export.settings import SamArch, image_side, stated_image_side, stated_resize
from medreasoner_export.tiny_vit import is_tiny_vit, tiny_vit_graph
from medreasoner_export.torch_file import read_torch_file

__all__ = ["SAM2_VIDEO", "TWICE", "Family", "is_sam2", "open_sam", "recognise"]

# Weights of the architecture that the graphs leave out: mask prompts, masks that were not asked for, and counters.
UNUSED = ("prompt_encoder.mask_embed.", "mask_decoder.output_hypernetworks_mlps.", "num_batches_tracked")
# Older files hold the positions of the prompt encoder a second time.
TWICE = "prompt_encoder.shared_embedding.positional_embedding"
SAM2_VIDEO = (
    "memory_attention.", "memory_encoder.", "mask_downsample.",
    "memory_temporal_positional_encoding", "no_memory_positional_encoding", "no_object_pointer",
    "object_pointer_proj.", "occlusion_spatial_embedding_parameter", "temporal_positional_encoding_projection_layer.",
    "maskmem_tpos_enc", "no_mem_pos_enc", "no_obj_ptr", "obj_ptr_proj.", "obj_ptr_tpos_proj.", "no_obj_embed_spatial",
)  # fmt: skip
"""Parts of the names, in transformers and in the original, of what in a SAM 2 serves videos alone."""

# Pixels of the images that they were trained on.
SAM2_IMAGE, MEDSAM2_IMAGE = 1024, 512


def _keeps_its_graph(_storage: Storage, _precision: Precision) -> None:
    """Of encoders that no kernel of ours runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a checkpoint was found to be.

    Attributes
    ----------
    name, form, sizes
        In words: the architecture, who stores it so, and how large it is.
    arch
        Whose images and prompts it wants.
    architecture
        As a manifest calls the decoder's conventions.
    config
        Sizes that encoder and decoder share.
    encoder, decoder
        Make the graphs; the rest of the arguments of :func:`encoder_graph` and :func:`sam_decoder_graph` is missing.
    unused
        Parts of the names of tensors that no graph needs.
    tower
        What a manifest says of an encoder that can do without its graph, for a storage and a precision.
    """

    name: str
    form: str
    sizes: str
    arch: SamArch
    architecture: Literal["sam", "sam2"]
    config: DecoderConfig
    encoder: Callable[..., onnx.ModelProto]
    decoder: Callable[..., onnx.ModelProto]
    unused: tuple[str, ...]
    tower: Callable[[Storage, Precision], dict[str, Any] | None] = _keeps_its_graph

    @property
    def recognised(self) -> str:
        """The whole in words."""
        return f"{self.name} {self.form}, {self.sizes}, images of {self.config.image_size} px"


def open_sam(path: str | Path) -> Weights:
    """Weights of a SAM or SAM 2 under their names in transformers, whatever form they are stored in.

    Parameters
    ----------
    path
        A folder as transformers writes it, or a ``.pt`` or ``.pth`` file of ``segment-anything`` or ``sam2``.

    Raises
    ------
    BundleError
        If it holds something else; the message names the file.
    """
    path = Path(path)
    if is_optimum(path):
        raise BundleError(f"{path} holds ONNX graphs without weights to read; give the checkpoint they were made from")
    if path.is_dir():
        return Checkpoint(path)
    entries = read_torch_file(path)
    return sam2_weights(path, entries) if is_sam2_file(entries) else sam_weights(path, entries)


def is_sam2(weights: Weights) -> bool:
    """Whether `weights` are those of a SAM 2."""
    return weights.config.get("model_type") in SAM2_TYPES


def recognise(weights: Weights, asked: SamArch, settings: Mapping[str, Any]) -> Family:
    """What the checkpoint is.

    Parameters
    ----------
    weights
        As :func:`open_sam` returns them.
    asked
        What it was called: it decides between those whose weights look alike.
    settings
        Of the export; ``resize`` decides on the size of a SAM 2's images.

    Raises
    ------
    BundleError
        If it is something else than was asked for, of no known size, or nothing tells the size of its images.
    """
    with naming(weights.path):
        return _sam2(weights, asked, settings) if is_sam2(weights) else _sam(weights, asked)


def _sam(weights: Weights, asked: SamArch) -> Family:
    config = SamConfig.from_json(weights.config)
    found: tuple[str, SamArch] = ("SAM", "sam")
    if is_tiny_vit(weights):
        found = ("LiteMedSAM", "litemedsam")
    elif config.adapter_dim:
        found = ("SAM-Med2D", "sam-med2d")
    name, arch = found
    if asked == "medsam" and arch == "sam":  # only their training differs
        name, arch = "MedSAM", "medsam"
    _check_asked(weights, asked, arch, found[0])
    return Family(
        name=name,
        form="as transformers stores it" if weights.path.is_dir() else "as segment-anything stores it",
        sizes=f"{config.n_layers} layers of {config.hidden_dim}",
        arch=arch,
        architecture="sam",
        config=config,
        encoder=partial(tiny_vit_graph if is_tiny_vit(weights) else encoder_graph, weights, config),
        decoder=partial(sam_decoder_graph, weights, config),
        unused=(*UNUSED, TWICE),
        tower=_keeps_its_graph if is_tiny_vit(weights) else partial(image_tower_section, config),
    )


def _sam2(weights: Weights, asked: SamArch, settings: Mapping[str, Any]) -> Family:
    arch: SamArch = "medsam2" if asked == "medsam2" else "sam2"
    _check_asked(weights, asked, arch, "SAM 2")
    config = Sam2Config.from_json(weights.config, SAM2_IMAGE)
    size = sam2_name(config)
    config = replace(config, image_size=_sam2_image(weights, asked, settings, ambiguous=size == "tiny"))
    return Family(
        name="MedSAM2" if arch == "medsam2" else "SAM 2",
        form="as transformers stores it" if weights.path.is_dir() else "as facebookresearch/sam2 stores it",
        sizes=f"Hiera{'-' + size if size else ''} with {len(config.blocks)} layers of {config.dims[0]} and more",
        arch=arch,
        architecture="sam2",
        config=config,
        encoder=partial(sam2_encoder_graph, weights, config),
        decoder=partial(sam2_decoder_graph, weights, config),
        unused=(*UNUSED, "mask_decoder.pred_obj_score_head.", *SAM2_VIDEO),
    )


def _check_asked(weights: Weights, asked: SamArch, arch: SamArch, name: str) -> None:
    if asked not in ("auto", arch):
        raise BundleError(f"{weights.path}: it was called {asked}, but the weights are those of {name}")


def _sam2_image(weights: Weights, asked: SamArch, settings: Mapping[str, Any], *, ambiguous: bool) -> int:
    """Side of the images, pixels: positions are enlarged to any, so the weights fit all and tell none.

    The first of these that says something: the ``resize`` setting, ``medsam2``, a folder's own files if they agree,
    ``sam2``, and not being `ambiguous`: of the size that MedSAM2 has too.

    Raises
    ------
    BundleError
        If nothing does, or a folder's files contradict each other.
    """
    resize = stated_resize(weights.path, settings)
    if resize is not None:
        side = image_side(resize)
        if side is None:
            raise BundleError(f"resize: a SAM 2 wants squares, such as {_setting()}, got {resize!r:.120}")
        return side
    if asked == "medsam2":
        return MEDSAM2_IMAGE
    stated = _stated_images(weights)
    if len(set(stated.values())) == 1:
        return next(iter(stated.values()))
    if asked == "sam2":
        return SAM2_IMAGE
    if stated:
        said = ", ".join(f"{key} says {side}" for key, side in stated.items())
        raise BundleError(f"{weights.path}: the size of its images is not certain: {said}; {_choices()}")
    if ambiguous:
        raise BundleError(f"{weights.path}: SAM 2.1's Hiera-tiny and MedSAM2 have the same tensors; {_choices()}")
    return SAM2_IMAGE


def _stated_images(weights: Weights) -> dict[str, int]:
    if not weights.path.is_dir():
        return {}
    found = image_sizes(weights.config)
    processor = stated_image_side(weights.path)
    return found | ({"the image processor": processor} if processor else {})


def _choices() -> str:
    return (
        f"say --arch sam2 for images of {SAM2_IMAGE} px, --arch medsam2 for {MEDSAM2_IMAGE}, "
        f"or --settings with {_setting()}"
    )


def _setting() -> str:
    return '{"resize": {"rule": "stretch", "width": 512, "height": 512}}'
