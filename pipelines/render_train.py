"""What a person reads on stdout of a training."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from pipelines.render import Json, make_console


def trained(result: Json) -> None:
    """Print what was learned: losses, and held-out pairs before and after."""
    console, losses = make_console(), result["losses"]
    console.print(
        f"examples  {result['trained']} trained on · {result['held_out']} held out, of {result['held_out_groups']} groups"
    )
    console.print(
        f"steps     {result['steps']} · loss {losses[0]:.3f} at the first checkpoint, {losses[-1]:.3f} at the last"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("held out", "queries", "measure", "chance", "before", "after", "difference", "p"):
        table.add_column(column, justify="left" if column in ("held out", "measure") else "right")
    for direction, found in result["measures"].items():
        for name, measure in found["measures"].items():
            difference = measure["difference"]
            table.add_row(
                direction,
                str(found["queries"]),
                name,
                f"{found['chance']:.3f}" if name == "R@1" else "",
                _interval(measure["before"]),
                _interval(measure["after"]),
                _interval([difference[part] for part in ("difference", "low", "high")], "+"),
                f"{difference['p']:.3g}",
            )
    console.print(table)
    console.print("seconds   " + " · ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items()))
    console.print(f"head      {result['head']}", markup=False)
    for command in result["next"]:
        console.print(f"next      {command}", markup=False)


def _interval(values: Sequence[float], sign: str = "") -> str:
    mean, low, high = (f"{value:{sign}.3f}" for value in values)
    return f"{mean} ({low} to {high})"
