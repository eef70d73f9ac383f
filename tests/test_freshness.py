import pyarrow as pa

from cluster.freshness import Quarantine, compare


def expected(**fingerprints):
    return pa.table({"key": list(fingerprints), "fingerprint": list(fingerprints.values())})


def existing(*rows):
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    return pa.table(
        {
            "key": pa.array(columns[0], pa.string()),
            "fingerprint": pa.array(columns[1], pa.string()),
            "rows_per_key": pa.array(columns[2], pa.int64()),
            "_rowid": pa.array(range(len(rows)), pa.uint64()),
        }
    )


def names(table):
    return sorted(table["key"].to_pylist())


def test_everything_is_missing_from_an_empty_table():
    result = compare(expected(a="1", b="1"), existing(), ["key"])
    assert names(result.missing) == ["a", "b"]
    assert result.surplus_row_ids == []


def test_nothing_is_done_where_every_fingerprint_matches():
    result = compare(expected(a="1"), existing(("a", "1", 1)), ["key"])
    assert (names(result.missing), result.surplus_row_ids, result.num_fresh) == ([], [], 1)


def test_a_changed_fingerprint_is_redone_and_its_old_row_removed():
    result = compare(expected(a="2", b="1"), existing(("a", "1", 1), ("b", "1", 1)), ["key"])
    assert names(result.missing) == ["a"]
    assert result.surplus_row_ids == [0]


def test_a_key_with_some_of_its_clips_is_redone_whole():
    result = compare(expected(a="1"), existing(("a", "1", 3), ("a", "1", 3)), ["key"])
    assert names(result.missing) == ["a"]
    assert result.surplus_row_ids == [0, 1]


def test_a_key_with_all_of_its_clips_is_fresh():
    result = compare(expected(a="1"), existing(("a", "1", 2), ("a", "1", 2)), ["key"])
    assert names(result.missing) == []


def test_doubled_rows_are_found_and_redone():
    result = compare(expected(a="1"), existing(("a", "1", 1), ("a", "1", 1)), ["key"])
    assert names(result.missing) == ["a"]
    assert result.surplus_row_ids == [0, 1]


def test_an_old_version_beside_a_complete_new_one_is_removed():
    result = compare(expected(a="2"), existing(("a", "1", 1), ("a", "2", 1)), ["key"])
    assert names(result.missing) == []
    assert result.surplus_row_ids == [0]


def test_rows_that_nothing_expects_are_surplus():
    result = compare(expected(a="1"), existing(("a", "1", 1), ("gone", "1", 1)), ["key"])
    assert result.surplus_row_ids == [1]


def test_a_failure_is_quarantined_when_it_is_final_or_was_tried_often_enough():
    known = {"v": ("f", 3, False, 0.0), "w": ("f", 1, True, 0.0), "x": ("f", 2, False, 0.0)}
    known = {(video, "decode"): failure for video, failure in known.items()}
    quarantine = Quarantine(known, max_attempts=3, wait_seconds=60)
    assert [quarantine.is_out(video, "decode", "f") for video in "vwxy"] == [True, True, False, False]


def test_a_changed_source_leaves_quarantine():
    quarantine = Quarantine({("v", "decode"): ("f", 9, True, 0.0)}, max_attempts=3, wait_seconds=60)
    assert not quarantine.holds("v", {"decode": "changed"})


def test_each_further_attempt_waits_twice_as_long():
    known = {("once", "decode"): ("f", 1, False, 1000.0), ("twice", "decode"): ("f", 2, False, 1000.0)}
    quarantine = Quarantine(known, max_attempts=9, wait_seconds=60)
    waits = {
        (video, now): quarantine.waits(video, {"decode": "f"}, now)
        for video in ("once", "twice")
        for now in (1059, 1061, 1121)
    }
    assert [waits["once", now] for now in (1059, 1061)] == [True, False]
    assert [waits["twice", now] for now in (1061, 1121)] == [True, False]
    assert not quarantine.waits("once", {"decode": "changed"}, 1001)
