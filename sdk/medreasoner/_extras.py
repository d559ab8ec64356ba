"""One place for optional packages."""

import importlib
from types import ModuleType

from medreasoner.errors import MissingExtraError

__all__ = ["require"]


def require(module: str, *, extra: str, feature: str, package: str | None = None) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Parameters
    ----------
    module
        Name to import, for example ``"highdicom"``.
    extra
        The extra of this distribution that installs it.
    feature
        What needs it, as the start of the sentence: ``"Writing DICOM SEG"``.
    package
        Name of the distribution, where it is not the module's.

    Raises
    ------
    MissingExtraError
        If the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        # A missing dependency of the package itself is another fault and must not be hidden behind our advice.
        if err.name is None or err.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise MissingExtraError(
            f"{feature} needs the package {package or module!r}: pip install 'medreasoner[{extra}]'"
        ) from err
