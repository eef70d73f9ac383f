"""How the figures of a morning report are written, in all of its forms."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pipelines.render import size

Json = Mapping[str, Any]

UNKNOWN = "–"


def count(value: float | None) -> str:
    """Return a whole number with its thousands apart."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def number(value: float | None) -> str:
    """Return a measure: three decimals, none where it counts something."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if abs(value) >= 1000 or (abs(value) >= 2 and float(value).is_integer()) else f"{value:.3f}"


def seconds(value: float | None) -> str:
    """Return seconds with one decimal."""
    return UNKNOWN if value is None else f"{value:,.1f}"


def rate(value: float | None) -> str:
    """Return rows a second, with more decimals where they are few."""
    if value is None:
        return UNKNOWN
    return f"{value:.2f}" if value < 10 else (f"{value:.1f}" if value < 100 else f"{value:,.0f}")


def duration(value: float | None) -> str:
    """Return seconds as a person says them."""
    if value is None:
        return UNKNOWN
    if value < 60:
        return f"{value:.1f} s"
    if value < 600:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def amount(value: float | None, currency: str) -> str:
    """Return an amount of money."""
    return UNKNOWN if value is None else f"{currency} {value:,.2f}"


def num_bytes(value: float | None) -> str:
    """Return a number of bytes in the unit that suits it."""
    return UNKNOWN if value is None else size(value)


def speed(times_slower: float | None) -> str:
    """Return a stage's speed against the median."""
    if times_slower is None:
        return UNKNOWN
    if times_slower >= 1.1:
        return f"{times_slower:.2f}x slower"
    return f"{1 / times_slower:.2f}x faster" if times_slower <= 1 / 1.1 else "as usual"


def longer(ratio: float | None) -> str:
    """Return a step's time as a multiple of the median."""
    return UNKNOWN if ratio is None else f"{ratio:.2f}x"


def clock(iso: str | None, pattern: str = "%Y-%m-%d %H:%M") -> str:
    """Return a time, in UTC."""
    return UNKNOWN if iso is None else datetime.fromisoformat(iso).strftime(pattern)


def passed(verdict: bool | None) -> str:
    """Return a gate's verdict as a word."""
    return "not measured" if verdict is None else ("passed" if verdict else "FAILED")


def again(failure: Json) -> str:
    """Return how often a video was tried, and whether it will be again."""
    tried = {None: "attempts unknown", 1: "1 attempt"}.get(failure["attempts"], f"{failure['attempts']} attempts")
    if failure["quarantined"]:
        return f"{tried}, quarantined"
    return f"{tried}, final" if failure["final"] else f"{tried}, tried again next run"


def fate(cause: Json) -> str:
    """Return how many of a cause's videos are in quarantine."""
    if not cause["quarantined"]:
        return "not quarantined"
    return "quarantined" if cause["quarantined"] == cause["videos"] else f"{cause['quarantined']} quarantined"


def count_nights(num_nights: int) -> str:
    """Return a number of nights."""
    return "1 night" if num_nights == 1 else f"{num_nights} nights"
