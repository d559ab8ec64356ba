"""Every failure that a caller can meet.

::

    MedReasonerError
    ├── ImageReadError        the image cannot be read, or must not be            (OSError)
    │   └── CodecError        its transfer syntax needs a package that is absent
    ├── ArrayError            an array, a size or an RLE does not fit the operation     (ValueError)
    ├── QueryError            the question is empty, too long or not text         (ValueError)
    ├── BundleError           a model folder is missing, altered or malformed
    ├── ProviderError         no runtime, two runtimes, or a device that fails
    ├── GenerationError       the reasoner's output holds no usable answer
    ├── QueueFullError        too many questions wait already
    ├── DeadlineError         the answer was not ready in time                    (TimeoutError)
    ├── CancelledError        the question was given up
    ├── OutputError           a result cannot be written as asked                 (OSError)
    └── MissingExtraError     an optional package is needed: names the extra      (ImportError)

Messages say what was wrong, the value found, what is accepted and the way out. They never hold patient data, pixels or
the text of a query.
"""

__all__ = [
    "ArrayError",
    "BundleError",
    "CancelledError",
    "CodecError",
    "DeadlineError",
    "GenerationError",
    "ImageReadError",
    "MedReasonerError",
    "MissingExtraError",
    "OutputError",
    "ProviderError",
    "QueryError",
    "QueueFullError",
]


class MedReasonerError(Exception):
    """Base of all errors that this package raises on purpose."""


class ImageReadError(MedReasonerError, OSError):
    """The image cannot be read; the message names the file and the reason."""


class CodecError(ImageReadError):
    """The pixel data are compressed in a way that needs a package that is not installed."""


class ArrayError(MedReasonerError, ValueError):
    """An array, a size or an RLE has another shape, type or range than the operation accepts."""


class QueryError(MedReasonerError, ValueError):
    """The question is empty, longer than the model accepts, or not text."""


class BundleError(MedReasonerError):
    """A model bundle is missing, altered, malformed or of another schema version."""


class ProviderError(MedReasonerError):
    """ONNX Runtime is absent, installed twice, or cannot run on the device asked for."""


class GenerationError(MedReasonerError):
    """The reasoner's output holds no usable answer."""


class QueueFullError(MedReasonerError):
    """As many questions wait as may; ask again later, or raise `max_waiting`."""


class DeadlineError(MedReasonerError, TimeoutError):
    """The answer was not ready when its time was over."""


class CancelledError(MedReasonerError):
    """The question was given up before it was answered."""


class OutputError(MedReasonerError, OSError):
    """A result cannot be written in the form or at the place asked for."""


class MissingExtraError(MedReasonerError, ImportError):
    """A feature needs an optional package; the message gives the pip line."""
