"""Files of every form, made by hand; their queries, judgements and videos are worked out by hand too."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from operators.errors import ConfigError
from pipelines import manifest
from pipelines.benchmarks_on_disk import LOADERS, make_dataset
from pipelines.cli import app
from pipelines.datasets import Dataset, JudgedQuery, read_qrels, read_queries, write


def parquet(**columns):
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def json_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def put(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def texts(queries):
    return {query.query_id: query.text for query in queries}


CACM_TOPICS = b"""<DOC>
<DOCNO> 1 </DOCNO>

 What articles exist which deal with TSS, an
operating system?

</DOC>
<DOC>
<DOCNO> 2 </DOCNO>
 Prieve, B.
</DOC>
"""
TREC_TOPICS = b"""<top>
<num> Number: 301
<title> International
Organized Crime

<desc> Description:
Identify organizations.
</top>

<top>
<num> 302 </num>
<title> Topic: Polio </title>
</top>
"""
TWO = {"1": "a cup of coffee", "2": "tea, milk"}
QUERIES = {
    "JSON lines": (
        "q.jsonl",
        json_lines({"id": "1", "text": " a cup of coffee "}, {"_id": 2, "text": "tea, milk"}),
        TWO,
    ),
    "JSON lines without an ending": (
        "queries",
        json_lines({"query_id": "1", "query": "a cup of coffee"}),
        {"1": TWO["1"]},
    ),
    "JSON lines that end in .json": ("q.json", json_lines(*({"id": i, "text": t} for i, t in TWO.items())), TWO),
    "a JSON list": ("q.json", json.dumps([{"id": i, "text": t} for i, t in TWO.items()], indent=1).encode(), TWO),
    "CSV": ("q.csv", b'Query_id,query\r\n1,a cup of coffee\r\n2,"tea, milk"\r\n', TWO),
    "CSV with a comma that is not quoted": ("q.csv", b"Query_id,query\n1,a cup of coffee\n2,tea, milk\n", TWO),
    "CSV whose text has a line break": ("q.csv", b'id,text\n1,"a cup\n\nof coffee"\n', {"1": "a cup\n\nof coffee"}),
    "CSV without a header": ("q.csv", b"1,a cup of coffee\n2,tea, milk\n", TWO),
    "TSV without a header": ("q.tsv", b"1\ta cup of coffee\n2\ttea, milk\n", TWO),
    "TSV with one": ("q.tsv", b"qid\tlanguage\tquery\n1\ten\ta cup of coffee\n2\ten\ttea, milk\n", TWO),
    "TSV whose quotes are text": ("q.tsv", b'1\t"tea" or\n2\tmilk"\n', {"1": '"tea" or', "2": 'milk"'}),
    "topics of Anserini": ("topics.tsv.gz", gzip.compress(b"1\ta cup of coffee\n2\ttea, milk\n"), TWO),
    "Parquet": ("q.parquet", parquet(id=["1", "2"], text=list(TWO.values()), video=[b"\xff", b"\xff"]), TWO),
    "Parquet with numbers": ("q.parquet", parquet(_id=[1, 2], text=list(TWO.values())), TWO),
    "TREC topics": ("topics.txt", TREC_TOPICS, {"301": "International Organized Crime", "302": "Polio"}),
    "TREC topics that are documents": (
        "topics.txt",
        CACM_TOPICS,
        {"1": "What articles exist which deal with TSS, an operating system?", "2": "Prieve, B."},
    ),
    "a byte order mark": ("q.csv", b"\xef\xbb\xbfid,text\n1,a cup of coffee\n", {"1": TWO["1"]}),
}


@pytest.mark.parametrize("case", QUERIES)
def test_queries_are_read_from(tmp_path, case):
    name, content, expected = QUERIES[case]
    assert texts(read_queries(put(tmp_path, {name: content}) / name)) == expected


GOOD_QUERY = b'{"id": "1", "text": "tea"}\n'
BROKEN_QUERIES = {
    "cut in a line": ("q.jsonl", GOOD_QUERY + b'{"id": "2", "te', ("line 2", "not JSON", "written to its end?")),
    "cut within JSON": ("q.json", b'[\n{"id": "1",\n', ("line 3", "not JSON", "written to its end?")),
    "a number": ("q.jsonl", GOOD_QUERY + b"\n3\n", ("line 3", "a number", "JSON object")),
    "without a text": ("q.jsonl", GOOD_QUERY + b'{"id": "2"}\n', ("line 2", "no text or query", "only 'id'")),
    "an empty text": ("q.jsonl", GOOD_QUERY + b'{"id": "2", "text": " "}\n', ("line 2", "text is empty")),
    "a text that is a list": ("q.jsonl", b'{"id": "2", "text": ["a", "b"]}\n', ("line 1", "a list of 2", "one text")),
    "a text that is an object": ("q.jsonl", b'{"id": "2", "text": {}}\n', ("line 1", "an object", "must be text")),
    "half of a character": ("q.jsonl", b'{"id": "2", "text": "\\ud83d"}\n', ("line 1", "half of a character")),
    "an id twice": ("q.jsonl", GOOD_QUERY + GOOD_QUERY, ("line 2", "'1'", "used before")),
    "an id with a space": ("q.jsonl", b'{"id": "q 1", "text": "tea"}\n', ("line 1", "'q 1'", "white space")),
    "an id with a no-break space": ("q.csv", "id,text\nq\u00a01,tea\n".encode(), ("line 2", "white space")),
    "an id that is true": ("q.jsonl", b'{"id": true, "text": "tea"}\n', ("line 1", "true or false", "must be text")),
    "a target that is a list": (
        "q.jsonl",
        b'{"id": "1", "text": "tea", "target_modality": ["a", "b"]}\n',
        ("line 1", "target_modality is a list of 2"),
    ),
    "not UTF-8": ("q.jsonl", GOOD_QUERY + '{"id": "é"}'.encode("latin-1"), ("line 2", "not UTF-8")),
    "CSV of one column": ("q.csv", b"Query_id,query\n1,tea\n2\n", ("line 3", "got '2', 1 columns", "query_id, query")),
    "CSV with an empty cell": ("q.csv", b"Query_id,query\n1,tea\n2,\n", ("line 3", "no text or query")),
    "a quote left open": ("q.csv", b'Query_id,query\n1,"tea\n2,milk\n', ("line 2", "not CSV", "Check its quotes")),
    "a comma too many in a column that is no text": (
        "q.csv",
        b"id,text,language\n1,tea, milk,en\n",
        ("line 2", "4 columns", "wanted 3: id, text, language"),
    ),
    "TSV of one column": ("q.tsv", b"1\ttea\n2\n", ("line 2", "1 columns between tabs", "wanted 2: id, text")),
    "text without ids": ("q.txt", b"a cup of coffee\n", ("line 1", "'a cup of coffee'", "between tabs", "id, text")),
    "gzip cut short": ("q.tsv.gz", gzip.compress(b"1\ttea\n" * 9000)[:90], ("after line", "Truncated")),
    "Parquet cut short": ("q.parquet", parquet(id=["1"], text=["tea"])[:-9], ("cannot read", "after row 0")),
    "Parquet of other columns": ("q.parquet", parquet(qno=["1"], words=["tea"]), ("'qno', 'words'", "query_id")),
    "Parquet with an empty text": ("q.parquet", parquet(id=["1", "2"], text=["tea", ""]), ("row 2", "text is empty")),
    "a topic without an end": ("t.txt", TREC_TOPICS[:-8], ("line 10", "no end", "written to its end?")),
    "a topic within a topic": (
        "t.txt",
        b"<top>\n<num> 1\n<title> a\n<top>\n",
        ("line 4", "begins on line 1", "no end"),
    ),
    "a topic without a number": ("t.txt", b"<top>\n<title> tea\n</top>\n", ("line 1", "no id")),
    "a topic without a title": ("t.txt", b"<top>\n<num> 7\n<title> \n</top>\n", ("line 1", "text is empty")),
    "text between topics": ("t.txt", b"<top>\n<num> 1\n<title> a\n</top>\nb\n", ("line 5", "got 'b'", "<top>")),
    "empty": ("q.jsonl", b"", ("q.jsonl holds no queries",)),
    "only a header": ("q.csv", b"id,text\n", ("q.csv holds no queries",)),
}


@pytest.mark.parametrize("case", BROKEN_QUERIES)
def test_a_broken_file_of_queries_is_refused_where_it_is_broken(tmp_path, case):
    name, content, fragments = BROKEN_QUERIES[case]
    with pytest.raises(ConfigError) as caught:
        read_queries(put(tmp_path, {name: content}) / name)
    assert [fragment for fragment in (name, *fragments) if fragment not in str(caught.value)] == [], caught.value


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.jsonl"):
        read_queries(tmp_path / "nowhere.jsonl")


def test_the_target_comes_from_its_column_or_from_the_ids_of_multivent(tmp_path):
    rows = [
        {"id": "a_base_0", "text": "x"},
        {"id": "a_speech_12", "text": "x"},
        {"id": "a_ocr_1", "text": "x"},
        {"id": "a_description_1", "text": "x"},
        {"id": "a_base_1", "text": "x", "target_modality": "metadata"},
        {"id": "a_base_1_more", "text": "x"},
        {"id": "clamr", "text": "x", "query_type": "video"},
        {"id": "own", "text": "x", "target_modality": "hard ones"},
    ]
    path = put(tmp_path, {"q.jsonl": json_lines(*rows)}) / "q.jsonl"
    assert [query.target_modality for query in read_queries(path)] == [
        *("frame", "speech", "screen_text", "metadata", "metadata"),
        *(None, "frame", "hard ones"),
    ]


def test_an_image_is_relative_to_its_file_and_answers_are_kept(tmp_path):
    row = {"id": "1", "text": "what is this?", "image": "images/a.jpg", "answers": ["tea", "a cup"]}
    other = {"id": "2", "text": "and this?", "image": "s3://images/a.jpg", "answers": "tea"}
    path = put(tmp_path, {"q.jsonl": json_lines(row, other)}) / "q.jsonl"
    assert read_queries(path) == [
        JudgedQuery("1", "what is this?", None, str(tmp_path / "images/a.jpg"), ("tea", "a cup")),
        JudgedQuery("2", "and this?", None, "s3://images/a.jpg", ("tea",)),
    ]


GRADES = {"q1": {"v1": 2, "v2": 0}, "q2": {"v1": 1}}
TRIPLES = [("q1", "v1", 2), ("q1", "v2", 0), ("q2", "v1", 1)]
QRELS = {
    "TREC": ("qrels.txt", b"q1 0 v1 2\nq1 Q0 v2 0\nq2 0 v1 1\n"),
    "TREC with tabs": ("qrels", b"q1\t0\tv1\t2\nq1\t0\tv2\t0\n\nq2\t0\tv1\t1"),
    "TREC in gzip": ("qrels.gz", gzip.compress(b"q1 0 v1 2\nq1 0 v2 0\nq2 0 v1 1\n")),
    "TREC that says the same twice": ("qrels.txt", b"q1 0 v1 2\nq1 0 v2 0\nq2 0 v1 1\nq1 0 v1 2\n"),
    "BEIR": ("test.tsv", b"query-id\tcorpus-id\tscore\nq1\tv1\t2\nq1\tv2\t0\nq2\tv1\t1\n"),
    "CSV": ("qrels.csv", b"query_id,doc_id,relevance\nq1,v1,2\nq1,v2,0\nq2,v1,1\n"),
    "MTEB": (
        "test.parquet",
        parquet(**{"query-id": ["q1", "q1", "q2"], "corpus-id": ["v1", "v2", "v1"], "score": [2.0, 0.0, 1.0]}),
    ),
    "MultiVENT": ("j.jsonl", json_lines(*({"query_id": q, "doc_id": d, "relevance": g} for q, d, g in TRIPLES))),
}


@pytest.mark.parametrize("case", QRELS)
def test_judgements_are_read_from(tmp_path, case):
    name, content = QRELS[case]
    assert read_qrels(put(tmp_path, {name: content}) / name) == GRADES


BROKEN_QRELS = {
    "cut in a line": ("q.txt", b"q1 0 v1 2\nq1 0 v", ("line 2", "3 columns between white space", "wanted 4: query-id")),
    "a run": ("q.txt", b"q1 Q0 v1 1 0.3 tag\n", ("line 1", "got 'q1 Q0 v1 1 0.3 tag', 6 columns")),
    "a grade that is a word": ("q.txt", b"q1 0 v1 2\nq1 0 v2 yes\n", ("line 2", "'yes'", "whole number")),
    "a grade with a fraction": ("q.txt", b"q1 0 v1 0.5\n", ("line 1", "'0.5'", "whole number")),
    "a grade with a fraction in Parquet": (
        "q.parquet",
        parquet(**{"query-id": ["q1"], "corpus-id": ["v1"], "score": [0.5]}),
        ("row 1", "0.5", "whole number"),
    ),
    "a grade that is true": ("q.jsonl", b'{"query_id": "q", "doc_id": "v", "relevance": true}', ("line 1", "True")),
    "no grade": ("q.jsonl", b'{"query_id": "q", "doc_id": "v"}', ("line 1", "None", "whole number")),
    "a grade that is infinite": ("q.jsonl", b'{"qid": "q", "pid": "v", "score": Infinity}', ("line 1", "inf")),
    "two grades": ("q.txt", b"q1 0 v1 2\nq1 0 v2 0\nq1 0 v1 1\n", ("line 3", "v1", "judged 1 here, but 2 before")),
    "BEIR cut short": (
        "t.tsv",
        b"query-id\tcorpus-id\tscore\nq1\tv1\t2\nq1\tv\n",
        ("line 3", "2 columns between tabs"),
    ),
    "BEIR without a header": ("t.tsv", b"q1\tv1\t2\n", ("line 1", "3 columns", "wanted 4: query-id")),
    "an id with a space": ("q.jsonl", b'{"qid": "q", "pid": "a v", "score": 1}', ("line 1", "'a v'", "white space")),
    "JSON cut short": ("q.jsonl", b'{"query_id": "q1", "doc', ("line 1", "not JSON", "written to its end?")),
    "empty": ("q.txt", b"\n", ("holds no judgements",)),
    "gzip cut short": ("q.gz", gzip.compress(b"q1 0 v1 2\n" * 9000)[:60], ("after line", "Truncated")),
}


@pytest.mark.parametrize("case", BROKEN_QRELS)
def test_a_broken_file_of_judgements_is_refused_where_it_is_broken(tmp_path, case):
    name, content, fragments = BROKEN_QRELS[case]
    with pytest.raises(ConfigError) as caught:
        read_qrels(put(tmp_path, {name: content}) / name)
    assert [fragment for fragment in (name, *fragments) if fragment not in str(caught.value)] == [], caught.value


BEIR = {
    "corpus.jsonl": json_lines(
        {"_id": "d1", "title": "Coffee", "text": "A cup of it."},
        {"_id": "d2", "title": "", "text": "Tea."},
        {"_id": "d3"},
    ),
    "queries.jsonl": json_lines({"_id": "q1", "text": "coffee"}, {"_id": "q9", "text": "of the training set"}),
    "qrels/test.tsv": b"query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n",
    "qrels/train.tsv": b"query-id\tcorpus-id\tscore\nq9\td2\t1\n",
}
DOCUMENTS = [
    {"video_id": "d1", "title": "Coffee", "description": "A cup of it."},
    {"video_id": "d2", "description": "Tea."},
    {"video_id": "d3"},
]
MTEB = {
    "corpus/test-00000-of-00002.parquet": parquet(id=["d1"], title=["Coffee"], text=["A cup of it."]),
    "corpus/test-00001-of-00002.parquet": parquet(id=["d2", "d3"], title=["", None], text=["Tea.", None]),
    "queries/queries-00000-of-00001.parquet": parquet(id=["q1", "q9"], text=["coffee", "of the training set"]),
    "qrels/test-00000-of-00001.parquet": parquet(
        **{"query-id": ["q1", "q1"], "corpus-id": ["d1", "d2"], "score": pa.array([2, 0], pa.int64())}
    ),
    "qrels/train-00000-of-00001.parquet": parquet(**{"query-id": ["q9"], "corpus-id": ["d2"], "score": [1]}),
}
DIDEMO = [
    {"annotation_id": 7, "video": "1@N0_2.mov", "description": "a dog runs.", "times": [[0, 0]], "num_segments": 6},
    {"annotation_id": 3, "video": "3@N0_4.avi", "description": "a door opens", "times": [[1, 1]], "num_segments": 6},
    {"annotation_id": 9, "video": "1@N0_2.mov", "description": "it sits ", "times": [[2, 3]], "num_segments": 6},
]
ACTIVITYNET = {
    "v_aaa": {"duration": 9.5, "timestamps": [[0, 1], [1, 2]], "sentences": ["A man runs.", " He falls.", ""]},
    "v_bbb": {"duration": 5, "timestamps": [[0, 5]], "sentences": ["Snow."]},
}
VATEX = [
    {"videoID": "abc_000001_000011", "enCap": ["a person opens a door", "someone enters"], "chCap": ["x"]},
    {"videoID": "xyz_000002_000012", "enCap": ["a dog runs"]},
]
YOUCOOK2 = {
    "database": {
        "abc": {
            "subset": "validation",
            "duration": 99.5,
            "annotations": [
                {"segment": [9, 12.5], "id": 0, "sentence": "cut the onion"},
                {"segment": [20, 31], "id": 1, "sentence": "fry it"},
            ],
        },
        "def": {"subset": "training", "annotations": [{"segment": [0, 1], "id": 0, "sentence": "eat"}]},
    }
}
TVR = [
    {"vid_name": "s01_clip_01", "ts": [1, 2], "desc": "Phoebe sits.", "type": "v", "desc_id": 90200},
    {"vid_name": "s01_clip_01", "ts": [1, 2], "desc": "Ross says no.", "type": "t", "desc_id": 90201},
    {"vid_name": "s01_clip_02", "ts": [1, 2], "desc": "Ross waves and says no.", "type": "vt", "desc_id": 90202},
]
MULTIVENT1 = b"""video_URL,video_description,language,event_category,event_name,article_url,en_article_url,en_article_excerpt
http://youtube.com/watch?v=t8lY-rjy7-Y,"An earthquake, today",korean,disasters,gyeongju_earthquake,a,b,The earthquake.
http://twitter.com/i/status/123,It shook.,english,disasters,gyeongju_earthquake,a,b,The earthquake.
https://www.youtube.com/watch?v=zz,Runners.,arabic,social,dubai_marathon,a,b,"A marathon, in Dubai."
https://youtube.com/watch?v=zz&t=1,Runners.,arabic,social,dubai_marathon,a,b,"A marathon, in Dubai."
"""
MULTIVENT2 = {
    "multivent_2_q.csv": b'Query_id,query\r\nx_base_0,1929 Segrave\r\nx_ocr_0,"McConnell, Trump"\r\nx_speech_0,a, b\r\n',
    "multivent_2_j.jsonl": json_lines(
        {"query_id": "x_base_0", "doc_id": "PPQ", "relevance": 1},
        {"query_id": "x_ocr_0", "doc_id": "PPQ", "relevance": 1},
        {"query_id": "x_speech_0", "doc_id": "UKQ", "relevance": 1},
        {"query_id": "x_speech_0", "doc_id": "UKQ", "relevance": 1},
    ),
}


def clip(name, start_seconds, stop_seconds):
    return {"video_id": name, "video": "abc", "start_seconds": start_seconds, "stop_seconds": stop_seconds}


def event(name, description, language, category):
    return {"video_id": name, "description": description, "language": language, "event_category": category}


def ids(*names):
    return [{"video_id": name} for name in names]


# name of the loader, files, queries, judgements, videos
BENCHMARKS = {
    "BEIR": (
        *("beir", BEIR, [("q1", "coffee", None), ("q9", "of the training set", None)]),
        *({"q1": {"d1": 2, "d2": 0}}, DOCUMENTS),
    ),
    "MTEB": (
        *("mteb", MTEB, [("q1", "coffee", None), ("q9", "of the training set", None)]),
        *({"q1": {"d1": 2, "d2": 0}}, DOCUMENTS),
    ),
    "MTEB in one file each": (
        "mteb",
        {
            "corpus.parquet": parquet(id=["d1"], text=["A cup."]),
            "queries.parquet": parquet(id=["q1"], text=["coffee"]),
            "qrels.parquet": parquet(**{"query-id": ["q1"], "corpus-id": ["d1"], "score": [1]}),
        },
        *([("q1", "coffee", None)], {"q1": {"d1": 1}}, [{"video_id": "d1", "description": "A cup."}]),
    ),
    "MTEB with videos": (
        "mteb",
        {
            "corpus/corpus-00000-of-00001.parquet": parquet(id=["v1"], video=[{"bytes": b"\0", "path": None}]),
            "queries/queries-00000-of-00001.parquet": parquet(id=["q1"], text=["coffee"]),
            "default/test-00000-of-00001.parquet": parquet(**{"query-id": ["q1"], "corpus-id": ["v1"], "score": [1]}),
        },
        *([("q1", "coffee", None)], {"q1": {"v1": 1}}, ids("v1")),
    ),
    "MSR-VTT": (
        "msrvtt-1k-a",
        {
            "MSRVTT_JSFUSION_test.csv": b"key,vid_key,video_id,sentence\nret0,msr9,video9,a person, connecting\n"
            b"ret1,msr8,video8,gymnastics\n"
        },
        *([("ret0", "a person, connecting", None), ("ret1", "gymnastics", None)],),
        *({"ret0": {"video9": 1}, "ret1": {"video8": 1}}, ids("video9", "video8")),
    ),
    "MSR-VTT as JSON": (
        "msrvtt-1k-a",
        {"msrvtt_ret_test1k.json": b'[{"video": "video9.mp4", "caption": "a person"}]'},
        *([("video9.mp4#0", "a person", None)], {"video9.mp4#0": {"video9.mp4": 1}}, ids("video9.mp4")),
    ),
    "DiDeMo": (
        *("didemo", {"test_data.json": json.dumps(DIDEMO).encode()}),
        [("1@N0_2.mov", "a dog runs. it sits", None), ("3@N0_4.avi", "a door opens", None)],
        *({"1@N0_2.mov": {"1@N0_2.mov": 1}, "3@N0_4.avi": {"3@N0_4.avi": 1}}, ids("1@N0_2.mov", "3@N0_4.avi")),
    ),
    "ActivityNet": (
        *("activitynet", {"captions/val_1.json": json.dumps(ACTIVITYNET).encode(), "captions/val_2.json": b"{}"}),
        [("v_aaa", "A man runs. He falls.", None), ("v_bbb", "Snow.", None)],
        *({"v_aaa": {"v_aaa": 1}, "v_bbb": {"v_bbb": 1}}, ids("v_aaa", "v_bbb")),
    ),
    "ActivityNet as a list": (
        *("activitynet", {"anet_ret_val_1.json": b'[{"video": "v_a.mp4", "caption": ["A man.", "He falls."]}]'}),
        *([("v_a.mp4", "A man. He falls.", None)], {"v_a.mp4": {"v_a.mp4": 1}}, ids("v_a.mp4")),
    ),
    "VATEX": (
        *("vatex", {"vatex_validation_v1.0.json": json.dumps(VATEX).encode()}),
        [
            ("abc_000001_000011#0", "a person opens a door", None),
            ("abc_000001_000011#1", "someone enters", None),
            ("xyz_000002_000012#0", "a dog runs", None),
        ],
        {
            "abc_000001_000011#0": {"abc_000001_000011": 1},
            "abc_000001_000011#1": {"abc_000001_000011": 1},
            "xyz_000002_000012#0": {"xyz_000002_000012": 1},
        },
        ids("abc_000001_000011", "xyz_000002_000012"),
    ),
    "MSVD": (
        "msvd",
        {
            "AllVideoDescriptions.txt": b"# This file contains\n\n-4w_5_15 a squirrel is eating\n-4w_5_15 a chipmunk  eats\n"
            b"other_1_2 not in the test\n",
            "test_list.txt": b"-4w_5_15\ngone_3_4\n",
        },
        [("-4w_5_15#0", "a squirrel is eating", None), ("-4w_5_15#1", "a chipmunk  eats", None)],
        *({"-4w_5_15#0": {"-4w_5_15": 1}, "-4w_5_15#1": {"-4w_5_15": 1}}, ids("-4w_5_15")),
    ),
    "YouCook2": (
        *("youcook2", {"youcookii_annotations_trainval.json": json.dumps(YOUCOOK2).encode()}),
        [("abc_0#0", "cut the onion", None), ("abc_1#0", "fry it", None)],
        *({"abc_0#0": {"abc_0": 1}, "abc_1#0": {"abc_1": 1}}, [clip("abc_0", 9, 12.5), clip("abc_1", 20, 31)]),
    ),
    "TVR": (
        *("tvr", {"tvr_val_release.jsonl": json_lines(*TVR)}),
        [
            ("90200", "Phoebe sits.", "frame"),
            ("90201", "Ross says no.", "speech"),
            ("90202", "Ross waves and says no.", None),
        ],
        {"90200": {"s01_clip_01": 1}, "90201": {"s01_clip_01": 1}, "90202": {"s01_clip_02": 1}},
        ids("s01_clip_01", "s01_clip_02"),
    ),
    "MultiVENT 1": (
        *("multivent1", {"data/multivent_base.csv": MULTIVENT1}),
        [("gyeongju_earthquake", "The earthquake.", None), ("dubai_marathon", "A marathon, in Dubai.", None)],
        {"gyeongju_earthquake": {"t8lY-rjy7-Y": 1, "123": 1}, "dubai_marathon": {"zz": 1}},
        [
            event("t8lY-rjy7-Y", "An earthquake, today", "korean", "disasters"),
            event("123", "It shook.", "english", "disasters"),
            event("zz", "Runners.", "arabic", "social"),
        ],
    ),
    "MultiVENT 2": (
        *("multivent2", MULTIVENT2),
        [
            ("x_base_0", "1929 Segrave", "frame"),
            ("x_ocr_0", "McConnell, Trump", "screen_text"),
            ("x_speech_0", "a, b", "speech"),
        ],
        {"x_base_0": {"PPQ": 1}, "x_ocr_0": {"PPQ": 1}, "x_speech_0": {"UKQ": 1}},
        ids("PPQ", "UKQ"),
    ),
    "MultiVENT 2 with its distractors": (
        *("multivent2", MULTIVENT2 | {"multivent_2_ids.csv": b"id\nedh\nPPQ\nUKQ\n"}),
        [
            ("x_base_0", "1929 Segrave", "frame"),
            ("x_ocr_0", "McConnell, Trump", "screen_text"),
            ("x_speech_0", "a, b", "speech"),
        ],
        {"x_base_0": {"PPQ": 1}, "x_ocr_0": {"PPQ": 1}, "x_speech_0": {"UKQ": 1}},
        ids("edh", "PPQ", "UKQ"),
    ),
}


@pytest.mark.parametrize("case", BENCHMARKS)
def test_a_benchmark_is_loaded_by_its_name(tmp_path, case):
    name, files, queries, qrels, videos = BENCHMARKS[case]
    loaded = LOADERS[name](put(tmp_path, files), None)
    assert [(query.query_id, query.text, query.target_modality) for query in loaded.queries] == queries
    assert loaded.qrels == qrels
    assert loaded.videos == videos


def test_every_loader_is_tested():
    assert {name for name, *_ in BENCHMARKS.values()} == set(LOADERS)


TVR_LINES = json_lines(*TVR)


def youcook2(*annotations):
    document = {"database": {"abc": {"subset": "validation", "annotations": annotations}}}
    return {"youcookii_annotations_trainval.json": json.dumps(document).encode()}


BROKEN_BENCHMARKS = {
    "BEIR without a corpus": ("beir", BEIR, {"corpus.jsonl": None}, ("holds no corpus",)),
    "BEIR cut in its corpus": ("beir", BEIR, {"corpus.jsonl": BEIR["corpus.jsonl"][:-9]}, ("corpus.jsonl, line 3",)),
    "BEIR with an id twice": (
        "beir",
        BEIR,
        {"corpus.jsonl": BEIR["corpus.jsonl"] * 2},
        ("line 4", "'d1'", "used before"),
    ),
    "BEIR with a space in an id": (
        "beir",
        BEIR,
        {"corpus.jsonl": b'{"_id": "d 1"}\n'},
        ("line 1", "'d 1'", "white space"),
    ),
    "BEIR without the split": (
        *("beir", BEIR, {"qrels/test.tsv": None, "qrels/dev.tsv": b""}),
        ("'dev', 'train'", "not 'test'", "--split"),
    ),
    "MTEB without a part": (
        "mteb",
        MTEB,
        {"corpus/test-00001-of-00002.parquet": None},
        ("1 of the 2 parts", "Get all"),
    ),
    "MTEB cut short": (
        "mteb",
        MTEB,
        {"corpus/test-00001-of-00002.parquet": b"PAR1"},
        ("00001-of-00002", "after row 0"),
    ),
    "MSR-VTT cut in a line": (
        *(
            "msrvtt-1k-a",
            {"MSRVTT_JSFUSION_test.csv": b"key,vid_key,video_id,sentence\nret0,msr9,video9,a\nret1,ms"},
            {},
        ),
        ("line 3", "2 columns", "wanted 4: key, vid_key, video_id, sentence"),
    ),
    "MSR-VTT with a key twice": (
        "msrvtt-1k-a",
        {"MSRVTT_JSFUSION_test.csv": b"key,vid_key,video_id,sentence\nret0,msr9,video9,a\nret0,m,v8,b\n"},
        *({}, ("line 3", "'ret0'", "used before")),
    ),
    "MSR-VTT of another table": (
        *("msrvtt-1k-a", {"MSRVTT_JSFUSION_test.csv": b"a,b\n1,2\n"}, {}),
        ("line 1", "'a', 'b'", "none of caption, key, sentence, video, video_id"),
    ),
    "DiDeMo cut short": (
        *("didemo", {"test_data.json": json.dumps(DIDEMO, indent=0).encode()[:-30]}, {}),
        ("test_data.json, line", "not JSON", "written to its end?"),
    ),
    "DiDeMo without a description": (
        *("didemo", {"test_data.json": b'[{"video": "a.mov", "description": ""}]'}, {}),
        ("entry 1", "description is empty"),
    ),
    "ActivityNet without sentences": (
        *("activitynet", {"val_1.json": b'{"v_a": {"sentences": ["a"]}, "v_b": {"sentences": []}}'}, {}),
        ("entry 'v_b'", "sentences is empty"),
    ),
    "ActivityNet of another form": (
        *("activitynet", {"val_1.json": b'{"v_a": {"sentences": ["a"]}, "v_b": ["a"]}'}, {}),
        ("entry 1", "no key or video"),
    ),
    "VATEX with an empty caption": (
        *("vatex", {"vatex.json": b'[{"videoID": "a", "enCap": ["a", ""]}]'}, {}),
        ("entry 1", "encap is empty"),
    ),
    "VATEX without captions": (
        "vatex",
        {"vatex.json": b'[{"videoID": "a"}]'},
        {},
        ("entry 1", "no encap", "'videoid'"),
    ),
    "MSVD cut in a line": (
        *("msvd", {"AllVideoDescriptions.txt": b"-4w_5_15 a squirrel\n-4w_5"}, {}),
        ("line 2", "caption is empty"),
    ),
    "MSVD of other videos": (
        *("msvd", {"AllVideoDescriptions.txt": b"-4w_5_15 a squirrel\n", "test_list.txt": b"vid1\n"}, {}),
        ("holds no captions of a video that test_list.txt names",),
    ),
    "YouCook2 without a sentence": (
        *("youcook2", youcook2({"segment": [0, 1]}), {}),
        ("entry 'abc', segment 0", "no sentence"),
    ),
    "YouCook2 with half a segment": (
        *("youcook2", youcook2({"segment": [0], "sentence": "eat"}), {}),
        ("entry 'abc', segment 0", "[0]", "[start, stop]"),
    ),
    "YouCook2 without the split": (
        *("youcook2", {"youcookii_annotations.json": b'{"database": {"a": {"subset": "testing"}}}'}, {}),
        ("'testing'", "not 'validation'", "--split"),
    ),
    "YouCook2 of another form": (
        *("youcook2", {"youcookii_annotations.json": b'{"a": {"subset": "testing"}}'}, {}),
        ("entry 1", "null"),
    ),
    "TVR cut in a line": ("tvr", {"tvr_val_release.jsonl": TVR_LINES[:-40]}, {}, ("line 3", "not JSON")),
    "TVR of another type": (
        *("tvr", {"tvr_val_release.jsonl": TVR_LINES.replace(b'"vt"', b'"x"')}, {}),
        ("line 3", "'x'", "v, t, vt"),
    ),
    "MultiVENT 1 cut in a line": (
        *("multivent1", {"multivent_base.csv": MULTIVENT1[:-15]}, {}),
        ("line 5", "not CSV", "Check its quotes"),
    ),
    "MultiVENT 1 with another text on an event": (
        *("multivent1", {"multivent_base.csv": MULTIVENT1.replace(b"The earthquake.", b"It.", 1)}, {}),
        ("line 3", "gyeongju_earthquake", "another en_article_excerpt"),
    ),
    "MultiVENT 2 without judgements": (
        *("multivent2", MULTIVENT2, {"multivent_2_j.jsonl": None}),
        ("'multivent_2_q.csv'", "no *_j.jsonl"),
    ),
    "MultiVENT 2 cut in a line": (
        *("multivent2", MULTIVENT2, {"multivent_2_j.jsonl": MULTIVENT2["multivent_2_j.jsonl"][:-20]}),
        ("multivent_2_j.jsonl, line 4", "not JSON"),
    ),
    "two files that fit": ("tvr", {"a/tvr_val_release.jsonl": b"", "b/tvr_val_release.jsonl": b""}, {}, ("Leave one",)),
    "no file that fits": ("vatex", {"other.json": b""}, {}, ("'other.json'", "no vatex_public_test*.json")),
}


@pytest.mark.parametrize("case", BROKEN_BENCHMARKS)
def test_a_broken_benchmark_is_refused_where_it_is_broken(tmp_path, case):
    name, files, changes, fragments = BROKEN_BENCHMARKS[case]
    changed = {path: content for path, content in (files | changes).items() if content is not None}
    with pytest.raises(ConfigError) as caught:
        LOADERS[name](put(tmp_path, changed), None)
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == [], caught.value


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_text_corpus_becomes_files_that_index_and_evaluate_take(tmp_path):
    made = make_dataset("beir", put(tmp_path / "beir", BEIR), tmp_path / "out", None)
    assert made == {
        "directory": str(tmp_path / "out"),
        **{"videos": 2, "queries": 1, "judgements": 2},
        "left_out": {
            "videos without text (name the folder of their files by --videos)": 1,
            "queries without judgements": 1,
        },
    }
    assert rows(tmp_path / "out" / "manifest.jsonl") == DOCUMENTS[:2]
    assert rows(tmp_path / "out" / "queries.jsonl") == [{"id": "q1", "text": "coffee"}]
    assert (tmp_path / "out" / "qrels.txt").read_text() == "q1 0 d1 2\nq1 0 d2 0\n"
    [entries] = manifest.read(str(tmp_path / "out" / "manifest.jsonl"), "stat", 10)
    assert [(entry.video_id, entry.title, entry.error) for entry in entries] == [
        ("d1", "Coffee", None),
        ("d2", None, None),
    ]
    assert read_queries(tmp_path / "out" / "queries.jsonl") == [JudgedQuery("q1", "coffee", None)]
    assert read_qrels(tmp_path / "out" / "qrels.txt") == {"q1": {"d1": 2, "d2": 0}}


def test_another_split_is_taken_when_asked_for(tmp_path):
    folder = put(tmp_path, BEIR)
    assert LOADERS["beir"](folder, "train").qrels == {"q9": {"d2": 1}}
    with pytest.raises(ConfigError, match="'test', 'train', not 'dev'"):
        LOADERS["beir"](folder, "dev")
    with pytest.raises(ConfigError, match="tvr has one split"):
        make_dataset("tvr", folder, tmp_path / "out", None, "train")


def test_videos_without_a_file_are_left_out_and_their_queries_stay(tmp_path):
    media = put(tmp_path / "media", {"deep/1@N0_2.MP4": b"", "unrelated.mp4": b"", "3@N0_4.txt": b""})
    folder = put(tmp_path / "didemo", {"test_data.json": json.dumps(DIDEMO).encode()})
    made = make_dataset("didemo", folder, tmp_path / "out", media)
    assert rows(tmp_path / "out" / "manifest.jsonl") == [
        {"video_id": "1@N0_2.mov", "uri": str(media / "deep" / "1@N0_2.MP4")}
    ]
    assert len(read_queries(tmp_path / "out" / "queries.jsonl")) == len(read_qrels(tmp_path / "out" / "qrels.txt")) == 2
    assert made["left_out"] == {
        f"videos without text or a file in {media}": 1,
        "judged videos that the manifest lacks": 1,
        "queries that count as 0, since it lacks all their relevant videos": 1,
    }


def test_a_file_of_activitynet_may_lack_the_prefix_of_its_id(tmp_path):
    media = put(tmp_path / "media", {"aaa.mp4": b"", "v_bbb.mkv": b""})
    make_dataset(
        "activitynet", put(tmp_path, {"val_1.json": json.dumps(ACTIVITYNET).encode()}), tmp_path / "out", media
    )
    uris = [row["uri"] for row in rows(tmp_path / "out" / "manifest.jsonl")]
    assert uris == [str(media / "aaa.mp4"), str(media / "v_bbb.mkv")]


def test_a_folder_of_other_videos_or_of_two_that_fit_is_refused(tmp_path):
    folder = put(tmp_path / "tvr", {"tvr_val_release.jsonl": TVR_LINES})
    with pytest.raises(ConfigError, match="no video file in .* such as 's01_clip_01'"):
        make_dataset("tvr", folder, tmp_path / "out", put(tmp_path / "other", {"a.mp4": b""}))
    twice = put(tmp_path / "twice", {"a/s01_clip_01.mp4": b"", "b/s01_clip_01.webm": b""})
    with pytest.raises(ConfigError, match=r"s01_clip_01 may be .*s01_clip_01\.\w+ or .*s01_clip_01\.\w+\. Leave one"):
        make_dataset("tvr", folder, tmp_path / "out", twice)
    assert not (tmp_path / "out").exists()


def test_the_list_of_test_videos_beside_the_captions_counts(tmp_path):
    _, files, *_ = BENCHMARKS["MSVD"]
    assert LOADERS["msvd"](put(tmp_path, files), None).left_out == {
        "videos that test_list.txt does not name": 1,
        "videos of test_list.txt without captions": 1,
    }


def test_without_files_there_are_queries_and_judgements_and_no_manifest_of_before(tmp_path):
    folder = put(tmp_path / "tvr", {"tvr_val_release.jsonl": TVR_LINES})
    put(tmp_path / "out", {"manifest.jsonl": b'{"video_id": "of before"}\n'})
    assert make_dataset("tvr", folder / "tvr_val_release.jsonl", tmp_path / "out", None)["videos"] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["qrels.txt", "queries.jsonl"]


def test_what_was_there_stays_as_it_is_when_writing_fails(tmp_path):
    out = put(tmp_path, {"queries.jsonl": b"old", "qrels.txt": b"old", "manifest.jsonl": b"old"})
    broken = Dataset([JudgedQuery("q", "new", None)], {"q": {"v": 1}}, [{"video_id": "v", "title": object()}])
    with pytest.raises(TypeError):
        write(broken, out)
    assert {(out / name).read_bytes() for name in ("queries.jsonl", "qrels.txt", "manifest.jsonl")} == {b"old"}


def test_queries_are_written_so_that_they_are_read_as_they_were(tmp_path):
    queries = [JudgedQuery("q1", "Käse", "speech", "s3://b/i.jpg", ("a", "b")), JudgedQuery("q2", "tea", None)]
    write(Dataset(queries, {"q1": {"v": 1}}, []), tmp_path)
    assert read_queries(tmp_path / "queries.jsonl") == queries


def test_the_command_prints_counts_and_names_what_is_wrong(tmp_path):
    put(tmp_path / "beir", BEIR)

    def run(*arguments):
        return CliRunner().invoke(app, ["dataset", *map(str, arguments)])

    result = run("beir", tmp_path / "beir", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["videos"] == 2
    result = run("beir", tmp_path / "beir", tmp_path / "out")
    assert "wrote 2 videos, 1 queries, 2 judgements" in result.stdout
    assert "1 queries without judgements" in result.stdout
    assert f"--queries {tmp_path / 'out'}/queries.jsonl" in result.stdout
    result = run("msrvtt", tmp_path / "beir", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "did you mean msrvtt-1k-a?" in result.stderr
    assert run("tvr", tmp_path / "nowhere", tmp_path / "out").exit_code == 2
