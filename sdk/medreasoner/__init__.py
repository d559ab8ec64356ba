"""Answers a question about a medical image with a mask.

>>> import medreasoner as mr
>>> result = mr.ground("sample:chest", "Where is the air-filled tissue?")              # doctest: +SKIP
"""

from medreasoner._version import __version__
from medreasoner.errors import (
    ArrayError,
    BundleError,
    CancelledError,
    CodecError,
    DeadlineError,
    GenerationError,
    ImageReadError,
    MedReasonerError,
    MissingExtraError,
    OutputError,
    ProviderError,
    QueryError,
    QueueFullError,
)
from medreasoner.grounder import Grounder, ground
from medreasoner.image import Image, read_image
from medreasoner.result import Answer, Grounding, Thought
from medreasoner.study import Study

__all__ = [
    "Answer",
    "ArrayError",
    "BundleError",
    "CancelledError",
    "CodecError",
    "DeadlineError",
    "GenerationError",
    "Grounder",
    "Grounding",
    "Image",
    "ImageReadError",
    "MedReasonerError",
    "MissingExtraError",
    "OutputError",
    "ProviderError",
    "QueryError",
    "QueueFullError",
    "Study",
    "Thought",
    "__version__",
    "ground",
    "read_image",
]
