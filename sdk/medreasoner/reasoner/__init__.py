"""The vision-language model: an image and a question in, a box and two points in the model's own grid out."""

from medreasoner.reasoner.model import Decoded, Prefix, Reasoner

__all__ = ["Decoded", "Prefix", "Reasoner"]
