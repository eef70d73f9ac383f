"""Sound: kept beside what was said, on demand, and given to encoders."""

import numpy as np
import pyarrow as pa
import pytest

from cluster.freshness import Quarantine
from cluster.store import MODALITIES, VIDEOS
from operators import schema, weights
from operators.encode import Encode
from operators.encoders import TokenEmbeddings
from operators.errors import ConfigError, MediaError
from operators.fingerprint import fingerprint
from operators.sound import decode_sound, encode_sound
from operators.speech import Speech
from pipelines.config import ExtractConfig, load
from pipelines.encode import plan, read_clips
from pipelines.extract import Fingerprints, extract
from pipelines.ingest import ingest
from pipelines.job import open_job
from pipelines.status import status
from tests.corpus import Corpus
from tests.media_files import make_video, tone

WITHOUT_AUDIO = schema.MODALITY_ROWS.remove(schema.MODALITY_ROWS.get_field_index("audio"))
VIDEO = {"uri": "v.mp4", "source_fingerprint": "s", "title": "t", "description": None, "tags": None}


def loudest_hz(samples):
    return np.abs(np.fft.rfft(samples)).argmax() * schema.SAMPLE_RATE_HZ / len(samples)


def test_a_sound_keeps_its_length_its_pitch_and_its_place_in_few_bytes():
    silence = np.zeros(16_000, np.int16)
    pcm = np.concatenate([silence, tone(1.5, 1000.0), silence])
    encoded = encode_sound(pcm.astype("<i2").tobytes())
    samples = decode_sound(encoded)
    assert (samples.dtype, samples.shape) == (np.float32, pcm.shape)
    assert loudest_hz(samples) == pytest.approx(1000, abs=1)
    np.testing.assert_allclose(samples[:15_900], 0, atol=0.01)
    np.testing.assert_allclose(samples[17_000:39_000], pcm[17_000:39_000] / 32768, atol=0.05)
    assert len(encoded) < pcm.nbytes / 8
    assert encode_sound(pcm.astype("<i2").tobytes()) == encoded


@pytest.mark.parametrize("encoded", [b"", b"this is no sound file"])
def test_what_is_no_sound_file_says_so(encoded):
    with pytest.raises(MediaError, match=f"{len(encoded)} bytes are not a sound file"):
        decode_sound(encoded)


def test_a_file_without_sound_is_none(tmp_path):
    with pytest.raises(MediaError, match="not a sound file"):
        decode_sound(make_video(tmp_path / "silent.mp4").read_bytes())


def test_keeping_audio_makes_speech_stale_and_not_keeping_it_nothing():
    off, on = (Fingerprints(ExtractConfig(keep_audio=keep)).of(VIDEO) for keep in (False, True))
    assert {stage for stage in off if off[stage] != on[stage]} == {"speech"}
    model = ExtractConfig().speech.model
    before = [Speech.VERSION, {"model": model, "compute_type": "int8", "language": None}, weights.fingerprint(model)]
    assert off["speech"] == fingerprint(off["decode"], before), "stores made without the setting must stay fresh"


def test_audio_is_kept_with_speech_only():
    with pytest.raises(ConfigError, match=r"add speech to extract\.modalities"):
        load([], ["extract.keep_audio=true", "extract.modalities=[frame]"])


class Ears:
    """An encoder that keeps what it was given."""

    dim = 4

    def encode_documents(self, clips):
        self.heard = [content.audio for clip in clips for content in clip.values()]
        empty = TokenEmbeddings(np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
        return [dict.fromkeys(clip, empty) for clip in clips]


def hear(corpus):
    """Return what an encoder is given as sound: {(video, clip, modality): audio}."""
    work = plan(corpus.store, corpus.config().encode, Quarantine({}, 1, 0))
    clips = read_clips(work.rows, corpus.store, corpus.store.open(MODALITIES).version)
    ears = Ears()
    Encode(lambda: ears, "ears", {}, {})(clips)
    keys = [(row["video_id"], row["clip"], m["modality"]) for row in clips.to_pylist() for m in row["modalities"]]
    return dict(zip(keys, ears.heard, strict=True))


def extracted(corpus, *assignments, dry_run=False):
    """Return how many videos there was something to extract of."""
    with open_job(corpus.config("extract.clip_seconds=1", *assignments), "extract", dry_run, creates=True) as job:
        ingest(job, corpus.manifest, False, dry_run)
        extract(job, dry_run)
    return job.summary.counts["extract"]


def add_speech_of_before(corpus, settings):
    """Write rows of speech as they were before sound could be kept."""
    fingerprints = Fingerprints(corpus.config("extract.clip_seconds=1", settings).extract)
    row = {"modality": "speech", "num_clips": 2, "start_seconds": 0.0, "stop_seconds": 1.0, "spans": [], "frames": []}
    found = [
        row | {"video_id": video["video_id"], "clip": clip, "fingerprint": fingerprints.of(video)["speech"]}
        for video in corpus.table(VIDEOS)
        for clip in (0, 1)
    ]
    corpus.store.append(MODALITIES, pa.Table.from_pylist(found, schema=WITHOUT_AUDIO))


def rows(corpus):
    found = corpus.store.rows(MODALITIES, ["video_id", "clip", "modality", "fingerprint"]).to_pylist()
    return {(r["video_id"], r["clip"], r["modality"]): (r["fingerprint"], r["_rowid"]) for r in found}


def test_a_store_from_before_sound_was_kept_stays_fresh_until_it_is_to_be_kept(tmp_path, cluster):
    corpus = Corpus(tmp_path)
    corpus.rows = [{"video_id": name, "uri": f"{name}.mp4", "title": "a tone"} for name in ("loud", "mute")]
    make_video(tmp_path / "loud.mp4", tone_seconds=2.0)
    make_video(tmp_path / "mute.mp4")
    corpus.store.create(MODALITIES, WITHOUT_AUDIO)
    assert extracted(corpus, "extract.modalities=[metadata]") == 2
    assert corpus.store.open(MODALITIES).schema.equals(WITHOUT_AUDIO)
    both = "extract.modalities=[speech,metadata]"
    add_speech_of_before(corpus, both)
    assert extracted(corpus, both, dry_run=True) == 0
    old, silent = rows(corpus), hear(corpus)
    assert set(silent) == {
        (video, clip, m) for video in ("loud", "mute") for clip in (0, 1) for m in ("speech", "metadata")
    }
    assert set(silent.values()) == {None}

    kept = [both, "extract.keep_audio=true"]
    assert extracted(corpus, *kept) == 2
    new = rows(corpus)
    assert {key for key in old if old[key] != new[key]} == {key for key in old if key[2] == "speech"}
    heard = {key: decode_sound(audio) for key, audio in hear(corpus).items() if audio is not None}
    assert set(heard) == {("loud", 0, "speech"), ("loud", 1, "speech")}
    for samples in heard.values():
        assert len(samples) == pytest.approx(16_000, abs=1)
        assert loudest_hz(samples) == pytest.approx(440, abs=1)
    assert status(corpus.config("extract.clip_seconds=1", *kept))["stale"]["extract"] == 0
    assert extracted(corpus, both, dry_run=True) == 2
