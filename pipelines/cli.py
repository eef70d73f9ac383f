"""The ``maxreel`` command. Heavy imports live inside the commands, so that ``--help`` answers at once.

Results go to stdout, logs to stderr; with ``--json`` stdout holds exactly one JSON document.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.job import Job

EXIT_CODES = """Exit codes: 0 ok, 1 crash, 2 usage or configuration, 3 finished with more failures than max_failure_rate,
4 a quality gate failed, 5 the store is held by another run."""

app = typer.Typer(
    name="maxreel",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Turn a corpus of videos into a compressed multi-vector index, keep it fresh, and measure it.",
    epilog=EXIT_CODES,
)

StoreOption = Annotated[str | None, typer.Option("--store", help="Folder or object-store URI of the store.")]
ConfigOption = Annotated[
    list[Path] | None, typer.Option("-c", "--config", help="YAML configuration; later files win. Repeatable.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Set one configuration value. Repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="More logs, and tracebacks.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Warnings and errors only.")]


def main() -> None:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the lease is released
    app()


Command = tuple["Callable[[Config], Any]", Callable[[Any], None]]
"""What a command does with the loaded configuration, and how its result is shown."""


def _command(name: str | None = None) -> Callable[[Callable[..., Command]], Callable[..., Command]]:
    """Register a command. The options that all of them take are added to its own."""

    def register(function: Callable[..., Command]) -> Callable[..., Command]:
        own = inspect.signature(function, eval_str=True)

        def run(
            store: StoreOption = None,
            config: ConfigOption = None,
            assignments: SetOption = None,
            as_json: JsonOption = False,
            verbose: VerboseOption = False,
            quiet: QuietOption = False,
            **arguments: Any,
        ) -> None:
            work, render = function(**arguments)
            _run(work, render, config, assignments, store, as_json, verbose, quiet)

        shared = list(inspect.signature(run, eval_str=True).parameters.values())[:-1]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own.parameters.values(), *shared)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = function.__doc__
        app.command(name or function.__name__)(run)
        return function

    return register


def _run(
    work: Callable[[Config], Any],
    render: Callable[[Any], None],
    files: list[Path] | None,
    assignments: list[str] | None,
    store: str | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Load the configuration, do the work, and print its result; end with the exit code of what went wrong."""
    _set_up_logging(verbose, quiet)
    from operators.errors import MaxreelError, without_credentials
    from pipelines import config

    try:
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints its warnings on stdout, which is for results
            result = work(config.load(files or [], assignments or [], store))
    except Exception as error:  # the outermost boundary: whatever it is, say it and exit with its code
        known, message = _explain(error, MaxreelError)
        if verbose:
            print(without_credentials("".join(traceback.format_exception(error))), file=sys.stderr)
        code, done = (known.exit_code, known.result) if known else (1, None)
        _fail(type(known or error).__name__, without_credentials(message), code, as_json, done, render)
    else:
        _print(result, render, as_json)


FILE_SYSTEM_ERRORS = {
    28: "there is no space left on the disk. Free some, or move the store",
    30: "the file system is read-only. Make it writable, or name another store",
    13: "permission denied. Give this user the rights to the store, or name another",
}


def _explain(error: Exception, known_kind: type[Any]) -> tuple[Any, str]:
    """Return the error of ours that an error is or carries, if any, and what to say."""
    from operators import errors

    cause = getattr(error, "cause", None)  # a Ray task's error carries what was raised
    known = next((e for e in (cause, error) if isinstance(e, known_kind)), None)
    text = str(error)
    for number, advice in FILE_SYSTEM_ERRORS.items():
        if f"(os error {number})" in text or f"[Errno {number}]" in text:
            return (
                known,
                f"{advice}; what was committed is kept, and the next run goes on from there. ({_last_line(text)})",
            )
    if known is not None:
        return known, str(known).strip() or type(known).__name__
    raised = _last_line(text) if "Traceback" in text or "ray::" in text else f"{type(error).__name__}: {text.strip()}"
    if ours := re.fullmatch(r"operators\.errors\.(\w+): (.*)", raised):  # of an actor that did not start
        kind, message = ours.groups()
        return getattr(errors, kind)(message), message
    return None, f"{raised} (-v shows where)"


def _last_line(text: str) -> str:
    """Return the line of a traceback that says what was raised; Ray's own advice may follow it."""
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*(?!ray\.)[\w.]+(Error|Exception): ", line)]
    return lines[-1] if lines else text.strip().rpartition("\n")[2]


def _print(result: Any, render: Callable[[Any], None], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, default=str))
    else:
        render(result)


def _fail(kind: str, message: str, code: int, as_json: bool, result: Any, render: Callable[[Any], None]) -> None:
    """Say what went wrong, after what was done before it did, and exit."""
    if as_json:
        document = {"error": {"type": kind, "message": message, "exit_code": code}}
        print(json.dumps((result or {}) | document, default=str))
    elif result is not None:
        render(result)
    print(f"maxreel: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _set_up_logging(verbose: bool, quiet: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("maxreel")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("LANCE_LOG", "error")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def _job(
    name: str,
    steps: Callable[[Job], Any],
    next_commands: Sequence[str] = (),
    dry_run: bool = False,
    creates: bool = False,
) -> Callable[[Config], Any]:
    """Return work that runs steps under one lease and gives what they return, or else their summary."""

    def work(config: Config) -> Any:
        from pipelines.job import open_job

        with open_job(config, name, dry_run, creates) as job:
            result = steps(job)
            job.summary.next_commands = [command.format(store=job.store.uri) for command in next_commands]
            job.limit_failures()
        return job.summary.to_json() if result is None else result

    return work


@app.command()
def sample(
    directory: Annotated[Path, typer.Argument(help="Where to put it.")],
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a sample corpus with known content: videos, manifest.jsonl, queries.jsonl, qrels.txt."""
    from pipelines import render

    def work(_: Config) -> Any:
        from pipelines.sample import make_sample

        return make_sample(directory)

    _run(work, render.sample, None, None, None, as_json, verbose, quiet)


ManifestArgument = Annotated[
    str, typer.Argument(help="JSONL, CSV or Parquet manifest, or a folder or object-store prefix of videos.")
]

RemoveGoneOption = Annotated[
    bool, typer.Option("--remove-gone", help="Delete the videos that the manifest no longer lists.")
]


@_command()
def index(manifest: ManifestArgument, remove_gone: RemoveGoneOption = False, dry_run: DryRunOption = False) -> Command:
    """Bring a store up to date with a manifest: ingest, extract and encode what is new or changed."""
    from pipelines import render

    def steps(job: Job) -> None:
        from pipelines.encode import encode
        from pipelines.extract import extract
        from pipelines.ingest import ingest

        ingest(job, manifest, remove_gone, dry_run)
        extract(job, dry_run)
        encode(job, dry_run)

    work = _job("index", steps, ["maxreel build-index --store {store}"], dry_run, creates=True)
    return work, render.summary


@_command()
def ingest(manifest: ManifestArgument, remove_gone: RemoveGoneOption = False, dry_run: DryRunOption = False) -> Command:
    """Read a manifest into `videos`, new and changed ones only."""
    from pipelines import render

    def steps(job: Job) -> None:
        from pipelines.ingest import ingest

        ingest(job, manifest, remove_gone, dry_run)

    work = _job("ingest", steps, ["maxreel extract --store {store}"], dry_run, creates=True)
    return work, render.summary


@_command()
def extract(dry_run: DryRunOption = False) -> Command:
    """Extract frames, speech, screen text and metadata that are missing or stale."""
    from pipelines import render

    def steps(job: Job) -> None:
        from pipelines.extract import extract

        extract(job, dry_run)

    work = _job("extract", steps, ["maxreel encode --store {store}"], dry_run)
    return work, render.summary


@_command()
def encode(dry_run: DryRunOption = False) -> Command:
    """Encode modalities whose token embeddings are missing or stale."""
    from pipelines import render

    def steps(job: Job) -> None:
        from pipelines.encode import encode

        encode(job, dry_run)

    work = _job("encode", steps, ["maxreel build-index --store {store}"], dry_run)
    return work, render.summary


@_command("build-index")
def build_index(
    dry_run: DryRunOption = False,
    full: Annotated[bool, typer.Option("--full", help="Build from nothing: train a new codec.")] = False,
    draft: Annotated[bool, typer.Option("--draft", help="Leave publishing to `maxreel publish`.")] = False,
) -> Command:
    """Bring the compressed index up to date with the token embeddings, and release it to readers."""
    from pipelines import render

    def steps(job: Job) -> None:
        from pipelines.build_index import build_index

        build_index(job, full, draft, dry_run)

    work = _job("build-index", steps, ['maxreel search "TEXT" --store {store} --explain'], dry_run)
    return work, render.index


@_command()
def search(
    text: Annotated[str, typer.Argument(help="What to look for; may be left out where there is an image.")] = "",
    image: Annotated[
        str | None, typer.Option("--image", help="A picture to look for, or what TEXT asks about.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many videos.")] = 10,
    explain: Annotated[bool, typer.Option("--explain", help="Say why each video was found.")] = False,
    video: Annotated[list[str] | None, typer.Option("--video", help="Only this video; may be repeated.")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="Only videos with this tag; may be repeated.")] = None,
    start: Annotated[float, typer.Option("--from", help="Only clips that end after this second.")] = 0.0,
    stop: Annotated[float, typer.Option("--to", help="Only clips that start before this second.")] = float("inf"),
    lost: Annotated[str | None, typer.Option("--why-not", help="Say at which stage this video was lost.")] = None,
) -> Command:
    """Search the newest release."""
    from pipelines import render, render_evaluation

    def work(loaded: Config) -> Any:
        from operators.encoders import Query
        from pipelines.queries import read_image
        from pipelines.search import Wanted, search
        from pipelines.why_not import why_not

        wanted = Wanted(tuple(video or ()), tuple(tag or ()), start, stop)
        query = Query(text or None, read_image(image, loaded.storage.environment()) if image else None)
        if lost is not None:
            return why_not(loaded, query, lost, k, wanted) | {"image": image}
        found = search(loaded, query, k, explain, wanted)
        return {"query": text, "image": image, "results": [result.to_json() for result in found]}

    return work, render.results if lost is None else render_evaluation.loss


@_command()
def evaluate(
    qrels: Annotated[Path, typer.Option("--qrels", help="Relevance judgements: TREC, BEIR, JSON lines or Parquet.")],
    queries: Annotated[
        Path | None, typer.Option("--queries", help="JSON lines (id, text, ...), TREC topics, TSV, CSV or Parquet.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for runs, measures and the page.")] = None,
    path: Annotated[
        Literal["index", "exact"], typer.Option("--path", help="`exact` scores every token embedding.")
    ] = "index",
    run: Annotated[
        Path | None, typer.Option("--run", help="Measure this TREC run; nothing is searched, no store is needed.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="Another system beside it: a release's number, or a TREC run.")
    ] = None,
) -> Command:
    """Measure retrieval over judged queries, beside fusions, single modalities and ablations, with significance."""
    from pipelines import render_evaluation

    def work(loaded: Config) -> Any:
        from operators.errors import ConfigError
        from pipelines.evaluate import evaluate, evaluate_run
        from pipelines.evaluation_folder import save

        if run is not None:
            found = evaluate_run(loaded, run, qrels, queries, Path(against) if against else None)
        elif queries is not None:
            found = evaluate(loaded, queries, qrels, path, against)
        else:
            raise ConfigError("evaluate takes --queries to search with, or --run to measure")
        if out is not None:
            save(found, out, loaded)
        return found.document

    return work, render_evaluation.leaderboard


@_command()
def diff(
    a: Annotated[Path, typer.Argument(help="Folder of an evaluation.")],
    b: Annotated[Path, typer.Argument(help="Folder of another, over the same queries.")],
    query: Annotated[str | None, typer.Option("--query", help="Only this query: both rankings, and why.")] = None,
) -> Command:
    """Show which queries are better and worse in one evaluation than in another."""
    from pipelines import render_evaluation

    def work(_: Config) -> Any:
        from pipelines.compare import diff

        return diff(a, b, query)

    return work, render_evaluation.comparison


@_command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="The settings to try: base, grid, exclude.")],
    queries: Annotated[Path | None, typer.Option("--queries", help="As `evaluate` takes them.")] = None,
    qrels: Annotated[Path | None, typer.Option("--qrels", help="Relevance judgements in TREC form.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for sweep.json, best.yaml and all finished.")
    ] = None,
    dry_run: DryRunOption = False,
) -> Command:
    """Measure many settings, each thing made once; goes on where it was killed, and ends with the best trade-offs."""
    from pipelines import render_sweep

    def work(loaded: Config) -> Any:
        from pipelines.sweep import sweep

        return sweep(loaded, file, queries, qrels, out, dry_run)

    return work, render_sweep.plan if dry_run else render_sweep.sweep


@_command()
def train(
    system: Annotated[Literal["clamr", "flmr", "mire"], typer.Argument(help="Whose head is trained.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for features, checkpoints, the head and its metrics.")],
    examples: Annotated[
        Path | None,
        typer.Option("--examples", help="JSON lines; for flmr and mire the store's frames and texts unless given."),
    ] = None,
) -> Command:
    """Train a head between frozen models, or CLaMR's adapters; goes on where it was killed. The store is only read."""
    from pipelines import render_train

    def work(loaded: Config) -> Any:
        from pipelines.train import train

        return train(loaded, system, out, examples)

    return work, render_train.trained


@_command()
def status() -> Command:
    """Show tables, rows and versions, what is stale, what failed, and what readers see."""
    from pipelines import render

    def work(loaded: Config) -> Any:
        from pipelines.status import status

        return status(loaded)

    return work, render.status


@_command()
def nightly(dry_run: DryRunOption = False) -> Command:
    """Do the whole chain for what changed: ingest, extract, encode, index, gates, publish, collect, report."""
    from pipelines import render

    def work(loaded: Config) -> Any:
        from operators.errors import MaxreelError
        from pipelines import nightly

        job = _job("nightly", lambda job: nightly.nightly(job, dry_run), dry_run=dry_run, creates=True)
        if dry_run:
            return job(loaded)
        try:
            run_id = job(loaded)["run_id"]
        except MaxreelError as error:
            if error.result is not None:
                error.result = nightly.keep_report(loaded, error.result["run_id"])
            raise
        return nightly.keep_report(loaded, run_id)

    return work, render.plan if dry_run else render.report


@_command()
def publish(
    release: Annotated[int | None, typer.Argument(help="Its number; the newest draft unless given.")] = None,
) -> Command:
    """Make a release the one that readers open."""
    from pipelines import render

    def steps(job: Job) -> Any:
        from pipelines import release as releases

        chosen = releases.to_publish(job.store, release)
        releases.publish(job, chosen, "published by hand")
        return {"live": chosen}

    return _job("publish", steps), render.live


@_command()
def rollback(
    reason: Annotated[str, typer.Option("--reason", help="Why; it is kept with the release.")],
    to: Annotated[int | None, typer.Option("--to", help="Release to go back to; the one before unless given.")] = None,
) -> Command:
    """Let readers open an older release again; nothing is copied."""
    from pipelines import render

    def steps(job: Job) -> Any:
        from pipelines import release as releases

        chosen = releases.to_roll_back_to(job.store, to)
        releases.publish(job, chosen, f"rolled back: {reason}")
        return {"live": chosen}

    return _job("rollback", steps), render.live


@_command()
def releases() -> Command:
    """List releases, newest first, and which of them is live since when."""
    from pipelines import render

    def work(loaded: Config) -> Any:
        from pipelines.job import open_store
        from pipelines.release import list_releases

        return {"releases": list_releases(open_store(loaded))}

    return work, render.releases


@_command()
def runs(
    number: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 20,
) -> Command:
    """List what was run, newest first, and how it ended."""
    from pipelines import render

    def work(loaded: Config) -> Any:
        from pipelines.status import list_runs

        return {"runs": list_runs(loaded)[:number]}

    return work, render.runs


@_command()
def report(
    run: Annotated[
        str, typer.Argument(help="A run's id, `last` for the last night, or the folder of an evaluation or a sweep.")
    ] = "last",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for report.html and report.json.")] = None,
) -> Command:
    """Show what a night did, against the nights before; or make the page of an evaluation or a sweep."""
    from pipelines import render

    if Path(run).is_dir():
        return lambda _: _write_page(Path(run), out or Path(run)), render.page

    def work(loaded: Config) -> Any:
        from pipelines.nightly import report_of, save_report

        made = report_of(loaded, run)
        if out is not None:
            save_report(made, out)
        return made

    return work, render.report


def _write_page(folder: Path, out: Path) -> dict[str, str]:
    from pipelines.evaluation_page import evaluation_page
    from pipelines.sweep_page import sweep_page

    html = sweep_page(folder) if (folder / "sweep.json").exists() else evaluation_page(folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(html, encoding="utf-8")
    return {"page": str(out / "report.html")}


@_command()
def failures(
    run: Annotated[str | None, typer.Option("--run", help="Only those that this run met last.")] = None,
) -> Command:
    """List the videos that failed, at which stage, and why."""
    from pipelines import render

    def work(loaded: Config) -> Any:
        from pipelines.status import list_failures

        return {"failures": list_failures(loaded, run)}

    return work, render.failures


@_command()
def retry(
    run: Annotated[str | None, typer.Option("--run", help="Only what this run met last.")] = None,
    video: Annotated[list[str] | None, typer.Option("--video", help="Only this video; may be repeated.")] = None,
) -> Command:
    """Forget failures, so that the next run tries those videos again, quarantined ones too."""
    from pipelines import render

    def steps(job: Job) -> Any:
        from pipelines.job import forget
        from pipelines.status import select_failures

        chosen = select_failures(job.store, run, video or [])
        forget(job, chosen)
        return {"forgotten": sorted({row["video_id"] for row in chosen.to_pylist()})}

    return _job("retry", steps), render.forgotten


@_command()
def gc(dry_run: DryRunOption = False) -> Command:
    """Delete what no kept release, reader or run needs any more: old versions, merged segments, orphan files."""
    from pipelines import render

    def steps(job: Job) -> Any:
        from pipelines.gc import gc

        return gc(job, dry_run)

    return _job("gc", steps, dry_run=dry_run), render.collected


@_command()
def doctor() -> Command:
    """Check versions, decoders, models and the store, and say how to mend what is wrong."""
    from pipelines import render

    def work(loaded: Config) -> Any:
        from pipelines.doctor import examine

        return {"checks": examine(loaded)}

    return work, render.checks


@_command()
def passages(
    examples: Annotated[
        Path, typer.Argument(metavar="EXAMPLES.jsonl", help="JSON lines: image, question (or text), response.")
    ],
    out: Annotated[Path, typer.Option("--out", help="JSON lines to write: image, text, passage.")],
    file: Annotated[
        Path | None,
        typer.Option("--passages", help="JSON lines or TSV with texts to find passages in; else the store's release."),
    ] = None,
) -> Command:
    """Turn answers about images into passages to train retrieval on: MIRe's response-to-passage conversion."""
    from pipelines import render

    def work(loaded: Config) -> Any:
        from pipelines.passages import make_passages

        return make_passages(loaded, examples, out, file)

    return work, render.passages


@app.command()
def dataset(
    name: Annotated[str, typer.Argument(help="The benchmark; a wrong name is answered with the list of them.")],
    folder: Annotated[Path, typer.Argument(help="Where its annotations are, or their one file.")],
    out: Annotated[Path, typer.Argument(help="Folder for manifest.jsonl, queries.jsonl and qrels.txt.")],
    videos: Annotated[Path | None, typer.Option("--videos", help="Folder of its video files.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="For beir, mteb and youcook2.")] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Turn a benchmark that is on disk into a manifest, queries and judgements."""
    from pipelines import render

    def work(_: Config) -> Any:
        from pipelines.benchmarks_on_disk import make_dataset

        return make_dataset(name, folder, out, videos, split)

    _run(work, render.dataset, None, None, None, as_json, verbose, quiet)
