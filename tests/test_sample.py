import json
import re
from pathlib import Path

import av
import pytest

from operators import schema
from operators.errors import ConfigError
from pipelines import sample
from pipelines.datasets import read_qrels, read_queries

STOP_WORDS = {"and", "for", "from", "how", "its", "not", "that", "the", "this", "which", "with"}
MODALITIES = {schema.FRAME, schema.SPEECH, schema.SCREEN_TEXT, schema.METADATA}
READABLE = [video for video in sample.VIDEOS if not video.broken]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sample")
    counts = sample.make_sample(directory)
    return directory, counts


def rows(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def content_words(text: str) -> set[str]:
    """Return the words that carry meaning, without the endings that would hide that two are the same."""
    words = set(re.findall(r"\w{3,}", text.lower())) - STOP_WORDS
    return {re.sub(r"(ing|ed|es|s)$", "", word) if len(word) > 4 else word for word in words}


def modification_times(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def test_counts_are_those_of_the_files(corpus):
    directory, counts = corpus
    assert counts["videos"] == len(rows(directory / "manifest.jsonl")) == len(list(directory.glob("videos/*.mp4")))
    assert counts["queries"] == len(rows(directory / "queries.jsonl"))


def test_every_uri_of_the_manifest_is_a_file_in_the_corpus(corpus):
    directory, _ = corpus
    for row in rows(directory / "manifest.jsonl"):
        assert not Path(row["uri"]).is_absolute()
        assert (directory / row["uri"]).is_file()


def test_every_query_is_judged_and_its_relevant_videos_are_in_the_manifest(corpus):
    directory, _ = corpus
    ids = {row["video_id"] for row in rows(directory / "manifest.jsonl")}
    qrels = read_qrels(directory / "qrels.txt")
    assert set(qrels) == {query.query_id for query in read_queries(directory / "queries.jsonl")}
    assert all(relevant and relevant.keys() <= ids for relevant in qrels.values())


def test_every_modality_is_the_target_of_six_queries_or_more(corpus):
    directory, _ = corpus
    targets = [query.target_modality for query in read_queries(directory / "queries.jsonl")]
    assert set(targets) == MODALITIES
    assert all(targets.count(modality) >= 6 for modality in MODALITIES)


@pytest.mark.parametrize("query", sample.QUERIES, ids=lambda query: query.query_id)
def test_only_its_target_modality_shares_words_with_a_query(query):
    texts = {video.video_id: video.texts for video in sample.VIDEOS}
    for video_id in query.relevant:
        others = " ".join(text for modality, text in texts[video_id].items() if modality != query.target_modality)
        assert texts[video_id][query.target_modality]
        assert not content_words(query.text) & content_words(others)


@pytest.mark.parametrize("video", READABLE, ids=lambda video: video.video_id)
def test_a_video_has_the_duration_and_the_tracks_it_claims(corpus, video):
    directory, _ = corpus
    with av.open(directory / video.uri) as container:
        num_frames = sum(1 for _ in container.decode(video=0))
        assert num_frames / container.streams.video[0].average_rate == pytest.approx(video.seconds, abs=0.05)
        if not video.clip:
            assert bool(container.streams.audio) == video.has_audio


def test_speech_ends_before_its_video_does():
    for video in sample.VIDEOS:
        if video.speech:
            samples, rate_hz = sample.synthesize(video.speech)
            assert sample.SPEECH_STARTS_SECONDS + len(samples) / rate_hz < video.seconds


def test_a_sentence_sounds_the_same_whatever_was_said_before():
    first, _ = sample.synthesize("The river is deep.")
    sample.synthesize("Something else.")
    again, _ = sample.synthesize("The river is deep.")
    assert (first == again).all()


def test_speech_is_heard_and_the_rest_of_its_video_is_silent(corpus):
    directory, _ = corpus
    with av.open(directory / "videos/v001.mp4") as container:
        rate_hz = container.streams.audio[0].rate
        loudness = [abs(frame.to_ndarray()).max() for frame in container.decode(audio=0)]
    blocks_a_second = rate_hz / 1024
    said = loudness[round(1 * blocks_a_second) : round(3 * blocks_a_second)]
    assert max(said) > 0.1
    assert max(loudness[-round(blocks_a_second) :]) < 0.01


def test_frames_move_and_the_banner_is_not_there_all_the_time(corpus):
    directory, _ = corpus
    with av.open(directory / "videos/v001.mp4") as container:
        frames = [frame.to_ndarray(format="gray").astype(float) for frame in container.decode(video=0)]
    banner = slice(sample.HEIGHT - 90, sample.HEIGHT - 20)
    first, middle, last = frames[0], frames[len(frames) // 2], frames[-1]
    assert abs(first[:200] - last[:200]).mean() > 3
    assert middle[banner, :40].mean() < 40 < min(first[banner, :40].mean(), last[banner, :40].mean())


def test_the_broken_video_cannot_be_opened(corpus):
    directory, _ = corpus
    (broken,) = [video for video in sample.VIDEOS if video.broken]
    with pytest.raises(av.FFmpegError):
        av.open(directory / broken.uri)


def test_a_second_call_touches_only_what_is_damaged(corpus):
    directory, _ = corpus
    damaged = directory / "videos/v013.mp4"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:100])
    before = modification_times(directory)
    sample.make_sample(directory)
    after = modification_times(directory)
    assert {path for path in after if after[path] != before.get(path)} == {str(damaged)}
    assert damaged.read_bytes() == content


def test_a_folder_with_other_files_is_refused(tmp_path):
    own = tmp_path / "manifest.jsonl"
    own.write_text("{}\n")
    with pytest.raises(ConfigError, match="not a sample corpus"):
        sample.make_sample(tmp_path)
    assert own.read_text() == "{}\n"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "corpus").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        sample.make_sample(tmp_path / "corpus")


def test_a_missing_package_names_the_extra():
    with pytest.raises(ConfigError, match=r"pip install 'maxreel\[sample\]'"):
        sample.locate(sample.Asset("no_such_package", "a.png", ""))
