import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw, ImageFont

from operators import schema
from operators.errors import ConfigError, ModelError
from operators.screen_text import Line, ScreenText, _decode, is_changed, join_lines, merge_spans

CLIPS = schema.CLIP.append(pa.field("wanted", pa.list_(pa.string()))).append(pa.field("title", pa.string()))


@pytest.fixture(scope="module")
def screen_text():
    return ScreenText()


class CountingEngine:
    """Reads nothing but the grey value of the first pixel, and counts."""

    language = "en"

    def __init__(self):
        self.num_read = 0

    def read(self, image):
        self.num_read += 1
        return [line(f"value {int(image[0, 0, 0])}")]


def picture(*texts, size=(320, 180), grey=60, noise_seed=None, quality=90):
    """Return a JPEG with (left, top, font size, fill, text) written on it."""
    pixels = np.full((size[1], size[0]), float(grey))
    if noise_seed is not None:
        pixels += np.random.default_rng(noise_seed).normal(0, 2, pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")
    for left, top, font_size, fill, text in texts:
        ImageDraw.Draw(image).text((left, top), text, font=ImageFont.load_default(font_size), fill=(fill,) * 3)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def clip(jpegs, wanted=("screen_text",)):
    """One frame a second from second 100 on; the clip stops at second 200."""
    frames = None if jpegs is None else [{"pts_seconds": 100.0 + i, "jpeg": jpeg} for i, jpeg in enumerate(jpegs)]
    return {
        "video_id": "v",
        "clip": 0,
        "num_clips": 1,
        "start_seconds": 100.0,
        "stop_seconds": 200.0,
        "frames": frames,
        "audio": None,
        "failures": [],
        "timings": [],
        "wanted": list(wanted),
        "title": "kept",
    }


def run(operator, *clips):
    return operator(pa.Table.from_pylist(list(clips), schema=CLIPS))


def line(text, confidence=0.9, left=0.0, top=0.0, right=100.0, bottom=10.0):
    return Line(text, confidence, left, top, right, bottom)


def spans_of(*texts_of_frames):
    """Frames at seconds 0, 1, 2 ..., a clip that stops a second after the last."""
    frames = [[line(text) for text in texts] for texts in texts_of_frames]
    spans = merge_spans([float(i) for i in range(len(frames))], frames, float(len(frames)), "en")
    return [(span["start_seconds"], span["stop_seconds"], span["text"]) for span in spans]


def test_text_is_read_in_reading_order_over_the_time_it_stays(screen_text):
    title = (20, 20, 28, 255, "FLOOD WARNING")
    city = (20, 70, 22, 230, "Valencia")
    other = (20, 110, 24, 255, "Weather tomorrow")
    jpegs = [picture(title, city), picture(title, city, quality=80), picture(other), picture()]
    (row,) = run(screen_text, clip(jpegs)).to_pylist()
    read = [(span["start_seconds"], span["stop_seconds"], span["text"].casefold()) for span in row["screen_text"]]
    assert read == [(100, 102, "flood warning"), (100, 102, "valencia"), (102, 103, "weather tomorrow")]
    assert all(0.4 <= span["confidence"] <= 1 for span in row["screen_text"])
    assert {span["language"] for span in row["screen_text"]} == {"en"}
    assert [timing["stage"] for timing in row["timings"]] == ["screen_text"]


def test_small_text_of_a_large_frame_is_found_and_its_empty_neighbour_is_not_read_into(screen_text):
    size = (640, 360)
    jpegs = [picture((520, 330, 14, 255, "Channel 42"), size=size, noise_seed=1), picture(size=size, noise_seed=2)]
    (row,) = run(screen_text, clip(jpegs)).to_pylist()
    assert [(span["text"], span["stop_seconds"]) for span in row["screen_text"]] == [("Channel 42", 101)]


def test_bfloat16_reads_the_same(screen_text):
    jpegs = [picture((20, 20, 28, 255, "FLOOD WARNING"), (20, 70, 22, 230, "Valencia"))]
    (expected,), (read,) = (
        run(operator, clip(jpegs)).to_pylist() for operator in (screen_text, ScreenText(precision="bfloat16"))
    )
    assert [span["text"] for span in read["screen_text"]] == [span["text"] for span in expected["screen_text"]]


def test_rapidocr_reads_too():
    pytest.importorskip("rapidocr")
    (row,) = run(ScreenText(engine="rapidocr"), clip([picture((20, 20, 28, 255, "FLOOD WARNING")), picture()]))[
        "screen_text"
    ].to_pylist()
    assert [(span["text"], span["stop_seconds"]) for span in row] == [("FLOOD WARNING", 101)]


def test_what_has_no_frames_is_null_or_empty_by_the_reason(screen_text):
    table = run(screen_text, clip(None), clip([]), clip([picture()], wanted=["frame"]), clip([picture()]))
    assert table["screen_text"].to_pylist() == [None, [], None, []]
    assert [len(timings) for timings in table["timings"].to_pylist()] == [0, 1, 0, 1]
    assert set(table.column_names) == {*CLIPS.names, "screen_text"}
    assert table.schema.field("screen_text").type == pa.list_(schema.SPAN)
    assert run(screen_text).schema == table.schema


def test_a_clip_with_a_broken_frame_fails_alone(screen_text):
    first, second = run(screen_text, clip([b"not a jpeg"]), clip([picture()])).to_pylist()
    assert first["screen_text"] is None
    assert [(failure["stage"], failure["final"]) for failure in first["failures"]] == [("screen_text", False)]
    assert second["screen_text"] == []
    assert second["failures"] == []


def test_a_frame_is_read_only_if_its_picture_changed(screen_text):
    engine = CountingEngine()
    operator = object.__new__(ScreenText)
    operator._engine, operator._min_confidence = engine, 0.4
    same = [picture(grey=60, noise_seed=seed, quality=quality) for seed, quality in ((1, 90), (2, 85), (3, 95))]
    (row,) = run(operator, clip([*same, picture(grey=200), picture(grey=200)])).to_pylist()
    assert engine.num_read == 2
    assert [span["stop_seconds"] for span in row["screen_text"]] == [103, 200]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((700, 412, 12, 255, "12:04"), (700, 412, 12, 255, "12:05")),
        ((700, 412, 12, 255, "Score 1"), (700, 412, 12, 255, "Score 7")),
        ((700, 412, 10, 255, ""), (700, 412, 10, 255, "Ada")),
        ((2, 2, 12, 110, ""), (2, 2, 12, 110, "Ada")),
    ],
)
def test_little_text_in_a_corner_is_a_change(before, after):
    first = picture(before, size=(768, 432), noise_seed=1)
    again = picture(before, size=(768, 432), noise_seed=2)
    then = picture(after, size=(768, 432), noise_seed=2)
    thumbnails = [_decode(jpeg)[1] for jpeg in (first, again, then)]
    assert not is_changed(thumbnails[0], thumbnails[1])
    assert is_changed(thumbnails[0], thumbnails[2])


def test_pictures_of_another_size_have_changed():
    assert is_changed(np.zeros((4, 4), np.float32), np.zeros((4, 5), np.float32))


def test_pieces_become_lines_in_reading_order():
    pieces = [
        line("bottom", top=50, bottom=60),
        line("world", confidence=0.5, left=55, right=90, top=1, bottom=11),
        line("hello", left=0, right=50),
        line("far", left=200, right=230, top=2, bottom=9),
        line("=>", top=80, bottom=90),
    ]
    joined = join_lines(pieces)
    assert [(piece.text, piece.confidence) for piece in joined] == [("hello world", 0.5), ("far", 0.9), ("bottom", 0.9)]
    assert (joined[0].left, joined[0].right) == (0, 90)


def test_the_same_text_on_consecutive_frames_is_one_span():
    assert spans_of(["title"], ["Title", "news"], ["news"], []) == [(0, 2, "title"), (1, 3, "news")]


def test_no_frames_are_no_spans():
    assert spans_of() == []


def test_text_that_comes_back_is_a_second_span():
    assert spans_of(["title"], [], ["title"]) == [(0, 1, "title"), (2, 3, "title")]


def test_text_that_is_read_slightly_differently_is_one_span_with_the_surest_reading():
    frames = [[line("Communist Parly", 0.5)], [line("Communist Party", 0.8)], [line("Communist Parky", 0.6)]]
    (span,) = merge_spans([0.0, 1.0, 2.0], frames, 9.0, None)
    assert span == {
        "start_seconds": 0.0,
        "stop_seconds": 9.0,
        "text": "Communist Party",
        "confidence": 0.8,
        "language": None,
    }


def test_a_digit_that_changes_makes_another_span():
    assert spans_of(["Score of the home team 1"], ["Score of the home team 2"]) == [
        (0, 1, "Score of the home team 1"),
        (1, 2, "Score of the home team 2"),
    ]


def test_alike_lines_of_one_frame_stay_apart_and_equal_ones_are_one():
    assert spans_of(["the first line", "the fist line", "THE FIRST LINE"], ["the fist line"]) == [
        (0, 1, "the first line"),
        (0, 2, "the fist line"),
    ]


@pytest.mark.parametrize("settings", [{"engine": "tesseract"}, {"precision": "int8"}])
def test_an_unknown_engine_or_precision_is_a_config_error(settings):
    with pytest.raises(ConfigError, match="expected"):
        ScreenText(**settings)


def test_a_folder_without_weights_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="EasyOCR cannot read"):
        ScreenText(model=str(tmp_path))
