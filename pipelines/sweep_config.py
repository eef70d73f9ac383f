"""What SWEEP.yaml says: which settings to try, each with each.

::

    base: {encode.encoder: lexical, search.scorer: sum_maxsim}   # the same in every cell
    grid:                                                        # dotted name: values
      build_index.nbits: [1, 2, 4]
      search.probes: [1, 2, 4, 8]
      search.modalities: [null, [speech], [speech, metadata]]
    exclude:                                                     # cells with all of these values are left out
      - {build_index.nbits: 1, search.probes: [1, 2]}
    queries: queries.jsonl                                       # or --queries, --qrels, --out
    qrels: qrels.txt
    out: sweep
    work: s3://bucket/sweep                                      # where indices go, if not below `out`

Every cell becomes a whole configuration and is checked before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from operators.errors import ConfigError
from pipelines.config import Config, override, read_yaml, validated
from pipelines.search import scorer_of

SWEPT = ("encode", "build_index", "search")
"""Blocks of settings that a sweep can vary: an index is made and searched by them."""

FIXED = (*SWEPT, "evaluate")

MAX_CELLS = 10_000

Values = Annotated[list[Any], Field(min_length=1)]


class SweepConfig(BaseModel):
    """See the module."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    grid: dict[str, Values] = Field(min_length=1)
    base: dict[str, Any] = {}
    exclude: tuple[dict[str, Any], ...] = ()
    queries: Path | None = None
    qrels: Path | None = None
    out: Path | None = None
    work: str | None = None


@dataclass(frozen=True)
class Cell:
    """One setting of everything.

    Attributes
    ----------
    settings
        By dotted name, those of the grid.
    config
        All of them.
    """

    settings: dict[str, Any]
    config: Config


def read_sweep(file: Path) -> SweepConfig:
    """Return what a SWEEP.yaml says.

    Raises
    ------
    ConfigError
        If it cannot be read, or a name or value is not allowed.
    """
    return validated(SweepConfig, read_yaml(file))


def expand(sweep: SweepConfig, config: Config) -> list[Cell]:
    """Return all cells, the last name of the grid varying fastest.

    Raises
    ------
    ConfigError
        If a setting of any cell is not allowed, or cannot be swept; all that is wrong is named.
    """
    _check_names(sweep)
    fixed = override(config, sweep.base)
    cells, wrong = [], dict[str, None]()
    for values in product(*sweep.grid.values()):
        settings = dict(zip(sweep.grid, values, strict=True))
        if any(_fits(settings, excluded) for excluded in sweep.exclude):
            continue
        try:
            cell = Cell(settings, override(fixed, settings))
            scorer_of(cell.config.search)
        except ConfigError as error:
            wrong |= dict.fromkeys(str(error).splitlines())
        else:
            cells.append(cell)
    if wrong:
        raise ConfigError("\n".join(wrong))
    if not cells:
        raise ConfigError("the sweep's `exclude` leaves no cell of its grid")
    _check_encoders(cells)
    return cells


def _check_names(sweep: SweepConfig) -> None:
    for name, values in sweep.grid.items():
        if "." not in name:
            raise ConfigError(f"grid: {name}: the names of a grid are dotted, for example build_index.nbits")
        _check_block(name, SWEPT, "a grid varies only")
        if any(value in values[:i] for i, value in enumerate(values)):
            raise ConfigError(f"grid: {name} names a value twice: {values}")
    for name in sweep.base:
        _check_block(name, FIXED, "the base of a sweep sets only")
    for name in (name for excluded in sweep.exclude for name in excluded):
        if name not in sweep.grid:
            raise ConfigError(f"exclude: {name} is not in the grid, which varies {', '.join(sweep.grid)}")
    if (num_cells := prod(len(values) for values in sweep.grid.values())) > MAX_CELLS:
        raise ConfigError(f"the grid has {num_cells} cells; {MAX_CELLS} at most. Cut it in two, or use fewer values.")


def _check_block(name: str, allowed: Iterable[str], what: str) -> None:
    block = name.partition(".")[0]
    # A block that does not exist is named, with the one that was meant, when the cells are checked.
    if block in Config.model_fields and block not in allowed:
        raise ConfigError(f"{name}: {what} {', '.join(allowed)}; set others with -c, --set or --store")


def _fits(settings: Mapping[str, Any], excluded: Mapping[str, Any]) -> bool:
    return all(settings[name] in (v if isinstance(v, list) else [v]) for name, v in excluded.items())


def _check_encoders(cells: Iterable[Cell]) -> None:
    """Raise ConfigError if two cells have other settings of one encoder: a store has one table an encoder."""
    known: dict[str, dict[str, Any]] = {}
    for cell in cells:
        encode = cell.config.encode
        if known.setdefault(encode.encoder, encode.parameters()) != encode.parameters():
            raise ConfigError(
                f"encode.{encode.encoder}: a store holds the tokens of one setting of an encoder, so that these cannot "
                "be swept. Sweep a store each."
            )
