"""SAM 2's mask decoder as an ONNX graph: SAM's, with finer features of the image, and scores that are calibrated."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from medreasoner_export.checkpoint import Weights
from medreasoner_export.graph import FLOAT, Storage, WeightsFile
from medreasoner_export.sam2_config import Sam2Config
from medreasoner_export.sam_decoder import SamDecoder

__all__ = ["sam2_decoder_graph"]


def sam2_decoder_graph(
    checkpoint: Weights,
    config: Sam2Config,
    *,
    multimask: bool,
    box_mask: bool = False,
    storage: Storage,
    metadata: Mapping[str, str],
    outside: WeightsFile | None = None,
) -> onnx.ModelProto:
    """The graph from what :func:`sam2_encoder_graph` made of an image and prompts to masks.

    Inputs and outputs are those of :func:`sam_decoder_graph`, and the encoder's ``high_res_s0`` and ``high_res_s1`` (1
    or batch, places, channels) float32. Among the labels one must be -1: SAM 2's predictor adds such a point to every
    prompt, where SAM's does so only to points without a box.

    Parameters
    ----------
    checkpoint, config
        The weights and their sizes.
    multimask
        Return the three masks for ambiguous prompts, as the single-image predictor does by default; whoever runs the
        graph takes the one with the highest predicted IoU. Otherwise return one, as that predictor does with
        ``multimask_output=False``: the mask of the single-mask token where it is stable, which means that the pixels
        above a margin are at least a share of those above minus the margin, else the best of the three
        (``dynamic_multimask_via_stability``, which ``build_sam2`` switches on; a ``config.json`` may switch it off).
    box_mask, storage, metadata, outside
        As in :func:`sam_decoder_graph`.

    Raises
    ------
    BundleError
        If a tensor is missing, misshapen or does not fit `storage`.

    References
    ----------
    facebookresearch/sam2: ``sam2_image_predictor.py``, ``build_sam.py``, ``modeling/sam/mask_decoder.py``.
    """
    return _Decoder(checkpoint, config, storage, box_mask=box_mask, outside=outside).build(multimask, metadata)


class _Decoder(SamDecoder):
    SCORE_TOKEN = 1  # behind that of the object's presence, which serves videos
    POINT_CODES = "prompt_encoder.shared_embedding.positional_embedding"
    OUT_PROJ = "o_proj"
    MLP = ("proj_in", "proj_out")

    def __init__(
        self, checkpoint: Weights, config: Sam2Config, storage: Storage, *, box_mask: bool, outside: WeightsFile | None
    ) -> None:
        super().__init__(checkpoint, config, storage, box_mask=box_mask, outside=outside)
        self.stability = config.stability

    def learned_tokens(self) -> list[npt.NDArray[Any]]:
        """Rows (n, C): the object's presence first."""
        presence = self.tensor("mask_decoder.obj_score_token.weight", 1, self.config.n_channels)
        return [presence, *super().learned_tokens()]

    def point_kinds(self) -> list[npt.NDArray[Any]]:
        """Rows (n, C) for label -1, 0, 1, 2 and 3."""
        channels = self.config.n_channels
        return [
            self.tensor("prompt_encoder.not_a_point_embed.weight", 1, channels),
            self.tensor("prompt_encoder.point_embed.weight", 4, channels),
        ]

    def refined(self, y: str, stage: int, channels: int) -> str:
        """The doubled embedding and the image's own features of that size."""
        places = (4 if stage else 16) * self.config.grid**2
        return self.g.op("Add", y, self.g.input(f"high_res_s{stage}", FLOAT, ("image_batch", places, channels)))

    def calibrated(self, scores: str) -> str:
        """Predicted IoU, between 0 and 1."""
        return self.g.op("Sigmoid", scores)

    def outputs(self, x: str, keys: str, *, multimask: bool) -> int:
        """Make ``mask_logits`` and ``predicted_iou``; return how many masks there are."""
        if multimask or self.stability is None:
            return super().outputs(x, keys, multimask=multimask)
        g, everything = self.g, range(self.config.n_masks + 1)
        masks, scores = self.masks(x, keys, everything), self.scores(x, everything)
        single = g.op("Slice", masks, g.ints(0), g.ints(1), g.ints(1))
        alternatives = g.op("Slice", scores, g.ints(1), g.ints(len(everything)), g.ints(1))
        best = g.op("Add", g.op("ArgMax", alternatives, axis=1, keepdims=1), g.ints(1))  # (batch, 1)
        chosen = g.op("Where", self._stable(single, *self.stability), g.ints(0), best)
        picked = g.op("GatherND", masks, chosen, batch_dims=1)
        g.op("Unsqueeze", picked, g.ints(1), out="mask_logits")
        g.op("GatherElements", scores, chosen, axis=1, out="predicted_iou")
        return 1

    def _stable(self, mask: str, margin: float, threshold: float) -> str:
        """(batch, 1) bool: whether a mask (batch, 1, side, side) hardly changes when zero is moved by `margin`."""
        g = self.g
        inner, outer = (
            g.op("ReduceSum", g.op("Cast", g.op("Greater", mask, limit), to=FLOAT), g.ints(2, 3), keepdims=0)
            for limit in (
                g.constant(name, np.array(value, dtype=np.float32))
                for name, value in (("above", margin), ("below", -margin))
            )
        )
        nothing = g.op("Equal", outer, g.constant("no_pixels", np.array(0.0, dtype=np.float32)))
        least = g.constant("stable_from", np.array(threshold, dtype=np.float32))
        return g.op("Or", nothing, g.op("GreaterOrEqual", g.op("Div", inner, outer), least))
