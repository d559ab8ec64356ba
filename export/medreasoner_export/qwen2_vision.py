"""What the vision tower of Qwen2-VL has otherwise than that of Qwen2.5-VL.

Its norms have a mean, its MLP no gate, and every layer sees the whole image.

References
----------
Qwen2-VL (arXiv 2409.12191), section 2.1; transformers' ``Qwen2VLVisionBlock``.
"""

from medreasoner_export.qwen_vision import EPSILON, VisionTower

__all__ = ["Qwen2VisionTower"]

# ACT2FN["quick_gelu"]: x * sigmoid(1.702 x).
QUICK_GELU = 1.702


class Qwen2VisionTower(VisionTower):
    """The tower of Qwen2-VL."""

    def first_norm(self, x: str, name: str) -> str:
        """The normalisation that no sum comes before."""
        return self.g.op("LayerNormalization", x, *self._norms(name), epsilon=EPSILON)

    def mlp(self, h: str, name: str) -> tuple[str, str]:
        """Two layers without the last bias, and that bias's name."""
        g, c = self.g, self.config
        first = self.tensor(name + "fc1.weight", c.mlp_dim, c.hidden_dim)
        wide = g.linear(h, name + "fc1", first, self.tensor(name + "fc1.bias", c.mlp_dim))
        hidden = g.op("com.microsoft.QuickGelu", wide, alpha=QUICK_GELU)
        second = self.tensor(name + "fc2.weight", c.hidden_dim, c.mlp_dim)
        return g.linear(hidden, name + "fc2", second), name + "fc2.bias"

    def add(self, x: str, y: str, bias: str, norm: str) -> tuple[str, str]:
        """``x + y + bias`` and its normalisation by `norm`."""
        total = self.g.total(y, x, self.vector(bias))
        return total, self.g.op("LayerNormalization", total, *self._norms(norm), epsilon=EPSILON)

    def _norms(self, name: str) -> tuple[str, str]:
        return self.vector(name + ".weight"), self.vector(name + ".bias")
