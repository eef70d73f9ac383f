"""Makes tiny videos whose content is known: frame i is flat grey ``levels[i]``, the sound is one tone."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

TICKS = 1000  # a second, in the time base of every video made here


def make_video(
    path: Path,
    levels: Sequence[int] = tuple(range(40, 240, 10)),
    fps: float = 10.0,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    times: Sequence[float] | None = None,
    picture: np.ndarray | None = None,
    rotation: int = 0,
    keyframe_every: int = 12,
    tone_seconds: float = 0.0,
    tone_from: float = 0.0,
    cover_art: bool = False,
    live: bool = False,
) -> Path:
    """Write a video: 20 grey frames in 2 seconds unless told otherwise.

    ``times`` gives the frames' times in seconds, ``picture`` (height, width, 3) replaces the grey ones, ``rotation`` is
    counterclockwise degrees to be applied by players. No ``levels`` makes a file that has only sound. ``live`` (WebM)
    leaves out the duration.
    """
    with av.open(str(path), "w", options={"live": "1"} if live else {}) as output:
        video = _add_video(output, codec, size, rotation, keyframe_every, fps, len(levels)) if levels else None
        sound = output.add_stream("aac", rate=16_000, layout="mono") if tone_seconds else None
        cover = _add_cover(output) if cover_art else None
        if cover is not None:
            _mux_cover(output, cover)
        if video is not None:
            for index, level in enumerate(levels):
                seconds = times[index] if times is not None else index / fps
                pixels = picture if picture is not None else np.full((size[1], size[0], 3), level, np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="yuv420p")
                frame.pts, frame.time_base = round(seconds * TICKS), Fraction(1, TICKS)
                output.mux(video.encode(frame))
            output.mux(video.encode())
        if sound is not None:
            _mux_tone(output, sound, tone_from, tone_seconds)
    return path


def tone(seconds: float, hz: float = 440.0) -> np.ndarray:
    """Return a sine of half the full scale at 16 kHz, int16."""
    return (np.sin(2 * np.pi * hz * np.arange(round(seconds * 16_000)) / 16_000) * 16_384).astype(np.int16)


def _add_video(
    output: Any, codec: str, size: tuple[int, int], rotation: int, keyframe_every: int, fps: float, num_frames: int
) -> Any:
    options = {}
    if codec == "libx265":
        # Of one single frame that may be reordered x265 now and then makes a packet without a time (1 in 10 here).
        options = {"crf": "10", "x265-params": "log-level=none" + (":bframes=0" if num_frames == 1 else "")}
    stream = output.add_stream(codec, rate=Fraction(fps).limit_denominator(1000), options=options)
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    stream.gop_size = keyframe_every
    stream.codec_context.time_base = Fraction(1, TICKS)
    if rotation:
        stream.set_display_rotation(rotation)
    return stream


def _add_cover(output: Any) -> Any:
    cover = output.add_stream("mjpeg", rate=1)
    cover.width, cover.height, cover.pix_fmt = 400, 400, "yuvj420p"
    cover.disposition = Disposition.attached_pic
    return cover


def _mux_cover(output: Any, cover: Any) -> None:
    black = av.VideoFrame.from_ndarray(np.zeros((400, 400, 3), np.uint8), "rgb24").reformat(format="yuvj420p")
    output.mux(cover.encode(black))
    output.mux(cover.encode())


def _mux_tone(output: Any, stream: Any, from_seconds: float, seconds: float) -> None:
    samples = tone(seconds)
    for begin in range(0, len(samples), 1024):
        frame = av.AudioFrame.from_ndarray(samples[None, begin : begin + 1024], format="s16", layout="mono")
        frame.sample_rate, frame.time_base = 16_000, Fraction(1, 16_000)
        frame.pts = round(from_seconds * 16_000) + begin
        output.mux(stream.encode(frame))
    output.mux(stream.encode())
