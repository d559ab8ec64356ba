"""Parts of the distribution that need packages which the base install leaves out."""

import importlib
from typing import Any

__all__ = ["load"]


def load(module: str, *, extra: str) -> Any:
    """Import a module of this distribution, or say which extra it needs.

    Raises
    ------
    MissingExtraError
        If a package that it needs is not installed.
    """
    from medreasoner.errors import MissingExtraError

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        needed = err.name or "a package"
        if needed.startswith("medreasoner"):
            raise MissingExtraError(f"this build has no {needed}") from err
        raise MissingExtraError(f"this needs the package {needed!r}: pip install 'medreasoner[{extra}]'") from err
