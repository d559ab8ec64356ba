"""Spatial and comparative questions about images with several structures, or several of a kind, true by their masks.

Sides are the picture's, as one looks at it. A question is asked only where the answer is clear by a margin, and where
what it chooses among is known: labelled structures that do not overlap, or the separate parts of a mask whose category
is of things that are counted.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import permutations
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import ConvexHull

from medreasoner_train.language import read_queries

__all__ = [
    "NOUNS",
    "Part",
    "Relation",
    "RelationKind",
    "ask",
    "choose",
    "load_templates",
    "relations",
    "template_texts",
]

Mask = npt.NDArray[np.bool_]
Part = Literal["train", "heldout"]
RelationKind = Literal["left", "right", "upper", "lower", "larger", "smaller", "central", "nearer"]

APART = 0.08  # of the picture's side, by which one structure must lie further than another
TIMES = 1.4  # by which one must be larger
OVERLAP = 0.2  # of the smaller of two, above which they are not compared: one is a part of the other
MOST = 6  # things of a kind that are told apart
SPECK = 0.02  # of the largest thing, below which a part of a mask is noise, if it is not cut off by the border
LEAST = 0.15  # of the largest thing, above which it is one more; in between nobody knows
SOLID = 0.8  # share of its convex hull that a single thing fills: two that touch fill less

# Categories of things that are counted, of which their sources label each one that is seen.
NOUNS = {
    "axon": "axon",
    "breast tumor": "mass",
    "cell nucleus": "nucleus",
    "dental caries": "carious spot",
    "lung": "lung",
    "lung consolidation": "consolidated patch",
    "polyp": "polyp",
    "white blood cell": "white cell",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Relation:
    """Something true of one structure among others.

    kind
        What sets it apart; ``"left"`` and so on are sides of the picture, ``"central"`` is nearest its middle,
        ``"nearer"`` is nearer to `third`.
    category
        Of the target.
    mask : (H, W) bool
        The target: a labelled structure, or one of several things of its category.
    other
        Category that it is compared with; None: with the other things of its own.
    third
        Category of what it is nearer to.
    """

    kind: RelationKind
    category: str
    mask: Mask
    other: str | None = None
    third: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Shape:
    """A mask with its area (share of the picture), centre (x, y) and box (x1, y1, x2, y2), relative to the picture."""

    category: str
    mask: Mask
    area: float
    centre: tuple[float, float]
    box: tuple[float, float, float, float]

    @classmethod
    def of(cls, category: str, mask: Mask) -> "_Shape":
        height, width = mask.shape
        rows, columns = np.nonzero(mask)
        return cls(
            category=category,
            mask=mask,
            area=float(mask.mean()),
            centre=(float(columns.mean() + 0.5) / width, float(rows.mean() + 0.5) / height),
            box=(
                float(columns.min()) / width,
                float(rows.min()) / height,
                float(columns.max() + 1) / width,
                float(rows.max() + 1) / height,
            ),
        )

    def off_centre(self) -> float:
        return float(np.hypot(self.centre[0] - 0.5, self.centre[1] - 0.5))


def relations(masks: Mapping[str, Mask]) -> list[Relation]:
    """Everything that spatial questions can be asked about, in an order that depends on the masks alone.

    Parameters
    ----------
    masks
        (H, W) bool of each category that is labelled in one image, as the picture is shown: mirror both or none. Empty
        ones are passed over.

    >>> m = np.zeros((20, 20), bool); n = m.copy(); m[2:6, 2:6] = True; n[2:6, 14:18] = True
    >>> [(r.kind, r.category) for r in relations({"nerve": m, "vessel": n})]
    [('left', 'nerve'), ('right', 'vessel')]
    """
    shapes = [_Shape.of(name, masks[name]) for name in sorted(masks) if masks[name].any()]
    found = []
    for one, other in permutations(shapes, 2):
        if _apart(one, other):
            found += [
                Relation(kind=kind, category=one.category, mask=one.mask, other=other.category)
                for kind in _shown(one, [other])
            ]
    found += _nearer(shapes)
    for shape in shapes:
        if shape.category in NOUNS:
            things = _things(shape)
            for k, thing in enumerate(things):
                found += [
                    Relation(kind=kind, category=shape.category, mask=thing.mask)
                    for kind in _shown(thing, [*things[:k], *things[k + 1 :]])
                ]
    return found


def choose(found: Sequence[Relation], rng: np.random.Generator) -> Relation:
    """One of several relations: first a kind, then one of it, for images with many structures have most of one kind."""
    kinds = sorted({own.kind for own in found})
    kind = kinds[int(rng.integers(len(kinds)))]
    own = [relation for relation in found if relation.kind == kind]
    return own[int(rng.integers(len(own)))]


def ask(relation: Relation, part: Part, rng: np.random.Generator) -> str:
    """A question whose answer is the relation's target, of the templates of one part."""
    several = relation.other is None
    templates = load_templates(part)["several" if several else "pair"][relation.kind]
    template = templates[int(rng.integers(len(templates)))]
    if several:
        return _opened(template.format(noun=NOUNS[relation.category]))
    names = [relation.category, str(relation.other)]
    if rng.random() < 0.5:
        names.reverse()
    return _opened(template.format(one=names[0], two=names[1], third=relation.third))


@cache
def load_templates(part: Part) -> dict[str, dict[str, tuple[str, ...]]]:
    """Templates of questions by ``"pair"`` or ``"several"`` and kind; those of ``"heldout"`` are never trained on."""
    table = read_queries("spatial")
    return {number: {kind: tuple(parts[part]) for kind, parts in kinds.items()} for number, kinds in table.items()}


def template_texts() -> Iterator[str]:
    """The words of the training templates, for the tokenizer."""
    for kinds in load_templates("train").values():
        for templates in kinds.values():
            for template in templates:
                yield template.format(one="one", two="other", third="third", noun="thing")
    yield from NOUNS.values()


def _opened(text: str) -> str:
    return text[:1].upper() + text[1:]


def _apart(one: _Shape, other: _Shape) -> bool:
    shared = float((one.mask & other.mask).mean())
    return shared <= OVERLAP * min(one.area, other.area)


def _shown(one: _Shape, others: Sequence[_Shape]) -> list[RelationKind]:
    """What sets a shape apart from all others."""
    kinds = [kind for kind in get_args(RelationKind) if kind != "nearer"]
    return [kind for kind in kinds if others and all(_holds(kind, one, other) for other in others)]


def _holds(kind: RelationKind, one: _Shape, other: _Shape) -> bool:
    if kind in ("right", "lower", "smaller"):
        opposite: dict[RelationKind, RelationKind] = {"right": "left", "lower": "upper", "smaller": "larger"}
        return _holds(opposite[kind], other, one)
    if kind == "larger":
        return one.area >= TIMES * other.area
    if kind == "central":
        return one.off_centre() + APART <= other.off_centre()
    axis = 0 if kind == "left" else 1
    return (
        one.centre[axis] + APART <= other.centre[axis]
        and one.box[axis] < other.box[axis]
        and one.box[axis + 2] < other.box[axis + 2]
    )


def _nearer(shapes: Sequence[_Shape]) -> list[Relation]:
    """Which of two structures has the smaller gap to a third."""
    found = []
    for third in shapes if len(shapes) > 2 else ():
        rest = [shape for shape in shapes if shape is not third and _apart(shape, third)]
        height, width = third.mask.shape
        distance = ndimage.distance_transform_edt(~third.mask, sampling=(1 / height, 1 / width))
        gaps = {shape.category: float(distance[shape.mask].min()) for shape in rest}
        for one, other in permutations(rest, 2):
            if _apart(one, other) and gaps[one.category] + APART <= gaps[other.category]:
                found.append(
                    Relation(
                        kind="nearer",
                        category=one.category,
                        mask=one.mask,
                        other=other.category,
                        third=third.category,
                    )
                )
    return found


def _things(shape: _Shape) -> list[_Shape]:
    """The separate things of a mask, or none if it holds one, too many, or parts that may be none or several."""
    labels, count = ndimage.label(shape.mask, structure=np.ones((3, 3)))
    if count < 2:
        return []
    sizes = np.bincount(labels.ravel())[1:]
    cut = np.union1d(np.union1d(labels[0], labels[-1]), np.union1d(labels[:, 0], labels[:, -1]))
    at_border = np.isin(np.arange(1, count + 1), cut)
    kept = np.flatnonzero((sizes >= SPECK * sizes.max()) | at_border) + 1
    if not 2 <= len(kept) <= MOST or sizes[kept - 1].min() < LEAST * sizes.max():
        return []
    masks = [labels == label for label in kept]
    if any(_solidity(mask) < SOLID for mask in masks):
        return []
    return [_Shape.of(shape.category, mask) for mask in masks]


def _solidity(mask: Mask) -> float:
    """Share of its convex hull that a mask fills; the hull is that of its pixels' corners."""
    rows, columns = np.nonzero(mask)
    corners = np.concatenate([np.stack([rows + dy, columns + dx], axis=1) for dy in (0, 1) for dx in (0, 1)])
    return float(mask.sum() / ConvexHull(corners).volume)
