"""SIGKILL at several moments, then the same command again: the rows of a run that was never killed."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cluster.store import MODALITIES, VIDEOS, Store, token_table
from tests.media_files import make_video

TOKENS = token_table("multivector")
NUM_VIDEOS = 12


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    for i in range(NUM_VIDEOS):
        make_video(folder / f"v{i}.mp4", levels=[20 * i] * 10)
    rows = [{"video_id": f"v{i}", "uri": f"v{i}.mp4", "title": f"red moon {i}"} for i in range(NUM_VIDEOS)]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "manifest.jsonl"


def start(manifest, store, model):
    assignments = [
        "extract.modalities=[frame,metadata]",
        "encode.encoder=multivector",
        f"encode.multivector.model={model}/late",
        "encode.resources.batch_clips=2",
        "storage.commit_rows=1",
        "ray.num_cpus=2",
        "ray.object_store_bytes=200000000",
    ]
    command = [sys.executable, "-m", "pipelines", "index", str(manifest), "--store", store.uri, "--json", "-q"]
    for assignment in assignments:
        command += ["--set", assignment]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def num_rows(store, table):
    dataset = store.open_or_none(table)
    return 0 if dataset is None else dataset.count_rows()


def kill_once(process, reached):
    """Kill as soon as a condition holds; return whether it was still running."""
    while process.poll() is None and not reached():
        time.sleep(0.05)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return running


def contents(store):
    rows = {}
    for table in (VIDEOS, MODALITIES, TOKENS):
        for row in store.open(table).to_table().to_pylist():
            key = (table, row["video_id"], row.get("clip"), row.get("modality"))
            assert key not in rows, f"doubled: {key}"
            row["embeddings"] = np.array(row.pop("embeddings", []), np.float32)
            rows[key] = row
    return rows


def test_a_run_killed_at_several_moments_ends_in_the_same_rows(manifest, tmp_path, tiny_model):
    undisturbed, store = Store.at(str(tmp_path / "undisturbed")), Store.at(str(tmp_path / "killed"))
    out, err = start(manifest, undisturbed, tiny_model).communicate()
    assert json.loads(out)["counts"]["new"] == NUM_VIDEOS, err

    moments = [
        lambda: os.path.exists(f"{store.uri}/_lease"),
        lambda: num_rows(store, VIDEOS) > 0,
        lambda: num_rows(store, MODALITIES) > 0,
        lambda: num_rows(store, TOKENS) > 0,
    ]
    killed = [kill_once(start(manifest, store, tiny_model), moment) for moment in moments]
    assert sum(killed) >= 3, "most of the kills must hit a running job"
    out, err = start(manifest, store, tiny_model).communicate()
    assert "error" not in json.loads(out), err

    expected, found = contents(undisturbed), contents(store)
    assert found.keys() == expected.keys()
    assert len(found) == NUM_VIDEOS * (1 + 2 + 2)
    for key, row in expected.items():
        embeddings = found[key].pop("embeddings")
        # Batches may be cut elsewhere, and matrix products of other shapes differ in their last bits.
        np.testing.assert_allclose(embeddings, row.pop("embeddings"), atol=2e-3)
        assert found[key] == row
