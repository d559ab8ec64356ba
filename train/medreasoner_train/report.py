"""The figures of an evaluation, and the files that hold them."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medreasoner_train.evalset import BadRow
from medreasoner_train.evaluate import EvalOptions, Evaluation, Row
from medreasoner_train.files import appearing
from medreasoner_train.metrics import Interval, group_mean
from medreasoner_train.tables import markdown

__all__ = ["as_dict", "figures_of", "markdown", "save", "threshold_for"]

_FIELDS = (
    "iou",
    "prior_iou",
    "dice",
    "dice_box",
    "dice_points",
    "true_prompt_dice",
    "pdice_paper",
    "pdice_corrected",
    "nsd",
)
_PRESENT, _ABSENT = ("present",), ("absent (same region)", "absent (elsewhere)", "absent (given)")


def figures_of(evaluation: Evaluation, options: EvalOptions) -> dict[str, Any]:
    """All figures of an evaluation, with what was measured and how."""
    rows = evaluation.rows
    counts = {kind: sum(row.kind in kinds for row in rows) for kind, kinds in (("there", _PRESENT), ("not", _ABSENT))}
    about = {
        "bundle": evaluation.model,
        "data": options.data.resolve().name,
        "groups": options.groups + (f", every {options.every}th image" if options.every > 1 else ""),
        "questions": f"{counts['there']} about what is there, {counts['not']} about what is not",
        "phrasings": f"{options.part}, seed {options.seed}",
        "reasoning in words first": "yes" if options.think else "no",
        "prior's boxes fitted on": evaluation.data.prior_of,
        "NSD tolerance": f"{options.tolerance:g} px of the 840-px grid",
        "rows left out": str(len(evaluation.bad)),
    }
    return as_dict(rows, evaluation.sets, bad=evaluation.bad, about=about)


def _over(rows: Sequence[Row], name: str) -> Interval:
    return group_mean([getattr(row, name) for row in rows], [row.group for row in rows])


def _share(rows: Sequence[Row], holds: Callable[[Row], bool]) -> dict[str, Any]:
    return _plain(group_mean([float(holds(row)) for row in rows], [row.group for row in rows]))


def _macro(rows: Sequence[Row], name: str) -> float:
    keys = sorted({row.key for row in rows})
    means = [np.mean([getattr(row, name) for row in rows if row.key == key]) for key in keys]
    return float(np.mean(means)) if means else math.nan


def as_dict(
    rows: Sequence[Row],
    sets: Mapping[str, frozenset[str]],
    *,
    bad: Sequence[BadRow] = (),
    about: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """All figures as plain data; the keys are those of :func:`markdown`'s tables.

    Parameters
    ----------
    rows, sets, bad
        Of an evaluation.
    about
        What was measured, and how, in the words that the report begins with.
    """
    present = [row for row in rows if row.kind == "present"]
    result: dict[str, Any] = {
        "about": dict(about or {}),
        "failed": sum(row.failed for row in rows),
        "bad_rows": [dataclasses.asdict(each) for each in bad],
        "sets": {name: _set([row for row in present if row.key in keys]) for name, keys in sets.items()},
        "super_categories": _by(present, lambda row: row.super_category),
        "modalities": _by(present, lambda row: row.modality),
        "categories": _by(present, lambda row: row.key),
        "absent": {
            kind: _share([row for row in rows if row.kind == kind], lambda row: row.said_absent)
            for kind in (*_PRESENT, *_ABSENT)
        },
        "detection": _detection([row for row in rows if row.kind in _PRESENT + _ABSENT]),
        "reads": _reads(present),
        "absent_threshold": _number(threshold_for(rows)),
        "controls": _controls(rows, sets["informative"]),
    }
    if traces := [row for row in present if row.trace is not None]:
        result["traces"] = _traces(traces)
    return result


def _means(rows: Sequence[Row]) -> dict[str, Any]:
    return {"count": len(rows), **{field: _plain(_over(rows, field)) for field in _FIELDS}}


def _set(rows: Sequence[Row]) -> dict[str, Any]:
    gain = group_mean([row.iou - row.prior_iou for row in rows], [row.group for row in rows])
    macro = {field: _number(_macro(rows, field)) for field in _FIELDS}
    return {**_means(rows), "iou_over_prior": _plain(gain), "macro": macro}


def _by(rows: Sequence[Row], name: Callable[[Row], str]) -> dict[str, Any]:
    return {each: _means([row for row in rows if name(row) == each]) for each in sorted({name(row) for row in rows})}


def _detection(rows: Sequence[Row]) -> dict[str, Any]:
    """Precision and recall, once of the answer "absent" and once of the answer that it is there."""
    absent = [row for row in rows if row.kind in _ABSENT]
    present = [row for row in rows if row.kind in _PRESENT]
    return {
        "absent": {
            "precision": _share([row for row in rows if row.said_absent], lambda row: row.kind in _ABSENT),
            "recall": _share(absent, lambda row: row.said_absent),
        },
        "present": {
            "precision": _share([row for row in rows if row.found], lambda row: row.kind in _PRESENT),
            "recall": _share(present, lambda row: row.found),
        },
    }


def _reads(present: Sequence[Row]) -> dict[str, Any]:
    asked = [row for row in present if row.others]
    pairs = [float(row.dice > other) for row in asked for other in row.others]
    return {
        "asked_over_each_other": _plain(group_mean(pairs, [row.group for row in asked for _ in row.others])),
        "asked_over_all_others": _share(asked, lambda row: row.dice > max(row.others)),
    }


def _controls(rows: Sequence[Row], informative: frozenset[str]) -> dict[str, Any]:
    controls = {}
    for kind in ("blank image", "swapped image", "other query"):
        own = [row for row in rows if row.kind == kind and row.key in informative]
        if own:
            controls[kind] = {
                "iou": _plain(_over(own, "iou")),
                "prior_iou": _plain(_over(own, "prior_iou")),
                # "Absent" counts as no overlap; whether a box that is given still fits is told apart.
                "found": _share(own, lambda row: row.found),
                "iou_found": _plain(_over([row for row in own if row.found], "iou")),
            }
    return controls


def _traces(rows: Sequence[Row]) -> dict[str, Any]:
    """Shares of the traces about targets that are there; a trace that calls its target absent names no place."""
    checked = [(row, row.trace) for row in rows if row.trace is not None]
    groups = [row.group for row, _ in checked]
    shares = {name: [float(getattr(trace, name)) for _, trace in checked] for name in _WORDS}
    shares["quadrant"] = [float(trace.vertical and trace.horizontal) for _, trace in checked]
    shares["all_words"] = [float(trace.size and trace.vertical and trace.horizontal) for _, trace in checked]
    return {name: _plain(group_mean(values, groups)) for name, values in shares.items()}


_WORDS = ("placed", "size", "vertical", "horizontal")


def _plain(interval: Interval) -> dict[str, Any]:
    ends = {name: _number(getattr(interval, name)) for name in ("mean", "low", "high")}
    return {**ends, "count": interval.count}


def _number(value: float) -> float | None:
    """The value to four places, or None where nothing was measured: JSON has no NaN."""
    return None if math.isnan(value) else round(value, 4)


def threshold_for(rows: Sequence[Row], *, false_absent: float = 0.08, recognised: float = 0.85) -> float:
    """Largest threshold on P(absent) at which `recognised` of the absent targets are still called absent.

    Raised if more than `false_absent` of the present targets would be called so too. NaN if no probabilities are known.
    """
    present, absent = (
        [row.absent_probability for row in rows if row.kind in kinds and not math.isnan(row.absent_probability)]
        for kinds in (_PRESENT, _ABSENT)
    )
    lowest = float(np.quantile(present, 1 - false_absent)) if present else math.nan
    highest = float(np.quantile(absent, 1 - recognised)) if absent else lowest
    return float(np.clip(max(lowest, highest), 0.02, 0.98))


def save(out: Path, rows: Sequence[Row], figures: Mapping[str, Any], page: str | None = None) -> None:
    """Write ``rows.jsonl``, ``figures.json``, ``report.md`` and ``report.html`` into `out`; NaN becomes null."""
    out.mkdir(parents=True, exist_ok=True)
    with appearing(out / "rows.jsonl") as beside, beside.open("w", encoding="utf-8") as file:
        for row in rows:
            values = dataclasses.asdict(row).items()
            plain = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values}
            file.write(json.dumps(plain, allow_nan=False) + "\n")
    texts = {"figures.json": json.dumps(figures, indent=1, allow_nan=False) + "\n", "report.md": markdown(figures)}
    if page is not None:
        texts["report.html"] = page
    for name, text in texts.items():
        with appearing(out / name) as beside:
            beside.write_text(text, encoding="utf-8")
