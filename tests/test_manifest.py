import contextlib
import email.utils
import gzip
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet
import pytest

from operators.errors import ConfigError, SourceError
from pipelines import manifest


def entries(path, source="stat", chunk_rows=100, **options):
    return [entry for chunk in manifest.read(str(path), source, chunk_rows, **options) for entry in chunk]


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
    assert "already used by line 1" in str(second.error)


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


def test_check_lists_the_ids_that_read_gives(corpus):
    for path in (
        corpus,
        write_jsonl(corpus / "m.jsonl", {"uri": "a.mp4"}, {"video_id": 7}, {"video_id": "x y"}, {"uri": "b"}),
    ):
        usable = [entry.video_id for entry in entries(path) if " " not in entry.video_id]
        assert manifest.check(str(path)).ids.to_pylist() == usable
    checked = manifest.check(str(corpus / "m.jsonl"))
    assert (len(checked.ids), checked.num_entries) == (3, 4)


def test_check_looks_at_no_video(corpus):
    path = write_jsonl(corpus / "m.jsonl", {"uri": "missing.mp4"}, {"uri": "nosuchscheme://nowhere/a.mp4"})
    assert manifest.check(str(path)).ids.to_pylist() == ["missing.mp4", "nosuchscheme://nowhere/a.mp4"]


@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
def test_the_first_of_repeated_ids_is_kept_in_whatever_chunk_they_are(corpus, chunk_rows):
    rows = [{"video_id": video_id} for video_id in "vwvvw"]
    found = entries(write_jsonl(corpus / "m.jsonl", *rows), chunk_rows=chunk_rows)
    assert [entry.error is None for entry in found] == [True, True, False, False, False]
    assert "line 5: the video_id 'w' was already used by line 2" in str(found[-1].error)


def test_a_manifest_that_changes_between_check_and_read_or_while_it_is_read_is_refused(corpus):
    path = write_jsonl(corpus / "m.jsonl", *({"video_id": f"v{i}"} for i in range(4)))
    checked = manifest.check(str(path))
    chunks = manifest.read(str(path), "stat", 2, checked=checked)
    assert len(next(chunks)) == 2
    write_jsonl(path, {"video_id": "only"})
    with pytest.raises(ConfigError, match="changed while it was read"):
        next(chunks)
    with pytest.raises(ConfigError, match="changed while it was read"):
        entries(path, checked=checked)


def test_a_folder_may_gain_videos_between_check_and_read(corpus):
    checked = manifest.check(str(corpus))
    (corpus / "new.mp4").write_bytes(b"new")
    assert "new.mp4" in [entry.video_id for entry in entries(corpus, checked=checked)]


def test_a_folder_and_a_manifest_given_as_uris_give_the_same_videos(corpus):
    (corpus / "50%25?.mp4").write_bytes(b"x")
    local, remote = entries(corpus), entries(f"file://{corpus}")
    assert [entry.error for entry in remote] == [None] * 5
    assert [(entry.video_id, entry.source_fingerprint) for entry in remote] == [
        (entry.video_id, entry.source_fingerprint) for entry in local
    ]
    listed = write_jsonl(corpus / "m.jsonl", {"uri": "with space.mp4"}, {"uri": "with%20space.mp4?sig=SECRET"})
    found = [entry.source_fingerprint for entry in entries(f"file://{listed}?sig=SECRET/")]
    assert found == [entries(listed)[0].source_fingerprint] * 2


def test_a_folder_given_relatively_gives_absolute_uris(corpus, monkeypatch):
    monkeypatch.chdir(corpus.parent)
    assert entries(corpus.name) == entries(corpus)


def test_a_file_name_that_is_not_utf8_is_an_error_of_its_entry(corpus):
    try:
        open(os.fsencode(corpus) + b"/\xff.mp4", "wb").close()
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    for folder in (str(corpus), f"file://{corpus}"):
        [bad] = [entry for entry in entries(folder) if entry.error]
        assert "the video_id is no valid Unicode" in str(bad.error)


def test_csv_gives_text_as_it_stands(corpus):
    (corpus / "m.csv").write_bytes(
        b'\xef\xbb\xbfvideo_id,title,views\r\n007,null,1\r\n\r\n1e3,"two\nlines, ""quoted""",\r\nlast,,x\r\n'
    )
    first, second, last = entries(corpus / "m.csv")
    assert (first.video_id, first.title, first.extra) == ("007", "null", '{"views": "1"}')
    assert (second.video_id, second.title, second.extra) == ("1e3", 'two\nlines, "quoted"', "{}")
    assert (last.video_id, last.title, last.extra) == ("last", None, '{"views": "x"}')


def test_text_manifests_may_be_compressed(corpus):
    plain = write_jsonl(corpus / "m.jsonl", {"uri": "a.mp4", "title": "A"})
    (corpus / "m.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert entries(corpus / "m.jsonl.gz") == entries(plain)


def test_parquet_ids_may_be_numbers_or_dictionaries_and_tags_lists(corpus):
    tags = pa.array([["x", "y"], []])
    table = pa.table({"video_id": pa.array([1, 2]), "title": pa.array(["A", None]).dictionary_encode(), "tags": tags})
    pyarrow.parquet.write_table(table, corpus / "m.parquet")
    found = [(entry.video_id, entry.title, entry.tags, entry.error) for entry in entries(corpus / "m.parquet")]
    assert found == [("1", "A", ("x", "y"), None), ("2", None, (), None)]


def test_an_id_derived_from_a_uri_holds_no_secret_and_tells_uris_apart():
    plain = "https://host:8080/a@b/x.mp4"
    assert manifest.derive_id(plain, is_remote=False) == plain
    signed = [manifest.derive_id(f"https://me:SECRET@host:8080/a@b/x.mp4?sig=SECRET{i}", False) for i in range(2)]
    assert [video_id.rpartition("~")[0] for video_id in signed] == [plain, plain]
    assert signed[0] != signed[1]
    assert manifest.derive_id("x.mp4?sig=SECRET", is_remote=True).startswith("x.mp4~")
    assert manifest.derive_id("what?.mp4", is_remote=False) == "what?.mp4"


def test_a_long_uri_gives_an_id_that_fits():
    video_id = manifest.derive_id("\N{CLAPPER BOARD}" * 500 + ".mp4", is_remote=False)
    assert manifest.MAX_ID_BYTES - 4 < len(video_id.encode()) <= manifest.MAX_ID_BYTES


@contextlib.contextmanager
def server(headers, together=1):
    """Serve five bytes under every path, to as many at once as are to come together; give its address and the paths."""
    barrier, paths = threading.Barrier(together, timeout=20), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            barrier.wait()
            self.send_response(404 if "missing" in self.path else 200)
            for name, value in {"Content-Length": "5", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"hello")

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", paths
        http.shutdown()
        thread.join()


def test_a_video_on_the_web_is_identified_by_each_source(tmp_path):
    versions = []
    for day, etag in ((1, "one"), (2, "one"), (2, "two")):
        with server({"Last-Modified": email.utils.formatdate(day * 86_400, usegmt=True), "ETag": f'"{etag}"'}) as (
            url,
            _,
        ):
            versions.append(
                [manifest.identify(f"{url}/a%20b/x.mp4?v=1", source) for source in ("stat", "etag", "content")]
            )
    first, second, third = versions
    assert [a == b for a, b in zip(first, second, strict=True)] == [False, True, True]
    assert [a == b for a, b in zip(second, third, strict=True)] == [True, False, True]
    (tmp_path / "hello.mp4").write_bytes(b"hello")
    assert first[2] == manifest.identify(str(tmp_path / "hello.mp4"), "content")


def test_a_uri_reaches_the_server_as_it_is_written():
    with server({"ETag": '"one"'}) as (url, paths):
        written = ["/a%2Fb.mp4", "/a//b.mp4", "/a.mp4?x=%2F&y=1", "/plain.mp4"]
        for path in written:
            manifest.identify(url + path, "etag")
    assert paths == written


@pytest.mark.parametrize(("source", "other"), [("etag", "stat"), ("stat", "etag")])
def test_a_server_that_tells_no_version_is_an_error_that_names_another_source(source, other):
    with server({}) as (url, _), pytest.raises(SourceError, match=f"x.mp4; set ingest.source={other}"):
        manifest.identify(f"{url}/x.mp4?sig=SECRET", source)


def test_a_store_without_etags_is_an_error_of_its_video():
    with pytest.raises(SourceError, match="cannot read hdfs://host/x.mp4"):
        manifest.identify("hdfs://host/x.mp4", "etag")


def test_a_local_file_under_etag_is_identified_as_by_stat(corpus):
    for uri in (str(corpus / "a.mp4"), f"file://{corpus}/a.mp4"):
        assert manifest.identify(uri, "etag") == manifest.identify(str(corpus / "a.mp4"), "stat")


def test_remote_videos_are_asked_for_side_by_side_and_stay_in_order(tmp_path):
    with server({"ETag": '"one"'}, together=8) as (url, paths):
        names = [f"{i}.missing" if i % 5 == 0 else f"{i}.mp4" for i in range(16)]
        found = entries(write_jsonl(tmp_path / "m.jsonl", *({"uri": f"{url}/{name}"} for name in names)), source="etag")
        assert [urlsplit(entry.uri).path for entry in found] == [f"/{name}" for name in names]
        assert [entry.error is None for entry in found] == [not name.endswith("missing") for name in names]
        assert sorted(paths) == sorted(f"/{name}" for name in names)
