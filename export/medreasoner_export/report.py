"""The result of a parity check, as a record, as JSON and as a table."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from medreasoner._text import one_line
from medreasoner.errors import BundleError

__all__ = ["KERNEL_TOLERANCES", "ParityReport", "ParityStage", "compare", "load_reference", "stated"]

KERNEL_TOLERANCES = {"bfloat16": 0.03, "int8": 0.1}
"""Accepted error of what runs without its graph, by the numbers that it multiplies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityStage:
    """One comparison.

    Attributes
    ----------
    error
        Largest absolute difference, or what `unit` says.
    scale
        Largest absolute value of the reference; 1 where the error is a share or a count.
    tolerance
        Largest accepted ``error / scale``.
    """

    name: str
    error: float
    scale: float
    tolerance: float
    unit: str = "max abs"

    @property
    def relative(self) -> float:
        """Error in units of the scale."""
        return self.error / self.scale

    @property
    def passed(self) -> bool:
        """Within the tolerance; never if the error is not a number."""
        return self.relative <= self.tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """All comparisons of a bundle with its reference."""

    bundle: str
    stages: tuple[ParityStage, ...]
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        """Every stage is within its tolerance."""
        return all(stage.passed for stage in self.stages)

    def to_json(self) -> dict[str, object]:
        """A mapping that ``json.dumps`` takes."""
        stages = [
            {key: _json(value) for key, value in {**asdict(stage), "relative": stage.relative}.items()}
            | {"passed": stage.passed}
            for stage in self.stages
        ]
        return {"bundle": self.bundle, "passed": self.passed, "versions": self.versions, "stages": stages}

    def to_markdown(self) -> str:
        """A heading, a table with one row a stage, and the versions."""
        lines = [
            f"# Parity of {self.bundle}: {'passed' if self.passed else 'FAILED'}",
            "",
            "| stage | measure | error | scale | error / scale | tolerance | |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {s.name} | {s.unit} | {s.error:.3g} | {s.scale:.3g} | {s.relative:.2g} | {s.tolerance:.2g} "
            f"| {'pass' if s.passed else 'FAIL'} |"
            for s in self.stages
        ]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return "\n".join([*lines, "", f"Reference in float32. {versions}.", ""])


def _json(value: object) -> object:
    """The value, or None for a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare(name: str, found: npt.ArrayLike, expected: npt.ArrayLike, tolerance: float) -> ParityStage:
    """The stage that compares two arrays by their largest absolute difference.

    Arrays of different shape differ without bound.

    Examples
    --------
    >>> compare("hidden", [1.0, 2.5], [1.0, 2.0], 0.2).relative
    0.25
    """
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    error = float(np.abs(found - expected).max()) if found.shape == expected.shape else float("inf")
    return ParityStage(name=name, error=error, scale=float(np.abs(expected).max()) or 1.0, tolerance=tolerance)


def stated(graph: Path, key: str) -> str | None:
    """What a graph says of itself in its metadata: a setting given at the export may differ from the checkpoint's."""
    model = onnx.load(str(graph), load_external_data=False)
    return next((each.value for each in model.metadata_props if each.key == key), None)


def load_reference(kind: Any, folder: str | Path, **settings: Any) -> Any:
    """Model of the transformers class `kind` from a checkpoint's folder.

    Raises
    ------
    BundleError
        If transformers cannot load it; the message names the folder.
    """
    # Its bars would stand between our lines, and its report of shapes is for those who read the log.
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        return kind.from_pretrained(folder, local_files_only=True, **settings)
    except Exception as err:  # transformers raises many kinds for a folder that holds no such model
        raise BundleError(
            f"{folder}: transformers cannot load it as {kind.__name__} ({one_line(err)}); "
            "'medreasoner-cli export' names the tensor"
        ) from err
