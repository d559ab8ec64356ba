"""Figures as tables, in a form that Markdown and HTML are both written from."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Cell", "Table", "markdown", "number", "tables"]

Cell = str | Mapping[str, Any]
"""Text, or a figure: ``mean``, and if it has an interval ``low`` and ``high``, each a number or None; ``most``, its
largest value, where that is not 1."""

_COLUMNS = {
    "iou": "box IoU",
    "prior_iou": "prior box IoU",
    "dice": "mask Dice",
    "dice_box": "Dice, box only",
    "dice_points": "Dice, points only",
    "true_prompt_dice": "Dice, true prompts",
    "pdice_paper": "pDice, paper's form (0 to 2)",
    "pdice_corrected": "pDice, corrected",
    "nsd": "NSD",
}
_WITH_INTERVAL = ("iou", "dice")  # of the long tables

_NOTES = {
    "overall": "All: categories with 20 samples or more in the whole set. Informative: of these, those whose prior box "
    "IoU is below 0.75. Macro: the mean of the categories' means. Failed answers and a wrong “absent” count 0.",
    "absent": "Precision depends on how many absent targets are asked for: the counts stand in brackets.",
    "traces": "Each word of place and size is held against the true mask, not against the model's own box. A trace "
    "without the word, or one that calls a target absent that is there, is not right.",
    "checks": "With the image blanked or swapped, or with another question, the overlap must fall to the prior.",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table: the first column names the row."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: list[list[Cell]]
    note: str = ""


def number(value: float | None) -> str:
    """The value to three places, or a dash.

    >>> number(0.5), number(None)
    ('0.500', '-')
    """
    return "-" if value is None else f"{value:.3f}"


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """The tables of :func:`medreasoner_train.report.as_dict`'s figures, in the report's order."""
    made = [_overall(figures)]
    for name, title in (("super_categories", "super-category"), ("modalities", "modality"), ("categories", "category")):
        made.append(_groups(name, title, figures[name]))
    made += [_absent(figures), _checks(figures)]
    if "traces" in figures:
        made.append(_traces(figures["traces"]))
    if bad := figures["bad_rows"]:
        rows: list[list[Cell]] = [[each["row"], each["reason"]] for each in bad]
        made.append(Table(name="bad", title=f"Rows left out: {len(bad)}", header=("row", "why"), rows=rows))
    return made


def _overall(figures: Mapping[str, Any]) -> Table:
    rows: list[list[Cell]] = []
    for name, own in figures["sets"].items():
        rows.append([name, str(own["count"]), *(_figure(field, own[field]) for field in _COLUMNS)])
        rows.append([f"{name}, macro", "", *(_figure(field, {"mean": own["macro"][field]}) for field in _COLUMNS)])
    header = ("categories", "samples", *_COLUMNS.values())
    return Table(name="overall", title="Overall", header=header, rows=rows, note=_NOTES["overall"])


def _figure(field: str, cell: Mapping[str, Any]) -> Cell:
    return {**cell, "most": 2} if field == "pdice_paper" else cell


def _groups(name: str, title: str, figures: Mapping[str, Any]) -> Table:
    rows: list[list[Cell]] = [
        [
            each,
            str(own["count"]),
            *(
                _figure(field, own[field] if field in _WITH_INTERVAL else {"mean": own[field]["mean"]})
                for field in _COLUMNS
            ),
        ]
        for each, own in figures.items()
    ]
    return Table(name=name, title=f"By {title}", header=(title, "samples", *_COLUMNS.values()), rows=rows)


def _absent(figures: Mapping[str, Any]) -> Table:
    rows: list[list[Cell]] = []
    for positive, own in figures["detection"].items():
        rows += [[f"{kind} of “{positive}” ({own[kind]['count']})", own[kind]] for kind in ("precision", "recall")]
    rows += [
        [f"answered absent: {kind} ({own['count']})", own] for kind, own in figures["absent"].items() if own["count"]
    ]
    rows.append(["answers that failed", str(figures["failed"])])
    return Table(name="absent", title="Absent targets", header=("answer", "share"), rows=rows, note=_NOTES["absent"])


def _checks(figures: Mapping[str, Any]) -> Table:
    threshold = number(figures["absent_threshold"])
    rows: list[list[Cell]] = [["threshold on P(absent) that these answers call for", threshold]]
    rows += [[f"{name.replace('_', ' ')} ({own['count']})", own] for name, own in figures["reads"].items()]
    for kind, own in figures["controls"].items():
        rows.append([f"{kind}: IoU (prior {number(own['prior_iou']['mean'])})", own["iou"]])
        rows.append([f"{kind}: answered with a box", own["found"]])
        rows.append([f"{kind}: IoU of those boxes", own["iou_found"]])
    title = "Does it look, and does it read"
    return Table(name="checks", title=title, header=("check", "value"), rows=rows, note=_NOTES["checks"])


def _traces(figures: Mapping[str, Any]) -> Table:
    said = {
        "placed": "names a place",
        "size": "size is right",
        "vertical": "upper or lower is right",
        "horizontal": "left or right is right",
        "quadrant": "both of these are",
        "all_words": "all three are",
    }
    rows: list[list[Cell]] = [[f"{text} ({figures[name]['count']})", figures[name]] for name, text in said.items()]
    title = "Reasoning traces"
    return Table(name="traces", title=title, header=("trace", "share"), rows=rows, note=_NOTES["traces"])


def markdown(figures: Mapping[str, Any]) -> str:
    """The figures as Markdown tables; brackets are 95 % bootstrap intervals over groups."""
    lines = [f"- {name}: {value}" for name, value in figures["about"].items()]
    for table in tables(figures):
        lines += ["", f"## {table.title}", "", _row(table.header), "|---" * len(table.header) + "|"]
        lines += [_row([_text(cell) for cell in row]) for row in table.rows]
        lines += ["", table.note] if table.note else []
    return "\n".join(lines).lstrip("\n") + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _text(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    if "low" not in cell:
        return number(cell["mean"])
    return f"{number(cell['mean'])} [{number(cell['low'])}, {number(cell['high'])}]"
