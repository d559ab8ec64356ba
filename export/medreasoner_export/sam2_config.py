"""The sizes of a SAM 2 model, read from the ``config.json`` that transformers writes for ``Sam2Model``.

References
----------
SAM 2, arXiv 2408.00714; Hiera, arXiv 2306.00989.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medreasoner.errors import BundleError
from medreasoner_export.config_section import ConfigSection
from medreasoner_export.sam_config import DecoderConfig, decoder_sizes

__all__ = ["SAM2_TYPES", "Block", "Sam2Config", "image_sizes"]

SAM2_TYPES = ("sam2", "sam2_video")
"""What ``model_type`` may be: a video model holds the parts for a single image under the same names."""

# Strides of the image encoder: of its patches, and of the embedding that the decoder reads.
PATCH_STRIDE, EMBEDDING_STRIDE = 4, 16
# The encoder halves the grid of patches this often, and the neck doubles it on the way back.
SMALLEST_STRIDE = 32
N_STAGES = 4
HIERA = "vision_config.backbone_config"
# The decoder's norms have torch's default there, not a number of the configuration.
DECODER_EPSILON = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A layer of the Hiera: channels before and behind it, and the patches along a side of what attends to itself.

    `window` is 0 where that is the whole grid. A block that `pools` halves the grid; one that `ends` a stage hands its
    output to the neck.
    """

    in_dim: int
    dim: int
    n_heads: int
    window: int
    pools: bool
    ends: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sam2Config(DecoderConfig):
    """A SAM 2: the Hiera's sizes beside the decoder's.

    Attributes
    ----------
    dims, depths, heads, windows
        Channels, blocks, attention heads and the window's side, stage by stage.
    global_blocks
        Counted through all stages: those that attend over the whole grid.
    background
        Height and width of the coarse positions, which are enlarged to the grid.
    mlp_ratio
        Hidden size of a block's MLP in units of its channels.
    stability
        Margin of the logits and threshold of ``dynamic_multimask_via_stability``, or None without it.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    windows: tuple[int, ...]
    global_blocks: tuple[int, ...]
    background: tuple[int, int]
    mlp_ratio: float
    layer_norm_eps: float
    stability: tuple[float, float] | None

    def __post_init__(self) -> None:
        numbers = (*self.dims, *self.depths, *self.heads, *self.windows)
        counts = [len(part) for part in (self.dims, self.depths, self.heads, self.windows)]
        if counts != [N_STAGES] * 4 or 0 in numbers:
            raise BundleError(f"config.json: {HIERA}: expected four stages with sizes each, got {counts} and {numbers}")
        if any(dim % heads for dim, heads in zip(self.dims, self.heads, strict=True)):
            raise BundleError(f"config.json: {HIERA}: heads {self.heads} do not divide the channels {self.dims}")
        if any(window % 2 for window in self.windows[:-1]):
            raise BundleError(f"config.json: {HIERA}: windows {self.windows} that cannot be halved")
        if len(set(self.dims)) < N_STAGES or self.n_channels % 8:
            raise BundleError(f"config.json: {HIERA}: channels {self.dims} that do not grow, or {self.n_channels}")
        if self.image_size % SMALLEST_STRIDE or self.patches % self.windows[0]:
            step = math.lcm(SMALLEST_STRIDE, PATCH_STRIDE * self.windows[0])
            raise BundleError(f"images of {self.image_size} px: this SAM 2 wants a side that is a multiple of {step}")

    @property
    def patches(self) -> int:
        """Patches along a side, before the first stage."""
        return self.image_size // PATCH_STRIDE

    @property
    def blocks(self) -> list[Block]:
        """The layers, in order. A stage's first has the window of the stage before, and halves the grid."""
        found: list[Block] = []
        for stage, depth in enumerate(self.depths):
            for index in range(depth):
                enters = stage > 0 and index == 0
                found.append(
                    Block(
                        in_dim=self.dims[stage - enters],
                        dim=self.dims[stage],
                        n_heads=self.heads[stage],
                        window=0 if len(found) in self.global_blocks else self.windows[stage - enters],
                        pools=enters,
                        ends=index + 1 == depth,
                    )
                )
        return found

    @classmethod
    def from_json(cls, config: Mapping[str, Any], image_size: int) -> "Sam2Config":
        """Read the content of ``config.json``, for images of `image_size` pixels a side whatever it says of them.

        Raises
        ------
        BundleError
            If a size is missing or malformed, or the parts do not fit each other or `image_size`.
        """
        if config.get("model_type") not in SAM2_TYPES:
            raise BundleError(f"config.json: model_type: expected sam2, got {config.get('model_type')!r:.80}")
        vision, prompts, decoder = (
            ConfigSection(config.get(name, {}), name)
            for name in ("vision_config", "prompt_encoder_config", "mask_decoder_config")
        )
        hiera = ConfigSection(vision.data.get("backbone_config", {}), HIERA)
        _expect_known(hiera, vision, prompts, decoder)
        spec = cls(
            image_size=image_size,
            patch_size=EMBEDDING_STRIDE,
            n_channels=vision.integer("fpn_hidden_size", 256),
            # Defaults are those of transformers' Sam2Config (Hiera-tiny), which files may lean on.
            dims=hiera.integers("embed_dim_per_stage", (96, 192, 384, 768)),
            depths=hiera.integers("blocks_per_stage", (1, 2, 7, 2)),
            heads=hiera.integers("num_attention_heads_per_stage", (1, 2, 4, 8)),
            windows=hiera.integers("window_size_per_stage", (8, 4, 14, 7)),
            global_blocks=hiera.integers("global_attention_blocks", (5, 7, 9)),
            background=_pair(hiera, "window_positional_embedding_background_size"),
            mlp_ratio=hiera.number("mlp_ratio", 4.0),
            layer_norm_eps=hiera.number("layer_norm_eps", 1e-6),
            stability=_stability(decoder),
            decoder_norm_eps=DECODER_EPSILON,
            **decoder_sizes(prompts, decoder),
        )
        for section in (prompts, decoder):
            if section.integer("hidden_size", 256) != spec.n_channels:
                raise BundleError(
                    f"config.json: {section.name}.hidden_size: expected {spec.n_channels}, as in the neck"
                )
        return spec


def image_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """What a ``config.json`` says of the images' side, pixels, by the keys that say it.

    >>> image_sizes({"prompt_encoder_config": {"image_size": 512}})
    {'prompt_encoder_config.image_size': 512}
    """
    vision, prompts = (ConfigSection(config.get(name, {}), name) for name in ("vision_config", "prompt_encoder_config"))
    hiera = ConfigSection(vision.data.get("backbone_config", {}), HIERA)
    found = {}
    for section in (prompts, hiera):
        if section.data.get("image_size") is not None:
            found[f"{section.name}.image_size"] = _square(section, "image_size", section.data["image_size"])
    levels = vision.data.get("backbone_feature_sizes")
    if levels is not None:
        key = "backbone_feature_sizes"
        first = levels[0] if isinstance(levels, list) and levels else levels
        found[f"{vision.name}.{key}"] = PATCH_STRIDE * _square(vision, key, first)
    return found


def _square(section: ConfigSection, key: str, value: Any) -> int:
    """A side that is given once or twice."""
    sides = value if isinstance(value, list | tuple) else [value]
    if len(set(map(str, sides))) != 1 or type(sides[0]) is not int or sides[0] < 1:
        raise BundleError(f"config.json: {section.name}.{key}: expected the side of a square, got {value!r:.80}")
    return int(sides[0])


def _pair(section: ConfigSection, key: str) -> tuple[int, int]:
    found = section.integers(key, (7, 7))
    if len(found) != 2 or 0 in found:
        raise BundleError(f"config.json: {section.name}.{key}: expected a height and a width, got {found}")
    return found[0], found[1]


def _stability(decoder: ConfigSection) -> tuple[float, float] | None:
    if not decoder.data.get("dynamic_multimask_via_stability", True):
        return None
    names = {"dynamic_multimask_stability_delta": 0.05, "dynamic_multimask_stability_thresh": 0.98}
    margin, threshold = (decoder.number(key, default) for key, default in names.items())
    return margin, threshold


def _expect_known(hiera: ConfigSection, vision: ConfigSection, prompts: ConfigSection, decoder: ConfigSection) -> None:
    """Refuse what the graphs do not follow, such as another image encoder."""
    hiera.expect("model_type", "sam2_hiera_det_model")
    for section, act in ((hiera, "gelu"), (prompts, "gelu"), (decoder, "gelu")):
        section.expect("hidden_act", act)
    for key, value in (("patch_kernel_size", 7), ("patch_stride", 4), ("patch_padding", 3), ("query_stride", 2)):
        if hiera.data.get(key) != value:  # a number stands for both directions
            hiera.expect(key, [value, value])
    hiera.expect("num_channels", 3)
    hiera.expect("num_query_pool_stages", N_STAGES - 1)
    vision.expect("fpn_top_down_levels", [2, 3])
    vision.expect("num_feature_levels", 3)
    for key, value in (("fpn_kernel_size", 1), ("fpn_stride", 1), ("fpn_padding", 0)):
        vision.expect(key, value)
    prompts.expect("num_point_embeddings", 4)
    prompts.expect("patch_size", EMBEDDING_STRIDE)
    decoder.expect("num_hidden_layers", 2)  # transformers takes it for the depth of the layers' MLP too
