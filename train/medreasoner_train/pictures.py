"""A sheet of samples to look at while a policy learns: the truth, the answers, and what each is worth."""

from collections.abc import Sequence

import numpy as np
from PIL import Image as PilImage
from PIL import ImageDraw

from medreasoner_train.episodes import Episode
from medreasoner_train.rewards import geometry_of

__all__ = ["sheet"]

SIDE = 320  # pixels of a picture on the sheet
BAND = 58
WHITE, DARK, TRUTH = (255, 255, 255), (24, 24, 27), (86, 180, 233)
BEST, WORST = (0, 158, 115), (213, 94, 0)  # of Okabe and Ito's palette, as the overlays


def sheet(episodes: Sequence[Episode], *, columns: int = 4) -> PilImage.Image:
    """Groups side by side: true box and mask in blue; the answers' boxes from orange (worst of the group) to green."""
    rows = -(-len(episodes) // columns)
    page = PilImage.new("RGB", (columns * SIDE, rows * (SIDE + BAND)), DARK)
    for index, episode in enumerate(episodes):
        page.paste(_one(episode), (index % columns * SIDE, index // columns * (SIDE + BAND)))
    return page


def _one(episode: Episode) -> PilImage.Image:
    task = episode.task
    picture = PilImage.fromarray(task.prompt.pixels).convert("RGB").resize((SIDE, SIDE))
    if task.mask is not None:
        tint = PilImage.fromarray(np.asarray(task.mask) * np.uint8(80)).resize((SIDE, SIDE))
        picture.paste(PilImage.new("RGB", (SIDE, SIDE), TRUTH), mask=tint)
    card = PilImage.new("RGB", (SIDE, SIDE + BAND), DARK)
    draw = ImageDraw.Draw(picture)
    across, down = SIDE / task.truth.size[0], SIDE / task.truth.size[1]
    low, high = min(episode.totals), max(episode.totals)
    absent = 0
    for total, completion in sorted(zip(episode.totals, episode.completions, strict=True), key=lambda pair: pair[0]):
        geometry = geometry_of(completion.text)
        if geometry is None:
            absent += 1
            continue
        share = (total - low) / (high - low) if high > low else 1.0
        colour = tuple(round(w + (b - w) * share) for b, w in zip(BEST, WORST, strict=True))
        x1, y1, x2, y2 = geometry[0]
        if x2 > x1 and y2 > y1:
            draw.rectangle((x1 * across, y1 * down, x2 * across, y2 * down), outline=colour)
    if task.truth.box is not None:
        x1, y1, x2, y2 = task.truth.box
        draw.rectangle((x1 * across, y1 * down, x2 * across, y2 * down), outline=TRUTH, width=3)
    card.paste(picture, (0, 0))
    words = ImageDraw.Draw(card)
    for line, text in enumerate(_caption(episode, absent)):
        words.text((6, SIDE + 4 + 17 * line), text, fill=WHITE)
    return card


def _caption(episode: Episode, absent: int) -> list[str]:
    query = episode.task.prompt.query
    shown = [query[start : start + 52] for start in range(0, min(len(query), 104), 52)]
    worth = f"worth {min(episode.totals):.2f} to {max(episode.totals):.2f}"
    there = "absent" if episode.task.truth.box is None else "present"
    return [*shown, f"{worth}; {there}; no box: {absent} of {len(episode.completions)}"]
