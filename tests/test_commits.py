import json

import lance
import pyarrow as pa
import pytest

from cluster.commits import Committer, compact, was_committed, write_receipt
from cluster.lease import Lease
from cluster.retries import retried
from cluster.store import FAILURES
from operators.errors import StorageError

SCHEMA = pa.schema([("video_id", pa.string()), ("value", pa.int64())])


@pytest.fixture
def store(store):
    store.create("numbers", SCHEMA)
    return store


@pytest.fixture
def lease(store):
    with Lease(store, "run-a", "index") as lease:
        yield lease


def batch(*values, failures=None):
    return pa.table(
        {
            "video_id": [f"v{value}" for value in values],
            "value": pa.array(values, pa.int64()),
            "failures": pa.array([failures or []] * len(values), FAILURE_LIST),
            "fingerprints": [[{"stage": "decode", "fingerprint": "abc"}]] * len(values),
            "timings": pa.array([[]] * len(values), TIMING_LIST),
        }
    )


FAILURE_LIST = pa.list_(
    pa.struct([("stage", pa.string()), ("error", pa.string()), ("message", pa.string()), ("final", pa.bool_())])
)
TIMING_LIST = pa.list_(pa.struct([("stage", pa.string()), ("seconds", pa.float64()), ("cpu_seconds", pa.float64())]))


def receipt(store, rows):
    [made] = write_receipt(
        rows, store, "numbers", SCHEMA, lambda b: b.select(["video_id", "value"]), lambda r: {"n": r.num_rows}
    ).to_pylist()
    return made


def committer(store, lease, attempts=None, every_rows=1000, every_seconds=1000.0):
    return Committer(store, "numbers", lease, "run-a", attempts or {}, every_rows, every_seconds)


def values(store):
    return sorted(store.open("numbers").to_table()["value"].to_pylist())


def test_fragments_written_but_not_committed_are_invisible(store, lease):
    receipt(store, batch(1, 2))
    assert values(store) == []


def test_receipts_become_rows_when_they_are_flushed(store, lease):
    writer = committer(store, lease)
    writer.add(receipt(store, batch(1, 2)))
    writer.add(receipt(store, batch(3)))
    assert values(store) == []
    writer.flush()
    assert values(store) == [1, 2, 3]
    assert writer.tally.counts["n"] == 3


def test_a_commit_happens_every_n_rows(store, lease):
    writer = committer(store, lease, every_rows=2)
    writer.add(receipt(store, batch(1)))
    assert values(store) == []
    writer.add(receipt(store, batch(2)))
    assert values(store) == [1, 2]


def test_a_commit_happens_every_m_seconds(store, lease):
    writer = committer(store, lease, every_seconds=0.0)
    writer.add(receipt(store, batch(1)))
    assert values(store) == [1]


def test_a_commit_whose_answer_was_lost_is_not_done_twice(store, lease, monkeypatch):
    """The fault is in the seam to storage: the transaction lands, then the call raises."""
    real = lance.LanceDataset.commit
    calls = []

    def lands_then_raises(*args, **kwargs):
        result = real(*args, **kwargs)
        calls.append(1)
        if len(calls) == 1:
            raise OSError("connection reset while reading the answer")
        return result

    monkeypatch.setattr(lance.LanceDataset, "commit", staticmethod(lands_then_raises))
    monkeypatch.setattr("cluster.commits.time.sleep", lambda _: None)
    writer = committer(store, lease)
    writer.add(receipt(store, batch(1, 2)))
    writer.flush()
    assert values(store) == [1, 2]
    assert len(calls) == 1


def test_a_commit_that_did_not_land_is_tried_again(store, lease, monkeypatch):
    real = lance.LanceDataset.commit
    calls = []

    def raises_first(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("no route to host")
        return real(*args, **kwargs)

    monkeypatch.setattr(lance.LanceDataset, "commit", staticmethod(raises_first))
    monkeypatch.setattr("cluster.commits.time.sleep", lambda _: None)
    writer = committer(store, lease)
    writer.add(receipt(store, batch(1, 2)))
    writer.flush()
    assert values(store) == [1, 2]


def test_every_transaction_names_its_run(store, lease):
    writer = committer(store, lease)
    writer.add(receipt(store, batch(1)))
    writer.flush()
    latest = store.open("numbers").get_transactions(1)[0]
    assert latest.transaction_properties["maxreel.run"] == "run-a"
    assert was_committed(store.open("numbers"), latest.transaction_properties["maxreel.commit"])
    assert not was_committed(store.open("numbers"), "another")


def test_an_item_that_failed_becomes_a_row_in_failures_with_its_fingerprint(store, lease):
    failure = {"stage": "decode", "error": "MediaError", "message": "no moov atom", "final": True}
    writer = committer(store, lease)
    writer.add(receipt(store, batch(7, failures=[failure])))
    writer.flush()
    [row] = store.open(FAILURES).to_table().to_pylist()
    assert (row["video_id"], row["stage"], row["fingerprint"], row["attempts"]) == ("v7", "decode", "abc", 1)


@pytest.mark.parametrize(("known", "expected"), [(("abc", 2), 3), (("changed", 2), 1)])
def test_attempts_count_up_until_the_source_changes(store, lease, known, expected):
    failure = {"stage": "decode", "error": "SourceError", "message": "gone", "final": False}
    writer = committer(store, lease, attempts={("v7", "decode"): known})
    writer.add(receipt(store, batch(7, failures=[failure])))
    writer.flush()
    assert store.open(FAILURES).to_table()["attempts"].to_pylist() == [expected]


def test_several_clips_of_one_video_that_fail_count_as_one_attempt(store, lease):
    failure = {"stage": "decode", "error": "SourceError", "message": "gone", "final": False}
    writer = committer(store, lease)
    writer.add(receipt(store, batch(7, 7, failures=[failure])))
    writer.flush()
    assert store.open(FAILURES).to_table()["attempts"].to_pylist() == [1]


def test_compaction_keeps_every_row(store, lease, monkeypatch):
    monkeypatch.setattr("cluster.commits.COMPACT_FRAGMENTS", 8)
    writer = committer(store, lease, every_rows=1)
    for value in range(10):
        writer.add(receipt(store, batch(value)))
    compact(store, "numbers", lease)
    assert values(store) == list(range(10))
    assert len(store.open("numbers").get_fragments()) < 10


def test_compaction_leaves_large_fragments_as_they_are(store, lease, monkeypatch):
    monkeypatch.setattr("cluster.commits.COMPACT_FRAGMENTS", 8)
    monkeypatch.setattr("cluster.commits.COMPACT_ROWS", 50)
    large = committer(store, lease, every_rows=1)
    large.add(receipt(store, batch(*range(1000, 1060))))
    [before] = [f.data_files()[0].path for f in store.open("numbers").get_fragments()]
    for value in range(10):
        large.add(receipt(store, batch(value)))
    compact(store, "numbers", lease)
    files = [f.data_files()[0].path for f in store.open("numbers").get_fragments()]
    assert before in files
    assert len(files) < 5


def test_row_ids_stay_when_a_table_is_compacted_and_never_come_again(store, lease, monkeypatch):
    monkeypatch.setattr("cluster.commits.COMPACT_FRAGMENTS", 8)
    writer = committer(store, lease, every_rows=1)
    for value in range(10):
        writer.add(receipt(store, batch(value)))
    ids = lambda: {r["value"]: r["_rowid"] for r in store.rows("numbers", ["value"], SCHEMA).to_pylist()}  # noqa: E731
    before = ids()
    store.delete_rows("numbers", [before[9]])
    compact(store, "numbers", lease)
    writer.add(receipt(store, batch(9)))
    after = ids()
    assert {value: after[value] for value in range(9)} == {value: before[value] for value in range(9)}
    assert after[9] not in before.values()
    assert store.take("numbers", store.open("numbers").version, [before[3], before[1]], ["value"])[
        "value"
    ].to_pylist() == [3, 1]


def test_a_table_of_other_columns_is_refused_and_not_emptied(store):
    lance.write_dataset(
        pa.table({"video_id": ["kept"]}), store.table_uri("videos"), storage_options=dict(store.options) or None
    )
    with pytest.raises(StorageError, match="other columns than this maxreel writes"):
        store.create("videos")
    assert store.open("videos").count_rows() == 1


@pytest.mark.parametrize("number", [13, 28, 30])
def test_a_disk_that_is_full_or_not_ours_is_not_asked_again(number):
    asked = []

    def write():
        asked.append(number)
        raise OSError(f"LanceError(IO): it will not (os error {number})")

    with pytest.raises(OSError, match=f"os error {number}"):
        retried(write, "writing")
    assert asked == [number]


def test_a_receipt_survives_json(store):
    made = receipt(store, batch(1))
    assert json.loads(made["fragments"][0])["physical_rows"] == 1
