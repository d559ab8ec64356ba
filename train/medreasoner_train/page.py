"""The report as one HTML file: no script, and nothing that is fetched from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from medreasoner.render import ANSWER, BOX, POINT, TRUTH
from medreasoner_train.evalset import Case
from medreasoner_train.evaluate import Evaluation
from medreasoner_train.exhibits import Section, choose, picture
from medreasoner_train.scoring import Row
from medreasoner_train.tables import Cell, Table, number, tables

__all__ = ["html"]

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 2rem 4rem; max-width: 90rem; background: #fff; color: #1c2024;
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.7rem; }
h2 { margin: 2.75rem 0 .5rem; padding-top: .5rem; border-top: 1px solid #d9dde2; font-size: 1.25rem; }
p.note { margin: .25rem 0 .75rem; max-width: 60rem; color: #565e67; }
a { color: #0b5cad; }
nav { margin: 1rem 0; padding: .6rem 1rem; background: #f4f6f8; border-radius: 6px; }
nav a { display: inline-block; margin-right: 1.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; margin: 1rem 0; }
dt { color: #565e67; }
dd { margin: 0; }
.key { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.key div { min-width: 8.5rem; padding: .6rem .9rem; border: 1px solid #d9dde2; border-radius: 6px; }
.key b { display: block; font-size: 1.45rem; line-height: 1.3; }
.key span, small { color: #565e67; font-size: .78rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; }
table.short { width: auto; min-width: 30rem; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid #e6e9ec; text-align: right; vertical-align: top;
  font-variant-numeric: tabular-nums; }
th { background: #f4f6f8; color: #3a4149; font-weight: 600; vertical-align: bottom; max-width: 7.5rem; }
th:first-child, td:first-child, .words td { text-align: left; white-space: nowrap; }
.words td { white-space: normal; }
td small { display: block; line-height: 1.2; white-space: nowrap; }
tr:hover td { background-color: #fafbfc; }
.grid { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1.25rem; }
@media (max-width: 70rem) { .grid { grid-template-columns: repeat(2, 1fr); } }
@media (max-width: 36rem) { .grid { grid-template-columns: 1fr; } }
figure { margin: 0; border: 1px solid #d9dde2; border-radius: 6px; overflow: hidden; break-inside: avoid; }
figure img { display: block; width: 100%; height: 17rem; object-fit: contain; background: #18181b; }
figcaption { padding: .6rem .8rem .8rem; }
figcaption q { display: block; font-weight: 600; line-height: 1.35; margin-bottom: .3rem; }
figcaption p { margin: .35rem 0 0; font-size: .85rem; }
figcaption .trace { color: #565e67; font-style: italic; }
.legend { display: flex; flex-wrap: wrap; gap: 1.4rem; margin: .75rem 0 0; }
.legend i { display: inline-block; width: 1rem; height: 1rem; margin-right: .4rem; vertical-align: -.15rem;
  border-radius: 3px; background: #55585c; }
"""


def html(figures: Mapping[str, Any], evaluation: Evaluation, *, count: int = 4) -> str:
    """The report of an evaluation as one HTML document.

    Parameters
    ----------
    figures
        Of :func:`medreasoner_train.report.figures_of`.
    evaluation
        Its questions and images are shown in the page, so that the page is as confidential as the data.
    count
        Pictures in each of the sections best, median, worst, missed and made up; 0: none.
    """
    made, sections = tables(figures), choose(evaluation.rows, count) if count else []
    cases = {case.sample.id: case for case in evaluation.data.asked}
    anchors = [(table.name, table.title) for table in made]
    # What the answers look like is wanted before the long tables.
    after = 1 if sections else 0
    anchors[after:after] = [(section.name, section.title) for section in sections]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Evaluation of {escape(evaluation.model)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Evaluation of {escape(evaluation.model.partition(' (')[0])}</h1>",
        '<p class="note">For research and engineering, not for diagnosis. Small print under a figure is its 95 % '
        "bootstrap interval over groups, such as patients.</p>",
        _about(figures["about"]),
        _key(figures),
        "<nav>" + "".join(f'<a href="#{escape(name)}">{escape(title)}</a>' for name, title in anchors) + "</nav>",
        _table(made[0]),
        _legend() if sections else "",
        *(_section(section, cases) for section in sections),
        *(_table(table) for table in made[1:]),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _about(about: Mapping[str, str]) -> str:
    return (
        "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in about.items()) + "</dl>"
    )


def _key(figures: Mapping[str, Any]) -> str:
    """The few figures that one looks for first."""
    every, some = figures["sets"]["every category"], figures["sets"]["informative"]
    absent = figures["detection"]["absent"]
    cards = [
        ("box IoU", every["iou"]),
        ("mask Dice", every["dice"]),
        ("box IoU, informative", some["iou"]),
        ("prior box IoU, the same", some["prior_iou"]),
        ("mask Dice, informative", some["dice"]),
        ("precision of “absent”", absent["precision"]),
        ("recall of “absent”", absent["recall"]),
    ]
    shown = "".join(
        f"<div><span>{escape(name)}</span><b>{number(own['mean'])}</b>{_interval(own)}</div>" for name, own in cards
    )
    return f'<div class="key">{shown}</div>'


def _table(table: Table) -> str:
    kind = "words" if table.name == "bad" else "short" if len(table.header) == 2 else "wide"
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    body = "\n".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<h2 id="{escape(table.name)}">{escape(table.title)}</h2>{note}<div class="scroll"><table class="{kind}">'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return f"<td>{escape(cell)}</td>"
    mean = cell["mean"]
    if mean is None:
        return "<td>-</td>"
    end = round(100 * min(1.0, mean / cell.get("most", 1)))
    bar = f"background-image:linear-gradient(90deg,#dcebfa {end}%,transparent {end}%)"
    return f'<td style="{bar}">{number(mean)}{_interval(cell)}</td>'


def _interval(cell: Mapping[str, Any]) -> str:
    if cell.get("low") is None:
        return ""
    return f"<small>{number(cell['low'])} to {number(cell['high'])}</small>"


def _legend() -> str:
    def colour(value: Sequence[int]) -> str:
        return "#" + "".join(f"{channel:02x}" for channel in value)

    marks = [
        (f"background:{colour(ANSWER)}", "mask of the answer"),
        (f"border:3px solid {colour(TRUTH)}", "outline of the truth"),
        (f"border:3px solid {colour(BOX)}", "box of the answer"),
        (f"background:{colour(POINT)};border-radius:50%", "points of the answer"),
    ]
    shown = "".join(f'<span><i style="{style}"></i>{text}</span>' for style, text in marks)
    return f'<div class="legend">{shown}</div>'


def _section(section: Section, cases: Mapping[str, Case]) -> str:
    figures = "\n".join(_figure(row, cases[row.id]) for row in section.rows)
    return (
        f'<h2 id="{section.name}">{section.title}</h2><p class="note">{escape(section.note)}</p>'
        f'<div class="grid">{figures}</div>'
    )


def _figure(row: Row, case: Case) -> str:
    trace = f'<p class="trace">{escape(row.reasoning)}</p>' if row.reasoning else ""
    image = f'<img src="{picture(row, case)}" alt="{escape(row.key)}: {_outcome(row)}">'
    return (
        f"<figure>{image}<figcaption><q>{escape(row.query)}</q>{escape(row.key)}"
        f"<p>{_outcome(row)}</p>{trace}</figcaption></figure>"
    )


def _outcome(row: Row) -> str:
    sure = "" if row.absent_probability != row.absent_probability else f"P(absent) {number(row.absent_probability)}"
    if not row.found:
        return f"answered absent, {sure}; with true prompts Dice {_value(row.true_prompt_dice)}"
    if row.kind != "present":
        return f"not in the image; {sure}"
    scores = {
        "Dice": row.dice,
        "box only": row.dice_box,
        "points only": row.dice_points,
        "true prompts": row.true_prompt_dice,
        "NSD": row.nsd,
        "box IoU": row.iou,
        "prior": row.prior_iou,
        "pDice": row.pdice_corrected,
    }
    return " · ".join(f"{name} {_value(value)}" for name, value in scores.items())


def _value(value: float) -> str:
    return number(None if value != value else value)
