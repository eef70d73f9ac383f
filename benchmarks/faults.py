"""Any process may be killed at any moment, and nothing is lost or doubled: kills nights at random and compares.

    python -m benchmarks.faults [--kills 100] [--seed 0] [--kinds driver,actor,node] [--out DIR]

A generated corpus (videos that are only metadata, and tiny files that are decoded) changes from night to night: some are
new, some changed, some gone. Each night is run twice: undisturbed into one store, and into another while processes die of
SIGKILL, until a run of it ends with code 0. What is killed:

- driver: ``python -m pipelines nightly``, alone or with all that it started; with a Ray cluster of its own, and as a client
  of a cluster that lives on;
- actor: a worker process of Ray while it works, an actor or a task;
- node: a worker node of a local cluster of three, its raylet and its workers; another one joins afterwards.

A kill waits for something to appear in the store (the lease, the n-th new file of a table or of an index, the draft's row,
its publication, a file that goes) and then for a random moment longer, so that every stage is hit. A driver that was killed
is started again; a run that loses an actor or a node has to survive, or to fail and be finished by the next.

Compared are, after each night: every row of ``videos``, ``modalities`` and the token embeddings, exactly; that nothing
failed; the live release, by the scores of every video for several queries, within what 8 bits lose; that what is left in
the store is what its releases need; that no run still claims to be running, that nobody holds the store, and that no
process of a killed run is left. Right after every kill the live release is read by this process, and must be that of last
night, or of this one once it is published, whole.

Ends with code 1 if anything was lost, doubled, unreadable or hung. Linux only: processes are found in ``/proc``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cluster.index_store import parts, read_manifest
from cluster.lease import current, process_started
from cluster.readers import reading
from cluster.searchers import SegmentHolder
from cluster.store import FAILURES, MODALITIES, RELEASES, RUNS, VIDEOS, Store, token_table
from operators.encoders import Query
from pipelines.config import load
from pipelines.release import COLLECTED, PUBLISHED, live_id, open_release, read_log
from pipelines.search import search_options
from tests.media_files import make_video

TOKENS = token_table("lexical")
KEYS = {
    VIDEOS: ("video_id",),
    MODALITIES: ("video_id", "clip", "modality"),
    TOKENS: ("video_id", "clip", "modality"),
}
KINDS = ("driver", "actor", "node")
STAGES = ("starting", "opening", "ingest", "extract", "encode", "index", "gates", "gc", "ending")
"""What a run was doing, from what had appeared in the store: nothing, the lease, rows of each table, parts of an index, a
draft, its publication (or files that went), the run's last row."""

TARGETS = STAGES[1:-1]
QUERIES = [" ".join(f"word{(7 * q + 13 * w) % 120}" for w in range(4)) for q in range(8)]
SCORE_TOLERANCE = 0.08
"""Of the sum over a query's four words: two codecs of 8 bits, trained on other samples."""

OF_RAY = ("ray::_StatsActor", "ray::_Autoscaling", "ray::ActorLocation")
"""Actors of Ray Data itself: always there, so killed less often."""

ACTORS = ("MapWorker", "_Trainer", "SegmentHolder", "Actor")

RUN_SECONDS = 600.0
"""A run that takes longer hangs."""

NO_RAY = ("timed out during startup", "the cluster has 0;")
"""What a run says that found no Ray to work on: it did not start in 30 s on a busy machine, or all nodes were dead."""

GONE_SECONDS = 60.0
"""How long processes of a killed run may live on."""

SETTINGS = [
    "extract.modalities=[frame,metadata]",
    "encode.encoder=lexical",
    "encode.resources.batch_clips=4",
    "storage.commit_rows=4",
    "build_index.nbits=8",
    "build_index.segment_tokens=300",
    "retries.wait_seconds=0",
    "gates.min_recall=0.5",
    "gates.min_overlap=0.1",
    "gates.max_gone=1",
    "gates.max_token_change=null",
    "gc.keep_hours=0",
    "gc.keep_releases=2",
]
LOCAL = ["ray.num_cpus=2", "ray.object_store_bytes=150000000"]

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")])),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_period_ms": "1000",  # a node that died is noticed within seconds
    "RAY_num_workers_soft_limit": "8",  # else a node of one CPU starts a process for each small task
}


class Corpus:
    """A manifest that changes from night to night; some of its videos are files."""

    def __init__(self, folder: Path, num_texts: int = 48, num_files: int = 8, seed: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rng = folder, random.Random(seed)
        self.manifest = folder / "manifest.jsonl"
        self.rows: dict[str, dict[str, str]] = {}
        self.made = 0
        self._add(num_texts, num_files)
        self._write()

    def change(self, num_texts: int = 10, num_files: int = 2) -> None:
        """Make so many videos of each kind new, change as many and drop as many."""
        texts = [video for video, row in self.rows.items() if "uri" not in row]
        videos = [video for video, row in self.rows.items() if "uri" in row]
        for kind, count in ((texts, num_texts), (videos, num_files)):
            chosen = self.rng.sample(kind, 2 * count)
            for video in chosen[:count]:
                del self.rows[video]
            for video in chosen[count:]:
                self.rows[video]["title"] = self._title()
        for video in chosen[num_files:]:
            self._film(video)
        self._add(num_texts, num_files)
        self._write()

    def _title(self) -> str:
        return " ".join(f"word{self.rng.randrange(120)}" for _ in range(12))

    def _film(self, video: str) -> None:
        make_video(self.folder / f"{video}.mp4", levels=[self.rng.randrange(20, 230)] * self.rng.randrange(5, 11))

    def _add(self, num_texts: int, num_files: int) -> None:
        for number in range(num_texts + num_files):
            self.made += 1
            video = f"v{self.made:04d}"
            self.rows[video] = {"video_id": video, "title": self._title()}
            if number >= num_texts:
                self._film(video)
                self.rows[video]["uri"] = f"{video}.mp4"

    def _write(self) -> None:
        self.manifest.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()))


class Processes:
    """The process tree, read from ``/proc``."""

    def __init__(self) -> None:
        self.children: dict[int, list[int]] = {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    parent = int(Path(entry.path, "stat").read_text().rpartition(")")[2].split()[1])
                except (OSError, IndexError):
                    continue
                self.children.setdefault(parent, []).append(int(entry.name))

    def below(self, pid: int) -> list[int]:
        """Return a process's descendants, parents first."""
        found = list(self.children.get(pid, []))
        for child in found:
            found += self.children.get(child, [])
        return found


def title_of(pid: int) -> str:
    """Return a process's command line, "" where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def kill(pids: Iterable[int]) -> list[tuple[int, str]]:
    """Kill processes, and return each with its start time."""
    known = [(pid, process_started(pid)) for pid in pids]
    for pid, _ in known:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return known


class Cluster:
    """A Ray cluster on this machine: a head that runs nothing and worker nodes of one CPU. A context manager."""

    def __init__(self, num_nodes: int = 2) -> None:
        self.folder = tempfile.mkdtemp(prefix="mrf")  # short: it holds sockets
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.address = f"127.0.0.1:{self.port}"
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.head = self._start(["--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false"])
        try:
            self._wait_until_there()
            self.nodes += [self._start_node() for _ in range(num_nodes)]
            self._wait_for_nodes(num_nodes)
        except BaseException:
            self.__exit__()
            raise

    def _start(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += ["--object-store-memory=100000000", *arguments]
        if "--head" in arguments:
            command.append(f"--temp-dir={self.folder}")  # so that others on this machine do not join it
        with open(f"{self.folder}/start.log", "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True)

    def _start_node(self) -> subprocess.Popen[bytes]:
        return self._start([f"--address={self.address}", "--num-cpus=1"])

    def _wait_until_there(self) -> None:
        for _ in range(240):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.5)
        raise TimeoutError(f"the cluster's head did not start; see {self.folder}/start.log")

    def _wait_for_nodes(self, num_nodes: int) -> None:
        ask = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR'); "
        ask += "print(sum(n['Alive'] for n in ray.nodes()), flush=True)"
        for _ in range(30):
            self.revive()  # on a busy machine a node gives up after 30 s
            told = subprocess.run(
                [sys.executable, "-c", ask, self.address],
                env=ENVIRONMENT,
                capture_output=True,
                timeout=120,
                check=False,
            )
            if told.returncode == 0 and int(told.stdout.split()[0]) > num_nodes:
                return
            time.sleep(1)
        raise TimeoutError(f"the cluster's nodes did not start; see {self.folder}/start.log")

    def pids(self) -> list[int]:
        """Return the processes of the worker nodes."""
        tree = Processes()
        return [pid for node in self.nodes for pid in tree.below(node.pid)]

    def kill_node(self, number: int) -> None:
        """Kill a worker node, all of it, and start another."""
        node = self.nodes[number]
        kill([node.pid, *Processes().below(node.pid)])
        node.wait()
        self.nodes[number] = self._start_node()

    def revive(self) -> None:
        """Start the nodes again that ended by themselves."""
        self.nodes = [node if node.poll() is None else self._start_node() for node in self.nodes]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        tree = Processes()
        for process in (*self.nodes, self.head):
            kill([process.pid, *tree.below(process.pid)])
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Watch:
    """What has appeared in a store since a run began, and so what the run is doing."""

    FIRST_VERSION = "18446744073709551614.manifest"  # of a table that was just made

    def __init__(self, store: Store) -> None:
        self.store, self.began = store, time.monotonic()
        self.events: Counter[str] = Counter()
        self.reached: dict[str, float] = {}  # seconds after the beginning
        self._rank, self._known = 0, set(self._scan())
        self._published = len([row for row in self._log() if row["state"] == PUBLISHED])
        self._recorded = False

    @property
    def stage(self) -> str:
        """What the run is doing."""
        return STAGES[self._rank]

    def look(self) -> None:
        """Look at the store again."""
        now = set(self._scan())
        appeared, gone, self._known = now - self._known, self._known - now, now
        if self._rank == 0 and not any(path.startswith("_lease/") for path in appeared):
            return  # not of this run: workers of the last, which lived on for a moment
        stages = [stage for stage in map(self._stage_of, sorted(appeared)) if stage]
        if self._recorded and any(path.endswith((".lance", ".manifest")) for path in gone):
            stages.append("gc")
        for stage in stages:
            self.events[stage] += 1
            self._rank = max(self._rank, STAGES.index(stage))
            self.reached.setdefault(stage, time.monotonic() - self.began)

    def _scan(self) -> Iterator[str]:
        skipped = ("_readers", "reports", "_transactions")
        for folder, folders, names in os.walk(self.store.uri):
            folders[:] = [name for name in folders if name not in skipped]
            for name in names:
                yield os.path.relpath(os.path.join(folder, name), self.store.uri)

    def _log(self) -> list[dict[str, object]]:
        try:
            return read_log(self.store)
        except Exception:  # a store being made
            return []

    def _stage_of(self, path: str) -> str | None:
        table, _, rest = path.partition("/")
        if table == "_lease":
            return "opening"
        if path.endswith("latest_version_hint.json"):
            return None
        if path.endswith(self.FIRST_VERSION) and not table.startswith("token"):
            return None
        if table == f"{RUNS}.lance":
            over = self._rank > STAGES.index("opening")
            self._recorded = self._recorded or "_versions" in rest
            return ("ending" if over else "opening") if "_versions" in rest else None
        if table == f"{RELEASES}.lance":
            if "_versions" not in rest:
                return None
            published = len([row for row in self._log() if row["state"] == PUBLISHED])
            return "gc" if published > self._published else "gates" if self._rank >= STAGES.index("index") else None
        return {
            f"{VIDEOS}.lance": "ingest",
            f"{MODALITIES}.lance": "extract",
            f"{TOKENS}.lance": "encode",
            "index": "index",
        }.get(table)


@dataclass
class Kill:
    """What to kill, and when: some seconds after the n-th event of a stage; a driver before the next stage is under way."""

    kind: str
    stage: str
    event: int
    delay: float
    due: float | None = None

    def is_due(self, watch: Watch) -> bool:
        """Return whether the moment has come."""
        now, later = time.monotonic(), STAGES.index(watch.stage) > STAGES.index(self.stage)
        if self.due is None and (later or watch.events[self.stage] >= self.event):
            self.due = now + self.delay
        if self.due is not None and later and self.kind == "driver":
            self.due = now
        return self.due is not None and time.monotonic() >= self.due


@dataclass
class Ended:
    """How a run ended, what was killed during it (kind and stage), and what was to be."""

    code: int
    watch: Watch
    killed: list[tuple[str, str]]
    pending: list[Kill]
    error: str


@dataclass
class Faults:
    """Two stores, one of which is disturbed, and what was found."""

    folder: Path
    corpus: Corpus
    rng: random.Random
    cluster: Cluster | None = None
    table: Counter[tuple[str, str]] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    worst: float = 0.0
    reads: int = 0
    last_live: int | None = None
    expected: list[dict[str, dict[str, float]]] = field(default_factory=list)
    usual: Watch | None = None
    killed_processes: list[tuple[int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.undisturbed = Store.at(str(self.folder / "undisturbed"))
        self.store = Store.at(str(self.folder / "killed"))

    def command(self, store: Store) -> list[str]:
        """Return the command of a night."""
        where = [f"ray.address={self.cluster.address}"] if self.cluster else LOCAL
        settings = [f"manifest={self.corpus.manifest}", *SETTINGS, *where]
        command = [sys.executable, "-m", "pipelines", "nightly", "--store", store.uri, "--json"]
        return [*command, *(part for setting in settings for part in ("--set", setting))]

    def start(self, store: Store) -> subprocess.Popen[str]:
        """Start a night."""
        (self.folder / "logs").mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.folder / "logs", suffix=".log", delete=False) as log:
            process = subprocess.Popen(
                self.command(store),
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=ENVIRONMENT,
                text=True,
                start_new_session=True,
            )
        process.log = Path(log.name)  # type: ignore[attr-defined]
        return process

    def run(self, store: Store, kills: Sequence[Kill] = ()) -> Ended:
        """Run one night to its end, or to that of its driver."""
        watch, pending, done = Watch(store), list(kills), []
        process = self.start(store)
        while process.poll() is None:
            watch.look()
            for planned in [planned for planned in pending if planned.is_due(watch)]:
                watch.look()
                stage = watch.stage
                what = self._kill(planned.kind, process) if process.poll() is None else None
                if what is None:
                    continue  # nothing of the kind yet
                pending.remove(planned)
                done.append((what, stage))
                self.table[what, stage] += 1
                say(f"    killed {what} in {stage}")
                self.check_readers(f"after a kill of {what} in {stage}")
            if time.monotonic() - watch.began > RUN_SECONDS:
                self.wrong.append(f"hang: a run took more than {RUN_SECONDS:g} s in {watch.stage}; killed: {done}")
                self._kill_tree(process)
            if self.cluster:
                self.cluster.revive()
            time.sleep(0.02)
        process.wait()
        watch.look()
        return Ended(process.returncode, watch, done, pending, process.log.read_text()[-3000:])  # type: ignore[attr-defined]

    def _kill(self, kind: str, process: subprocess.Popen[str]) -> str | None:
        """Kill something of a kind and return what it was, or None if there was nothing."""
        if kind == "driver":
            if self.cluster:
                process.kill()
                process.wait()
                return "driver of a cluster"
            if self.rng.random() < 0.5:
                self._kill_tree(process)
                return "driver with its Ray"
            self.killed_processes += [(pid, process_started(pid)) for pid in Processes().below(process.pid)]
            process.kill()
            process.wait()
            return "driver alone"
        if kind == "node":
            assert self.cluster is not None
            self.cluster.kill_node(self.rng.randrange(len(self.cluster.nodes)))
            return "node"
        pids = self.cluster.pids() if self.cluster else Processes().below(process.pid)
        titles = {pid: title_of(pid) for pid in pids}
        busy = {pid: t for pid, t in titles.items() if t.startswith("ray::") and "IDLE" not in t and "Agent" not in t}
        ours = [pid for pid, title in sorted(busy.items()) if not title.startswith(OF_RAY)]
        if not ours:
            return None
        pid = self.rng.choice(ours if self.rng.random() < 0.85 else sorted(busy))
        kill([pid])
        say(f"    {busy[pid]}")
        return "actor" if any(name in busy[pid] for name in ACTORS) else "task"

    def _kill_tree(self, process: subprocess.Popen[str]) -> None:
        self.killed_processes += kill([process.pid, *Processes().below(process.pid)])
        process.wait()

    def read_live(self, store: Store) -> tuple[int, dict[str, dict[str, float]]] | None:
        """Return the number of the live release and the score of every video for every query."""
        if store.open_or_none(RELEASES) is None or live_id(read_log(store)) is None:
            return None
        release = open_release(store)
        with reading(store, release.release_id):
            return release.release_id, self._scores(store, release)

    def _scores(self, store: Store, release: object) -> dict[str, dict[str, float]]:
        encoder = release.load_encoder(num_threads=1)  # type: ignore[attr-defined]
        manifest = release.manifest  # type: ignore[attr-defined]
        embedded = encoder.encode_queries([Query(text=text) for text in QUERIES])
        holder = SegmentHolder(store, manifest, manifest["segments"])
        options = search_options(load([], ["search.probes=0"]).search, 10_000)
        found = holder.search(embedded, options)
        return {text: {hit.video_id: hit.score for hit in hits} for text, hits in zip(QUERIES, found, strict=True)}

    def check_readers(self, when: str) -> None:
        """Check that the live release is last night's, or tonight's once it is published, whole."""
        self.reads += 1
        try:
            found = self.read_live(self.store)
        except Exception as error:
            self.wrong.append(f"unreadable {when}: {type(error).__name__}: {error}")
            return
        if found is None:
            if self.last_live is not None:
                self.wrong.append(f"unreadable {when}: no release is live, {self.last_live} was")
            return
        release_id, scores = found
        expected = self.expected[-2] if release_id == self.last_live else self.expected[-1]
        self._compare_scores(f"release {release_id} {when}", scores, expected)

    def _compare_scores(
        self, what: str, scores: dict[str, dict[str, float]], expected: dict[str, dict[str, float]]
    ) -> None:
        for text, of_query in expected.items():
            if scores[text].keys() != of_query.keys():
                lost, extra = of_query.keys() - scores[text].keys(), scores[text].keys() - of_query.keys()
                self.wrong.append(f"mixture: {what} lacks {sorted(lost)} and has {sorted(extra)}")
                return
            apart = max(abs(scores[text][video] - of_query[video]) for video in of_query)
            self.worst = max(self.worst, apart)
            if apart > SCORE_TOLERANCE:
                self.wrong.append(f"mixture: {what}: scores of {text!r} are {apart:.3f} apart")
                return

    def undisturbed_night(self) -> None:
        """Run tonight's manifest into the undisturbed store."""
        ended = self.run(self.undisturbed)
        while ended.code and found_no_ray(ended):
            ended = self.run(self.undisturbed)
        if ended.code:
            raise RuntimeError(f"the undisturbed night ended with code {ended.code}: {ended.error}")
        self.usual = ended.watch
        found = self.read_live(self.undisturbed)
        assert found is not None
        self.expected.append(found[1])

    def plan(self, kind: str, stage: str) -> Kill:
        """Return a kill at a random moment of a stage: at one of its events, or some time after its first."""
        assert self.usual is not None
        times = self.usual.reached
        following = [times[later] for later in STAGES[STAGES.index(stage) + 1 :] if later in times]
        lasts = min(following, default=times.get(stage, 0.0)) - times.get(stage, 0.0)
        if stage == "opening" and self.rng.random() < 0.5:
            return Kill(kind, stage, self.rng.randint(1, 3), 0.0)
        if stage == "gc":
            lasts = min(lasts, 0.3)  # it does, and what follows is closing Ray
        if self.rng.random() < 0.5:
            return Kill(kind, stage, 1, self.rng.uniform(0, max(0.05, lasts)))
        event = self.rng.randint(1, max(1, self.usual.events[stage] * 2 // 3))
        return Kill(kind, stage, event, self.rng.choice([0.0, 0.0, 0.02, 0.1]))

    def night(self, runs: Sequence[Sequence[Kill]]) -> int:
        """Run tonight's manifest under kills, again and again until a run ends with code 0; return how many were done."""
        before, waiting = sum(self.table.values()), list(runs)
        for _ in range(sum(map(len, runs)) + 10):
            ended = self.run(self.store, waiting.pop(0) if waiting else ())
            others = [what for what, _ in ended.killed if not what.startswith("driver")]
            if ended.code and len(others) == len(ended.killed):
                say(f"    failed, code {ended.code}: {ended.error.strip().splitlines()[-1][:300]}")
                if ended.pending:
                    waiting.insert(0, ended.pending)
            if ended.code == 0 and others:
                self.outcomes["runs that lost actors or nodes and ended well"] += 1
            elif ended.code and others and len(others) == len(ended.killed):
                self.outcomes["runs that lost actors or nodes, failed, and were finished by the next"] += 1
            elif ended.code and not ended.killed and found_no_ray(ended):
                self.outcomes["runs that found no Ray to work on, repeated"] += 1
            elif ended.code and not ended.killed:
                self.wrong.append(f"lost: a run in which nothing was killed ended with {ended.code}: {ended.error}")
            elif ended.killed:
                self.outcomes["runs whose driver was killed, resumed by the next"] += 1
            if ended.code == 0 and not waiting:
                break
        else:
            self.wrong.append("lost: tonight was never finished")
        self.compare()
        live = live_id(read_log(self.store))
        self.last_live = live
        return sum(self.table.values()) - before

    def compare(self) -> None:
        """Compare the stores: all that the module's docstring promises."""
        wrong = [*self._rows(), *self._leftovers(self.store), *self._state(), *self._still_running()]
        self.wrong += wrong
        found = self.read_live(self.store)
        if found is None:
            self.wrong.append("lost: nothing is live")
            return
        self._compare_scores("the live release", found[1], self.expected[-1])
        sums = []
        for store in (self.undisturbed, self.store):
            manifest = open_release(store).manifest
            live = sum(entry["num_clips"] - entry["num_dead_clips"] for entry in manifest["segments"])
            sums.append((manifest["num_tokens"], live))
        if sums[0] != sums[1]:
            self.wrong.append(f"doubled: tokens and clips of the index are {sums[1]}, wanted {sums[0]}")
        for row in read_log(self.store):
            if row["release_id"] not in collected(self.store):
                self._scores(self.store, open_release(self.store, row["release_id"]))

    def _rows(self) -> Iterator[str]:
        for table, names in KEYS.items():
            contents = []
            for store in (self.undisturbed, self.store):
                rows = store.open(table).to_table().to_pylist()
                keys = Counter(tuple(row[name] for name in names) for row in rows)
                yield from (f"doubled: {table} {key}" for key, count in keys.items() if count > 1)
                contents.append({tuple(row[name] for name in names): row for row in rows})
            expected, found = contents
            yield from (f"lost: {table} {key}" for key in expected.keys() - found.keys())
            yield from (f"doubled: {table} {key} should be gone" for key in found.keys() - expected.keys())
            for key in expected.keys() & found.keys():
                if not same(expected[key], found[key]):
                    yield f"lost: {table} {key} differs"
        for store in (self.undisturbed, self.store):
            for failure in store.open(FAILURES).to_table().to_pylist():
                yield f"lost: a failure in {store.uri}: {failure}"

    def _leftovers(self, store: Store) -> Iterator[str]:
        """Yield the files that nothing refers to: of tables no version, of indices no release."""
        kept = [row for row in read_log(store) if row["release_id"] not in collected(store)]
        pinned: dict[str, set[int]] = {}
        for row in kept:
            for table, version in json.loads(row["tables"]).items():
                pinned.setdefault(table, set()).add(version)
        for table in (*KEYS, FAILURES, RUNS, RELEASES):
            dataset = store.open(table)
            versions = {v["version"] for v in dataset.versions()}
            if table in KEYS and (surplus := versions - pinned[table] - {dataset.version}):
                yield f"leftover: versions {sorted(surplus)} of {table}"
            needed = {
                file.path
                for version in versions
                for fragment in store.open(table, version).get_fragments()
                for file in fragment.data_files()
            }
            there = {path.name for path in Path(store.table_uri(table), "data").glob("*")}
            yield from (f"leftover: {table} {name}" for name in there - needed)
            yield from (f"lost: {table} {name} is needed" for name in needed - there)
        needed = {part for row in kept for part in parts(read_manifest(store, row["index_id"]))}
        for path in Path(store.uri, "index").rglob("*"):
            name = path.relative_to(store.uri).as_posix()
            if path.is_file() and not any(name == part or name.startswith(f"{part}/") for part in needed):
                yield f"leftover: {name}"

    def _state(self) -> Iterator[str]:
        for row in self.store.open(RUNS).to_table().to_pylist():
            if row["status"] == "running":
                yield f"lost: run {row['run_id']} still claims to be running"
        holder = current(self.store)[1]
        if holder is not None and holder.is_alive(time.time()):
            yield f"lost: the store is held by {holder}"

    def _still_running(self) -> Iterator[str]:
        limit = time.monotonic() + GONE_SECONDS
        while time.monotonic() < limit:
            left = [pid for pid, started in self.killed_processes if started and process_started(pid) == started]
            if not left:
                break
            time.sleep(0.5)
        else:
            yield from (f"leftover: process {pid} of a killed run: {title_of(pid)}" for pid in left)
        self.killed_processes = []


def found_no_ray(ended: Ended) -> bool:
    return any(text in ended.error for text in NO_RAY)


def collected(store: Store) -> set[int]:
    return {row["release_id"] for row in read_log(store) if row["state"] == COLLECTED}


def same(one: dict[str, object], other: dict[str, object]) -> bool:
    """Return whether two rows are equal, embeddings bit by bit."""
    if one.keys() != other.keys():
        return False
    return all(
        np.array_equal(np.array(one[name]), np.array(other[name])) if name == "embeddings" else one[name] == other[name]
        for name in one
    )


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def driver_runs(faults: Faults, count: int) -> list[list[Kill]]:
    """Return a night's runs, whose driver dies in each, in one stage after another; the last runs to its end."""
    stages = [*TARGETS, *faults.rng.choices(TARGETS, k=count)][:count]
    ordered = sorted(stages, key=TARGETS.index)
    return [[faults.plan("driver", stage)] for stage in ordered]


def worker_runs(faults: Faults, kinds: Sequence[str]) -> list[list[Kill]]:
    """Return a night's only run, in whose stages something else than the driver dies."""
    stages = [stage for stage in TARGETS if stage not in ("opening", "gc")]
    return [[faults.plan(kind, stages[number % len(stages)]) for number, kind in enumerate(kinds)]]


def share(num_kills: int, kinds: Sequence[str]) -> Counter[str]:
    """Return how many kills of each kind to make: two of a driver and two of an actor for one of a node."""
    weights = {"driver": 2, "actor": 2, "node": 1}
    total = sum(weights[kind] for kind in kinds)
    left = Counter({kind: num_kills * weights[kind] // total for kind in kinds})
    left[kinds[0]] += num_kills - left.total()
    return left


def report(faults: Faults, seconds: float) -> str:
    """Return the table, and what was wrong."""
    kinds = sorted({kind for kind, _ in faults.table})
    lines = ["| doing | " + " | ".join(kinds) + " | all |", "|---|" + "---|" * (len(kinds) + 1)]
    for stage in STAGES:
        counts = [faults.table[kind, stage] for kind in kinds]
        if sum(counts):
            lines.append(f"| {stage} | " + " | ".join(str(c or "") for c in counts) + f" | {sum(counts)} |")
    sums = [sum(faults.table[kind, stage] for stage in STAGES) for kind in kinds]
    lines.append("| all | " + " | ".join(map(str, sums)) + f" | {sum(sums)} |")
    lines += [f"{what}: {count}" for what, count in sorted(faults.outcomes.items())]
    found = Counter(problem.partition(":")[0].split()[0] for problem in faults.wrong)
    problems = ("lost", "doubled", "mixture", "unreadable", "leftover", "hang")
    lines.append(", ".join(f"{problem} {found[problem]}" for problem in problems))
    lines.append(
        f"{len(faults.expected)} nights, {faults.reads} reads right after a kill, "
        f"scores at most {faults.worst:.4f} apart, {seconds:.0f} s"
    )
    return "\n".join([*lines, *(f"WRONG {problem}" for problem in faults.wrong)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="of what is killed, by commas")
    parser.add_argument("--out", type=Path, help="where the stores and logs are kept; a temporary folder otherwise")
    parser.add_argument("--texts", type=int, default=48, help="videos that are only metadata")
    parser.add_argument("--own-ray", type=int, default=2, help="nights that start a Ray of their own; then a cluster")
    parser.add_argument("--files", type=int, default=8, help="videos that are decoded")
    given = parser.parse_args()
    kinds = [kind for kind in KINDS if kind in given.kinds.split(",")]
    folder = given.out or Path(tempfile.mkdtemp(prefix="faults"))
    began = time.monotonic()
    faults = Faults(folder, Corpus(folder / "corpus", given.texts, given.files, given.seed), random.Random(given.seed))
    left = share(given.kills, kinds)
    cluster = None
    try:
        for night in range(100):
            if not +left:
                break
            if night == given.own_ray:
                cluster = faults.cluster = Cluster()
            if night:
                faults.corpus.change()
            tonight = Counter(left)
            if faults.cluster is None:
                tonight.pop("node", None)
            by_driver = tonight["driver"] > 0 and (night % 2 == 0 or not (tonight["actor"] + tonight["node"]))
            say(f"night {night}: {'drivers' if by_driver else 'actors and nodes'}, left {dict(left)}")
            faults.undisturbed_night()
            say(f"  undisturbed: {[(stage, round(at)) for stage, at in faults.usual.reached.items()]}")
            before = Counter(faults.table)
            if by_driver:
                runs = driver_runs(faults, min(16 if faults.cluster else 8, tonight["driver"]))
            else:
                chosen = ["actor"] * min(15 if faults.cluster else 10, tonight["actor"]) + ["node"] * min(
                    10, tonight["node"]
                )
                faults.rng.shuffle(chosen)
                runs = worker_runs(faults, chosen)
            faults.night(runs)
            for (what, _), count in (faults.table - before).items():
                left[what.split()[0].replace("task", "actor")] -= count
            left = +left
            print(report(faults, time.monotonic() - began), flush=True)
    finally:
        if cluster is not None:
            cluster.__exit__()
    print(report(faults, time.monotonic() - began), flush=True)
    if given.out is None and not faults.wrong:
        shutil.rmtree(folder)
    sys.exit(1 if faults.wrong else 0)


if __name__ == "__main__":
    main()
