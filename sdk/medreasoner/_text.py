"""Words of others, made fit for a line of ours."""

__all__ = ["one_line", "printable"]


def one_line(error: BaseException) -> str:
    r"""Message of an error of another package: without line breaks, and no longer than people read.

    >>> one_line(ValueError("no such\n    layer"))
    'no such layer'
    """
    return " ".join(str(error).split())[:200]


def printable(name: str) -> str:
    r"""A file's name without signs that would steer a terminal.

    >>> printable("scan\x1b[31m.dcm")
    'scan?[31m.dcm'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in name)
