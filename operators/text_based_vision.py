"""FLMR's text-based vision: objects with attributes, text in the picture and a caption, as words; and where to look.

What others saw in a picture goes into the query's text between markers that FLMR's tokenizer knows as tokens. Regions of
interest are cut out and become visual tokens of their own.

References
----------
FLMR, arXiv:2309.17133, sec. 3.2 and app. C.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from operators.errors import ConfigError

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as shares of a picture's width and height."""

QUESTION = ("<BOQ>", "<EOQ>")
VISION = ("<BOV>", "<SOV>", "<EOV>")
CAPTION = ("<BOC>", "<EOC>")
PASSAGE = ("<BOK>", "<EOK>")

MAX_OBJECTS = 40
MAX_ATTRIBUTES = 3
MIN_SCORE = 0.05
"""Attributes are named above it."""

NUM_REGIONS = 9
MIN_PIXELS = 5


@dataclass(frozen=True)
class SeenObject:
    """An object that a detector saw: its class, attributes with their scores, and where, if that is known."""

    name: str
    attributes: tuple[tuple[str, float], ...] = ()
    box: Box | None = None


def render_vision(objects: Sequence[SeenObject] = (), texts: Sequence[str] = (), caption: str = "") -> str:
    """Return what was seen as ``<BOV> attribute object <SOV> … text <EOV> <BOC> caption <EOC>``.

    Parameters
    ----------
    objects
        The first 40 count, each with the first 3 attributes whose score is above 0.05.
    texts
        Text read in the picture; the same one counts once.
    caption
        A sentence; without one its part is left out.
    """
    words = [VISION[0]]
    for seen in objects[:MAX_OBJECTS]:
        named = [name for name, score in seen.attributes if score > MIN_SCORE]
        words += [*named[:MAX_ATTRIBUTES], seen.name, VISION[1]]
    words += dict.fromkeys(" ".join(text.split()) for text in texts)
    words.append(VISION[2])
    if caption:
        words += [CAPTION[0], caption, CAPTION[1]]
    return " ".join(words)


def render_query(question: str, vision_text: str = "") -> str:
    """Return ``<BOQ> question <EOQ>`` and after it what was seen, as `render_vision` gives it."""
    return " ".join(filter(None, [QUESTION[0], question, QUESTION[1], vision_text]))


def without_markers(text: str) -> str:
    """Return a rendered text for a tokenizer that does not know the markers: commas between objects, nothing else."""
    commas = re.sub(rf"\s*{VISION[1]}(?:\s*(?={VISION[2]}))?", ",", text)
    return " ".join(re.sub("|".join((*QUESTION, *VISION, *CAPTION, *PASSAGE)), " ", commas).split())


def choose_regions(objects: Sequence[SeenObject], question: str = "", num_regions: int = NUM_REGIONS) -> list[Box]:
    """Return where to look: boxes of objects that the question names, then the others, the larger first.

    Where there are fewer than asked for, the last is given again, as FLMR was trained; of no boxes there are none.
    """
    placed = sorted(
        ((_is_named(seen.name, question), _area(seen.box), seen.box) for seen in objects if seen.box is not None),
        key=lambda region: region[:2],
        reverse=True,
    )
    boxes = [box for *_, box in placed[:num_regions]]
    return boxes + boxes[-1:] * (num_regions - len(boxes))


def grid_regions(num_regions: int = NUM_REGIONS) -> list[Box]:
    """Return the cells of the largest square grid that has no more of them than asked for, row by row. Ours, not FLMR's."""
    side = math.isqrt(num_regions)
    return [
        (column / side, row / side, (column + 1) / side, (row + 1) / side)
        for row in range(side)
        for column in range(side)
    ]


def crop(picture: Any, box: Box) -> Any:
    """Return a region of a picture of PIL; a side of less than 5 pixels is widened by 2.5 either way, within the picture.

    FLMR widens only where both sides are that small; but a hair's breadth scaled to 224 pixels would be a picture of
    millions.

    Raises
    ------
    ConfigError
        If the box is not within the picture, or has no area.
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ConfigError(
            f"box {box} is none: left, top, right and bottom are shares of the picture from 0 to 1, left < right and "
            "top < bottom"
        )
    across = _widened(left * picture.width, right * picture.width, picture.width)
    down = _widened(top * picture.height, bottom * picture.height, picture.height)
    return picture.crop((across[0], down[0], across[1], down[1]))


def _widened(start: float, stop: float, limit: int) -> tuple[int, int]:
    """Return the whole pixels of a side, at least one of them."""
    if stop - start < MIN_PIXELS:
        start, stop = max(0.0, start - MIN_PIXELS / 2), min(float(limit), stop + MIN_PIXELS / 2)
    first = min(round(start), limit - 1)
    return first, max(round(stop), first + 1)


def _is_named(name: str, question: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", question, re.IGNORECASE) is not None


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
