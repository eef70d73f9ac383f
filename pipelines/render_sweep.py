"""What a person reads on stdout of a sweep."""

from __future__ import annotations

from rich.table import Table

from pipelines.render import Json, make_console, size


def plan(result: Json) -> None:
    """Print what a sweep would do."""
    console, reused = make_console(), result["reused"]
    for encoder, number in result["to_encode"].items():
        console.print(f"encode    {number} clips and rows of {encoder}, in the store")
    shared = ("encodings", "token_tables", "trainings", "indices", "exact_rankings")
    console.print("made      " + " · ".join(f"{reused[name]} {name.replace('_', ' ')}" for name in shared))
    console.print(f"cells     {reused['cells']}, {reused['from_cache']} of them done before")
    console.print("Nothing was written.")


def sweep(result: Json) -> None:
    """Print the cells of a sweep: the Pareto set first, best first, and the knee marked."""
    console, measure = make_console(), result["primary_measure"]
    table = Table(box=None, pad_edge=False)
    figures = (measure, "95 %", "recall", "p50 ms", "p99 ms", "queries/s", "a video")
    for column in ("", *result["axes"], *figures):
        table.add_column(column, justify="right" if column in figures else "left", no_wrap=True)
    done = [cell for cell in result["cells"] if cell["error"] is None]
    for cell in sorted(done, key=lambda c: (not c["pareto"], -c["measures"][measure], c["p50_seconds"])):
        mark = "knee" if cell["knee"] else "pareto" if cell["pareto"] else ""
        table.add_row(mark, *(str(cell["settings"][name]) for name in result["axes"]), *_figures(cell, measure))
    console.print(table)
    for cell in result["cells"]:
        if cell["error"] is not None:
            console.print(f"failed    {cell['settings']}: {cell['error']}", markup=False)
    if done:
        console.print(f"next      maxreel nightly -c {result['out']}/best.yaml", markup=False)


def _figures(cell: Json, measure: str) -> tuple[str, ...]:
    low, high = cell["intervals"].get(measure, (float("nan"), float("nan")))
    return (
        f"{cell['measures'][measure]:.4f}",
        f"{low:.3f}–{high:.3f}",
        "" if cell["recall_exact"] is None else f"{cell['recall_exact']:.3f}",
        f"{1000 * cell['p50_seconds']:.2f}",
        f"{1000 * cell['p99_seconds']:.2f}",
        f"{cell['queries_per_second']:.0f}",
        size(cell["bytes_per_video"]),
    )
