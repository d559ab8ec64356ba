"""The part of a bundle's manifest that lets kernels run a model without its graph; see `medreasoner.spec`."""

from dataclasses import dataclass
from typing import Literal

from medreasoner._ranges import need, need_positive

__all__ = ["DrawingSpec", "ImageTowerSpec", "StepSpec", "TowerSpec", "WeightDtype"]

WeightDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpec:
    """A decoder's weights in the file beside its graph, for steps without the graph: element types and sizes.

    `products` says how matrices are multiplied: as they are, or rounded to eight bits when they are loaded, and the
    activations with them. Matrices in four bits are multiplied in integers anyhow.
    """

    file: str
    matrices: Literal[WeightDtype, "int4"]
    vectors: Literal["float32", "float16"]
    mlp_dim: int
    rms_norm_eps: float
    products: Literal["float", "int8"] = "float"

    def __post_init__(self) -> None:
        need_positive(self, "mlp_dim")
        need(self.rms_norm_eps > 0, "rms_norm_eps", "a positive number", self.rms_norm_eps)
        fits = self.matrices != "int4" or (self.products == "float" and self.vectors == "float32")
        need(fits, "matrices", "products float and vectors float32 beside int4", self.matrices)


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerSpec:
    """The vision tower's weights in the file beside its graph, to run it without that: element types and sizes.

    `patches` is the type of the first matrix alone. With `products` in bfloat16, a processor that multiplies such
    numbers does without the graph; in int8, also one that multiplies bytes (AVX-512 VNNI), and where there are no tiles
    for bfloat16 (AMX) matrices and activations are rounded to eight bits, 64 numbers at a time.
    """

    file: str
    patches: WeightDtype
    matrices: WeightDtype
    vectors: Literal["float32", "float16"]
    n_layers: int
    n_heads: int
    mlp_dim: int
    rms_norm_eps: float
    products: Literal["float", "bfloat16", "int8"] = "float"

    def __post_init__(self) -> None:
        need_positive(self, "n_layers", "n_heads", "mlp_dim")
        need(self.rms_norm_eps > 0, "rms_norm_eps", "a positive number", self.rms_norm_eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTowerSpec:
    """Weights of SAM's image encoder in the file beside its graph, to run it without that: element types and sizes.

    `patch_size` in pixels, `window_size` in patches; layers that are not among the `global_layers` look within windows.
    `products` as those of a `TowerSpec`.
    """

    file: str
    matrices: WeightDtype
    vectors: Literal["float32", "float16"]
    patch_size: int
    window_size: int
    global_layers: tuple[int, ...]
    n_layers: int
    n_heads: int
    hidden_dim: int
    mlp_dim: int
    n_channels: int
    norm_eps: float
    products: Literal["float", "bfloat16", "int8"] = "float"

    def __post_init__(self) -> None:
        need_positive(self, "patch_size", "window_size", "n_layers", "n_heads", "hidden_dim", "mlp_dim", "n_channels")
        need(self.norm_eps > 0, "norm_eps", "a positive number", self.norm_eps)
        need(self.hidden_dim % self.n_heads == 0, "n_heads", f"a divisor of {self.hidden_dim}", self.n_heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawingSpec:
    """The mask decoder's weights in the file beside its graph, to run it without that: element types and sizes.

    `n_learned` tokens stand before a prompt's, of whose masks the first that is asked for is `first_mask`; a box is
    drawn into the mask prompt where that has `box_channels`. With `products` in bfloat16, a processor that
    multiplies such numbers does without the graph.
    """

    file: str
    matrices: WeightDtype
    image_size: int
    n_channels: int
    inner_dim: int
    n_heads: int
    mlp_dim: int
    n_layers: int
    n_learned: int
    first_mask: int
    iou_dim: int
    iou_depth: int
    box_channels: int
    norm_eps: float
    prompt_norm_eps: float
    products: Literal["float", "bfloat16"] = "float"

    def __post_init__(self) -> None:
        need_positive(self, "image_size", "n_channels", "inner_dim", "n_heads", "mlp_dim", "n_layers", "n_learned")
        need_positive(self, "iou_dim", "iou_depth")
        for key in ("first_mask", "box_channels"):
            need(getattr(self, key) >= 0, key, "no negative number", getattr(self, key))
        for key in ("norm_eps", "prompt_norm_eps"):
            need(getattr(self, key) > 0, key, "a positive number", getattr(self, key))
        need(self.inner_dim % self.n_heads == 0, "n_heads", f"a divisor of {self.inner_dim}", self.n_heads)
        need(self.box_channels % 4 == 0, "box_channels", "a multiple of 4", self.box_channels)
