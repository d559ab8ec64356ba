"""What went wrong, as one line and one number."""

import os

__all__ = ["ABSENT", "FOUND", "INPUT", "MODEL", "USAGE", "exit_code", "is_debugging", "one_line"]

FOUND, ABSENT, USAGE, INPUT, MODEL = range(5)
"""Exit codes, in order of severity, so that the largest of several tells most."""


def exit_code(error: BaseException) -> int:
    """Exit code for an error; one that is not of the package counts as trouble with the engine.

    >>> from medreasoner.errors import ImageReadError, OutputError
    >>> exit_code(ImageReadError("x")), exit_code(OutputError("x"))
    (3, 2)
    """
    from medreasoner.errors import ImageReadError, OutputError, QueryError

    if isinstance(error, QueryError | OutputError):
        return USAGE
    return INPUT if isinstance(error, ImageReadError) else MODEL


def is_debugging() -> bool:
    """Whether MEDREASONER_DEBUG asks for tracebacks."""
    return bool(os.environ.get("MEDREASONER_DEBUG"))


def one_line(error: BaseException) -> str:
    """Message of an error without line breaks; for one that is not ours, with its class."""
    from medreasoner.errors import MedReasonerError

    text = " ".join(str(error).split())
    if isinstance(error, MedReasonerError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
