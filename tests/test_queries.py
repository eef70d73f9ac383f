"""Queries with images: read from files, from disk and object stores, and refused by name."""

import io
import json

import numpy as np
import obstore
import pytest
from PIL import Image

from cluster.objects import open_objects
from operators.encoder_lexical import LexicalEncoder
from operators.errors import ConfigError
from operators.remote import Environment
from pipelines.config import StorageConfig
from pipelines.datasets import JudgedQuery, read_queries
from pipelines.queries import AT_ONCE, encode_queries, read_image, to_query

NOWHERE = Environment()


def jpeg(level=90):
    sink = io.BytesIO()
    Image.new("RGB", (8, 6), (level, level, level)).save(sink, "JPEG")
    return sink.getvalue()


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_query_is_text_an_image_or_both(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    file = lines(
        tmp_path / "queries.jsonl",
        {"id": "t", "text": "a cat"},
        {"id": "i", "image": "a.jpg"},
        {"id": "b", "text": "what is it", "image": "a.jpg", "boxes": [[0, 0.5, 1, 1]], "caption": "a red cat"},
    )
    text, image, both = (to_query(query, NOWHERE) for query in read_queries(file))
    assert (text.text, text.image) == ("a cat", None)
    assert (image.text, image.image) == (None, jpeg())
    assert (both.text, both.image, both.boxes) == ("what is it", jpeg(), ((0.0, 0.5, 1.0, 1.0),))
    assert both.vision_text == "<BOV> <EOV> <BOC> a red cat <EOC>"


def test_objects_that_were_seen_are_words_of_the_query_and_say_where_to_look(tmp_path):
    dog = {"name": "dog", "attributes": {"brown": 0.9, "wet": 0.01}, "box": [0, 0, 0.5, 0.5]}
    cat = {"name": "cat", "box": [0.5, 0.5, 0.75, 0.75]}
    row = {"id": "q", "text": "whose cat", "image": "a.jpg", "objects": [dog, cat, {"name": "moon"}], "texts": ["exit"]}
    [query] = read_queries(lines(tmp_path / "queries.jsonl", row))
    assert query.vision_text == "<BOV> brown dog <SOV> cat <SOV> moon <SOV> exit <EOV>"
    assert query.boxes[:2] == ((0.5, 0.5, 0.75, 0.75), (0, 0, 0.5, 0.5)), "what the question names comes first"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "line 1: it has no text or query"),
        ({"image": "a.jpg", "boxes": [[0, 0, 640, 480]]}, "line 1: the box .*640.* shares"),
        ({"image": "a.jpg", "boxes": [[0.5, 0, 0.2, 1]]}, "line 1: the box"),
        ({"image": "a.jpg", "boxes": "everywhere"}, "line 1: the box 'e' is none"),
        ({"image": "a.jpg", "objects": ["cat"]}, "line 1: the object is 'cat'; it must be"),
    ],
)
def test_a_query_that_asks_nothing_or_looks_nowhere_is_named(tmp_path, row, message):
    with pytest.raises(ConfigError, match=message):
        read_queries(lines(tmp_path / "queries.jsonl", {"id": "q", **row}))


def test_images_are_read_from_disk_and_from_object_stores(tmp_path, s3):
    (tmp_path / "a b.jpg").write_bytes(jpeg())
    assert read_image(str(tmp_path / "a b.jpg"), NOWHERE) == jpeg()
    assert read_image(f"file://{tmp_path}/a b.jpg", NOWHERE) == jpeg()
    obstore.put(open_objects("s3://videos", s3.options), "queries/a.jpg", jpeg())
    storage = StorageConfig(endpoint=s3.url, region="us-east-1", options=s3.options)
    assert read_image("s3://videos/queries/a.jpg", storage.environment()) == jpeg()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("/nowhere/a.jpg", "the image /nowhere/a.jpg cannot be read"),
        ("https://user:secret@example.org/a.jpg?key=secret", "web server; download it"),
    ],
)
def test_an_image_that_cannot_be_read_is_named_without_secrets(uri, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_image(uri, NOWHERE)
    assert "secret" not in str(caught.value)


def test_of_many_queries_the_one_that_is_not_taken_is_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    asked = [JudgedQuery(f"q{i}", "red moon", None) for i in range(AT_ONCE + 3)]
    encoder = LexicalEncoder(dim=16)
    embedded = encode_queries(encoder, asked, NOWHERE)
    assert len(embedded) == AT_ONCE + 3
    np.testing.assert_array_equal(embedded[0], embedded[-1])
    asked[AT_ONCE + 1] = JudgedQuery("seen", "", None, str(tmp_path / "a.jpg"))
    with pytest.raises(ConfigError, match="query seen: .*no image tower"):
        encode_queries(encoder, asked, NOWHERE)
