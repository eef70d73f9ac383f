"""Sweeps: what cells share, that a cell is what a run of its own gives, and that a killed sweep goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner

import pipelines.sweep_work
from cluster.index_store import find_manifest
from cluster.store import Store, token_table
from operators.errors import ConfigError, StoreHeldError, TooManyFailuresError
from operators.pareto import knee, pareto_set
from pipelines.build_index import build_index
from pipelines.cli import app
from pipelines.config import load, override
from pipelines.evaluate import evaluate
from pipelines.extract import extract
from pipelines.ingest import ingest
from pipelines.job import open_job
from pipelines.release import open_release
from pipelines.sweep import sweep
from pipelines.sweep_config import SweepConfig, expand
from pipelines.sweep_plan import Asked, Stored, count, place, place_all
from pipelines.sweep_work import keep

TOKENS = token_table("lexical")
NUM_VIDEOS = 48


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([(1, 1)], [0]),
        ([(1, 3), (3, 1), (2, 2), (1, 1)], [0, 1, 2]),
        ([(1, 3), (1, 2)], [0]),
        ([(2, 2), (2, 2), (1, 2)], [0, 1]),
        ([(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0)], [0, 1, 2]),
    ],
)
def test_the_pareto_set_is_what_nothing_dominates(points, best):
    assert np.flatnonzero(pareto_set(np.array(points, float))).tolist() == best


@pytest.mark.parametrize(
    ("points", "chosen"),
    [
        ([(0.5, 3)], 0),
        ([(0.80, 4), (0.79, 2)], 1),  # a doubling for 1.25 % is too dear
        ([(0.80, 4), (0.78, 2)], 0),  # for 2.5 % it is not
        ([(0.80, 4), (0.78, 1)], 1),  # two are
        ([(0.80, 400), (0.78, 200)], 0),  # units do not count
        ([(0.80, 5), (0.40, 3)], 0),  # nor does the range that costs happen to have
        ([(-10, 4), (-11, 2)], 0),  # ranks: less is better
    ],
)
def test_the_knee_is_where_a_doubling_buys_too_little(points, chosen):
    goodness = np.array([(quality, -np.log2(cost)) for quality, cost in points])
    assert knee(goodness, [f"point {i}" for i in range(len(points))]) == chosen


def test_of_equal_knees_the_first_by_name_is_taken():
    assert knee(np.ones((3, 2)), ["b", "a", "c"]) == 1


# 48 clips of 12 tokens: so few candidates that what is probed, how it is coded, and what is rescored all count.
GRID = {
    "encode.pool_tokens.metadata": [0, 6],
    "build_index.nbits": [1, 4],
    "search.rescored": [0, 20],
}
NUM_CELLS = 8
BASE = {
    "encode.encoder": "lexical",
    "build_index.num_centroids": 16,
    "search.probes": 2,
    "search.candidates": 20,
    "build_index.segment_tokens": 150,
    "evaluate.shard_tokens": 200,
    "evaluate.depth": 10,
}


def cells_of(**sweep_config):
    return expand(SweepConfig.model_validate({"grid": GRID, "base": BASE} | sweep_config), load([], []))


def test_cells_are_all_combinations_but_those_left_out():
    cells = cells_of(exclude=[{"search.rescored": 0, "build_index.nbits": [1, 2]}, {"encode.pool_tokens.metadata": 6}])
    expected = [(0, 1, 20), (0, 4, 0), (0, 4, 20)]
    assert [cell.settings for cell in cells] == [dict(zip(GRID, values, strict=True)) for values in expected]
    first = cells[0].config
    assert (first.build_index.nbits, first.build_index.num_centroids, first.search.rescored) == (1, 16, 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"build_index.nbit": [1]}}, "Did you mean nbits?"),
        ({"grid": {"build.nbits": [1]}}, "Did you mean build_index?"),
        (
            {"grid": {"build_index.nbits": [1, 3], "search.probes": [-1]}},
            r"(?s)search\.probes: .*got -1.*nbits: .*got 3",
        ),
        ({"grid": {"search.probes": [1, 1]}}, "names a value twice"),
        ({"grid": {"extract.clip_seconds": [1.0]}}, "varies only encode, build_index, search"),
        ({"grid": {"search": [{"probes": 1}]}}, "dotted"),
        ({"grid": {"search.scorer": ["group_sum"]}}, "group_sum takes groups"),
        ({"grid": {"encode.lexical.dim": [32, 64]}}, "one setting of an encoder"),
        ({"base": {"store": "elsewhere"}}, "the base of a sweep sets only"),
        ({"exclude": [{"search.recall": 0.9}]}, "is not in the grid"),
        ({"exclude": [{"search.rescored": [0, 20]}]}, "leaves no cell"),
    ],
)
def test_settings_that_cannot_be_swept_are_named_before_anything_runs(changes, message):
    with pytest.raises(ConfigError, match=message):
        cells_of(**changes)


def test_a_wrong_name_in_the_file_says_which_was_meant(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("girds: {search.probes: [1]}")
    with pytest.raises(ConfigError, match="girds: no such setting. Did you mean grid?"):
        sweep(load([], []), file)


def stored_tokens(num_tokens=12, kept=128):
    config = load([], ["encode.encoder=lexical", f"encode.pool_tokens.metadata={kept}"])
    rows = pa.table({"modality": ["metadata"], "num_tokens": [num_tokens], "video_id": ["v"]})
    return Stored(config.encode, 0, 3, rows, "digest")


ASKED = Asked([], {}, ("nDCG@10",), 10, 10, "fingerprint")


def counts_of(grid, stored=None):
    return count(place_all(cells_of(grid=grid), {"lexical": stored or stored_tokens()}, ASKED))


@pytest.mark.parametrize(
    "name", ["search.actors", "encode.resources.batch_clips", "build_index.retrain_drift", "encode.offline.top_k"]
)
def test_settings_that_change_nothing_are_not_swept(name):
    with pytest.raises(ConfigError, match=f"{name}: makes no difference"):
        counts_of({"search.probes": [1, 3], name: [1, 2]})


def test_cells_share_all_that_their_settings_do_not_touch():
    assert counts_of(GRID) == {
        "encodings": 1,
        "token_tables": 2,
        "trainings": 2,
        "indices": 4,
        "exact_rankings": 2,
        "cells": NUM_CELLS,
    }
    assert counts_of({"build_index.num_centroids": [2, 4], "build_index.nbits": [1, 2, 4]})["trainings"] == 2
    assert counts_of({"search.candidates": [1, 2], "search.rescored": [0, 9]})["exact_rankings"] == 1
    assert counts_of({"search.modalities": [None, ["metadata"]]})["exact_rankings"] == 2
    assert counts_of({"encode.pool_tokens.metadata": [0, 12, 128, 11]})["token_tables"] == 2, "12 tokens are all"


def test_budgets_above_what_was_pooled_are_refused_only_where_something_is_gone():
    assert counts_of({"encode.pool_tokens.metadata": [0, 99]}, stored_tokens(11, 12))["token_tables"] == 1
    for budget in (0, 99):
        with pytest.raises(ConfigError, match=rf"metadata={budget} is above the 12"):
            counts_of({"encode.pool_tokens.metadata": [budget]}, stored_tokens(12, 12))


@pytest.mark.parametrize(
    "change",
    [
        lambda cell, stored, asked: (cell, replace(stored, version=4), asked),
        lambda cell, stored, asked: (cell, replace(stored, digest="other"), asked),
        lambda cell, stored, asked: (cell, stored, replace(asked, fingerprint="other")),
        lambda cell, stored, asked: (cell, stored, replace(asked, measures=("R@1",))),
        lambda cell, stored, asked: (
            replace(cell, config=override(cell.config, {"build_index.seed": 1})),
            stored,
            asked,
        ),
        lambda cell, stored, asked: (
            replace(cell, config=override(cell.config, {"search.recall": 0.5})),
            stored,
            asked,
        ),
    ],
)
def test_a_cell_is_another_where_anything_that_it_depends_on_changed(change):
    before = cells_of()[0], stored_tokens(), ASKED
    assert place(*before).fingerprint != place(*change(*before)).fingerprint
    assert place(*before).fingerprint == place(cells_of()[0], stored_tokens(), ASKED).fingerprint


class Library:
    """Videos of words in a store with token embeddings, queries for them, and sweeps."""

    def __init__(self, folder):
        self.folder = folder
        self.store = Store.at(str(folder / "store"))
        self.config = load([], ["encode.encoder=lexical", "extract.modalities=[metadata]"], self.store.uri)
        self.queries, self.qrels = folder / "queries.jsonl", folder / "qrels.txt"

    def fill(self):
        rng = np.random.default_rng(0)
        titles = {f"v{i:02d}": rng.choice([f"word{w}" for w in range(60)], 12) for i in range(NUM_VIDEOS)}
        manifest = self.folder / "manifest.jsonl"
        manifest.write_text(
            "".join(json.dumps({"video_id": v, "title": " ".join(t)}) + "\n" for v, t in titles.items())
        )
        with open_job(self.config, "index") as job:
            ingest(job, str(manifest))
            extract(job)
        with self.queries.open("w") as queries, self.qrels.open("w") as qrels:
            for number, (video, title) in enumerate(list(titles.items())[:20]):
                words = [*rng.choice(title, 2), f"word{rng.integers(60)}"]
                queries.write(json.dumps({"id": f"q{number}", "text": " ".join(words)}) + "\n")
                qrels.write(f"q{number} 0 {video} 1\n")

    def file(self, **changes):
        path = self.folder / "sweep.yaml"
        path.write_text(
            yaml.safe_dump({"grid": GRID, "base": BASE, "out": str(self.folder / "out")} | changes, sort_keys=False)
        )
        return path

    def sweep(self, dry_run=False, **changes):
        return sweep(self.config, self.file(**changes), self.queries, self.qrels, dry_run=dry_run)

    def finished(self):
        return {path: path.stat().st_mtime_ns for path in (self.folder / "out" / "cells").glob("*.json")}

    def one(self, settings):
        """Return what building and evaluating one setting by itself gives."""
        config = override(self.config, BASE | settings | {"search.actors": 1})
        with open_job(config, "build-index") as job:
            build_index(job, full=True)
        return evaluate(config, self.queries, self.qrels).document


@pytest.fixture(scope="module")
def swept(tmp_path_factory, cluster):
    """A library that was swept once."""
    library = Library(tmp_path_factory.mktemp("swept"))
    library.fill()
    plan = library.sweep(dry_run=True)
    assert plan["to_encode"] == {"lexical": NUM_VIDEOS}
    assert library.store.open_or_none(TOKENS) is None, "a dry run writes nothing"
    library.result = library.sweep()
    return library


@pytest.fixture
def library(swept, tmp_path):
    """What was there before the sweep, but with its token embeddings."""
    library = Library(tmp_path)
    shutil.copytree(swept.store.uri, library.store.uri)
    for path in (swept.queries, swept.qrels):
        shutil.copy(path, tmp_path)
    return library


def test_cells_are_what_runs_of_their_own_give(swept, library):
    by_settings = {json.dumps(cell["settings"]): cell for cell in swept.result["cells"]}
    assert len(by_settings) == swept.result["reused"]["cells"] == NUM_CELLS
    for nbits, rescored in ((1, 20), (4, 0)):
        settings = dict(zip(GRID, (0, nbits, rescored), strict=True))
        alone, cell = library.one(settings), by_settings[json.dumps(settings)]
        own = {name: value for name, value in alone["measures"]["all"].items() if name != "queries"}
        assert cell["measures"] == own
        assert cell["recall_exact"] == alone["overlap@10 with exact"]
        assert cell["intervals"]["nDCG@10"] == alone["intervals"]["all"]["nDCG@10"]
        assert 0 < cell["bytes_per_video"] <= alone["cost"]["index_bytes_per_video"]
    assert len({json.dumps(cell["measures"]) for cell in swept.result["cells"]}) >= 6, "settings make a difference"


def test_pooled_tokens_are_fewer_and_belong_to_the_sweep(swept):
    tokens = {c["settings"]["encode.pool_tokens.metadata"]: c["tokens_per_video"] for c in swept.result["cells"]}
    assert tokens == {0: 12, 6: 6}
    assert swept.store.open(TOKENS).to_table(columns=["num_tokens"])["num_tokens"].unique().to_pylist() == [12]
    assert not (Path(swept.store.uri) / "index").exists(), "the store is only read"


def test_every_cell_says_what_it_costs_and_the_knee_is_a_config(swept, library):
    result = json.loads((swept.folder / "out" / "sweep.json").read_text())
    assert result["cells"] == swept.result["cells"]
    for cell in result["cells"]:
        assert 0 < cell["p50_seconds"] <= cell["p99_seconds"]
        assert cell["queries_per_second"] > 0
        assert cell["intervals"]["nDCG@10"][0] <= cell["measures"]["nDCG@10"] <= cell["intervals"]["nDCG@10"][1]
    [best] = [cell for cell in result["cells"] if cell["knee"]]
    assert best["pareto"]
    config = load([swept.folder / "out" / "best.yaml"], [], library.store.uri)
    assert config == override(load([], [], library.store.uri), best_settings(best))


def best_settings(cell):
    pool_tokens = {f"encode.pool_tokens.{m}": b for m, b in (("frame", 64), ("speech", 512), ("screen_text", 256))}
    of_blocks = {name: value for name, value in BASE.items() if not name.startswith("evaluate")}
    return of_blocks | pool_tokens | cell["settings"]


def test_a_sweep_that_is_done_does_nothing_and_a_larger_one_only_what_is_new(swept):
    before, index = swept.finished(), swept.folder / "out" / "work" / "index"
    built = {path.name: path.stat().st_mtime_ns for path in index.iterdir()}
    again = swept.sweep()
    assert again["reused"]["from_cache"] == NUM_CELLS
    assert [c["measures"] for c in again["cells"]] == [c["measures"] for c in swept.result["cells"]]
    larger = swept.sweep(grid=GRID | {"search.rescored": [0, 20, 48]}, base=BASE)
    assert larger["reused"]["from_cache"] == NUM_CELLS
    assert len(larger["cells"]) == 12
    assert before.items() <= swept.finished().items()
    assert {path.name: path.stat().st_mtime_ns for path in index.iterdir()} == built


def test_cells_that_ask_for_a_recall_get_the_curve_of_their_index(swept, library):
    folder = swept.folder / "out" / "curves"
    assert not folder.exists(), "cells that name their plan do not wait for one"
    grid = {"encode.pool_tokens.metadata": [0], "build_index.nbits": [4], "search.rescored": [None]}
    result = swept.sweep(grid=grid)
    [cell], [curve] = result["cells"], folder.iterdir()
    alone = library.one(cell["settings"])
    assert json.loads(curve.read_text()) == open_release(library.store).manifest["curve"]
    assert cell["measures"].items() <= alone["measures"]["all"].items()
    assert cell["recall_exact"] == alone["overlap@10 with exact"]


def test_a_sweep_killed_at_any_time_goes_on(swept, library):
    """Killed twice, once while it searches and once while it times, and finished by another process."""
    command = [sys.executable, "-m", "pipelines", "sweep", library.file(), "--store", library.store.uri]
    command += ["--queries", library.queries, "--qrels", library.qrels, "--set", "ray.num_cpus=2", "-q"]
    command += ["--set", "extract.modalities=[metadata]", "--set", "ray.object_store_bytes=150000000"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    for kind in ("quality", "cells"):
        with subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 60
            while len(list((library.folder / "out" / kind).glob("*.json"))) < 2 and time.monotonic() < deadline:
                assert process.poll() is None, process.stderr.read().decode()
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
    before = library.finished()
    assert 2 <= len(before) < NUM_CELLS
    result = library.sweep()
    assert result["reused"]["from_cache"] == len(before)
    assert before.items() <= library.finished().items(), "what was finished is not made again"
    assert [c["measures"] for c in result["cells"]] == [c["measures"] for c in swept.result["cells"]]


SMALL = {"grid": {"build_index.nbits": [1, 4]}, "base": BASE | {"encode.pool_tokens.metadata": 0}}


def test_an_index_that_was_not_finished_is_made_again(swept, library, monkeypatch):
    def lose_power(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pipelines.sweep_work.write_manifest", lose_power)
        with pytest.raises(KeyboardInterrupt):
            library.sweep(**SMALL)
    indices = [Path(lib.folder) / "out" / "work" / "index" for lib in (library, swept)]
    left = list(indices[0].iterdir())
    assert left
    assert {cell["error"] for cell in library.sweep(**SMALL)["cells"]} == {None}
    for path in left:
        ours, theirs = ([f for f in (index / path.name).rglob("*") if f.is_file()] for index in indices)
        assert len(ours) == len(theirs), "nothing of what was left is still there"
        assert find_manifest(Store.at(str(indices[0].parent)), path.name)["index_id"] == path.name


def test_a_cell_that_fails_is_recorded_and_the_others_are_done(library):
    grid = {"build_index.num_centroids": [16, 100_000], "search.probes": [1, 3]}
    with pytest.raises(TooManyFailuresError, match="2 of 4 cells failed") as failed:
        library.sweep(grid=grid, base=SMALL["base"])
    errors = {json.dumps(list(c["settings"].values())): c["error"] for c in failed.value.result["cells"]}
    assert errors["[16, 1]"] is errors["[16, 3]"] is None
    assert "100000" in errors["[100000, 1]"]
    kept = [json.loads(path.read_text()) for path in library.finished()]
    assert sorted(cell["error"] is None for cell in kept) == [False, False, True, True]
    file = library.file(grid=grid, base=SMALL["base"])
    run = CliRunner().invoke(
        app,
        [
            "sweep",
            *map(str, (file, "--store", library.store.uri, "--queries", library.queries, "--qrels", library.qrels)),
        ],
    )
    assert run.exit_code == 3
    assert "failed    {'build_index.num_centroids': 100000" in run.stdout
    assert "best.yaml" in run.stdout


def test_two_sweeps_into_one_folder_do_not_meet(library):
    with (
        pipelines.sweep.Lease(Store.at(str(library.folder / "out" / "work")), "the-other", "sweep"),
        pytest.raises(StoreHeldError, match="the-other"),
    ):
        library.sweep(**SMALL)


def test_a_file_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    keep(tmp_path / "cells" / "a.json", "before")
    monkeypatch.setattr(Path, "write_text", lambda self, *_, **__: self.write_bytes(b"aft") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        keep(tmp_path / "cells" / "a.json", "after")
    assert (tmp_path / "cells" / "a.json").read_text() == "before"
