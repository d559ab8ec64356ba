"""The vision-language model: an image and a question in, a box and two points in the model's own grid out."""

from medreasoner.reasoner.model import Decoded, Limits, Prefix, Reasoner
from medreasoner.reasoner.scheduler import Cancellation, Ticket

__all__ = ["Cancellation", "Decoded", "Limits", "Prefix", "Reasoner", "Ticket"]
