import dataclasses
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from operators import schema
from operators.errors import ConfigError, ModelError
from operators.speech import Segment, Speech, Thresholds, keep_segments

sys.path.insert(0, str(Path(__file__).parent))
from speech_audio import silence, synthesize  # noqa: E402, the tests are no package

CLIPS = schema.CLIP.append(pa.field("wanted", pa.list_(pa.string()))).append(pa.field("title", pa.string()))
SENTENCE = "Good morning everyone. The train to London leaves from platform four in ten minutes."


@pytest.fixture(scope="module")
def speech():
    return Speech()


def clip(audio, wanted=("speech",), start_seconds=0.0, failures=()):
    return {
        "video_id": "v",
        "clip": 0,
        "num_clips": 1,
        "start_seconds": start_seconds,
        "stop_seconds": start_seconds + 10,
        "frames": [],
        "audio": None if audio is None else audio.astype("<i2").tobytes(),
        "failures": list(failures),
        "timings": [{"stage": "decode", "seconds": 1.0, "cpu_seconds": 1.0}],
        "wanted": list(wanted),
        "title": "kept",
    }


def run(speech, *clips):
    return speech(pa.Table.from_pylist(list(clips), schema=CLIPS))


def words(spans):
    return "".join(c for span in spans for c in span["text"].casefold() + " " if c.isalnum() or c == " ").split()


def segment(text="hello", **changes):
    sure = Segment(1.0, 2.0, text, -0.3, 0.1, 1.2, "en")
    return dataclasses.replace(sure, **changes)


def test_speech_is_heard_at_its_time_in_the_video(speech):
    audio = np.concatenate([silence(3), synthesize(SENTENCE), silence(1)])
    table = run(speech, clip(audio, start_seconds=60.0))
    (row,) = table.to_pylist()
    heard = words(row["speech"])
    assert {"morning", "train", "london", "platform", "minutes"} <= set(heard)
    assert row["speech"][0]["start_seconds"] == pytest.approx(63, abs=0.5)
    assert row["speech"][-1]["stop_seconds"] <= 60 + len(audio) / schema.SAMPLE_RATE_HZ
    assert {span["language"] for span in row["speech"]} == {"en"}
    assert all(0.37 < span["confidence"] <= 1 for span in row["speech"])


def test_the_table_keeps_its_columns_and_loses_audio(speech):
    table = run(speech, clip(None))
    assert set(table.column_names) == {*CLIPS.names, "speech"} - {"audio"}
    assert table.schema.field("speech").type == pa.list_(schema.SPAN)
    assert table.schema.field("failures").type == pa.list_(schema.FAILURE)
    (row,) = table.to_pylist()
    assert row["title"] == "kept"
    assert [timing["stage"] for timing in row["timings"]] == ["decode", "speech"]


def test_a_table_without_rows_keeps_its_schema(speech):
    assert run(speech).schema == run(speech, clip(None)).schema


def test_utterances_far_apart_are_all_heard_each_at_its_time(speech):
    loud, quiet = synthesize("Where is the museum of the city?"), synthesize("The museum is near the river bank.") // 8
    (row,) = run(speech, clip(np.concatenate([loud, silence(8), quiet, silence(1)]))).to_pylist()
    assert words(row["speech"]).count("museum") == 2
    assert row["speech"][-1]["start_seconds"] == pytest.approx(len(loud) / schema.SAMPLE_RATE_HZ + 8, abs=0.8)


@pytest.mark.parametrize("kind", ["silence", "noise", "tone", "chord", "clicks", "one_sample"])
def test_nothing_is_heard_where_nobody_speaks(speech, kind):
    rng, seconds = np.random.default_rng(0), np.arange(10 * schema.SAMPLE_RATE_HZ) / schema.SAMPLE_RATE_HZ
    audio = {
        "silence": silence(10),
        "noise": rng.normal(0, 6000, len(seconds)),
        "tone": 12_000 * np.sin(2 * np.pi * 440 * seconds),
        "chord": sum(4000 * np.sin(2 * np.pi * hz * seconds) for hz in (262, 330, 392)) * np.exp(-(seconds % 0.5)),
        "clicks": 20_000.0 * (np.arange(len(seconds)) % 8000 < 20),
        "one_sample": np.array([1]),
    }[kind]
    (row,) = run(speech, clip(audio)).to_pylist()
    assert row["speech"] == []
    assert row["failures"] == []


@pytest.mark.parametrize(
    ("voice", "text"),
    [
        ("de", "Guten Morgen, heute sprechen wir über das Wetter in den Bergen."),
        ("es", "Buenos días, hoy vamos a visitar el museo de la ciudad con nuestros amigos."),
        ("ru", "Доброе утро, сегодня мы поговорим о погоде и о дорогах в горах."),
    ],
)
def test_an_english_model_does_not_invent_english_for_other_languages(speech, voice, text):
    (row,) = run(speech, clip(np.concatenate([silence(0.5), synthesize(text, voice), silence(0.5)]))).to_pylist()
    assert row["speech"] == []


def test_no_audio_says_nothing_unless_it_failed_or_is_not_wanted(speech):
    def failed(stage):
        return {"stage": stage, "error": "MediaError", "message": "broken", "final": True}

    table = run(
        speech,
        clip(None),
        clip(None, failures=[failed("speech")]),
        clip(None, failures=[failed("decode")]),
        clip(None, failures=[failed("frame")]),
        clip(silence(1), wanted=["frame"]),
    )
    assert table["speech"].to_pylist() == [[], None, None, [], None]
    assert [len(failures) for failures in table["failures"].to_pylist()] == [0, 1, 1, 1, 0]
    assert [len(timings) for timings in table["timings"].to_pylist()] == [2, 1, 1, 2, 1]


def test_a_clip_that_cannot_be_transcribed_fails_alone(speech):
    broken = clip(silence(1)) | {"audio": b"\x01"}  # half a sample
    first, second = run(speech, broken, clip(silence(1))).to_pylist()
    assert first["speech"] is None
    assert [(failure["stage"], failure["error"]) for failure in first["failures"]] == [("speech", "ValueError")]
    assert second["speech"] == []
    assert second["failures"] == []


@pytest.mark.parametrize(
    "unbelievable",
    [
        segment(mean_log_probability=-1.01),
        segment(no_speech_probability=0.61),
        segment(compression_ratio=2.41),
        segment(text=" ."),
        segment(start_seconds=2.0),
    ],
)
def test_a_segment_must_keep_to_every_threshold(unbelievable):
    assert keep_segments([segment("before"), unbelievable, segment("after")]) == [segment("before"), segment("after")]


def test_a_segment_at_its_thresholds_is_kept():
    edge = segment(mean_log_probability=-1.0, no_speech_probability=0.6, compression_ratio=2.4)
    assert keep_segments([edge]) == [edge]
    assert keep_segments([edge], Thresholds(min_log_probability=-0.9)) == []


def test_what_is_said_again_is_joined_to_one_segment():
    spoken = [segment(" Thank you."), segment("thank you. ", start_seconds=3.0, stop_seconds=4.0), segment("Yes")]
    assert keep_segments(spoken) == [segment("Thank you.", stop_seconds=4.0), segment("Yes")]


def test_an_english_model_refuses_another_language():
    with pytest.raises(ConfigError, match="English only, got language 'de'"):
        Speech(language="de")


def test_a_folder_that_holds_no_model_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="speech model"):
        Speech(model=str(tmp_path))
