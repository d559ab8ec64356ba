"""The time by stage as a picture: a bar for the first question on an image, one for a further one."""

import math
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from medreasoner_cli.measure import in_order

__all__ = ["draw_stages"]

# Okabe and Ito's palette, whose colours stay apart in every kind of colour blindness, and lighter ones of it.
_COLOURS = {
    "read": "#999999",
    "preprocess": "#e69f00",
    "vision": "#0072b2",
    "prefill": "#56b4e9",
    "think": "#cc79a7",
    "answer": "#009e73",
    "segment_encode": "#d55e00",
    "segment_decode": "#f0e442",
    "postprocess": "#8d6e54",
}
_FURTHER = ("#7b5ea7", "#8fd6bd", "#f2b79f", "#4a4a4a")  # for stages that have no colour above
_BETWEEN = "between the stages"
_BLANK = "#e4e4e4"
_OVERLAP = "Stages that run side by side add up to more than the time until the mask, which the black mark shows."
_INK, _FAINT, _PAPER = "#222222", "#d0d0d0", "white"
_BARS = {"first": "first question", "further": "further question"}

_WIDTH, _MARGIN, _LABEL, _TOTAL = 1000, 24, 150, 110  # pixels
_BAR, _GAP, _LINE = 54, 26, 24
_LEAST_WIDTH = 8  # of a part that has its time written in it, over that of the text
_MOST_TICKS = 8


def draw_stages(report: Mapping[str, Any]) -> Image.Image:
    """RGB picture of medians in milliseconds, stacked by stage, with a legend that holds the figures.

    Parameters
    ----------
    report
        Of `measure`. What the wall clock shows beyond the stages is drawn too.
    """
    parts = {key: _split(report[key]) for key in _BARS}
    stages = in_order(dict.fromkeys(stage for part in parts.values() for stage in part if stage != _BETWEEN))
    if any(_BETWEEN in part for part in parts.values()):
        stages.append(_BETWEEN)
    colours = _colours(stages)
    head = _head(report)
    if any(_BETWEEN not in part for part in parts.values()):
        head.append(_OVERLAP)
    top = _MARGIN + _LINE * len(head) + _GAP
    axis = top + len(parts) * (_BAR + _GAP)
    legend = axis + 2 * _LINE
    picture = Image.new("RGB", (_WIDTH, legend + _LINE * (len(stages) + 2) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(head):
        draw.text((_MARGIN, _MARGIN + _LINE * number), line, _INK, _font(16 if number == 0 else 13))
    longest = max(max(sum(part.values()), report[key]["wall"]["p50"]) for key, part in parts.items())
    scale = (_WIDTH - 2 * _MARGIN - _LABEL - _TOTAL) / max(longest, 1e-6)  # pixels a millisecond
    _draw_axis(draw, longest, scale, top - _GAP // 2, axis)
    for number, (key, part) in enumerate(parts.items()):
        y = top + number * (_BAR + _GAP)
        _draw_bar(draw, _BARS[key], part, colours, scale, y)
        wall, left = report[key]["wall"]["p50"], _MARGIN + _LABEL
        draw.line((left + wall * scale, y - 6, left + wall * scale, y + _BAR + 6), "black", 3)
        x = left + max(sum(part.values()), wall) * scale + 10
        draw.text((x, y + _BAR / 2), f"{_figure(wall)} ms", _INK, _font(15), anchor="lm")
    _draw_legend(draw, parts, stages, colours, legend)
    return picture


def _split(times: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Medians by stage, and what the wall clock shows beyond them."""
    part = {stage: times[stage]["p50"] for stage in in_order(times) if stage != "wall"}
    between = times["wall"]["p50"] - sum(part.values())
    return part | {_BETWEEN: between} if between > 0 else part


def _colours(stages: list[str]) -> dict[str, str]:
    unknown = [stage for stage in stages if stage not in _COLOURS and stage != _BETWEEN]
    more = {stage: _FURTHER[number % len(_FURTHER)] for number, stage in enumerate(unknown)}
    return {**_COLOURS, **more, _BETWEEN: _BLANK}


def _head(report: Mapping[str, Any]) -> list[str]:
    model = report["bundle"]
    runs_on = ", ".join(dict.fromkeys(report["providers"].values()))
    lines = [
        f"{model['name']} {model['version']}: median time by stage, ms",
        f"{runs_on}, {report['threads']} threads, {report['simd']}, {report['precision']}; "
        f"image {report['image'][1]} x {report['image'][0]}; {report['runs']} runs; "
        f"medreasoner {report['medreasoner']}",
    ]
    return [*lines, *report["notes"]]


def _draw_axis(draw: ImageDraw.ImageDraw, longest: float, scale: float, top: int, bottom: int) -> None:
    step = _tick(longest)
    for number in range(math.floor(longest / step) + 1):
        x = _MARGIN + _LABEL + number * step * scale
        draw.line((x, top, x, bottom), _FAINT)
        draw.text((x, bottom + 4), f"{number * step:g}", _INK, _font(12), anchor="ma")


def _tick(longest: float) -> float:
    """A round number of milliseconds between two marks.

    >>> _tick(120.0)
    20.0
    """
    least = longest / _MOST_TICKS
    power = 10.0 ** math.floor(math.log10(max(least, 1e-6)))
    return next(power * times for times in (1, 2, 5, 10) if power * times >= least)


def _draw_bar(
    draw: ImageDraw.ImageDraw, name: str, part: Mapping[str, float], colours: Mapping[str, str], scale: float, y: int
) -> None:
    draw.text((_MARGIN, y + _BAR / 2), name, _INK, _font(15), anchor="lm")
    left = float(_MARGIN + _LABEL)
    for stage, spent in part.items():
        right = left + spent * scale
        draw.rectangle((left, y, max(right - 1, left), y + _BAR), colours[stage])
        text, font = _figure(spent), _font(12)
        if draw.textlength(text, font) + _LEAST_WIDTH <= right - left:
            draw.text(((left + right) / 2, y + _BAR / 2), text, _ink_on(colours[stage]), font, anchor="mm")
        left = right


def _draw_legend(
    draw: ImageDraw.ImageDraw,
    parts: Mapping[str, Mapping[str, float]],
    stages: list[str],
    colours: Mapping[str, str],
    y: int,
) -> None:
    places = dict(zip(parts, (_MARGIN + 320, _MARGIN + 480), strict=True))
    for key, x in places.items():
        draw.text((x, y), _BARS[key], _INK, _font(13), anchor="ra")
    for stage in stages:
        y += _LINE
        draw.rectangle((_MARGIN, y + 2, _MARGIN + 14, y + 16), colours[stage])
        draw.text((_MARGIN + 24, y), stage.replace("_", " "), _INK, _font(13))
        for key, x in places.items():
            text = _figure(parts[key][stage]) if stage in parts[key] else "-"
            draw.text((x, y), text, _INK, _font(13), anchor="ra")


def _figure(spent: float) -> str:
    return f"{spent:.0f}" if spent >= 100 else f"{spent:.1f}" if spent >= 10 else f"{spent:.2f}"


def _ink_on(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return _INK if 0.3 * red + 0.59 * green + 0.11 * blue > 130 else _PAPER


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
