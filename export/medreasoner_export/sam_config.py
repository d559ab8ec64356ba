"""The sizes of a SAM model, read from the ``config.json`` that transformers writes for ``SamModel``."""

from dataclasses import dataclass
from typing import Any

from medreasoner.errors import BundleError
from medreasoner_export.config_section import ConfigSection

__all__ = ["DecoderConfig", "SamConfig", "decoder_sizes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """What a mask decoder needs to know, of whatever image encoder: `image_size` in pixels, `patch_size` those of a
    place of the embedding, `n_channels` its depth. Sizes of the transformer begin with ``decoder_``.
    """

    image_size: int
    patch_size: int
    n_channels: int
    decoder_mlp_dim: int
    decoder_layers: int
    decoder_heads: int
    decoder_downsample: int
    decoder_norm_eps: float
    n_masks: int
    iou_depth: int
    iou_dim: int
    mask_channels: int
    prompt_norm_eps: float

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def mask_size(self) -> int:
        """Side of a predicted mask: the embedding, doubled twice."""
        return 4 * self.grid


@dataclass(frozen=True, slots=True, kw_only=True)
class SamConfig(DecoderConfig):
    """A SAM: its image encoder beside the decoder, `window_size` in patches.

    `adapter_dim`: hidden size of SAM-Med2D's adapters, 0 without them.
    """

    hidden_dim: int
    mlp_dim: int
    n_layers: int
    n_heads: int
    window_size: int
    global_layers: tuple[int, ...]
    layer_norm_eps: float
    qkv_bias: bool
    absolute_positions: bool
    relative_positions: bool
    adapter_dim: int

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> "SamConfig":
        """Read the content of ``config.json``.

        Raises
        ------
        BundleError
            If a size is missing or malformed, or the parts do not fit each other.
        """
        if config.get("model_type") != "sam":
            raise BundleError(f"config.json: model_type: expected sam or sam2, got {config.get('model_type')!r:.80}")
        vision, prompts, decoder = (
            ConfigSection(config.get(name, {}), name)
            for name in ("vision_config", "prompt_encoder_config", "mask_decoder_config")
        )
        for section, act in ((vision, "gelu"), (decoder, "relu")):
            section.expect("hidden_act", act)
        vision.expect("num_channels", 3)
        prompts.expect("num_point_embeddings", 4)
        spec = _sizes(vision, prompts, decoder)
        for section, key, expected in (
            (prompts, "hidden_size", spec.n_channels),
            (decoder, "hidden_size", spec.n_channels),
            (prompts, "image_size", spec.image_size),
            (prompts, "patch_size", spec.patch_size),
        ):
            if section.integer(key, 256 if key == "hidden_size" else expected) != expected:
                raise BundleError(f"config.json: {section.name}.{key}: expected {expected}, as in the image encoder")
        return spec


def decoder_sizes(prompts: ConfigSection, decoder: ConfigSection) -> dict[str, Any]:
    """Those entries of a :class:`DecoderConfig` that SAM and SAM 2 state in the same way.

    Raises
    ------
    BundleError
        If one is malformed.
    """
    inner = decoder.integer("hidden_size", 256)
    heads, downsample = decoder.integer("num_attention_heads", 8), decoder.integer("attention_downsample_rate", 2)
    if inner % (heads * downsample):
        raise BundleError(
            f"config.json: {decoder.name}: {heads} heads and a downsampling by {downsample} do not divide {inner}"
        )
    return {
        "decoder_mlp_dim": decoder.integer("mlp_dim", 2048),
        "decoder_layers": decoder.integer("num_hidden_layers", 2),
        "decoder_heads": heads,
        "decoder_downsample": downsample,
        "n_masks": decoder.integer("num_multimask_outputs", 3),
        "iou_depth": decoder.integer("iou_head_depth", 3),
        "iou_dim": decoder.integer("iou_head_hidden_dim", 256),
        "mask_channels": prompts.integer("mask_input_channels", 16),
        "prompt_norm_eps": prompts.number("layer_norm_eps", 1e-6),
    }


def _sizes(vision: ConfigSection, prompts: ConfigSection, decoder: ConfigSection) -> SamConfig:
    # Defaults are those of transformers' SamConfig (SAM ViT-B), which published files lean on.
    hidden = vision.integer("hidden_size", 768)
    mlp_dim = vision.data.get("mlp_dim") or int(hidden * vision.number("mlp_ratio", 4.0))
    spec = SamConfig(
        image_size=vision.integer("image_size", 1024),
        patch_size=vision.integer("patch_size", 16),
        hidden_dim=hidden,
        mlp_dim=mlp_dim,
        n_layers=vision.integer("num_hidden_layers", 12),
        n_heads=vision.integer("num_attention_heads", 12),
        window_size=vision.integer("window_size", 14),
        global_layers=vision.integers("global_attn_indexes", (2, 5, 8, 11)),
        layer_norm_eps=vision.number("layer_norm_eps", 1e-6),
        qkv_bias=bool(vision.data.get("qkv_bias", True)),
        absolute_positions=bool(vision.data.get("use_abs_pos", True)),
        relative_positions=bool(vision.data.get("use_rel_pos", True)),
        adapter_dim=vision.integer("adapter_dim", 1) if "adapter_dim" in vision.data else 0,
        n_channels=vision.integer("output_channels", 256),
        decoder_norm_eps=decoder.number("layer_norm_eps", 1e-6),
        **decoder_sizes(prompts, decoder),
    )
    if spec.hidden_dim % spec.n_heads or spec.image_size % spec.patch_size or spec.n_channels % 8:
        raise BundleError("config.json: vision_config: heads, patches or channels do not divide their sizes")
    if vision.integer("num_pos_feats", 128) * 2 != spec.n_channels:
        raise BundleError("config.json: vision_config.num_pos_feats: expected half of output_channels")
    return spec
