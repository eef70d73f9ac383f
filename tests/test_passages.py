"""Response-to-passage conversion: what is left out and why, what is put together, and where passages come from."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from cluster.searchers import Hit
from cluster.store import MODALITIES
from operators import schema
from operators.bm25 import Bm25
from operators.response_to_passage import (
    content_words,
    first_sentences,
    prepare,
    to_document,
    without_image_phrases,
)
from pipelines.cli import app
from pipelines.passages import first_with_text
from tests.corpus import Corpus

QUESTION = "Which breed of dog is lying on the sofa?"
RESPONSE = "The dog is a Pembroke Welsh Corgi, bred to herd cattle."

PASSAGES = [
    "The Pembroke Welsh Corgi is a cattle herding dog. It comes from Wales. Queens have kept it.",
    "Sofas are furniture. They are soft.",
    "A dog is an animal. It barks! It also sleeps.",
    "Cattle are herded by dogs. A corgi nips their heels. It is low.",
    "The moon is made of stone.",
]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"image": "vg/VG_100K_2/1.jpg"}, "Visual Genome"),
        ({"question": "Which breed of dog is it"}, "whose question has under 25"),
        ({"question": "<image>\nWhich breed of dog is it"}, "whose question has under 25"),
        ({"question": "Please tell me how many dogs lie on the sofa."}, "count or a colour"),
        ({"question": "What colour is the dog on the sofa?"}, "count or a colour"),
        ({"question": "What are the colors of the dogs on the sofa?"}, "count or a colour"),
        ({"response": "1,024."}, "is a number"),
        ({"response": "Unanswerable"}, "says that there is none"),
        ({"response": "It is, as one sees, a corgi."}, "whose answer has under 30"),
        ({"response": "It looks rather like a corgi in the image."}, "whose answer has under 30"),
    ],
)
def test_what_retrieval_cannot_answer_is_left_out_with_its_reason(changed, reason):
    found = prepare(**({"image": "coco/1.jpg", "question": QUESTION, "response": RESPONSE} | changed)).reason
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("In the image, a man rides.", "A man rides."),
        ("The dog in this picture is brown.", "The dog is brown."),
        ("A man, in the scene, rides a horse in the photo.", "A man rides a horse."),
        ("The image shows a ferry\nat sea.", "A ferry at sea."),
        ("It stands in the image's corner.", "It stands in the image's corner."),
        ("In the image.", ""),
    ],
)
def test_an_answer_does_not_speak_of_the_image(text, left):
    assert without_image_phrases(text) == left


def test_a_short_answer_is_given_the_words_of_its_question():
    assert content_words("What is the Breed of the dog, and which breed has it?") == ["Breed", "dog"]
    short = prepare("a.jpg", QUESTION, "A Corgi dog.")
    assert (short.response, short.reason) == ("A Corgi dog (breed, lying, sofa)", None)
    assert prepare("a.jpg", QUESTION, "It looks like a corgi.").response == "It looks like a corgi."


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("One.  Two!\nThree.", "One. Two!"),
        ("One. Two.", "One. Two."),
        ("only one", "only one"),
        (
            "J. R. Smith of the U.S. Navy paid 3.50 dollars. He left. She stayed.",
            "J. R. Smith of the U.S. Navy paid 3.50 dollars. He left.",
        ),
        ('He asked "Why?" She said e.g. this. Then no more.', 'He asked "Why?" She said e.g. this.'),
    ],
)
def test_two_sentences_of_a_passage_are_kept(text, kept):
    assert first_sentences(text) == kept


def test_the_answer_stands_after_the_best_passage():
    assert to_document("R", ["One. Two. Three.", "Four.", "Five."]) == "One. Two. R Four. Five."
    assert to_document("R", ["One."]) == "One. R"


def test_bm25_is_okapis():
    texts = [
        "corgi herds cattle",
        "sofas soft furniture dog",
        "dog barks dog sleeps",
        "moon stone",
        "dog moon cattle soft dog",
    ]
    counts = [Counter(text.split()) for text in texts]
    length = np.array([sum(count.values()) for count in counts])

    def score(query):
        total = np.zeros(len(texts))
        for word in query.split():
            tf = np.array([count[word] for count in counts])
            df = np.count_nonzero(tf)
            idf = np.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            total += idf * tf / (tf + 1.2 * (0.25 + 0.75 * length / length.mean()))
        return total

    queries = ["corgi cattle", "dog dog sofas", "soft barks moon"]
    for query, found in zip(queries, Bm25(texts).search(queries, 5), strict=True):
        wanted = score(query)
        assert [text for text, _ in found] == [text for text in np.argsort(-wanted) if wanted[text]]
        np.testing.assert_allclose([value for _, value in found], np.sort(wanted)[::-1][: len(found)], rtol=1e-5)
    assert Bm25(texts).search(["zebra", "the", "dog"], 2)[:2] == [[], []]


def convert(tmp_path, examples, *arguments):
    tmp_path.mkdir(exist_ok=True)
    lines = examples if isinstance(examples, str) else "".join(json.dumps(row) + "\n" for row in examples)
    (tmp_path / "examples.jsonl").write_text(lines)
    out = tmp_path / "out" / "train.jsonl"
    ran = CliRunner().invoke(app, ["passages", str(tmp_path / "examples.jsonl"), "--out", str(out), *arguments])
    return ran, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else None


def in_file(tmp_path, name="passages.jsonl"):
    path = tmp_path / name
    if name.endswith("jsonl"):
        path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(["", *PASSAGES])))
    else:
        path.write_text("".join(f"{i}\t{text}\n" for i, text in enumerate(PASSAGES)))
    return ["--passages", str(path)]


@pytest.mark.parametrize("name", ["passages.jsonl", "passages.tsv"])
def test_answers_become_documents_with_passages_of_a_file(tmp_path, name):
    good = {"image": "img/1.jpg", "text": QUESTION, "response": RESPONSE}
    examples = [
        good,
        {"image": "https://h/2.jpg", "question": f"<image> {QUESTION}", "answer": RESPONSE},
        good | {"image": "VG_100K/3.jpg"},
        good | {"response": "Zebras graze beside Kilimanjaro quietly."},
    ]
    ran, rows = convert(tmp_path, examples, *in_file(tmp_path, name))
    assert ran.exit_code == 0, ran.stderr
    first, second, third = PASSAGES[0].rpartition(" Queens")[0], PASSAGES[3].rpartition(" It")[0], PASSAGES[2]
    document = f"{first} {RESPONSE} {second} {third.rpartition(' It')[0]}"
    assert rows == [
        {"image": "../img/1.jpg", "text": QUESTION, "passage": document},
        {"image": "https://h/2.jpg", "text": QUESTION, "passage": document},
    ]
    assert "wrote 2 of 4 examples" in ran.stdout
    assert "left out 1 with an image of Visual Genome" in ran.stdout
    assert "left out 1 for whose answer nothing was found" in ran.stdout


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        (
            '{"image": "a.jpg", "text": "q", "response": "r"}\n{"image": "b.jpg", "text": "q"}\n',
            "line 2: it has no response",
        ),
        ('{"image": "a.jpg", "text": "q", "response": "r"}\n{"image": \n', "line 2"),
        ('{"image": "a.jpg", "text": "q", "response": "r"}\n', "none of 1 examples can be used; 1 whose question has"),
    ],
)
def test_a_file_that_cannot_be_used_says_where_and_nothing_is_written(tmp_path, examples, said):
    ran, rows = convert(tmp_path, examples, *in_file(tmp_path))
    assert (ran.exit_code, rows) == (2, None)
    assert said in ran.stderr


def test_there_must_be_somewhere_to_search(tmp_path):
    example = {"image": "a.jpg", "text": QUESTION, "response": RESPONSE}
    ran, _ = convert(tmp_path, [example])
    assert ran.exit_code == 2
    assert "--passages FILE or --store STORE" in ran.stderr
    (tmp_path / "empty.jsonl").write_text("")
    ran, _ = convert(tmp_path, [example], "--passages", str(tmp_path / "empty.jsonl"))
    assert "holds no passages" in ran.stderr
    (tmp_path / "marks.jsonl").write_text('{"text": "! ?"}\n')
    ran, _ = convert(tmp_path, [example], "--passages", str(tmp_path / "marks.jsonl"))
    assert "none of 1 texts has a word" in ran.stderr
    ran, _ = convert(tmp_path, [example], "--out", str(tmp_path / "examples.jsonl"), *in_file(tmp_path))
    assert "is the file of the examples itself" in ran.stderr


def test_clips_without_text_give_no_passage():
    hits = [Hit(video_id, 1.0, 0, 0.0, 1.0) for video_id in ("a", "b", "c", "d", "e")]
    texts = {("b", 0): "B", ("c", 0): "C", ("c", 1): "another", ("d", 0): "D", ("e", 0): "E"}
    assert first_with_text(hits, texts) == ["B", "C", "D"]


def test_answers_become_documents_with_what_is_known_of_the_clips_of_a_store(tmp_path, cluster):
    corpus = Corpus(tmp_path)
    corpus.rows = [
        {"video_id": "corgis", "title": "Welsh corgi herding cattle", "description": "A dog. It runs. It stops."},
        {"video_id": "moons", "title": "Moons and planets"},
        {"video_id": "dogs", "title": "A dog asleep"},
        {"video_id": "silent", "title": ""},
    ]
    corpus.index("extract.modalities=[metadata]")
    said = {"video_id": "dogs", "clip": 0, "modality": "speech", "spans": [{"text": "Good boy"}, {"text": "Sit!"}]}
    corpus.store.append(MODALITIES, pa.Table.from_pylist([said], schema=schema.MODALITY_ROWS))
    corpus.build()
    example = {"image": "1.jpg", "text": QUESTION, "response": "Welsh corgi herding cattle, a kind of dog."}
    ran, [row] = convert(tmp_path / "in", [example], "--store", corpus.store.uri)
    assert ran.exit_code == 0, ran.stderr
    parts = ["Welsh corgi herding cattle. A dog.", example["response"], "A dog asleep. Good boy.", "Moons and planets."]
    assert row["passage"] == " ".join(parts)
