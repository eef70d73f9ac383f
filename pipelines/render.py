"""What a person reads on stdout: results as text and tables."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Json = Mapping[str, Any]


def make_console() -> Console:
    """Return where results are printed."""
    # Without a terminal rich would cut tables at 80 columns.
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)


def clock(seconds: float | None) -> str:
    """Return a position in a video as minutes and seconds."""
    minutes, rest = divmod(int(seconds or 0), 60)
    return f"{minutes:02d}:{rest:02d}"


def size(num_bytes: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def sample(result: Json) -> None:
    """Print what a sample corpus holds."""
    counts = ", ".join(f"{value} {name}" for name, value in result.items() if isinstance(value, int))
    make_console().print(f"made {counts} in {result['directory']}")


def summary(result: Json) -> None:
    """Print what a run of index, ingest, extract or encode did."""
    console, counts = make_console(), result["counts"]
    if "listed" in counts:
        names = ("listed", "new", "changed", "gone", "unchanged", "quarantined", "waiting")
        console.print("videos    " + " · ".join(f"{counts.get(name, 0)} {name}" for name in names))
    if "extract" in counts or "encode" in counts:
        console.print(f"work      extract {counts.get('extract', 0)} videos · encode {counts.get('encode', 0)} clips")
    if result["tokens"]:
        console.print("tokens    " + " · ".join(f"{name} {value}" for name, value in sorted(result["tokens"].items())))
    _print_stages(console, result)
    _print_failures(console, result["failures"])
    console.print("seconds   " + " · ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items()))
    _print_next(console, result)


def _print_stages(console: Console, result: Json) -> None:
    if not result["stages"]:
        return
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "actors", "busy s", "cpu s", ""):
        table.add_column(column, justify="left" if column in ("stage", "") else "right")
    for name, cost in result["stages"].items():
        mark = "← bottleneck" if name == result["bottleneck"] else ""
        table.add_row(name, str(cost["actors"]), f"{cost['seconds']:.1f}", f"{cost['cpu_seconds']:.1f}", mark)
    console.print(table)


def _print_failures(console: Console, failed: Sequence[Json]) -> None:
    if not failed:
        return
    causes = Counter(f"{failure['stage']}: {failure['error']}" for failure in failed)
    videos = len({failure["video_id"] for failure in failed})
    console.print(f"failed    {videos} videos · " + " · ".join(f"{n} {cause}" for cause, n in causes.most_common()))


def _print_next(console: Console, result: Json) -> None:
    for command in result["next"]:
        console.print(f"next      {command}", markup=False)


def index(result: Json) -> None:
    """Print what build-index made."""
    console, counts = make_console(), result["counts"]
    console.print(
        f"tokens    {counts['tokens']} in {counts['clips']} clips · {counts['segments']} segments"
        + (f" · {counts['centroids']} centroids" if "centroids" in counts else "")
    )
    if "index_bytes" in counts:
        per_token = counts["index_bytes"] / counts["tokens"]
        console.print(
            f"index     {size(counts['index_bytes'])} on disk, {per_token:.1f} bytes a token, everything counted"
        )
        plan = (
            f"{counts['probes']} probes, {counts['candidates']} candidates"
            if counts["probes"]
            else "scoring every code"
        )
        plan += f", {counts['rescored']} rescored" if counts["rescored"] else ""
        console.print(f"search    the first 10 to search.recall by {plan}")
        if made := result["index"]:
            _print_upkeep(console, made)
        console.print(f"release   {counts['release']} {result['release']['state']}")
    console.print("seconds   " + " · ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items()))
    _print_next(console, result)


def _print_upkeep(console: Console, made: Json) -> None:
    if made["rebuilt"]:
        console.print(f"built     from nothing: {made['rebuilt']}")
    drift = "" if made["drift"] is None else f" · drift {made['drift']:+.1%}"
    console.print(
        f"upkeep    {made['new_segments']} new segments · {made['merged_segments']} merged · "
        f"{made['dead_clips']} clips with tombstones{drift}"
    )


def plan(result: Json) -> None:
    """Print what a night would do, and what it would take."""
    summary(result)
    estimate = result["estimate"]
    if not estimate["from_nights"]:
        console_line = "estimate  none: no earlier night to judge by"
    else:
        parts = " · ".join(f"{name} {value:.0f}" for name, value in estimate["seconds"].items())
        console_line = f"estimate  seconds, by the last {estimate['from_nights']} nights: {parts}"
    console = make_console()
    console.print(console_line)
    if estimate["cost"]:
        console.print(f"cost      {estimate['cost']['amount']:.2f} {estimate['cost']['currency']}")
    console.print("Nothing was written.")


def report(result: Json) -> None:
    """Print a morning report."""
    from pipelines.report_text import to_text

    print(to_text(result), end="")


def page(result: Json) -> None:
    """Print where a page was written."""
    print(result["page"])


def live(result: Json) -> None:
    """Print which release readers now see."""
    make_console().print(f"release {result['live']} is live")


def releases(result: Json) -> None:
    """Print releases, a line each."""
    console = make_console()
    table = Table(box=None, pad_edge=False)
    for column in ("release", "state", "made", "published", "index", "reason"):
        table.add_column(column, justify="right" if column == "release" else "left", no_wrap=column != "reason")
    for release in result["releases"]:
        state = "LIVE" if release["live"] else release["state"]
        cells = (state, _time(release["made"]), _time(release["published"]), release["index_id"], release["reason"])
        table.add_row(str(release["release_id"]), *map(Text, cells))
    console.print(table if result["releases"] else "no releases yet")


def _time(when: Any) -> str:
    return f"{when:%Y-%m-%d %H:%M}" if when else ""


def runs(result: Json) -> None:
    """Print runs, a line each."""
    console = make_console()
    table = Table(box=None, pad_edge=False)
    for column in ("run", "job", "status", "started", "seconds", "what"):
        table.add_column(column, justify="right" if column == "seconds" else "left", no_wrap=column != "what")
    for run in result["runs"]:
        seconds = f"{(run['stopped'] - run['started']).total_seconds():.0f}" if run["stopped"] else ""
        status = run["status"] if not run["exit_code"] else f"{run['status']} ({run['exit_code']})"
        changes = [f"{run['counts'][name]} {name}" for name in ("new", "changed", "gone") if run["counts"].get(name)]
        cells = (run["job"], status, _time(run["started"]), seconds, run["headline"] or ", ".join(changes))
        table.add_row(run["run_id"], *map(Text, cells))
    console.print(table if result["runs"] else "no runs yet")


def forgotten(result: Json) -> None:
    """Print which videos will be tried again."""
    videos = result["forgotten"]
    shown = ", ".join(videos[:10]) + (", ..." if len(videos) > 10 else "")
    make_console().print(f"{len(videos)} videos will be tried again by the next run: {shown}", markup=False)


def collected(result: Json) -> None:
    """Print what gc deleted, or would."""
    would = "would delete" if result["dry_run"] else "deleted"
    releases_gone = ", ".join(map(str, result["releases"])) or "none"
    console = make_console()
    console.print(
        f"{would} {result['files']} files, {size(result['bytes'])}, and {result['versions']} old versions of tables"
    )
    console.print(
        f"releases  {releases_gone} no longer to be opened · kept: {', '.join(map(str, result['kept'])) or 'none'}"
    )


def results(result: Json) -> None:
    """Print search results and their explanations."""
    console = make_console()
    if not result["results"]:
        console.print("nothing found")
    for rank, found in enumerate(result["results"], start=1):
        span = f"{clock(found['start_seconds'])}–{clock(found['stop_seconds'])}"
        console.print(
            f"{rank:3d}  {found['score']:7.3f}  {found['video_id']}  {found['title'] or ''}  {span}", markup=False
        )
        _print_explanation(console, found)


def _print_explanation(console: Console, found: Json) -> None:
    if not found["winners"]:
        return
    shares = sorted(found["share_by_modality"].items(), key=lambda item: -item[1])
    console.print("       by modality: " + " · ".join(f"{name} {share:.0%}" for name, share in shares if share > 0))
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(6):
        table.add_column(no_wrap=True)
    for winner in found["winners"]:
        text = winner["text"] if len(winner["text"]) <= 60 else winner["text"][:57] + "..."
        cells = (winner["token"], f"{winner['score']:.2f}", winner["modality"], clock(winner["start_seconds"]), text)
        table.add_row("      ", *map(Text, cells))
    console.print(table)


def status(result: Json) -> None:
    """Print the state of a store."""
    console = make_console()
    table = Table(box=None, pad_edge=False)
    for column in ("table", "rows", "version"):
        table.add_column(column, justify="left" if column == "table" else "right")
    for name, entry in result["tables"].items():
        table.add_row(name, str(entry["rows"]), str(entry["version"]))
    console.print(table)
    stale, release, holder = result["stale"], result["release"], result["held_by"]
    console.print(
        f"stale     extract {stale['extract']} videos · encode {stale['encode']} clips · {stale['quarantined']} quarantined"
    )
    console.print("failed    " + (" · ".join(f"{n} {cause}" for cause, n in result["failures"].items()) or "nothing"))
    console.print(
        f"release   {release['release_id']} ({release['index_id']}, {release['time']})"
        if release
        else "release   none yet"
    )
    if holder:
        console.print(
            f"held by   run {holder['run_id']} ({holder['job']}) on {holder['host']}, process {holder['pid']}"
        )


def failures(result: Json) -> None:
    """Print failures, a paragraph each."""
    console = make_console()
    for failure in result["failures"]:
        again = "final" if failure["final"] else f"attempt {failure['attempts']}"
        console.print(f"{failure['video_id']}  {failure['stage']}  {failure['error']}  ({again})", markup=False)
        console.print(f"    {failure['message']}", markup=False)
    if not result["failures"]:
        console.print("no failures")


def checks(result: Json) -> None:
    """Print what the doctor found."""
    console = make_console()
    for check in result["checks"]:
        console.print(f"{check['level']:<5} {check['name']:<10} {check['detail']}", markup=False)
        if check["mend"]:
            console.print(f"      mend: {check['mend']}", markup=False)


def dataset(result: Json) -> None:
    """Print what a benchmark holds, what was left out of it and why, and what to do with it."""
    console, out = make_console(), result["directory"]
    counts = ", ".join(f"{result[name]} {name}" for name in ("videos", "queries", "judgements"))
    console.print(f"wrote {counts} to {out}")
    for reason, count in result["left_out"].items():
        console.print(f"  {count} {reason}")
    if not result["videos"]:
        console.print("  no manifest.jsonl, since no video has a file or text")
    else:
        console.print(f"next: maxreel index {out}/manifest.jsonl --store STORE")
    console.print(f"then: maxreel evaluate --store STORE --queries {out}/queries.jsonl --qrels {out}/qrels.txt")


def passages(result: Json) -> None:
    """Print how many examples were converted, and why the others were left out."""
    console = make_console()
    console.print(f"wrote {result['written']} of {result['examples']} examples to {result['file']}")
    for reason, count in result["left_out"].items():
        console.print(f"  left out {count} {reason}")
