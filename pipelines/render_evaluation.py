"""What a person reads on stdout of evaluations, comparisons and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from pipelines.render import clock, make_console, size

Json = Mapping[str, Any]

SIGNIFICANT = 0.05


def leaderboard(result: Json) -> None:
    """Print measures by target modality, and all systems beside each other."""
    console = make_console()
    where = f" · release {result['release_id']}" if result["release_id"] else ""
    console.print(f"{result['path']} path · scorer {result['scorer']}{where}" if where else "measures of a run")
    _print_groups(result)
    _print_systems(result)
    cost = result.get("cost") or {}
    if "p50_seconds" in cost:
        console.print(
            f"a query   {1e3 * cost['p50_seconds']:.1f} ms p50 · {1e3 * cost['p99_seconds']:.1f} ms p99, one at a time · "
            f"{cost['queries_per_second']:.0f} a second together, on {cost['cores']:.0f} cores"
        )
    if "videos" in cost:
        console.print(
            f"a video   {cost['tokens_per_video']:.0f} tokens · {size(cost['index_bytes_per_video'])} of index · "
            f"{cost['videos']} videos"
        )
    if selected := result.get("modality_selection"):
        console.print(
            f"modality  selected rightly for {selected['accuracy']:.1%} of {selected['pairs']} queries and videos · "
            f"macro F1 {selected['macro_f1']:.3f}"
        )
    for name, value in result.items():
        if name.startswith("overlap@"):
            console.print(f"{name}: {value:.3f}")
    if ceiling := result.get("ceiling"):
        parts = " · ".join(f"{name} {value:.3f}" for name, value in ceiling.items())
        console.print(f"a perfect ranker reaches only: {parts} (one candidate a judgement)")


def _names(result: Json) -> list[str]:
    return [name for name in result["measures"]["all"] if name != "queries"]


def _print_groups(result: Json) -> None:
    names = _names(result)
    table = Table(box=None, pad_edge=False)
    table.add_column("target modality")
    table.add_column("queries", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    groups = sorted(result["measures"].items(), key=lambda item: (item[0] == "all", item[0]))
    for group, values in groups:
        table.add_row(group, str(values["queries"]), *(_number(values.get(name)) for name in names))
    low_high = result["intervals"]["all"]
    table.add_row("95 % interval", "", *(_interval(low_high.get(name)) for name in names))
    make_console().print(table)


def _print_systems(result: Json) -> None:
    """Print a line a system: its first measure with an interval, and how it differs from the primary one."""
    if len(result["systems"]) < 2:
        return
    measure = result["primary_measure"]
    table = Table(box=None, pad_edge=False)
    for column in ("system", measure, "95 % interval", "difference", "p (Holm)", "won/tied/lost", "what"):
        table.add_column(column, justify="left" if column in ("system", "what") else "right")
    for name, row in result["systems"].items():
        cells = [name, _number(row["measures"]["all"][measure]), _interval(row["intervals"]["all"].get(measure))]
        if against := row.get("against", {}).get(measure):
            mark = "*" if against["p_holm"] < SIGNIFICANT else ""
            cells += [f"{against['difference']:+.3f}{mark}", f"{against['p_holm']:.3f}"]
            cells += [f"{against['wins']}/{against['ties']}/{against['losses']}"]
        else:
            cells += ["", "", ""]
        table.add_row(*map(Text, [*cells, row["label"]]))
    make_console().print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return f"{bounds[0]:.3f}–{bounds[1]:.3f}" if bounds else ""


def comparison(result: Json) -> None:
    """Print how two evaluations differ, and the queries that differ most; or, of one query, both rankings."""
    console = make_console()
    if "query" in result:
        _print_rankings(result)
        return
    console.print(f"{result['a']} → {result['b']} · {result['queries']} queries of both")
    table = Table(box=None, pad_edge=False)
    for column in ("measure", "a", "b", "difference", "95 % interval", "p", "better/same/worse"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for name, row in result["measures"].items():
        cells = (
            _number(row["a"]),
            _number(row["b"]),
            f"{row['difference']:+.3f}",
            f"{row['low']:+.3f} to {row['high']:+.3f}",
        )
        table.add_row(name, *cells, f"{row['p']:.3f}", f"{row['wins']}/{row['ties']}/{row['losses']}")
    console.print(table)
    for title in ("better", "worse"):
        for row in result[title]:
            console.print(f"{title:<7} {row['difference']:+.3f}  {row['query_id']}  {row['text'] or ''}", markup=False)
    if left_out := result["only_in_one"]:
        console.print(f"{left_out} queries are judged in only one of them and were left out")


def _print_rankings(result: Json) -> None:
    console, query = make_console(), result["query"]
    console.print(f"{query['query_id']}  {query['text'] or ''}", markup=False)
    for name, row in result["measures"].items():
        console.print(f"  {name}: {row['a']:.3f} → {row['b']:.3f}")
    table = Table(box=None, pad_edge=False)
    for column in ("video", "grade", f"rank in {result['a']}", "score", f"rank in {result['b']}", "score", "why"):
        table.add_column(column, justify="left" if column in ("video", "why") else "right")
    for row in result["videos"]:
        cells = [row["video_id"], "" if row["grade"] is None else str(row["grade"])]
        for side in ("a", "b"):
            found = row[side]
            cells += [str(found["rank"]), f"{found['score']:.3f}"] if found else ["not found", ""]
        table.add_row(*map(Text, [*cells, row["why"]]))
    console.print(table)


def loss(result: Json) -> None:
    """Print at which stage a known video was lost."""
    console = make_console()
    console.print(f"{result['video_id']}  {result['stage']}", markup=False)
    console.print(f"    {result['detail']}", markup=False)
    if "start_seconds" in result:
        console.print(f"    its best clip: {clock(result['start_seconds'])}–{clock(result['stop_seconds'])}")
