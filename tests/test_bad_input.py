import gzip
import json
import random
import re

import lance
import pyarrow as pa
import pyarrow.parquet
import pytest

from operators import remote
from operators.errors import ConfigError, ItemError, SourceError
from operators.remote import Environment
from pipelines import config, manifest
from pipelines.manifest_files import MAX_LINE_BYTES
from pipelines.search import any_of

GOOD = b'{"video_id": "good"}\n'


def parquet(**columns):
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def not_utf8():
    offsets = pa.py_buffer(b"\0\0\0\0\2\0\0\0")
    return pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])


def read(path, source="stat", **options):
    return [entry for chunk in manifest.read(str(path), source, 1000, **options) for entry in chunk]


BROKEN = {
    "not JSON": ("m.jsonl", GOOD + b"video_id: v1\n", ("line 2", "not JSON", "must be one JSON object")),
    "cut in a line": ("m.jsonl", GOOD + b'{"video_id": "v', ("line 2", "written to its end?")),
    "a list": ("m.jsonl", GOOD + b"\n[1, 2]\n", ("line 3", "a list", "must be a JSON object")),
    "a number": ("m.jsonl", b"3\n", ("line 1", "a number", "must be a JSON object")),
    "nested too deeply": ("m.jsonl", GOOD + b"[" * 200_000, ("line 2", "not JSON")),
    "a number of 5000 digits": ("m.jsonl", b'{"video_id": ' + b"1" * 5000 + b"}", ("line 1", "not JSON")),
    "not UTF-8": (
        "m.jsonl",
        GOOD + '{"title": "é"}'.encode("latin-1"),
        ("line 2", "not UTF-8", "Save it as UTF-8"),
    ),
    "a surrogate in UTF-8": ("m.jsonl", GOOD + b'"\xed\xa0\x80"', ("line 2", "not UTF-8")),
    "one endless line": ("m.jsonl", GOOD + b" " * MAX_LINE_BYTES, ("line 2", "longer than", "one line a row")),
    "empty": ("m.jsonl", b"", ("lists no videos", "remove every video", "check what writes")),
    "blank lines": ("m.jsonl", b"\n \n", ("lists no videos", "remove every video")),
    "a byte order mark": ("m.jsonl", b"\xef\xbb\xbf", ("lists no videos", "remove every video")),
    "no entry with an id": (
        "m.jsonl",
        b'{"url": "a"}\n' * 3,
        ("none of its 3", "line 1", "Did you mean uri by 'url'?"),
    ),
    "gzip cut short": ("m.jsonl.gz", gzip.compress(GOOD * 9000)[:90], ("after line", "Truncated", "copy it again")),
    "not gzip": ("m.csv.gz", b"video_id\nv1\n", ("after line 0", "copy it again")),
    "empty CSV": ("m.csv", b"", ("lists no videos", "remove every video")),
    "only a header": ("m.csv", b"video_id,uri\n", ("lists no videos", "remove every video")),
    "CSV without columns": (
        "m.csv",
        b"url,title\na.mp4,A\n",
        ("line 1", "'url', 'title'", "Did you mean uri by 'url'?"),
    ),
    "CSV in capitals": ("m.csv", b"name,Video-ID\nA,v1\n", ("line 1", "Did you mean video_id by 'Video-ID'?")),
    "CSV without a header": (
        "m.csv",
        b"https://h/a.mp4?sig=SECRET,A\n",
        ("line 1", "Name the columns in the first line"),
    ),
    "a column twice": ("m.csv", b"uri,title,uri\na,b,c\n", ("line 1", "'uri' named more than once")),
    "too many values": ("m.csv", b"video_id,title\nv1,A\nv2,A, B\n", ("line 3", "3 values", "2 columns", '"quotes"')),
    "too few values": ("m.tsv", b"video_id\ttitle\nv1\n", ("line 2", "1 values", "2 columns")),
    "a quote left open": ("m.csv", b'video_id,title\nv1,"A\nv2,B\n', ("line 2", "not CSV", "Check its quotes")),
    "CSV not UTF-8": ("m.csv", b"video_id,title\nv1,\xe9\n", ("line 2", "not UTF-8", "Save it as UTF-8")),
    "an empty file as Parquet": ("m.parquet", b"", ("cannot read", "after row 0", "copy it again")),
    "Parquet cut short": ("m.parquet", parquet(video_id=["v1"])[:-9], ("cannot read", "after row 0", "copy it again")),
    "Parquet without columns": ("m.parquet", parquet(id=["v1"]), ("'id'", "Did you mean video_id by 'id'?")),
    "Parquet without rows": ("m.parquet", parquet(uri=pa.array([], pa.string())), ("lists no videos", "remove every")),
    "ids that are structs": (
        "m.parquet",
        parquet(video_id=[{"a": 1}]),
        ("video_id", "struct", "text or whole numbers"),
    ),
    "ids with a fraction": (
        "m.parquet",
        parquet(video_id=[1.0, None]),
        ("video_id", "double", "text or whole numbers"),
    ),
    "ids that are true": ("m.parquet", parquet(video_id=[True]), ("video_id", "bool", "text or whole numbers")),
    "uris that are bytes": ("m.parquet", parquet(uri=[b"a.mp4"]), ("uri", "binary", "must be text")),
    "tags that are numbers": (
        "m.parquet",
        parquet(video_id=["v"], tags=[[1]]),
        ("tags", "int64", "text or lists of text"),
    ),
    "Parquet not UTF-8": (
        "m.parquet",
        parquet(video_id=["v"], title=not_utf8()),
        ("after row 0", "UTF8", "copy it again"),
    ),
    "another kind of file": ("m.txt", b"a.mp4\n", ("'.txt'", "must be .jsonl")),
    "compressed Parquet": ("m.parquet.gz", b"", ("'.gz'", "must be .jsonl")),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_manifest_is_refused_before_anything_is_read_of_it(tmp_path, case):
    name, content, parts = BROKEN[case]
    path = tmp_path / name
    path.write_bytes(content)
    for refuse in (manifest.check, read):
        with pytest.raises(ConfigError) as caught:
            refuse(str(path))
        message = str(caught.value)
        assert [part for part in (str(path), *parts) if part not in message] == []
        assert "SECRET" not in message
        assert len(message) < 1000


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to(path)])
def test_a_manifest_that_is_no_file_is_a_usage_error(tmp_path, make):
    make(tmp_path / "m.jsonl")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/m.jsonl")):
        manifest.check(str(tmp_path / "m.jsonl"))


@pytest.mark.parametrize(
    "uri", ["s3://KEY:SECRET@b/m.jsonl?sig=SECRET", "nosuch://h/m.csv?sig=SECRET x", "s3://K:S/SECRET@b/m.csv"]
)
def test_the_uri_of_a_manifest_is_named_without_its_secrets(uri):
    with pytest.raises(ConfigError) as caught:
        manifest.check(uri)
    assert re.search(r"(s3://b/m|nosuch://h/m)", str(caught.value))
    assert "SECRET" not in str(caught.value)


MANY = "x" * 10_000_000
ENTRIES = {
    "white space": ({"video_id": "a b"}, "the video_id 'a b' holds white space"),
    "white space of another script": ({"video_id": "a\u3000b"}, "holds white space"),
    "a control character": ({"video_id": "a\x07b"}, r"the video_id 'a\x07b' holds white space or control characters"),
    "NUL in an id": ({"video_id": "a\0"}, "control characters"),
    "an empty id": ({"video_id": ""}, "the video_id is empty; give it one"),
    "an empty id with a uri": ({"video_id": "", "uri": "v.mp4"}, "the video_id is empty"),
    "a long id": ({"video_id": "é" * 257}, f"the video_id is 514 bytes long, '{'é' * 60}'...; at most 512 are allowed"),
    "an id that is true": ({"video_id": True}, "the video_id is true or false; allowed are text and numbers"),
    "an id that is a list": ({"video_id": ["a"]}, "the video_id is a list"),
    "an id that is NaN": ({"video_id": float("nan")}, "the video_id is not a number"),
    "half a character in an id": ({"video_id": "a\ud800"}, r"the video_id is no valid Unicode: it holds '\ud800'"),
    "an id that is a signed URI": ({"video_id": "https://h/a b?sig=SECRET"}, "the video_id 'https://h/a b' holds"),
    "no id": ({"title": "T", "url": None}, "neither a uri nor a video_id, only 'title'"),
    "no id but a url": ({"url": "a.mp4"}, "Did you mean uri by 'url'?"),
    "nothing": ({}, "neither a uri nor a video_id, only nothing. Give it one."),
    "a uri that is a number": ({"uri": 3}, "the uri is a number; it must be text, or left out"),
    "a uri that is NaN": ({"video_id": "v", "uri": float("nan")}, "the uri is not a number (NaN"),
    "a uri that is an object": ({"video_id": "v", "uri": {"a": 1}}, "the uri is an object"),
    "NUL in a uri": ({"video_id": "v", "uri": "a\0.mp4"}, "the uri holds a NUL character; remove it"),
    "half a character in a uri": ({"uri": "a\udc80.mp4"}, "the uri is no valid Unicode"),
    "a long uri": ({"uri": "https://h/x?" + MANY}, "the uri is 10000012 bytes long, 'https://h/x'; at most 8192 are"),
    "NUL in a title": ({"video_id": "v", "title": "a\0b"}, "the title holds a NUL character"),
    "a title of 10 MB": ({"video_id": "v", "title": MANY}, "the title is 10000000 bytes long, 'xxx"),
    "a description of 10 MB": ({"video_id": "v", "description": MANY}, "at most 1000000 are allowed; shorten it"),
    "half a character in a title": (
        {"video_id": "v", "title": "\ud83d"},
        r"the title is no valid Unicode: it holds '\ud83d'",
    ),
    "a title that is a list": ({"video_id": "v", "title": ["T"]}, "the title is a list; it must be text"),
    "a title that is NaN": ({"video_id": "v", "title": float("nan")}, "the title is not a number (NaN"),
    "a description that is an object": ({"video_id": "v", "description": {}}, "the description is an object"),
    "tags that are numbers": (
        {"video_id": "v", "tags": ["a", 1]},
        "the tags hold a number; they must be a list of texts",
    ),
    "a tag that is null": ({"video_id": "v", "tags": [None, "a"]}, "the tags hold null"),
    "tags that are an object": ({"video_id": "v", "tags": {"a": 1}}, "the tags hold an object"),
    "tags that are false": ({"video_id": "v", "tags": False}, "the tags hold true or false"),
    "half a character in a tag": ({"video_id": "v", "tags": ["\udfff"]}, "the tags is no valid Unicode"),
    "half a character elsewhere": ({"video_id": "v", "x": {"y": "\ud800"}}, "the other columns is no valid Unicode"),
    "10 MB elsewhere": ({"video_id": "v", "x": MANY}, "the other columns is 100000"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_a_bad_entry_is_an_error_that_names_its_line_and_the_others_go_on(tmp_path, case):
    row, part = ENTRIES[case]
    path = tmp_path / "m.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n" + GOOD.decode())
    bad, good = read(path)
    message = str(bad.error)
    assert message.startswith(f"{path}, line 2: ")
    assert part in message
    assert "SECRET" not in message
    assert len(message) < 500
    assert (good.video_id, good.error) == ("good", None)
    pa.array([bad.video_id, message])  # a row in failures is UTF-8
    assert bad.video_id in ("v", "line 2")


@pytest.mark.parametrize("depth", [900, 20_000])
def test_values_nested_deeply_are_kept_or_refused_but_never_end_the_job_otherwise(tmp_path, depth):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"video_id": "v", "x": ' + b"[" * depth + b"]" * depth + b"}\n" + GOOD)
    try:
        assert read(path)[1].error is None
    except ConfigError as error:
        assert "line 1: not JSON" in str(error)


def test_a_number_is_an_id(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"video_id": 7}\n{"video_id": 1%s}\n{"video_id": 1.5}' % ("0" * 400))
    assert [entry.video_id for entry in read(path)] == ["7", "1" + "0" * 400, "1.5"]


LEGAL_IDS = (
    *(
        "it's",
        "''",
        '"',
        "a\\",
        "\\'",
        "100%",
        "a_b",
        "../..",
        ".",
        "..",
        "/",
        "a;--",
        "x'OR'a'='a",
        "\N{CLAPPER BOARD}",
    ),
    *("\N{MAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}", "é", "e\u0301", "{}", "$1", "?", "NULL", "x" * 512),
)


def test_ids_of_any_characters_are_found_by_the_filters_of_search(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"video_id": video_id}) + "\n" for video_id in LEGAL_IDS))
    assert [entry.video_id for entry in read(path) if entry.error is None] == list(LEGAL_IDS)
    table = lance.write_dataset(pa.table({"video_id": manifest.check(str(path)).ids}), str(tmp_path / "t.lance"))
    for video_id in LEGAL_IDS:
        assert table.to_table(filter=any_of([video_id]))["video_id"].to_pylist() == [video_id]
    assert table.count_rows(any_of(LEGAL_IDS)) == len(LEGAL_IDS)


@pytest.fixture
def places(tmp_path):
    for folder in ("videos/deep", "videos-evil", "other"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "v.mp4").write_bytes(b"v")
    (tmp_path / "videos" / "out").symlink_to(tmp_path / "other")
    (tmp_path / "videos" / "link.mp4").symlink_to(tmp_path / "other" / "v.mp4")
    (tmp_path / "other" / "in").symlink_to(tmp_path / "videos")
    (tmp_path / "videos" / "loop.mp4").symlink_to("loop.mp4")
    return tmp_path


def leads_outside(folder, uri, *roots):
    path = folder / "m.jsonl"
    path.write_text(json.dumps({"video_id": "v", "uri": uri}))
    [entry] = read(path, allowed_roots=roots)
    outside = "leads outside of what ingest.allowed_roots allows" in str(entry.error)
    if outside:
        assert isinstance(entry.error, ItemError)
        assert "SECRET" not in str(entry.error)
        assert all(root.split("?")[0] in str(entry.error) for root in roots)
    return outside


@pytest.mark.parametrize(
    ("uri", "outside"),
    [
        ("videos/deep/v.mp4", False),
        ("videos/../videos/deep/v.mp4", False),
        ("{here}/videos/deep/v.mp4", False),
        ("file://{here}/videos/deep/v.mp4", False),
        ("file://{here}/videos/%64eep/v.mp4", False),
        ("other/in/deep/v.mp4", False),
        ("videos/missing.mp4", False),
        ("videos/loop.mp4", False),
        ("videos-evil/v.mp4", True),
        ("videos/../other/v.mp4", True),
        ("videos/out/v.mp4", True),
        ("videos/link.mp4", True),
        ("{here}/other/v.mp4", True),
        ("/etc/passwd", True),
        ("file:///etc/passwd", True),
        ("file://{here}/videos/%2e%2e/other/v.mp4", True),
        ("file://{here}/videos/%2E./other/v.mp4?sig=SECRET", True),
        ("file://elsewhere{here}/videos/deep/v.mp4", True),
        ("nosuch://host/videos/v.mp4", True),
        ("concat:videos/v.mp4|/etc/passwd", True),
    ],
)
def test_a_path_must_lie_under_an_allowed_root_wherever_it_leads(places, uri, outside):
    uri = uri.format(here=places)
    assert leads_outside(places, uri, str(places / "videos")) is outside
    assert leads_outside(places, uri, f"file://{places}/videos/") is outside
    assert not leads_outside(places, uri)


@pytest.mark.parametrize(
    ("path", "outside"),
    [
        ("host/videos/v.mp4", False),
        ("HOST/videos/v.mp4?sig=SECRET", False),
        ("me:SECRET@host/videos/v.mp4", False),
        ("host/videos/a/../v.mp4", False),
        ("host/videos/100%25.mp4", False),
        ("host/videos-evil/v.mp4", True),
        ("host/videos/../evil/v.mp4?sig=SECRET", True),
        ("host/videos/%2e%2e/evil/v.mp4", True),
        ("host/videos/%2E%2e%2Fevil/v.mp4", True),
        ("host/videos/%252e%252e/evil/v.mp4", True),
        ("host/videos/%" + "25" * 40 + "2e%2e/v.mp4", True),
        ("host/evil%2f..%2fvideos/v.mp4", True),
        ("host/evil/../videos/v.mp4", True),
        ("host/evil#/../videos/v.mp4", True),
        ("host/videos#/../../evil", True),
        ("host/videos%23/v.mp4", True),
        ("host.evil/videos/v.mp4", True),
        ("host:8443/videos/v.mp4", True),
        ("evil\\@host/videos/v.mp4", True),
        ("host@evil/videos/v.mp4", True),
        ("host\n/videos/v.mp4", True),
        ("[host/videos/v.mp4", True),
    ],
)
def test_a_url_must_lie_under_an_allowed_root_however_it_is_understood(tmp_path, monkeypatch, path, outside):
    asked = []
    monkeypatch.setattr(manifest, "identify", lambda uri, *_: asked.append(uri) or "fingerprint")
    assert leads_outside(tmp_path, f"https://{path}", "https://host/videos") is outside
    assert asked == ([] if outside else [f"https://{path}"]), "the place is looked at before the video"
    assert leads_outside(tmp_path, f"http://{path}", "https://host/videos", "s3://host/videos", str(tmp_path))


def test_an_allowed_root_that_is_empty_is_refused_since_it_would_be_the_working_directory():
    with pytest.raises(ConfigError, match=r"ingest\.allowed_roots\.0: .* at least 1 character"):
        config.load([], ["ingest.allowed_roots=['']"])


def test_a_bucket_is_allowed_with_the_server_that_its_uri_chooses(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "identify", lambda uri, *_: "fingerprint")
    assert not leads_outside(tmp_path, "s3://bucket/v.mp4", "s3://bucket")
    assert leads_outside(tmp_path, "s3://bucket/v.mp4?endpoint_override=evil", "s3://bucket")
    assert not leads_outside(tmp_path, "s3://bucket/v.mp4?endpoint_override=mine", "s3://bucket?endpoint_override=mine")


@pytest.mark.parametrize(
    "uri",
    [
        "nosuch://me:SECRET@host/x.mp4?sig=SECRET",
        "http://me:SECRET@127.0.0.1:9/x.mp4?sig=SECRET a'SECRET",
        "s3://bucket/x y.mp4?sig=SECRET SECRET",
        "s3://K:S/SECRET@bucket/x.mp4",
        "file:///nowhere/x.mp4?sig=SECRET",
    ],
)
@pytest.mark.parametrize("source", ["stat", "etag"])
def test_no_message_holds_a_secret_of_a_uri(uri, source, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    nowhere = Environment({"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_REGION": "here"})
    options = {"aws_endpoint": "http://127.0.0.1:9", "allow_http": "true", "aws_skip_signature": "true"}
    options |= {"timeout": "1s", "connect_timeout": "1s"}
    with pytest.raises(SourceError) as caught:
        manifest.identify(uri, source, nowhere, options)
    assert ".mp4" in str(caught.value)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet", "jsonl.gz"])
def test_any_bytes_are_entries_or_a_usage_error(tmp_path, suffix, seed):
    chance = random.Random(seed)
    rows = [{"video_id": f"v{i}", "uri": "a.mp4", "title": "T", "tags": ["x"]} for i in range(20)]
    table = pa.Table.from_pylist(rows)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    sound = {
        "jsonl": text,
        "csv": b"video_id,uri\n" + b'"v",a\n' * 20,
        "tsv": b"video_id\turi\n" + b"v\ta\n" * 20,
        "parquet": parquet(**{name: table[name] for name in table.column_names}),
        "jsonl.gz": gzip.compress(text),
    }
    content = bytearray(sound[suffix]) if seed % 4 else bytearray(chance.randbytes(500))
    for _ in range(chance.randrange(1, 8)):
        content[chance.randrange(len(content))] = chance.choice(
            [0, 10, 13, 34, 44, 92, 123, 128, 255, chance.randrange(256)]
        )
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(content)
    try:
        ids = manifest.check(str(path)).ids
    except ConfigError as error:
        assert str(path) in str(error)
        return
    found = read(path)
    assert [entry.video_id for entry in found if not re.match(r"(line|row) ", entry.video_id)] == ids.to_pylist()
