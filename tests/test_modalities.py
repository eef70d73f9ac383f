import pyarrow as pa
import pytest

from operators import schema
from operators.modalities import modality_rows

SPAN = {"start_seconds": 1.0, "stop_seconds": 2.0, "text": "hello", "confidence": 0.9, "language": "en"}


def clip(**changes):
    row = {
        "video_id": "v1",
        "clip": 0,
        "num_clips": 1,
        "start_seconds": 0.0,
        "stop_seconds": 4.0,
        "wanted": list(schema.MODALITIES),
        "fingerprints": [{"stage": name, "fingerprint": f"made of {name}"} for name in ("decode", *schema.MODALITIES)],
        "title": "A title",
        "description": "",
        "tags": ["x", "y"],
        "frames": [{"pts_seconds": 0.5, "jpeg": b"jpeg"}],
        "speech": [SPAN],
        "screen_text": [],
        "failures": [],
    } | changes
    types = {
        "failures": pa.list_(schema.FAILURE),
        "speech": pa.list_(schema.SPAN),
        "screen_text": pa.list_(schema.SPAN),
    }
    types["frames"] = pa.list_(schema.FRAME_IMAGE)
    return pa.table({name: pa.array([value], types.get(name)) for name, value in row.items()})


def failure(stage, final=True):
    return {"stage": stage, "error": "MediaError", "message": "broken", "final": final}


def rows(**changes):
    return {row["modality"]: row for row in modality_rows(clip(**changes)).to_pylist()}


def test_each_wanted_modality_is_a_row_with_its_own_fingerprint():
    made = rows()
    assert {name: row["fingerprint"] for name, row in made.items()} == {m: f"made of {m}" for m in schema.MODALITIES}
    assert [span["text"] for span in made["speech"]["spans"]] == ["hello"]
    assert made["frame"]["frames"][0]["jpeg"] == b"jpeg"
    assert made["screen_text"]["spans"] == []


def test_metadata_is_title_description_and_tags_never_an_id():
    assert [span["text"] for span in rows()["metadata"]["spans"]] == ["A title", "x, y"]
    assert rows(title=None, tags=None)["metadata"]["spans"] == []


def test_what_is_not_wanted_gives_no_row():
    assert set(rows(wanted=["speech"])) == {"speech"}


@pytest.mark.parametrize(
    ("failed", "left"),
    [
        (failure("speech"), {"frame", "screen_text", "metadata"}),
        (failure("frame"), {"speech", "metadata"}),
        (failure("decode"), {"metadata"}),
        (failure("decode", final=False), set()),
    ],
)
def test_a_modality_that_failed_leaves_the_others(failed, left):
    assert set(rows(failures=[failed])) == left
