"""Measures our index beside those of others: the same token embeddings, threads and machine, recall beside every speed.

    python benchmarks/engines.py CORPUS [CORPUS ...] --out DIR --environments DIR [--install] [--threads 1]
        [--engines maxreel,fast-plaid] [--queries N] [--rounds 3] [--blocks 4] [--build-limit 3600]
        [--xtr-sample DOCUMENTS] [--int8-gops G] [--no-pin]

A corpus is a folder that `benchmarks/corpus.py` made. Every engine runs in a process of its own (``benchmarks/peers``)
on ``--threads`` processors, fast-plaid, xtr-warp-rs and NumKong in a virtual environment under ``--environments``,
because the wheels of the first two are bound to one minor version of torch; ``--install`` makes it. Stanford's ColBERT
and WARP are left out: they need compilers at first use and pins of their own.

Indices are built once, and kept under ``--out`` until the corpus, the options, the threads or our code change; so is the
fact that a build took longer than ``--build-limit``. ``--rebuild NAMES`` builds again. Queries come one a call, in
``--blocks`` blocks: every setting of every engine answers one block before any answers the next, so that a ratio compares
what ran within minutes of each other, and medians over these turns are reported. Processor time moves least when the
machine has other work. Recall is the share of the exact top k that is found; k is 100 unless a setting has its own,
because the time of some engines grows with it.

Prints Markdown: what each engine costs, what it is fastest at for a wanted recall, and what the machine would allow.
Writes ``results.md`` and ``results.json`` to ``--out``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
K = 100
TARGETS = (0.90, 0.95, 0.99)
SEARCH_LIMIT_SECONDS = 3600
BASELINE = "fast-plaid"
ENVIRONMENTS = {"fp": ["torch==2.11.0", "fast-plaid==1.7.0.2110", "xtr-warp-rs==2.1.0.2110", "numkong==7.8.6"]}
THREAD_VARIABLES = ("OMP", "MKL", "OPENBLAS", "NUMBA", "RAYON", "NUMEXPR")


@dataclass(frozen=True)
class Peer:
    """An engine with its build options, and the settings it is searched with."""

    name: str
    family: str
    module: str
    settings: list[dict]
    build: dict = field(default_factory=dict)
    package: str = ""
    environment: str | None = None


def grid(*names: str, rows: Iterable[tuple]) -> list[dict]:
    return [dict(zip(names, row, strict=True)) for row in rows]


PLAID = grid(
    "n_ivf_probe",
    "n_full_scores",
    rows=[
        (1, 128),
        (1, 256),
        (2, 256),
        (4, 256),
        (2, 512),
        (4, 512),
        (2, 1024),
        (4, 1024),
        (4, 4096),
        (8, 4096),
        (16, 8192),
        (32, 16384),
    ],
)
MAXREEL = [
    *grid(
        "probes",
        "candidates",
        rows=[(1, 256), (2, 256), (2, 512), (4, 512), (4, 1024), (8, 1024), (16, 2048), (32, 4096), (0, 1)],
    ),
    *grid("k", "probes", "candidates", rows=[(10, 1, 32), (10, 1, 64), (10, 2, 64), (10, 2, 128), (10, 4, 256)]),
    *grid("k", "probes", "candidates", "rescored", rows=[(10, 4, 128, 20), (10, 4, 256, 20), (10, 8, 512, 40)]),
]
WARP = [  # its own choice, PyLate's, and without the threshold that costs it most recall
    {},
    {"nprobe": 32, "t_prime": 100_000},
    *(
        {"nprobe": probes, "t_prime": t_prime, "bound": 4 * probes, "centroid_score_threshold": 0.0}
        for probes, t_prime in [(8, 5000), (32, 5000), (32, 20_000), (128, 5000), (128, 20_000), (512, 20_000)]
    ),
]
LANCE = [
    {"nprobes": 10},
    {"nprobes": 20},
    *grid("k", "nprobes", "refine_factor", rows=[(10, 5, 2), (10, 10, 5), (10, 20, 5), (10, 20, 10), (10, 50, 10)]),
    *grid("nprobes", "refine_factor", rows=[(5, 2), (10, 2), (20, 2), (20, 5), (50, 5), (100, 10)]),
]
PEERS = [
    Peer("exact", "exact", "exact_engine", [{}], package="torch"),
    Peer("numkong", "numkong", "numkong_engine", [{}], package="numkong", environment="fp"),
    *(
        Peer(f"maxreel {bits}-bit", "maxreel", "maxreel_engine", MAXREEL, {"nbits": bits}, "maxreel")
        for bits in (4, 2, 8)
    ),
    *(
        Peer(f"fast-plaid {bits}-bit", "fast-plaid", "fast_plaid_engine", PLAID, {"nbits": bits}, "fast-plaid", "fp")
        for bits in (4, 2)
    ),
    Peer("xtr-warp-rs 4-bit", "xtr-warp-rs", "xtr_warp_engine", WARP, {"nbits": 4}, "xtr-warp-rs", "fp"),
    Peer("lance IVF_PQ", "lance", "lance_engine", LANCE, package="pylance"),
]
EXACT = PEERS[0]


class WorkerError(Exception):
    """An engine failed; the message says at what."""


class LateError(WorkerError):
    """An engine took too long."""


class Worker:
    """An engine's process."""

    def __init__(self, peer: Peer, corpus: Path, folder: Path, given: argparse.Namespace) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        variables = {f"{prefix}_NUM_THREADS": str(given.threads) for prefix in THREAD_VARIABLES}
        variables["PYTHONPATH"] = str(HERE.parent)
        self.log = folder / "log.txt"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [python_of(peer.environment, given.environments), str(HERE / "peers" / "worker.py")]
                + [peer.module, str(corpus), str(folder / "index"), str(given.threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **variables},
            )

    def ask(self, do: str, limit_seconds: float, **request: object) -> dict:
        """Return the answer to a request.

        Raises
        ------
        WorkerError
            If the engine failed or its process ended.
        LateError
            If the limit passed.
        """
        assert self.process.stdin and self.process.stdout
        began = time.monotonic()
        timer = threading.Timer(limit_seconds, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line and time.monotonic() - began >= limit_seconds:
            raise LateError(f"{do} did not finish in {limit_seconds:.0f} s")
        if not line:
            raise WorkerError(f"{do} ended the process; see {self.log}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{do}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def python_of(environment: str | None, folder: Path | None) -> str:
    if environment is None:
        return sys.executable
    return str((folder or Path("environments")).resolve() / environment / "bin" / "python")


def install(folder: Path) -> None:
    for name, requirements in ENVIRONMENTS.items():
        if not (folder / name).exists():
            venv.create(folder / name, with_pip=True)
            subprocess.run([python_of(name, folder), "-m", "pip", "install", "-q", *requirements], check=True)


class Corpus:
    """What the driver needs of a corpus: its sizes, and which documents are right."""

    def __init__(self, folder: Path, num_queries: int | None) -> None:
        self.folder, self.name = folder, folder.name
        tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.num_tokens, self.dim = tokens.shape
        self.num_documents = len(np.load(folder / "lengths.npy"))
        self.fingerprint = f"{tokens.shape} {(folder / 'tokens.npy').stat().st_mtime_ns}"
        query_lengths = np.load(folder / "query_lengths.npy")
        order = np.random.default_rng(0).permutation(len(query_lengths))[:num_queries]
        self.queries = sorted(order.tolist())
        self.query_tokens = float(query_lengths[self.queries].mean())
        qrels = json.loads((folder / "qrels.json").read_text())
        self.relevant = [set(qrels.get(str(q), [])) for q in self.queries]

    def sizes(self) -> str:
        """Return what the corpus holds, in words."""
        return (
            f"{self.num_documents:,} documents, {self.num_tokens:,} tokens of {self.dim} dimensions "
            f"({self.num_tokens / self.num_documents:.0f} a document), {len(self.queries)} queries of "
            f"{self.query_tokens:.1f} tokens"
        )

    def ndcg(self, found: np.ndarray, cutoff: int = 10) -> float | None:
        """Mean nDCG over judged queries; a judgement is yes or no."""
        discounts = 1 / np.log2(np.arange(2, cutoff + 2))
        values = [
            sum(d for d, number in zip(discounts, row, strict=False) if number in relevant)
            / discounts[: len(relevant)].sum()
            for row, relevant in zip(found.tolist(), self.relevant, strict=True)
            if relevant
        ]
        return statistics.mean(values) if values else None


def recall(found: np.ndarray, exact: np.ndarray, k: int) -> float:
    k = min(k, exact.shape[1])
    shares = [len(set(f[:k]) & set(e[:k])) / k for f, e in zip(found.tolist(), exact.tolist(), strict=True)]
    return statistics.mean(shares)


def exact_answers(corpus: Corpus, out: Path, given: argparse.Namespace) -> np.ndarray:
    """Return the exact top documents of the chosen queries, (Q, k), from the cache where they are there."""
    path = out / "exact" / "answers.npz"
    wanted = {"queries": corpus.queries, "corpus": corpus.fingerprint}
    note = path.with_suffix(".json")
    if not (note.exists() and json.loads(note.read_text()) == wanted):
        note.unlink(missing_ok=True)
        worker = Worker(EXACT, corpus.folder, out / EXACT.name, given)
        try:
            worker.ask("load", SEARCH_LIMIT_SECONDS, package=EXACT.package)
            worker.ask("search", SEARCH_LIMIT_SECONDS, settings={}, k=K, queries=corpus.queries, out=str(path))
        finally:
            worker.close()
        note.write_text(json.dumps(wanted))
    return np.load(path)["found"][:, : min(K, corpus.num_documents)]


def built(peer: Peer, corpus: Corpus, folder: Path, given: argparse.Namespace) -> dict:
    """Return what the build of an index took, now or when it was built."""
    options = dict(peer.build)
    if peer.family == "xtr-warp-rs" and given.xtr_sample:
        options["sample_documents"] = given.xtr_sample
    key = {"corpus": corpus.fingerprint, "options": options, "threads": given.threads}
    if peer.family == "maxreel":
        sources = sorted((HERE.parent / "operators").glob("*.py"))
        key["code"] = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    path = folder / "build.json"
    kept = json.loads(path.read_text()) if path.exists() else {"key": None}
    if kept["key"] != key or (given.rebuild and peer.name.startswith(tuple(given.rebuild.split(",")))):
        path.unlink(missing_ok=True)
        kept = {"key": key, **build(peer, corpus, folder, options, given)}
        path.write_text(json.dumps(kept))
    if "late" in kept:  # another hour would end as this one did
        raise WorkerError(kept["late"])
    return kept["build"]


def build(peer: Peer, corpus: Corpus, folder: Path, options: dict, given: argparse.Namespace) -> dict:
    shutil.rmtree(folder / "index", ignore_errors=True)
    worker = Worker(peer, corpus.folder, folder, given)
    try:
        return {"build": worker.ask("build", given.build_limit, options=options)}
    except LateError as error:
        return {"late": str(error)}
    finally:
        worker.close()


def run_corpus(corpus: Corpus, peers: list[Peer], out: Path, given: argparse.Namespace) -> dict:
    """Build, load and search with every engine; return everything measured."""
    say(f"{corpus.name}: {corpus.sizes()}")
    exact = exact_answers(corpus, out, given)
    engines: list[dict] = []
    workers: dict[str, Worker] = {}
    for peer in peers:
        engine: dict = {**asdict(peer), "settings": []}
        engines.append(engine)
        folder = out / peer.name.replace(" ", "-")
        try:
            engine["build_cost"] = built(peer, corpus, folder, given)
            say(f"{peer.name}: built in {engine['build_cost']['wall_seconds']:.1f} s")
            workers[peer.name] = worker = Worker(peer, corpus.folder, folder, given)
            engine["load"] = worker.ask("load", given.build_limit, package=peer.package)
            engine["settings"] = [{"setting": setting, "turns": []} for setting in peer.settings]
        except WorkerError as error:
            engine["failure"] = str(error)
            say(f"{peer.name}: {error}")
    search_in_turns(engines, workers, corpus, exact, out / "found.npz", given)
    for worker in workers.values():
        worker.close()
    return {
        "sizes": corpus.sizes(),
        "num_tokens": corpus.num_tokens,
        "num_documents": corpus.num_documents,
        "dim": corpus.dim,
        "query_tokens": corpus.query_tokens,
        "exact_ndcg_10": corpus.ndcg(exact),
        "engines": engines,
    }


def search_in_turns(
    engines: list[dict],
    workers: dict[str, Worker],
    corpus: Corpus,
    exact: np.ndarray,
    file: Path,
    given: argparse.Namespace,
) -> None:
    """Ask every setting of every engine a block of queries, then the next block; note costs and what was found."""
    of_engine = [[(engine, setting) for setting in engine["settings"]] for engine in engines]
    pairs = [pair for together in zip_longest(*of_engine) for pair in together if pair]
    found = [np.empty((len(corpus.queries), K), np.int64) for _ in pairs]
    num_blocks = min(given.blocks, len(corpus.queries))
    for turn in range(given.rounds * num_blocks):
        block = slice(turn % num_blocks, None, num_blocks)
        say(f"turn {turn + 1} of {given.rounds * num_blocks}")
        for (engine, setting), rows in zip(pairs, found, strict=True):
            if "failure" in engine:
                continue
            request = {"settings": setting["setting"], "k": K, "queries": corpus.queries[block], "out": str(file)}
            try:
                cost = workers[engine["name"]].ask("search", SEARCH_LIMIT_SECONDS, **request)
            except WorkerError as error:
                engine["failure"] = str(error)
                say(f"{engine['name']}, {describe(setting['setting'])}: {error}")
                continue
            rows[block] = np.load(file)["found"]
            setting["turns"].append(cost)
    for (_, setting), rows in zip(pairs, found, strict=True):
        if len(setting["turns"]) >= num_blocks:
            setting["median"] = {
                key: statistics.median(t[key] for t in setting["turns"]) for key in setting["turns"][0]
            }
            setting["recall_10"] = recall(rows, exact, 10)
            setting["recall_100"] = recall(rows, exact, 100) if setting["setting"].get("k", K) >= 100 else None
            setting["ndcg_10"] = corpus.ndcg(rows)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def describe(setting: dict) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in setting.items()) or "defaults"


def decimals(value: float | None, places: int) -> str:
    return "–" if value is None else f"{value:.{places}f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def costs_table(result: dict) -> str:
    header = ["engine", "version", "build s (CPU)", "tokens/s built", "build peak MB", "bytes/token", "RSS MB"]
    header += ["start s", "setting", "CPU ms/query", "p50 ms", "queries/s", "R@10", "R@100", "nDCG@10"]
    rows = []
    for engine in result["engines"]:
        first = engine_cells(engine, result)
        for setting in engine["settings"]:
            if "median" in setting:
                rows.append(first + setting_cells(setting))
                first = [""] * len(first)
        if "failure" in engine:
            rows.append([engine["name"], *[""] * 7, f"failed: {engine['failure']}", *[""] * 6])
    return table(header, rows)


def engine_cells(engine: dict, result: dict) -> list[str]:
    build, load = engine.get("build_cost"), engine.get("load")
    if not build or not load:
        return [""] * 8
    indexed = build["index_bytes"] / result["num_tokens"]
    vectors = build["vectors_bytes"] / result["num_tokens"] or (0 if indexed else 2 * result["dim"])
    of_token = " + ".join([f"{indexed:.1f}"] * (indexed > 0) + [f"{vectors:.0f} vectors"] * (vectors > 0))
    medians = [s["median"]["rss_bytes"] for s in engine["settings"] if "median" in s]
    return [
        engine["name"],
        load["version"],
        f"{build['wall_seconds']:.1f} ({build['cpu_seconds']:.1f})" if indexed else "–",
        f"{result['num_tokens'] / build['wall_seconds']:,.0f}" if indexed else "–",
        f"{build['peak_bytes'] / 1e6:,.0f}" if indexed else "–",
        of_token,
        f"{max(medians, default=load['loaded_bytes']) / 1e6:,.0f}",
        f"{load['start_seconds']:.1f}",
    ]


def setting_cells(setting: dict) -> list[str]:
    median = setting["median"]
    return [
        describe(setting["setting"]),
        f"{1000 * median['cpu_seconds']:.2f}",
        f"{1000 * median['p50_seconds']:.2f}",
        f"{1 / median['wall_seconds']:.1f}",
        f"{setting['recall_10']:.3f}",
        decimals(setting["recall_100"], 3),
        decimals(setting["ndcg_10"], 4),
    ]


def fastest(engines: list[dict], family: str, target: float) -> tuple[dict, dict] | None:
    """Return the engine and the setting of a family that reach a recall with least wall time a query."""
    reached = [
        (engine, setting)
        for engine in engines
        if engine["family"] == family
        for setting in engine["settings"]
        if "median" in setting and setting["recall_10"] >= target
    ]
    return min(reached, key=lambda pair: pair[1]["median"]["wall_seconds"], default=None)


def ratio(setting: dict, other: dict | None, cost: str) -> str:
    """Return how many times faster a setting is than another: the median over turns of the ratio within each."""
    if other is None:
        return "–"
    pairs = zip(setting["turns"], other["turns"], strict=False)
    return f"{statistics.median(b[cost] / a[cost] for a, b in pairs):.2f}"


def targets_table(result: dict) -> str:
    families = list(dict.fromkeys(engine["family"] for engine in result["engines"]))
    header = ["recall@10", "engine", "setting", "queries/s", "CPU ms", f"× {BASELINE}", f"× {BASELINE} in CPU"]
    header += ["× best other", "best other"]
    rows = []
    result["targets"] = []
    for target in TARGETS:
        best = {family: fastest(result["engines"], family, target) for family in families}
        baseline = best.get(BASELINE)
        for family in families:
            found = best[family]
            if found is None:
                top = max((s.get("recall_10", 0) for e in of_family(result, family) for s in e["settings"]), default=0)
                reason = f"not reached: best {top:.3f}" if top else "failed"
                rows.append([f"{target:.2f}", family, reason, *["–"] * 6])
                continue
            engine, setting = found
            others = [best[f] for f in families if f != family and best[f] is not None]
            other = min(others, key=lambda pair: pair[1]["median"]["wall_seconds"], default=None)
            rows.append(
                [f"{target:.2f}", engine["name"], describe(setting["setting"])]
                + [f"{1 / setting['median']['wall_seconds']:.1f}", f"{1000 * setting['median']['cpu_seconds']:.2f}"]
                + [ratio(setting, baseline and baseline[1], cost) for cost in ("wall_seconds", "cpu_seconds")]
                + [ratio(setting, other and other[1], "wall_seconds"), other[0]["name"] if other else "–"]
            )
            result["targets"].append(
                {"recall_10": target, "family": family, "engine": engine["name"], "setting": setting["setting"]}
                | {"queries_per_second": 1 / setting["median"]["wall_seconds"]}
            )
    return table(header, rows)


def of_family(result: dict, family: str) -> list[dict]:
    return [engine for engine in result["engines"] if engine["family"] == family]


def limits_table(result: dict, machine: dict, bits: int = 4) -> str:
    """Return what arithmetic and memory allow at best, for codes of ``bits`` and the centroids that PLAID takes."""
    tokens, dim, in_query = result["num_tokens"], result["dim"], result["query_tokens"]
    ops, read = machine["int8_ops_per_second"], machine["read_bytes_per_second"]
    centroids = 2 ** math.floor(math.log2(16 * math.sqrt(tokens)))
    code_bytes = dim * bits // 8 + 3
    compute = 2 * dim * in_query / ops
    memory = code_bytes / read
    token = max(compute, memory)
    lookup = 2 * centroids * dim * in_query / ops
    in_document = tokens / result["num_documents"]
    rows = [
        ["exact, float16 read once", f"{tokens:,} · {2 * dim} B / {read / 1e9:.1f} GB/s", 2 * dim * tokens / read],
        [f"every {bits}-bit token", f"{tokens:,} · max({compute * 1e9:.1f}, {memory * 1e9:.1f}) ns", tokens * token],
    ]
    for documents in (256, 1024):
        if documents < result["num_documents"]:
            how = f"{lookup * 1e3:.2f} ms + {documents:,} · {in_document:.0f} · {token * 1e9:.1f} ns"
            rows.append([f"centroids + {documents:,} documents", how, lookup + documents * in_document * token])
    result["limits"] = {name: seconds for name, _, seconds in rows}
    text = table(
        ["work of a query", "arithmetic", "ms at least", "queries/s at most"],
        [[name, how, f"{1000 * seconds:.2f}", f"{1 / seconds:,.0f}"] for name, how, seconds in rows],
    )
    build = ops / (2 * centroids * dim)
    result["limits"]["build tokens/s"] = build
    return (
        f"{text}\n\n"
        f"One token against a query of {in_query:.1f}: 2 · {dim} · {in_query:.1f} int8 operations / {ops / 1e9:.0f} GOP/s = "
        f"{compute * 1e9:.1f} ns; {code_bytes} bytes / {read / 1e9:.1f} GB/s = {memory * 1e9:.1f} ns. "
        f"{centroids:,} centroids (2^⌊log2 16√T⌋): 2 · {centroids:,} · {dim} · {in_query:.1f} / {ops / 1e9:.0f} GOP/s = "
        f"{lookup * 1e3:.2f} ms. The stage between them, which picks the documents, is left out. "
        f"Assigning a token to its centroid: 2 · {centroids:,} · {dim} / {ops / 1e9:.0f} GOP/s, so at most {build:,.0f} "
        "tokens/s in one pass; k-means adds its passes over a sample."
    )


def measure_machine(out: Path, given: argparse.Namespace) -> dict:
    worker = Worker(EXACT, out, out / "machine", given)
    try:
        machine = worker.ask("machine", SEARCH_LIMIT_SECONDS)
    finally:
        worker.close()
    if given.int8_gops:
        machine["int8_ops_per_second"] = given.int8_gops * 1e9
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {**machine, "processor": models[0] if models else "", "threads": given.threads, "load": os.getloadavg()}


def report(results: dict) -> str:
    machine = results["machine"]
    parts = [
        f"{machine['processor']}, {machine['threads']} thread(s). Queries in {results['blocks']} blocks, each asked "
        f"{results['rounds']} time(s), one a call, k = {K} unless a setting has its own; medians over blocks; builds once. "
        f"{machine['read_bytes_per_second'] / 1e9:.1f} GB/s read, {machine['int8_ops_per_second'] / 1e9:.0f} int8 GOP/s "
        f"at {machine['clock_hertz'] / 1e9:.2f} GHz, of which torch's product reaches "
        f"{machine['int8_product_ops_per_second'] / 1e9:.0f}; "
        f"load {machine['load'][0]:.1f} at the start."
    ]
    for name, result in results["corpora"].items():
        parts += [f"## {name}", f"{result['sizes']}; exact nDCG@10 {decimals(result['exact_ndcg_10'], 4)}."]
        makers: list[tuple[str, Callable[[], str]]] = [
            ("What each engine costs", lambda r=result: costs_table(r)),
            ("Queries a second at a wanted recall@10", lambda r=result: targets_table(r)),
            (f"What {machine['threads']} thread(s) of this machine allow", lambda r=result: limits_table(r, machine)),
        ]
        for title, make in makers:
            parts += [f"### {title}", make()]
    return "\n\n".join(parts) + "\n"


def chosen(names: str | None) -> list[Peer]:
    """Return the engines whose names begin with one of the names, all without any."""
    if names is None:
        return PEERS
    peers = [peer for peer in PEERS if any(peer.name.startswith(name) for name in names.split(","))]
    if not peers:
        sys.exit(f"no engine is called {names}; there are {', '.join(peer.name for peer in PEERS)}")
    return peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--environments", type=Path, help="where the environments of other engines are")
    parser.add_argument("--install", action="store_true", help="make those that are not there")
    parser.add_argument("--engines", help="beginnings of names, between commas; all without it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="times that every query is asked of every setting")
    parser.add_argument(
        "--blocks", type=int, default=4, help="parts of the queries, after each of which engines change"
    )
    parser.add_argument("--queries", type=int, help="draw so many of a corpus's queries")
    parser.add_argument("--build-limit", type=float, default=3600, help="seconds an engine may take to build")
    parser.add_argument("--rebuild", metavar="NAMES", help="beginnings of names of what to build again")
    parser.add_argument("--xtr-sample", type=int, help="documents that xtr-warp-rs draws for its k-means")
    parser.add_argument("--int8-gops", type=float, help="the processor's limit, where it is known better than measured")
    parser.add_argument("--no-pin", dest="pin", action="store_false", help="let engines use every processor")
    given = parser.parse_args()
    if given.install:
        install(given.environments)
    if given.pin:  # the workers inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-given.threads :])
    out = given.out.resolve()
    results: dict = {
        "rounds": given.rounds,
        "blocks": given.blocks,
        "machine": measure_machine(out, given),
        "corpora": {},
    }
    for folder in given.corpora:
        corpus = Corpus(folder.resolve(), given.queries)
        results["corpora"][corpus.name] = run_corpus(corpus, chosen(given.engines), out / corpus.name, given)
        text = report(results)
        (out / "results.md").write_text(text)
        (out / "results.json").write_text(json.dumps(results, indent=1))
    print(text)


if __name__ == "__main__":
    main()
