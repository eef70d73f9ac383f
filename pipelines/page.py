"""What the pages share: the template environment, how figures are written, and the axes of charts.

A page is one file that asks for nothing: its policy forbids every request, pictures are ``data:`` URIs, and what is drawn is
inline SVG. Positions in charts are shares of their box, so that text and dots keep their size at every width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from operators.errors import ConfigError
from pipelines import render, report_words
from pipelines.report import clean

if TYPE_CHECKING:
    from jinja2 import Environment, Template

UNKNOWN = report_words.UNKNOWN
SIGNIFICANT = 0.05


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Every function of report_words writes a figure, and so does every one that is listed here.
    of_report = [
        form for form in vars(report_words).values() if getattr(form, "__module__", "") == report_words.__name__
    ]
    ours = (signed, between, p_value, verdict, short_time, position, plural)
    environment.filters.update({form.__name__: form for form in (*of_report, *ours)})
    return environment


def template(name: str) -> Template:
    """Return a template of this folder; what it is filled with is escaped."""
    return _environment().get_template(name)


def load_json(path: Path, schema: str) -> dict[str, Any]:
    """Return a document that a page is made of, its texts cleaned; what is not a number in it is None.

    Raises
    ------
    ConfigError
        If the file cannot be read or its ``schema`` is another one.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    found = document.get("schema") if isinstance(document, dict) else None
    if found != schema:
        raise ConfigError(f"{path}: got schema {found!r}; this page is made of {schema!r}")
    cleaned: dict[str, Any] = clean(document)
    return cleaned


def signed(value: float | None) -> str:
    """Return a difference with its sign."""
    if value is None:
        return UNKNOWN
    shown = f"{abs(value):.3f}"
    return shown if float(shown) == 0 else ("−" if value < 0 else "+") + shown


def between(interval: Sequence[float] | None) -> str:
    """Return an interval of a measure."""
    return UNKNOWN if interval is None else " to ".join(report_words.number(end) for end in interval)


def p_value(value: float | None) -> str:
    """Return a p-value: those that print as zero are bounded instead."""
    return UNKNOWN if value is None else ("<0.001" if value < 0.001 else f"{value:.3f}")


def verdict(against: dict[str, Any]) -> str:
    """Return what a paired comparison shows, in a word."""
    if against["p_holm"] is None or against["p_holm"] >= SIGNIFICANT:
        return "unclear"
    return "better" if (against["difference"] > 0) == against.get("rises", True) else "worse"


def short_time(value: float | None) -> str:
    """Return seconds in the unit that suits a search."""
    if value is None:
        return UNKNOWN
    return f"{value:.2f} s" if value >= 1 else (f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs")


def position(value: float | None) -> str:
    """Return a moment of a video."""
    return UNKNOWN if value is None else render.clock(value)


def plural(number: int, thing: str, things: str | None = None) -> str:
    """Return how many of a thing there are."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


@dataclass(frozen=True)
class Axis:
    """A scale from figures to the shares of a chart's width or height, in percent."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float | None], log: bool = False) -> Axis:
        """Return the axis that shows all values with some room; shares stay within 0 to 1."""
        known = [value for value in values if value is not None and (value > 0 or not log)] or [1.0]
        low, high = min(known), max(known)
        if log:
            room = (high / low) ** 0.06 if high > low else 1.5
            return cls(low / room, high * room, True)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
        bounded = low >= 0 and high <= 1
        return cls(max(0.0, low - room) if low >= 0 else low - room, min(1.0, high + room) if bounded else high + room)

    def share(self, value: float) -> float:
        """Return where a value lies, in percent from the low end."""
        low, high, at = (math.log(max(x, 1e-12)) if self.log else x for x in (self.low, self.high, value))
        return round(min(100.0, max(0.0, 100 * (at - low) / (high - low))), 2)

    def ticks(self, most: int = 6) -> list[float]:
        """Return a few round figures to write at the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [digit * 10.0**decade for decade in decades for digit in digits]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= most:
                    break
            if len(found) > 1:
                return found
        span = self.high - self.low
        steps = (digit * 10.0**power for power in range(-9, 13) for digit in (1, 2, 2.5, 5))
        step = next(step for step in steps if span / step <= most - 1)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]
