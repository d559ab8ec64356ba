"""Evaluation rows as tables: what a bundle reaches, beside the prior, with intervals over groups."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medreasoner_train.evaluate import Row
from medreasoner_train.files import appearing
from medreasoner_train.metrics import Interval, group_mean

__all__ = ["as_dict", "markdown", "save", "threshold_for"]


_FIELDS = ("iou", "prior_iou", "dice", "true_prompt_dice")
_RULE = "|---|---|---|---|---|---|"


def _over(rows: Sequence[Row], name: str) -> Interval:
    return group_mean([getattr(row, name) for row in rows], [row.group for row in rows])


def _macro(rows: Sequence[Row], name: str) -> float:
    keys = sorted({row.key for row in rows})
    means = [np.mean([getattr(row, name) for row in rows if row.key == key]) for key in keys]
    return float(np.mean(means)) if means else math.nan


def as_dict(rows: Sequence[Row], sets: Mapping[str, frozenset[str]]) -> dict[str, Any]:
    """All figures as plain data; the keys are those of :func:`markdown`'s tables."""
    present = [row for row in rows if row.kind == "present"]
    result: dict[str, Any] = {"sets": {}, "categories": {}, "absent": {}, "controls": {}}
    for name, keys in sets.items():
        own = [row for row in present if row.key in keys]
        result["sets"][name] = {
            "count": len(own),
            **{field: _plain(_over(own, field)) for field in _FIELDS},
            "iou_over_prior": _plain(group_mean([row.iou - row.prior_iou for row in own], [row.group for row in own])),
            "macro": {field: _number(_macro(own, field)) for field in _FIELDS},
        }
    for key in sorted({row.key for row in present}):
        own = [row for row in present if row.key == key]
        result["categories"][key] = {
            "count": len(own),
            **{field: _plain(_over(own, field)) for field in _FIELDS},
        }
    for kind in ("present", "absent (same region)", "absent (elsewhere)"):
        own = [row for row in rows if row.kind == kind]
        result["absent"][kind] = _plain(group_mean([float(not r.found) for r in own], [r.group for r in own]))
    asked = [row for row in present if row.others]
    more = [float(row.dice > max(row.others)) for row in asked]
    pairs = [float(row.dice > other) for row in asked for other in row.others]
    result["reads"] = {
        "asked_over_each_other": _plain(group_mean(pairs, [row.group for row in asked for _ in row.others])),
        "asked_over_all_others": _plain(group_mean(more, [row.group for row in asked])),
    }
    result["absent_threshold"] = _number(threshold_for(rows))
    for kind in ("blank image", "swapped image", "other query"):
        own = [row for row in rows if row.kind == kind and row.key in sets["informative"]]
        if own:
            found = [row for row in own if row.found]
            result["controls"][kind] = {
                "iou": _plain(_over(own, "iou")),
                "prior_iou": _plain(_over(own, "prior_iou")),
                # "Absent" counts as no overlap; whether a box that is given still fits is told apart.
                "found": _plain(group_mean([float(row.found) for row in own], [row.group for row in own])),
                "iou_found": _plain(_over(found, "iou")),
            }
    return result


def _plain(interval: Interval) -> dict[str, Any]:
    ends = {name: _number(getattr(interval, name)) for name in ("mean", "low", "high")}
    return {**ends, "count": interval.count}


def _number(value: float) -> float | None:
    """The value to four places, or None where nothing was measured: JSON has no NaN."""
    return None if math.isnan(value) else round(value, 4)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _show(value: Mapping[str, Any]) -> str:
    return f"{_text(value['mean'])} [{_text(value['low'])}, {_text(value['high'])}]"


def markdown(figures: Mapping[str, Any]) -> str:
    """The figures as Markdown tables; brackets are 95 % bootstrap intervals over groups."""
    lines = [
        "| categories | samples | box IoU | prior box IoU | mask Dice | Dice from true prompts |",
        _RULE,
    ]
    for name, own in figures["sets"].items():
        cells = [_show(own[field]) for field in _FIELDS]
        lines.append(f"| {name} | {own['count']} | " + " | ".join(cells) + " |")
        macro = [_text(own["macro"][field]) for field in _FIELDS]
        lines.append(f"| {name}, macro | | " + " | ".join(macro) + " |")
    lines += ["", "| question | answered absent |", "|---|---|"]
    lines += [f"| {kind} ({int(own['count'])}) | {_show(own)} |" for kind, own in figures["absent"].items()]
    lines += ["", "| check | value |", "|---|---|"]
    lines.append(f"| threshold on P(absent) that these answers call for | {_text(figures['absent_threshold'])} |")
    lines += [
        f"| {name.replace('_', ' ')} ({int(own['count'])}) | {_show(own)} |" for name, own in figures["reads"].items()
    ]
    for kind, own in figures["controls"].items():
        lines.append(f"| {kind}: IoU (prior {_text(own['prior_iou']['mean'])}) | {_show(own['iou'])} |")
        lines.append(f"| {kind}: answered with a box | {_show(own['found'])} |")
        lines.append(f"| {kind}: IoU of those boxes | {_show(own['iou_found'])} |")
    lines += [
        "",
        "| category | samples | box IoU | prior | mask Dice | Dice from true prompts |",
        _RULE,
    ]
    for key, own in figures["categories"].items():
        cells = [_show(own["iou"]), _text(own["prior_iou"]["mean"]), _show(own["dice"])]
        lines.append(
            f"| {key} | {own['count']} | " + " | ".join(cells) + f" | {_text(own['true_prompt_dice']['mean'])} |"
        )
    return "\n".join(lines) + "\n"


def threshold_for(rows: Sequence[Row], *, false_absent: float = 0.08, recognised: float = 0.85) -> float:
    """Largest threshold on P(absent) at which `recognised` of the absent targets are still called absent.

    Raised if more than `false_absent` of the present targets would be called so too. NaN if no probabilities are known.
    """
    present, absent = (
        [row.absent_probability for row in rows if row.kind in kinds and not math.isnan(row.absent_probability)]
        for kinds in (("present",), ("absent (same region)", "absent (elsewhere)"))
    )
    lowest = float(np.quantile(present, 1 - false_absent)) if present else math.nan
    highest = float(np.quantile(absent, 1 - recognised)) if absent else lowest
    return float(np.clip(max(lowest, highest), 0.02, 0.98))


def save(out: Path, rows: Sequence[Row], figures: Mapping[str, Any]) -> None:
    """Write ``rows.jsonl``, ``figures.json`` and ``report.md`` into the folder `out`; NaN becomes null."""
    out.mkdir(parents=True, exist_ok=True)
    with appearing(out / "rows.jsonl") as beside, beside.open("w", encoding="utf-8") as file:
        for row in rows:
            values = dataclasses.asdict(row).items()
            plain = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values}
            file.write(json.dumps(plain, allow_nan=False) + "\n")
    texts = {"figures.json": json.dumps(figures, indent=1, allow_nan=False) + "\n", "report.md": markdown(figures)}
    for name, text in texts.items():
        with appearing(out / name) as beside:
            beside.write_text(text, encoding="utf-8")
