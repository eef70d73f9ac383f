"""Everything on a real S3 protocol: the chain, what it does when storage fails, and where credentials may not turn up."""

import json
import logging
import time
from pathlib import Path

import lance
import obstore
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from cluster.commits import Committer
from cluster.index_store import num_bytes
from cluster.lease import Lease
from cluster.objects import open_objects
from cluster.retries import retried
from cluster.store import FAILURES, MODALITIES, RELEASES, RUNS, VIDEOS, Store, token_table
from operators.decode import Child
from operators.encoders import Query
from operators.errors import ConfigError, SourceError, StorageError
from operators.remote import Environment, locate
from pipelines import doctor, manifest
from pipelines.build_index import build_index
from pipelines.config import load
from pipelines.encode import encode
from pipelines.extract import extract
from pipelines.gc import gc
from pipelines.ingest import ingest
from pipelines.job import open_job
from pipelines.nightly import nightly
from pipelines.release import open_release
from pipelines.search import search
from pipelines.status import status
from tests.media_files import make_video
from tests.s3_keys import ACCESS_KEY, SECRET_KEY
from tests.test_commits import SCHEMA, batch, receipt, values

KEYS = {"MAXREEL_TEST_KEY": ACCESS_KEY, "MAXREEL_TEST_SECRET": SECRET_KEY}


@pytest.fixture
def keys(monkeypatch):
    """The credentials are in variables of this process, and nowhere else: workers must be given them."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def configure(s3, keys):
    def configure(*assignments, store="s3://night/store"):
        storage = [
            f"storage.endpoint={s3.url}",
            "storage.region=us-east-1",
            "storage.access_key_id_env=MAXREEL_TEST_KEY",
            "storage.secret_access_key_env=MAXREEL_TEST_SECRET",
        ]
        return load([], [*storage, *assignments], store)

    return configure


@pytest.fixture
def bucket(s3):
    """The bucket of videos; each test has its own prefix in it."""
    return open_objects("s3://videos", s3.options)


def environment(s3):
    found = {
        "AWS_ENDPOINT_URL_S3": s3.url,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    }
    return Environment(found)


def test_the_whole_chain_runs_in_buckets_and_shows_no_credential(configure, bucket, s3, cluster, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    names = ["plain.mp4", "with space.mp4", "100%25 & #1?.mp4"]
    for level, name in enumerate(names):
        make_video(tmp_path / "video.mp4", levels=[60 + 60 * level] * 10)
        obstore.put(bucket, f"corpus/{name}", (tmp_path / "video.mp4").read_bytes())
    rows = [
        {"video_id": "v0", "uri": names[0], "title": "red cat"},
        {"video_id": "v1", "uri": f"s3://videos/corpus/{names[1]}", "title": "blue dog"},
        {"video_id": "v2", "uri": names[2], "title": "green moon"},
        {"video_id": "gone", "uri": "gone.mp4", "title": "red dog"},
        {"video_id": "kept from us", "uri": "s3://forbidden/a.mp4", "title": "red dog"},
        {"video_id": "forbidden", "uri": "s3://forbidden/a.mp4", "title": "red dog"},
    ]
    obstore.put(bucket, "corpus/manifest.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    config = configure(
        "extract.modalities=[frame,metadata]",
        "extract.frames.frames_per_clip=2",
        "extract.resources.decode=1",
        "encode.encoder=lexical",
        "encode.resources.actors=1",
        "build_index.nbits=8",
        "max_failure_rate=1.0",
        "manifest=s3://videos/corpus/manifest.jsonl",
        "gates.min_overlap=null",
        "gc={keep_releases: 1, keep_hours: 0, after_nightly: false}",
    )

    def index():
        with open_job(config, "index") as job:
            ingest(job, "s3://videos/corpus/manifest.jsonl")
            extract(job)
            encode(job)
        return job.summary.counts

    assert index()["new"] == 3
    with open_job(config, "build-index") as job:
        build_index(job)
    [first, *_] = search(config, Query(text="green moon"), 3, True)
    assert first.video_id == "v2"

    obstore.put(bucket, f"corpus/{names[0]}", (tmp_path / "video.mp4").read_bytes())
    with open_job(config, "nightly") as job:
        nightly(job)
    counts = job.summary.counts
    assert (counts["changed"], counts["unchanged"], counts["extract"]) == (1, 2, 1)
    assert job.summary.release == {"release_id": 2, "live_before": 1, "state": "published"}
    assert search(config, Query(text="green moon"), 3, True)[0].video_id == "v2"
    with open_job(config, "gc") as job:
        assert gc(job)["releases"] == [1]

    store = Store.at(config.store, s3.options)
    keys = [(row["video_id"], row["modality"]) for row in store.open(MODALITIES).to_table().to_pylist()]
    assert sorted(keys) == [(f"v{i}", modality) for i in range(3) for modality in ("frame", "metadata")]
    assert store.open(token_table("lexical")).count_rows() == 6
    failed = {row["video_id"]: row["message"] for row in store.open(FAILURES).to_table().to_pylist()}
    assert failed.keys() == {"gone", "line 5", "forbidden"}
    assert "there is no file at s3://videos/corpus/gone.mp4" in failed["gone"]
    assert "ACCESS_DENIED" in failed["forbidden"]
    found = status(config)
    assert found["tables"][VIDEOS]["rows"] == 3
    assert (found["held_by"], found["stale"]["extract"]) == (None, 0)
    listed = obstore.list(store.objects, "index/").collect()
    assert num_bytes(store, open_release(store).manifest) == sum(entry["size"] for entry in listed) > 1000, "no orphans"

    recorded = [store.open(name).to_table().to_pylist() for name in (RUNS, RELEASES, FAILURES, VIDEOS)]
    logs = Path(cluster._private.worker.global_worker.node.get_logs_dir_path()).rglob("*")
    logged = "".join(path.read_text(errors="replace") for path in logs if path.is_file())
    assert "MapBatches(Decode)" in logged
    for shown in (str(recorded), logged, caplog.text, repr(store), repr(config), str(found)):
        assert SECRET_KEY not in shown
        assert ACCESS_KEY not in shown


def test_a_prefix_is_a_folder_of_videos(s3, bucket):
    for name in ("b.mp4", "deeper/a.mov", "notes.txt"):
        obstore.put(bucket, f"prefix/{name}", b"x")
    [entries] = manifest.read("s3://videos/prefix/", "content", 10, environment=environment(s3))
    assert [(entry.video_id, entry.uri, entry.error) for entry in entries] == [
        ("b.mp4", "s3://videos/prefix/b.mp4", None),
        ("deeper/a.mov", "s3://videos/prefix/deeper/a.mov", None),
    ]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_manifests_in_buckets_are_read(s3, bucket, suffix):
    table = pa.table({"uri": ["a.mp4"], "title": ["red cat"]})
    sink = pa.BufferOutputStream()
    (pa.csv.write_csv if suffix == ".csv" else pa.parquet.write_table)(table, sink)
    obstore.put(bucket, f"tables/m{suffix}", sink.getvalue().to_pybytes())
    obstore.put(bucket, "tables/a.mp4", b"x")
    [[entry]] = manifest.read(f"s3://videos/tables/m{suffix}", "stat", 10, environment=environment(s3))
    assert (entry.uri, entry.title, entry.error) == ("s3://videos/tables/a.mp4", "red cat", None)


def test_a_manifest_that_may_not_be_read_is_said_to_be(s3):
    with pytest.raises(ConfigError, match="cannot read the manifest s3://forbidden/m.jsonl.*ACCESS_DENIED"):
        list(manifest.read("s3://forbidden/m.jsonl", "stat", 10, environment=environment(s3)))


def test_reading_a_file_survives_more_refusals_than_pyarrow_does_by_itself(s3, bucket):
    obstore.put(bucket, "patience.bin", b"abc")
    s3.fail(503, times=3, path="patience")
    filesystem, path = locate("s3://videos/patience.bin", environment(s3).over({}))
    assert filesystem.open_input_stream(path).read() == b"abc"


def test_credentials_in_a_uri_are_refused_and_not_repeated(s3):
    with pytest.raises(SourceError, match="holds credentials") as caught:
        manifest.identify("s3://me:hunter2@videos/a.mp4", "stat")
    assert "hunter2" not in str(caught.value)


def test_the_query_of_a_signed_url_is_in_no_message():
    uri = "https://127.0.0.1:1/videos/a.mp4?X-Amz-Credential=me&X-Amz-Signature=hunter2"
    with pytest.raises(SourceError) as listing:
        manifest.identify(uri, "stat")
    child = Child(20)
    try:
        with pytest.raises(SourceError) as opening:
            child.request("open", uri=uri, max_side=64)
    finally:
        child.close()
    for caught in (listing, opening):
        assert "a.mp4" in str(caught.value)
        assert "hunter2" not in str(caught.value)


def committer(store, lease):
    return Committer(store, "numbers", lease, "run-a", {}, 1000, 1000.0)


@pytest.mark.parametrize(
    ("what", "times", "path"),
    [
        (503, 9, "_versions|_transactions"),
        ("reset", 4, "_versions|_transactions"),
        (503, 9, "numbers.lance/data"),
        ("lose the answer", 1, "_versions"),
        ("lose the answer", 2, "_versions"),
    ],
)
def test_rows_are_committed_once_whatever_storage_does(s3, tmp_path, monkeypatch, what, times, path):
    """Without retries of Lance's own, so that ours are what is tested; a wait of ours takes no time."""
    monkeypatch.setattr("cluster.retries.time.sleep", lambda _: None)
    store = s3.store(tmp_path.name)
    store.create("numbers", SCHEMA)
    impatient = Store.at(store.uri, s3.options | {"client_max_retries": "0"})
    with Lease(store, "run-a", "index") as lease:
        writer = committer(impatient, lease)
        s3.fail(what, times, "PUT|POST", path)
        writer.add(receipt(impatient, batch(1, 2)))
        writer.flush()
        s3.requests()
        writer.add(receipt(impatient, batch(3)))
        writer.flush()
    assert values(store) == [1, 2, 3]


def test_an_upsert_is_done_again_and_leaves_one_row(s3, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.retries.time.sleep", lambda _: None)
    store = Store.at(f"s3://night/{tmp_path.name}", s3.options | {"client_max_retries": "0"})
    store.create(FAILURES)
    row = {"video_id": "v1", "stage": "decode", "attempts": 1}
    table = pa.Table.from_pylist([row], schema=store.open(FAILURES).schema)
    for what in (503, "lose the answer", "reset"):
        s3.fail(what, 4 if what == 503 else 1, "PUT", "failures.lance/_versions")
        store.upsert(FAILURES, table, ["video_id", "stage"])
        s3.requests()
    assert [found["video_id"] for found in store.open(FAILURES).to_table().to_pylist()] == ["v1"]


def test_waits_grow_and_differ(monkeypatch):
    waits = []
    monkeypatch.setattr("cluster.retries.time.sleep", waits.append)

    def fail():
        raise OSError("connection reset")

    for _ in range(2):
        with pytest.raises(OSError, match="reset"):
            retried(fail, "a test")
    first, second = waits[:4], waits[4:]
    assert first != second
    assert all(2**i / 2 <= wait <= 2**i for waits in (first, second) for i, wait in enumerate(waits))


def test_a_store_that_refuses_is_not_asked_again(s3, monkeypatch):
    monkeypatch.setattr("cluster.retries.time.sleep", lambda _: pytest.fail("it waited"))
    store = Store.at("s3://night/refused", s3.options | {"aws_secret_access_key": "hunter2"})
    with pytest.raises(StorageError, match="403") as caught:
        retried(lambda: store.open(VIDEOS), "a test")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("assignments", "store", "detail", "mend"),
    [
        ([], "s3://forbidden/store", "AccessDenied", "refuses these credentials"),
        ([], "s3://not-there/store", "NoSuchBucket", "create the bucket"),
        (["storage.options={aws_secret_access_key: hunter2}"], "s3://night/a", "AccessDenied", "refuses these"),
        (
            ["storage.endpoint=http://127.0.0.1:1"],
            "s3://night/a",
            "error sending request",
            "in force: http://127.0.0.1:1",
        ),
        (["storage.session_token_env=NOT_SET_ANYWHERE"], "s3://night/a", "session_token_env", "correct the setting"),
        (["storage.options={aws_colour: red}"], "s3://night/a", "aws_colour", "correct the setting"),
    ],
)
def test_doctor_says_within_seconds_what_is_wrong_with_a_store(configure, assignments, store, detail, mend):
    started = time.perf_counter()
    check = doctor._store(configure(*assignments, store=store))
    assert (check.level, detail in check.detail, mend in check.mend) == ("FAIL", True, True)
    assert time.perf_counter() - started < 10
    assert "hunter2" not in f"{check}"


def test_doctor_finds_a_good_store_and_one_that_two_runs_could_write(configure, s3):
    assert doctor._store(configure(store="s3://night/fine")).level == "ok"
    s3.fail("ignore conditions", times=2, method="PUT", path="_doctor")
    check = doctor._store(configure(store="s3://night/fine"))
    assert (check.level, "If-None-Match" in check.mend) == ("FAIL", True)


def test_options_that_hold_credentials_are_neither_recorded_nor_shown(configure):
    config = configure(
        "storage.options={aws_secret_access_key: hunter2, proxy_url: 'http://me:hunter2@host', timeout: 9s}"
    )
    recorded = json.loads(config.model_dump_json())["storage"]["options"]
    assert recorded == {"aws_secret_access_key": "***", "proxy_url": "***", "timeout": "9s"}
    assert "hunter2" not in repr(config)
    assert config.storage.to_options()["aws_secret_access_key"] == "hunter2"


@pytest.mark.parametrize(
    "assignment",
    [
        "storage.options={aws_secret_access_key: [hunter2]}",
        "storage.endpoint=http://me:hunter2@host",
        "storage.secret_access_key=hunter2",
        "storage=hunter2",
        "storage.access_key_id_env=hunter2",
    ],
)
def test_a_wrong_storage_setting_is_not_repeated(assignment):
    with pytest.raises(ConfigError, match="storage") as caught:
        load([], [assignment])
    assert "hunter2" not in str(caught.value)


def test_a_session_token_of_other_keys_is_refused(configure, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hunter2")
    with pytest.raises(ConfigError, match="AWS_SESSION_TOKEN belongs to other keys"):
        configure().storage.to_options()


def test_a_store_in_no_bucket_is_said_to_be_nowhere(s3):
    with pytest.raises(StorageError, match="cannot take the lease on s3://not-there/store.*NoSuchBucket"):
        Lease(Store.at("s3://not-there/store", s3.options), "run-a", "index").__enter__()


def test_where_the_store_is_may_be_said_by_the_environment(monkeypatch, s3):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    config = load([], [], "s3://night/by-environment")
    store = Store.at(config.store, config.storage.to_options())
    store.put_json("a.json", [1])
    assert store.get_json("a.json") == [1]
    assert store.create(VIDEOS).count_rows() == 0
    assert lance.dataset(f"{config.store}/videos.lance", storage_options={"allow_http": "true"}).version == 1
