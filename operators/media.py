"""What a video file holds: its description, the pictures on screen at given times, its sound.

Runs inside the decoder process (``decode_child``), because native decoders crash and hang. Pictures of short videos are
read by decord, which indexes the whole file and then seeks; what it cannot do or gets wrong (see ``DECORD_CODECS`` and
below it, rotation, several video streams, edit lists, odd shapes, damage) and what is long is read by PyAV, which is
also the only reader of sound. Over 9 videos of 8 to 363 s the two took the same CPU time within a third. Each function
that uses PyAV opens the file anew: a few milliseconds a clip, and no state to go wrong.

Times are seconds from the start of the container, in floating point. Frame indices do not leave this module, because
the two libraries count frames differently where a file is odd.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

import av
import decord
import numpy as np
import numpy.typing as npt
from av.stream import Disposition

from operators.errors import MediaError, SourceError
from operators.schema import SAMPLE_RATE_HZ

Source: TypeAlias = str | IO[bytes]
Picture: TypeAlias = npt.NDArray[np.uint8]

MIN_SIDE = 16
"""Pictures with a shorter side show nothing and are no frame modality."""

MAX_DECLARED_SECONDS = 86_400.0
"""A longer declared duration is measured before it is believed: damaged headers declare years."""

SAME_TIME_SECONDS = 1e-3
"""Times closer than this are one: decord's are float32, which resolves half a millisecond after two hours."""

SEEK_AHEAD_SECONDS = 4.0
"""A gap PyAV seeks over. Below it, decoding on is cheaper than starting at a keyframe again."""

SEEK_BACK_SECONDS = (0.0, 10.0, 60.0)
"""How much earlier to look for a keyframe, in turn, before reading from the start."""

PREROLL_SECONDS = 0.5
"""Sound decoded before what is wanted and dropped: codecs need some packets to settle."""

SOUND_GAP_SECONDS = 0.05
"""Timestamps of sound that disagree by less are jitter; by more, a gap that is filled with silence."""

DECORD_CODECS = frozenset({"h264", "mpeg4", "msmpeg4", "vp8", "vp9", "h263", "mjpeg", "mpeg2video", "mpeg1video"})
"""Where decord gave the same frame as PyAV for the same time. HEVC is not here: open GOPs came out one frame late."""


DECORD_FORMATS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"})
"""Likewise. In MPEG-TS, decord gave frames that were more than a second away."""


DECORD_MAX_BYTES = 256 << 20
"""Unpacked size of a video that decord may have. Its thread decodes ahead of what was asked for, without a limit: after
one frame of a 6 minute video it held 1.3 GB and had burnt 6 s of CPU time."""


@dataclass(frozen=True)
class Probe:
    """What a file holds.

    Attributes
    ----------
    duration_seconds
        As declared; None where it is not declared or not believable.
    width, height
        Pixels of the picture as shown, after rotation. Pixel aspect ratio is not applied.
    summary
        The streams in words, for messages: ``h264 1280x720, aac``.
    """

    duration_seconds: float | None
    width: int | None
    height: int | None
    fps: float | None
    has_video: bool
    has_audio: bool
    summary: str

    @property
    def has_pictures(self) -> bool:
        """Whether there is a picture that is large enough to show something."""
        return self.has_video and min(self.width or 0, self.height or 0) >= MIN_SIDE


def probe(source: Source, name: str) -> Probe:
    """Return what a file holds.

    One frame is decoded, because only it tells the rotation.

    Parameters
    ----------
    source
        A local path, a URL that FFmpeg can open, or a seekable binary file.
    name
        What messages call the file.

    Raises
    ------
    SourceError
        If the bytes cannot be read.
    MediaError
        If it is not a media file, or none of its streams is video or audio that can be decoded.
    """
    with _open(source, name) as container:
        summary = _summary(container)
        stream, sound = _video_stream(container), _audio_stream(container)
        if stream is None and sound is None:
            raise MediaError(
                f"{name}: the container opens ({summary}) but holds neither video nor audio that can be decoded"
            )
        width, height = _shown_size(stream, _stream_turns(container, stream)) if stream is not None else (None, None)
        return Probe(
            duration_seconds=_declared_duration(container),
            width=width,
            height=height,
            fps=_fps(stream) if stream is not None else None,
            has_video=stream is not None,
            has_audio=bool(container.streams.audio),
            summary=summary,
        )


def measure_duration(path: str, name: str) -> float:
    """Return when the last packet of a file ends, in seconds. Reads all of it and decodes nothing."""
    stop_seconds = 0.0
    with _open(path, name) as container:
        start_seconds = _start_seconds(container)
        streams = [*container.streams.video, *container.streams.audio]
        with contextlib.suppress(av.FFmpegError):  # what precedes the damage is what can be decoded
            for packet in container.demux(streams):
                if packet.pts is not None:
                    stop = float((packet.pts + (packet.duration or 0)) * packet.time_base) - start_seconds
                    stop_seconds = max(stop_seconds, stop)
    return stop_seconds


class FrameReader:
    """Reads the pictures of one file, in clips; keeps decord's index of the file between them.

    Parameters
    ----------
    path
        A local file.
    name
        What messages call the file.
    max_side
        Pictures are scaled down so that the longer side has at most this many pixels; never up.
    """

    def __init__(self, path: str, name: str, max_side: int) -> None:
        self._path, self._name = path, name
        with _open(path, name) as container:
            stream = _video_stream(container)
            if stream is None:
                raise MediaError(f"{name}: has no video stream")
            turns = _stream_turns(container, stream)
            self._size = _fit(_shown_size(stream, turns), max_side)
            self._try_decord = not turns and _suits_decord(container, stream, self._size)
            self._start_seconds = _stream_start(stream) - _start_seconds(container)
            self._declared_stop_seconds = _declared_stop(stream) - _start_seconds(container)
            self._summary = _summary(container)
        self._decord: _DecordIndex | None = None

    def read(self, times: Sequence[float]) -> Iterator[tuple[float, Picture]]:
        """Yield (pts_seconds, picture) of the frames on screen at some times, each frame once.

        Times at which nothing is shown, before the first frame or after the last, yield nothing. Where the file is
        damaged, the frames before the damage come out.

        Parameters
        ----------
        times
            Seconds, ascending.

        Yields
        ------
        pts_seconds, picture
            Ascending; picture is (height, width, 3), uint8, RGB, rotated and scaled.

        Raises
        ------
        MediaError
            If no frame comes out although the file should have one.
        """
        last_seconds = -math.inf
        for pts_seconds, picture in self._either(times):
            if pts_seconds > last_seconds + SAME_TIME_SECONDS:
                last_seconds = pts_seconds
                yield pts_seconds, picture

    def _either(self, times: Sequence[float]) -> Iterator[tuple[float, Picture]]:
        num_read = 0
        if self._try_decord:
            try:
                for frame in self._by_decord(times):
                    num_read += 1
                    yield frame
                return
            except _DecordFailed:
                self._try_decord, self._decord = False, None
        cause = None
        try:
            for frame in self._by_pyav(times):
                num_read += 1
                yield frame
        except av.FFmpegError as error:
            cause = error
        if not num_read and (cause is not None or self._is_declared(times)):
            raise MediaError(self._explain(times, cause)) from cause

    def _by_decord(self, times: Sequence[float]) -> Iterator[tuple[float, Picture]]:
        if self._decord is None:
            self._decord = _DecordIndex(self._path, *self._size)
        shifted = [seconds - self._start_seconds for seconds in times]
        for pts_seconds, picture in self._decord.read(shifted):
            yield pts_seconds + self._start_seconds, picture

    def _by_pyav(self, times: Sequence[float]) -> Iterator[tuple[float, Picture]]:
        with _open(self._path, self._name) as container:
            stream = _video_stream(container)
            if stream is not None:
                for pts_seconds, frame in _frames_at(_Decoding(container, stream), times):
                    yield pts_seconds, _picture(frame, *self._size)

    def _is_declared(self, times: Sequence[float]) -> bool:
        return any(seconds <= 0 or seconds < self._declared_stop_seconds for seconds in times)

    def _explain(self, times: Sequence[float], cause: av.FFmpegError | None) -> str:
        reason = _reason(cause) if cause else "its picture data is missing or damaged"
        return (
            f"{self._name}: the container opens ({self._summary}) but no frame could be decoded between "
            f"{times[0]:.1f} and {times[-1]:.1f} s; {reason}. Play the file to see whether it is whole, or encode it again"
        )


def read_audio(path: str, name: str, start_seconds: float, stop_seconds: float) -> bytes | None:
    """Return the sound of [start_seconds, stop_seconds) as mono int16 PCM at 16 kHz, or None where there is none.

    The first sample is the one at ``start_seconds``: gaps are filled with silence, so that times in the sound are times
    in the video. Packets that cannot be decoded become silence too.

    Raises
    ------
    MediaError
        If there is an audio stream but none of its packets here can be decoded.
    """
    with _open(path, name) as container:
        if not container.streams.audio:
            return None
        stream = _audio_stream(container)
        if stream is None:
            raise MediaError(f"{name}: no decoder for its audio stream ({_summary(container)})")
        start_of_file = _start_seconds(container)
        stream.codec_context.thread_count = 1
        if start_seconds > PREROLL_SECONDS:
            _seek(container, stream, start_of_file + start_seconds - PREROLL_SECONDS)
        track = _Track(start_seconds, stop_seconds)
        cause = _fill(track, container, stream, start_of_file)
        declared = _overlap(track, stream, start_of_file)
        if not track.num_samples and (cause is not None or declared > 1.0):
            raise MediaError(
                f"{name}: no sound could be decoded between {start_seconds:.1f} and {stop_seconds:.1f} s "
                f"({_summary(container)}); {_reason(cause) if cause else 'its data is missing or damaged'}"
            ) from cause
        return track.samples().tobytes() if track.num_samples else None


def _overlap(track: _Track, stream: Any, start_of_file: float) -> float:
    """Return for how many seconds of a track its stream says that it has sound."""
    begin = max(track.start_seconds, _stream_start(stream) - start_of_file)
    return min(track.stop_seconds, _declared_stop(stream) - start_of_file) - begin


def _fill(track: _Track, container: Any, stream: Any, start_of_file: float) -> av.FFmpegError | None:
    """Decode into ``track`` until it is full; return an error that was met on the way."""
    resampler, errors = _resampler(), list[av.FFmpegError]()
    for frame in _sound(container, stream, errors):
        seconds = None if frame.pts is None else frame.time - start_of_file
        if seconds is not None and seconds >= track.stop_seconds:
            break
        try:
            pieces = resampler.resample(frame)
        except ValueError:  # the format changed in mid-stream; the new one needs a new resampler
            resampler = _resampler()
            pieces = resampler.resample(frame)
        track.add(seconds, [piece.to_ndarray()[0] for piece in pieces])
    track.add(None, [piece.to_ndarray()[0] for piece in resampler.resample(None)])
    return errors[-1] if errors else None


def _sound(container: Any, stream: Any, errors: list[av.FFmpegError]) -> Iterator[Any]:
    """Yield the frames of an audio stream; packets that cannot be decoded go to ``errors``."""
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.InvalidDataError as error:
                errors.append(error)
    except av.FFmpegError as error:
        errors.append(error)


class _Track:
    """Samples laid out by their timestamps, cut to [start_seconds, stop_seconds)."""

    def __init__(self, start_seconds: float, stop_seconds: float) -> None:
        self.start_seconds, self.stop_seconds = start_seconds, stop_seconds
        self.num_samples = 0
        self._length = self._position(stop_seconds)
        self._pieces: list[npt.NDArray[np.int16]] = []
        self._next: int | None = None  # where the next sample goes; negative in the preroll

    def add(self, seconds: float | None, pieces: Sequence[npt.NDArray[np.int16]]) -> None:
        """Append what one decoded frame gave; ``seconds`` is the frame's time, if it has one."""
        begin = self._next
        if seconds is not None:
            position = self._position(seconds)
            if begin is None or position - begin > SOUND_GAP_SECONDS * SAMPLE_RATE_HZ:
                begin = position
        begin = begin or 0
        for piece in pieces:
            self._place(piece, begin)
            begin += len(piece)
        self._next = begin

    def samples(self) -> npt.NDArray[np.int16]:
        """Return the samples from the start of the track to the last one there is."""
        return np.concatenate(self._pieces) if self._pieces else np.zeros(0, np.int16)

    def _position(self, seconds: float) -> int:
        return round((seconds - self.start_seconds) * SAMPLE_RATE_HZ)

    def _place(self, piece: npt.NDArray[np.int16], begin: int) -> None:
        kept = piece[max(0, self.num_samples - begin) : max(0, self._length - begin)]
        if len(kept):
            silence = max(0, begin - self.num_samples)
            self._pieces += [np.zeros(silence, np.int16), kept]
            self.num_samples += silence + len(kept)


class _Decoding:
    """Frames of one stream in order, from wherever it was last told to seek to."""

    def __init__(self, container: Any, stream: Any) -> None:
        self._container, self._stream = container, stream
        self._start_seconds = _start_seconds(container)
        self._frame_seconds = 1.0 / (_fps(stream) or 1.0)
        stream.codec_context.thread_count = 1  # parallelism is one process a video, not threads
        self._frames = container.decode(stream)
        self._stop_seconds = _stream_start(stream) - self._start_seconds
        self.seekable = True

    def seek(self, seconds: float) -> None:
        """Go on from the keyframe before a time, if the file can be sought in."""
        self.seekable = _seek(self._container, self._stream, self._start_seconds + seconds)
        if self.seekable:
            self._frames = self._container.decode(self._stream)

    def next(self) -> tuple[float, float, Any] | None:
        """Return (pts_seconds, stop_seconds, frame), or None at the end."""
        frame = next(self._frames, None)
        if frame is None:
            return None
        pts_seconds = self._stop_seconds if frame.pts is None else frame.time - self._start_seconds
        duration = float(frame.duration * frame.time_base) if frame.duration else self._frame_seconds
        self._stop_seconds = pts_seconds + duration
        return pts_seconds, self._stop_seconds, frame


def _frames_at(decoding: _Decoding, times: Sequence[float]) -> Iterator[tuple[float, Any]]:
    """Yield (pts_seconds, frame) of what is on screen at each of some ascending times.

    Seeks over long gaps. Where a seek lands no further than decoding already is (few keyframes), it is the last one.
    """
    shown, upcoming, position = None, None, 0.0
    for index, seconds in enumerate(times):
        if decoding.seekable and seconds - position > SEEK_AHEAD_SECONDS:
            decoding.seek(seconds)
            shown, upcoming = None, decoding.next()
            decoding.seekable = decoding.seekable and upcoming is not None and (index == 0 or upcoming[0] > position)
        elif upcoming is None and shown is None:
            upcoming = decoding.next()
        while upcoming is not None and upcoming[0] <= seconds:
            shown, upcoming = upcoming, _next_or_none(decoding)
        if shown is None:
            continue
        position = shown[0]
        if upcoming is not None or seconds < shown[1]:
            yield shown[0], shown[2]


def _next_or_none(decoding: _Decoding) -> tuple[float, float, Any] | None:
    """Return the next frame; None at damage too, because the frame before it is still to be handed out."""
    try:
        return decoding.next()
    except av.FFmpegError:
        return None


_DECORD_ERRORS = (decord.DECORDError, RuntimeError, AssertionError, IndexError, ValueError, OSError)


class _DecordFailed(Exception):
    """Decord cannot read this file; PyAV may."""


class _DecordIndex:
    """A decord reader and the times of its frames, counted from the first frame."""

    def __init__(self, path: str, width: int, height: int) -> None:
        self._shape = (height, width, 3)
        try:
            self._reader = decord.VideoReader(path, width=width, height=height, num_threads=1)
            times = self._reader.get_frame_timestamp(range(len(self._reader)))
        except _DECORD_ERRORS as error:
            raise _DecordFailed(str(error)) from error
        self._starts, self._stops = times[:, 0].astype(np.float64), times[:, 1].astype(np.float64)
        if abs(self._starts[0]) > SAME_TIME_SECONDS or (np.diff(self._starts) < 0).any():
            raise _DecordFailed(f"frame times begin at {self._starts[0]} s")  # edit lists, missing timestamps

    def read(self, times: Sequence[float]) -> Iterator[tuple[float, Picture]]:
        for index in self._indices(times):
            try:
                picture = self._reader[index].asnumpy()
            except _DECORD_ERRORS as error:
                raise _DecordFailed(str(error)) from error
            if picture.shape != self._shape:
                raise _DecordFailed(f"a frame of shape {picture.shape}, not {self._shape}")
            yield float(self._starts[index]), picture

    def _indices(self, times: Sequence[float]) -> list[int]:
        """Return which frames are on screen at some times, each once."""
        frame_seconds = self._starts[-1] / max(1, len(self._starts) - 1)
        stop_seconds = max(self._stops[-1], self._starts[-1] + frame_seconds, SAME_TIME_SECONDS)
        later = np.asarray(times) + SAME_TIME_SECONDS
        shown = later[(later >= 0) & (later < stop_seconds + SAME_TIME_SECONDS)]
        return [int(index) for index in np.unique(np.searchsorted(self._starts, shown, side="right") - 1)]


def _open(source: Source, name: str) -> Any:
    """Return an open PyAV container.

    Some files have metadata that is not UTF-8; it is not worth losing them for.
    """
    if isinstance(source, str) and "://" not in source:
        source = os.path.abspath(source)  # FFmpeg would take `a:b.mp4` for a protocol
    try:
        return av.open(source, metadata_errors="ignore")
    except (av.InvalidDataError, av.DemuxerNotFoundError, av.EOFError) as error:
        raise MediaError(f"{name}: not a media file, or its header is damaged or cut off; {_reason(error)}") from error
    except (OSError, av.HTTPClientError, av.HTTPServerError) as error:
        raise SourceError(f"{name}: cannot be read; {error.strerror or type(error).__name__}") from error
    except av.FFmpegError as error:
        raise MediaError(f"{name}: cannot be opened; {_reason(error)}") from error


def _reason(error: av.FFmpegError) -> str:
    """Return FFmpeg's own words: the error and the last line it logged."""
    log = getattr(error, "log", None)
    return f"FFmpeg says {error.strerror!r}" + (f", {log[2].strip()!r}" if log else "")


def _summary(container: Any) -> str:
    """Return the streams in words: ``h264 1280x720, aac``."""
    return ", ".join(_stream_words(stream) for stream in container.streams) or "no streams"


def _stream_words(stream: Any) -> str:
    context = stream.codec_context
    codec = f"{stream.type} without decoder" if context is None else context.name
    return f"{codec} {stream.width}x{stream.height}" if stream.type == "video" and context is not None else codec


def _video_stream(container: Any) -> Any | None:
    """Return the video stream with the most pixels; cover art is not video."""
    streams = [
        stream
        for stream in container.streams.video
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic
    ]
    return max(streams, key=lambda stream: stream.width * stream.height, default=None)


def _audio_stream(container: Any) -> Any | None:
    """Return the first audio stream that has a decoder."""
    return next((stream for stream in container.streams.audio if stream.codec_context is not None), None)


def _suits_decord(container: Any, stream: Any, size: tuple[int, int]) -> bool:
    """Return whether decord reads the same stream as we would, reads it right, and does not eat the memory."""
    num_frames = (_declared_duration(container) or math.inf) * (_fps(stream) or math.inf)
    return (
        stream.codec_context.name in DECORD_CODECS
        and container.format.name in DECORD_FORMATS
        and len(container.streams.video) == 1
        and num_frames * size[0] * size[1] * 3 <= DECORD_MAX_BYTES
        and not any(key.lower() == "rotate" for key in stream.metadata)  # which only decord would obey
    )


def _declared_duration(container: Any) -> float | None:
    seconds = (container.duration or 0) / 1e6
    return seconds if 0 < seconds <= MAX_DECLARED_SECONDS else None


def _start_seconds(container: Any) -> float:
    return float((container.start_time or 0) / 1e6)


def _stream_start(stream: Any) -> float:
    return float((stream.start_time or 0) * stream.time_base)


def _declared_stop(stream: Any) -> float:
    return _stream_start(stream) + float((stream.duration or 0) * stream.time_base)


def _fps(stream: Any) -> float | None:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def _stream_turns(container: Any, stream: Any) -> int:
    """Return the quarter turns of a stream, which only a decoded frame tells."""
    with contextlib.suppress(av.FFmpegError):
        frame = next(container.decode(stream), None)
        return _quarter_turns(frame) if frame is not None else 0
    return 0


def _shown_size(stream: Any, turns: int) -> tuple[int, int]:
    """Return (width, height) after rotation."""
    return (stream.height, stream.width) if turns % 2 else (stream.width, stream.height)


def _fit(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """Return a size scaled down so that its longer side is at most ``max_side``."""
    shrink = min(1.0, max_side / max(*size, 1))
    return max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink))


def _quarter_turns(frame: Any) -> int:
    """Return by how many quarter turns, counterclockwise, a frame is shown. Odd angles are damage, not a wish."""
    return int(frame.rotation) // 90 if frame.rotation in (-270, -180, -90, 90, 180, 270) else 0


def _picture(frame: Any, width: int, height: int) -> Picture:
    """Return a frame as shown: (height, width, 3), RGB."""
    turns = _quarter_turns(frame)
    if turns % 2:
        width, height = height, width
    scaled = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA")
    return np.ascontiguousarray(np.rot90(scaled.to_ndarray(), turns))


def _seek(container: Any, stream: Any, seconds: float) -> bool:
    """Go to a keyframe at or before a time; return False where a file cannot be sought in.

    Formats without an index (MPEG-TS) land after the time that was asked for, so it is asked for again, earlier.
    """
    try:
        for back_seconds in SEEK_BACK_SECONDS:
            offset = round((seconds - back_seconds) / stream.time_base)
            container.seek(offset, stream=stream, backward=True)
            if _next_keyframe_seconds(container, stream) <= seconds:
                container.seek(offset, stream=stream, backward=True)
                return True
        container.seek(0)
    except av.FFmpegError:
        return False
    return True


def _next_keyframe_seconds(container: Any, stream: Any) -> float:
    for packet in container.demux(stream):
        timestamp = packet.pts if packet.pts is not None else packet.dts
        if packet.is_keyframe and timestamp is not None:
            return float(timestamp * packet.time_base)
    return math.inf


def _resampler() -> Any:
    return av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE_HZ)
