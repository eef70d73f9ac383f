import json
import os

import pyarrow as pa
import pyarrow.parquet
import pytest

from operators.errors import ConfigError, SourceError
from pipelines import manifest


def entries(path, source="stat", chunk_rows=100):
    return [entry for chunk in manifest.read(str(path), source, chunk_rows) for entry in chunk]


@pytest.fixture
def corpus(tmp_path):
    for name in ("a.mp4", "b.webm", "notes.txt", "with space.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "-c.MOV").write_bytes(b"c")
    return tmp_path


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_gives_its_videos_with_ids_from_their_paths(corpus):
    found = entries(corpus)
    assert [entry.video_id.split("~")[0] for entry in found] == ["a.mp4", "b.webm", "deep/-c.MOV", "with_space.mp4"]
    assert all(os.path.exists(entry.uri) for entry in found)
    assert all(entry.title is None for entry in found), "a file name is never text to be indexed"


def test_a_folder_without_videos_is_a_usage_error(tmp_path):
    with pytest.raises(ConfigError, match="holds no videos"):
        entries(tmp_path)


def test_jsonl_csv_and_parquet_give_the_same_entries(corpus):
    rows = [{"video_id": "v1", "uri": "a.mp4", "title": "A", "tags": "x, y"}, {"video_id": "v2", "uri": "b.webm"}]
    jsonl = write_jsonl(corpus / "m.jsonl", *rows)
    (corpus / "m.csv").write_text('video_id,uri,title,tags\nv1,a.mp4,A,"x, y"\nv2,b.webm,,\n')
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), corpus / "m.parquet")
    assert entries(jsonl) == entries(corpus / "m.csv") == entries(corpus / "m.parquet")
    assert entries(jsonl)[0].tags == ("x", "y")


def test_other_columns_are_kept_in_extra(corpus):
    [entry] = entries(write_jsonl(corpus / "m.jsonl", {"uri": "a.mp4", "licence": "CC0", "views": 3}))
    assert json.loads(entry.extra) == {"licence": "CC0", "views": 3}


def test_a_uri_is_relative_to_the_manifest_and_gives_the_id(corpus):
    [entry] = entries(write_jsonl(corpus / "m.jsonl", {"uri": "deep/-c.MOV"}))
    assert (entry.video_id, entry.uri) == ("deep/-c.MOV", str(corpus / "deep" / "-c.MOV"))


def test_a_video_without_uri_is_metadata_only(corpus):
    [entry] = entries(write_jsonl(corpus / "m.jsonl", {"video_id": "d1", "title": "only text"}))
    assert (entry.uri, entry.error) == (None, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video_id": "a b", "uri": "a.mp4"}, "white space"),
        ({"video_id": "x", "uri": "missing.mp4"}, "there is no file"),
    ],
)
def test_an_entry_that_cannot_be_used_carries_its_error_and_the_others_go_on(corpus, row, message):
    bad, good = entries(write_jsonl(corpus / "m.jsonl", row, {"video_id": "ok", "uri": "b.webm"}))
    assert message in str(bad.error)
    assert good.error is None


def test_a_repeated_id_is_an_error_of_the_second_entry(corpus):
    first, second = entries(
        write_jsonl(corpus / "m.jsonl", {"video_id": "v", "uri": "a.mp4"}, {"video_id": "v", "uri": "b.webm"})
    )
    assert first.error is None
    assert "already used by entry 1" in str(second.error)


def test_a_line_that_is_not_json_is_named(corpus):
    (corpus / "m.jsonl").write_text('{"uri": "a.mp4"}\n{"uri": \n')
    with pytest.raises(ConfigError, match=r"m\.jsonl, line 2"):
        entries(corpus / "m.jsonl")


def test_there_is_no_manifest(tmp_path):
    with pytest.raises(ConfigError, match="there is no manifest"):
        entries(tmp_path / "nowhere.jsonl")


def test_a_manifest_is_read_in_chunks(corpus):
    path = write_jsonl(corpus / "m.jsonl", *({"video_id": f"v{i}"} for i in range(5)))
    assert [len(chunk) for chunk in manifest.read(str(path), "stat", 2)] == [2, 2, 1]


def test_stat_notices_a_new_modification_time_and_content_only_new_bytes(corpus):
    video = corpus / "a.mp4"
    before = [manifest.identify(str(video), source) for source in ("stat", "content")]
    os.utime(video, ns=(1, 1))
    after = [manifest.identify(str(video), source) for source in ("stat", "content")]
    assert before[0] != after[0]
    assert before[1] == after[1]
    video.write_bytes(b"other")
    assert manifest.identify(str(video), "content") != before[1]


def test_a_uri_that_cannot_be_reached_is_a_source_error():
    with pytest.raises(SourceError):
        manifest.identify("nosuchscheme://bucket/a.mp4", "stat")
