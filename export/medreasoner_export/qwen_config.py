"""The sizes of a Qwen2.5-VL or Qwen2-VL model, from ``config.json`` as published and as transformers 5 writes it."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from medreasoner.errors import BundleError
from medreasoner_export.config_section import ConfigSection

__all__ = ["Family", "QwenConfig", "QwenTextConfig", "QwenVisionConfig"]


Family: TypeAlias = Literal["qwen2_5_vl", "qwen2_vl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenVisionConfig:
    """The vision tower. Patch and window sizes in pixels, merge size in patches."""

    n_layers: int
    hidden_dim: int
    mlp_dim: int
    n_heads: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    window_size: int
    full_attention_layers: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_dim // self.n_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenTextConfig:
    """The decoder."""

    n_layers: int
    hidden_dim: int
    mlp_dim: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    max_length: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tied: bool

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_dim // self.n_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenConfig:
    """Both towers."""

    family: Family
    vision: QwenVisionConfig
    text: QwenTextConfig

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> "QwenConfig":
        """Read the content of ``config.json``.

        Raises
        ------
        BundleError
            If a size is missing or malformed, or the model is of another architecture or uses what the graphs do not
            have (sliding windows in the decoder, scaled rotary positions, another activation).
        """
        family = config.get("model_type")
        if family not in ("qwen2_5_vl", "qwen2_vl"):
            raise BundleError(f"config.json: model_type: expected qwen2_5_vl or qwen2_vl, got {family!r:.60}")
        # The published files are flat; transformers 5 nests the decoder's sizes.
        text = ConfigSection(config.get("text_config", config), "text_config")
        vision = ConfigSection(config.get("vision_config"), "vision_config")
        make, width = (_vision, "out_hidden_size") if family == "qwen2_5_vl" else (_qwen2_vision, "hidden_size")
        decoder = _text(text, tied=bool(config.get("tie_word_embeddings", False)))
        if vision.integer(width, 3584) != decoder.hidden_dim:
            raise BundleError(f"config.json: vision_config.{width} is not the decoder's hidden_size")
        return cls(family=family, vision=_checked(make(vision), vision), text=decoder)


def _vision(data: ConfigSection) -> QwenVisionConfig:
    data.expect("hidden_act", "silu")
    # Defaults are those of transformers' Qwen2_5_VLVisionConfig, which published files lean on.
    return QwenVisionConfig(
        n_layers=data.integer("depth", 32),
        hidden_dim=data.integer("hidden_size", 3584),
        mlp_dim=data.integer("intermediate_size", 3420),
        n_heads=data.integer("num_heads", 16),
        patch_size=data.integer("patch_size", 14),
        temporal_patch_size=data.integer("temporal_patch_size", 2),
        merge_size=data.integer("spatial_merge_size", 2),
        window_size=data.integer("window_size", 112),
        full_attention_layers=data.integers("fullatt_block_indexes", (7, 15, 23, 31)),
    )


def _qwen2_vision(data: ConfigSection) -> QwenVisionConfig:
    """Every layer of Qwen2-VL's tower sees the whole image; defaults are those of transformers."""
    data.expect("hidden_act", "quick_gelu")
    depth, dim = data.integer("depth", 32), data.integer("embed_dim", 1280)
    patch, merge = data.integer("patch_size", 14), data.integer("spatial_merge_size", 2)
    return QwenVisionConfig(
        n_layers=depth,
        hidden_dim=dim,
        mlp_dim=int(dim * data.number("mlp_ratio", 4)),
        n_heads=data.integer("num_heads", 16),
        patch_size=patch,
        temporal_patch_size=data.integer("temporal_patch_size", 2),
        merge_size=merge,
        window_size=4 * patch * merge,  # no layer uses it, the runtime's tables want one
        full_attention_layers=tuple(range(depth)),
    )


def _checked(config: QwenVisionConfig, data: ConfigSection) -> QwenVisionConfig:
    data.expect("in_channels", 3)
    data.expect("in_chans", 3)
    # The runtime makes the rotary tables of the tower with this base.
    ConfigSection(data.data.get("rope_parameters") or {}, f"{data.name}.rope_parameters").expect("rope_theta", 10_000.0)
    if config.hidden_dim % config.n_heads or config.head_dim % 4:
        raise BundleError(
            f"config.json: {data.name}: {config.n_heads} heads of a multiple of 4 do not fit {config.hidden_dim}"
        )
    if config.window_size % (config.patch_size * config.merge_size):
        raise BundleError(
            f"config.json: {data.name}.window_size: {config.window_size} is no whole number of merged patches"
        )
    return config


def _text(data: ConfigSection, *, tied: bool) -> QwenTextConfig:
    data.expect("hidden_act", "silu")
    kinds = data.data.get("layer_types") or []
    if not isinstance(kinds, list):
        raise BundleError(f"config.json: {data.name}.layer_types: expected a list, got {kinds!r:.60}")
    if data.data.get("use_sliding_window") or "sliding_attention" in kinds:
        raise BundleError(f"config.json: {data.name}: sliding-window attention is not supported")
    rope = ConfigSection(
        data.data.get("rope_parameters") or data.data.get("rope_scaling") or {}, f"{data.name}.rope_parameters"
    )
    kind = rope.data.get("rope_type", rope.data.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise BundleError(f"config.json: {rope.name}.rope_type: only default is supported, got {kind!r}")
    section = rope.integers("mrope_section", (16, 24, 24))
    heads = data.integer("num_attention_heads")
    config = QwenTextConfig(
        n_layers=data.integer("num_hidden_layers"),
        hidden_dim=data.integer("hidden_size"),
        mlp_dim=data.integer("intermediate_size"),
        n_heads=heads,
        n_kv_heads=data.integer("num_key_value_heads", heads),
        vocab_size=data.integer("vocab_size"),
        max_length=data.integer("max_position_embeddings", 32768),
        rms_norm_eps=data.number("rms_norm_eps", 1e-5),
        rope_theta=rope.number("rope_theta", data.number("rope_theta", 1_000_000.0)),
        mrope_section=section[:3] if len(section) == 3 else (0, 0, 0),
        tied=tied or bool(data.data.get("tie_word_embeddings", False)),
    )
    if config.hidden_dim % config.n_heads or config.n_heads % config.n_kv_heads:
        raise BundleError(
            f"config.json: {data.name}: {config.n_kv_heads} and {heads} heads do not fit {config.hidden_dim}"
        )
    if sum(config.mrope_section) * 2 != config.head_dim:
        raise BundleError(
            f"config.json: {rope.name}.mrope_section: {section} does not sum to half of {config.head_dim}"
        )
    return config
