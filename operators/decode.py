"""Decodes videos: a row for each clip, with frames as JPEG and sound as 16 kHz PCM.

Decoding runs in a process of its own (``decode_child``), so that a crash or a hang in native code costs one video: its
row says why, and the next video gets a new process. Nothing that is wrong with a video is raised. A clip is decoded when
it is asked for, so that memory holds one clip of a film however long it is. The price of the process is 0.3 s when it
starts and one copy of each clip through a pipe.

Seconds count from the start of the container.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pyarrow as pa

from operators import errors, schema
from operators.errors import ConfigError, ItemError, MediaTimeoutError
from operators.remote import Environment

SAMPLINGS = ("uniform", "fps", "shot")
SHOT_FPS = 2.0
"""How often ``shot`` sampling looks at the picture."""

START_SECONDS = 60.0
"""How long a decoder process may take to import its libraries on a busy machine."""

DOING = {"open": "opening it", "probe": "probing it", "clip": "decoding a clip"}
"""What a request is called in messages."""


class Decode:
    """Decodes videos into clips.

    Input columns: ``video_id``, ``uri`` (null for a video that is only metadata), ``wanted`` (list of modalities).
    Output: the input columns, repeated, and those of ``schema.CLIP``; one table of one row a clip.

    In a row, ``frames`` is null where none were wanted or all failed and empty where there is nothing to see;
    ``audio`` is null where none was wanted, there is none, or it failed. ``failures`` tells the cases apart: stage
    ``decode`` where nothing of the video can be had (then the row is its last), ``frame`` or ``speech`` where one
    modality failed.

    Parameters
    ----------
    clip_seconds
        A video has ``max(1, round(duration / clip_seconds))`` clips of equal length.
    sampling
        ``uniform``: the middles of ``frames_per_clip`` equal parts. ``fps``: ``fps`` frames a second, and
        ``max_frames_per_clip`` evenly spread ones where that is more. ``shot``: the first frame and those after the
        largest changes of the picture, ``frames_per_clip`` at most.
    max_side
        Frames are scaled down so that the longer side has at most this many pixels; never up.
    timeout_seconds
        Limit of opening a video and of each clip. Copying a remote file counts only while nothing arrives.
    environment
        How to reach object stores (``remote.locate``), where the environment of this process does not say it.

    Raises
    ------
    ConfigError
        If ``sampling`` is unknown or a number is not positive.
    """

    VERSION = "1"

    def __init__(
        self,
        clip_seconds: float = 60.0,
        frames_per_clip: int = 10,
        sampling: str = "uniform",
        fps: float = 1.0,
        max_frames_per_clip: int = 60,
        max_side: int = 768,
        jpeg_quality: int = 90,
        timeout_seconds: float = 120.0,
        environment: Environment | None = None,
    ) -> None:
        if sampling not in SAMPLINGS:
            raise ConfigError(f"sampling is {sampling!r}; allowed: {', '.join(SAMPLINGS)}")
        for name, value in [
            ("clip_seconds", clip_seconds),
            ("frames_per_clip", frames_per_clip),
            ("fps", fps),
            ("max_frames_per_clip", max_frames_per_clip),
            ("max_side", max_side),
            ("jpeg_quality", jpeg_quality),
        ]:
            if value <= 0:
                raise ConfigError(f"{name} is {value}; it must be more than 0")
        self._clip_seconds, self._frames_per_clip, self._sampling = clip_seconds, frames_per_clip, sampling
        self._fps, self._max_frames_per_clip = fps, max_frames_per_clip
        self._max_side, self._jpeg_quality = max_side, jpeg_quality
        self._child = Child(timeout_seconds, environment)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Yield a table of one row for each clip of each video of a batch."""
        for index in range(batch.num_rows):
            row = batch.slice(index, 1)
            uri, wanted = row["uri"][0].as_py(), row["wanted"][0].as_py() or []
            for clip in self._clips(uri, wanted):
                yield _extend(row, clip)

    def _clips(self, uri: str | None, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
        if uri is None:
            yield _clip(0, [(0.0, 0.0)], frames=[])
            return
        watch = Stopwatch(self._child)
        try:
            probe = self._child.request("open", uri=uri, max_side=self._max_side)
        except ItemError as error:
            yield _clip(0, [(0.0, 0.0)], failures=[failure("decode", error)], timings=[watch.timing("decode")])
            return
        windows = clip_windows(probe["duration_seconds"], self._clip_seconds)
        for clip, window in enumerate(windows):
            try:
                content = self._child.request("clip", uri=uri, **self._request(*window, wanted))
            except ItemError as error:
                yield _clip(clip, windows, failures=[failure("decode", error)], timings=[watch.timing("decode")])
                return
            yield _clip(
                clip,
                windows,
                frames=content["frames"],
                audio=content["audio"],
                failures=[failure(stage, error_named(name, message)) for stage, name, message in content["errors"]],
                timings=[watch.timing("decode")],
            )
            watch = Stopwatch(self._child)

    def _request(self, start_seconds: float, stop_seconds: float, wanted: Sequence[str]) -> dict[str, Any]:
        with_frames = schema.FRAME in wanted or schema.SCREEN_TEXT in wanted
        return {
            "max_side": self._max_side,
            "start_seconds": start_seconds,
            "stop_seconds": stop_seconds,
            "frame_times": self._frame_times(start_seconds, stop_seconds) if with_frames else None,
            "most_changed": self._frames_per_clip if self._sampling == "shot" else None,
            "jpeg_quality": self._jpeg_quality,
            "with_audio": schema.SPEECH in wanted,
        }

    def _frame_times(self, start_seconds: float, stop_seconds: float) -> list[float]:
        if self._sampling == "uniform":
            return uniform_times(start_seconds, stop_seconds, self._frames_per_clip)
        if self._sampling == "shot":
            return regular_times(start_seconds, stop_seconds, SHOT_FPS)
        times = regular_times(start_seconds, stop_seconds, self._fps)
        if len(times) > self._max_frames_per_clip:
            return uniform_times(start_seconds, stop_seconds, self._max_frames_per_clip)
        return times


class Probe:
    """Reads what videos declare of themselves, without decoding them.

    Input columns: ``video_id``, ``uri`` (null for a video that is only metadata). Output: the input columns and
    ``duration_seconds`` (null where it is not declared), ``width``, ``height`` (after rotation), ``fps``,
    ``has_audio``, ``failures`` and ``timings``, both of stage ``probe``.

    Parameters
    ----------
    timeout_seconds
        Limit for each video.
    environment
        As `Decode` takes it.
    """

    VERSION = "1"

    _FIELDS = tuple(schema.VIDEOS.field(name) for name in ("duration_seconds", "width", "height", "fps", "has_audio"))

    def __init__(self, timeout_seconds: float = 120.0, environment: Environment | None = None) -> None:
        self._child = Child(timeout_seconds, environment)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the batch with the columns added."""
        found = [self._probe(uri) for uri in batch["uri"].to_pylist()]
        for field in (*self._FIELDS, schema.CLIP.field("failures"), schema.CLIP.field("timings")):
            batch = _with_column(batch, field, [row.get(field.name) for row in found])
        return batch

    def _probe(self, uri: str | None) -> dict[str, Any]:
        if uri is None:
            return {"failures": [], "timings": []}
        watch = Stopwatch(self._child)
        try:
            found, failures = self._child.request("probe", uri=uri), []
        except ItemError as error:
            found, failures = {}, [failure("probe", error)]
        return {**found, "failures": failures, "timings": [watch.timing("probe")]}


class Child:
    """A decoder process, started when first needed and again after it died.

    Parameters
    ----------
    timeout_seconds
        How long a request may stay without an answer.
    environment
        Set over the environment of this process.
    """

    def __init__(self, timeout_seconds: float, environment: Environment | None = None) -> None:
        if timeout_seconds <= 0:
            raise ConfigError(f"timeout_seconds is {timeout_seconds}; it must be more than 0")
        self._timeout_seconds = timeout_seconds
        self._environment = environment or Environment()
        self._process: _Process | None = None
        self.cpu_seconds = 0.0

    @property
    def pid(self) -> int | None:
        """The process id, or None where none runs."""
        return self._process.pid if self._process is not None and self._process.is_running() else None

    def request(self, verb: str, uri: str, **arguments: Any) -> Any:
        """Return what the decoder process answers.

        Raises
        ------
        ItemError
            What the decoder process raised: ``MediaError`` or ``SourceError``.
        MediaTimeoutError
            If it did not answer in time, or died. It is gone then, and the next request starts another.
        ConfigError
            If no decoder process can be started.
        """
        if self.pid is None:
            self.close()
            self._process = _Process(self._environment)
        assert self._process is not None
        try:
            reply = self._process.ask((verb, {"uri": uri, **arguments}), self._timeout_seconds)
        except TimeoutError as error:
            self.close()
            raise MediaTimeoutError(
                f"{_name(uri)}: {DOING[verb]} took more than {self._timeout_seconds:g} s and was stopped. It will be tried "
                "again; raise timeout_seconds if the video is merely large."
            ) from error
        except OSError as error:
            ending = self._process.ending()
            self.close()
            raise MediaTimeoutError(f"{_name(uri)}: decoder process died {ending} while {DOING[verb]}") from error
        self.cpu_seconds += reply[-1]
        if reply[0] == "error":
            raise error_named(reply[1], reply[2])
        return reply[1]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()
        self._process = None


class _Process:
    """A running decoder process and the pipe to it."""

    def __init__(self, environment: Environment) -> None:
        self._connection, theirs = Pipe()
        born: SimpleQueue[subprocess.Popen[bytes] | OSError] = SimpleQueue()
        # The kernel ends a decoder process with the *thread* that started it, so that thread waits for its end.
        threading.Thread(target=_live, args=(theirs, environment, born), name="decoder", daemon=True).start()
        popen = born.get()
        if isinstance(popen, OSError):
            raise ConfigError(f"the decoder process does not start: {popen}") from popen
        self._popen = popen
        self._finalizer = weakref.finalize(self, _end, popen, self._connection)
        try:
            self._receive(START_SECONDS)
        except (OSError, TimeoutError) as error:
            self.close()
            raise ConfigError(
                "the decoder process does not start; its error is on stderr above, and "
                f"`{sys.executable} -c 'import operators.decode_child'` repeats it"
            ) from error

    @property
    def pid(self) -> int:
        return self._popen.pid

    def is_running(self) -> bool:
        return self._popen.poll() is None

    def ask(self, request: tuple[str, dict[str, Any]], timeout_seconds: float) -> tuple[Any, ...]:
        """Return the reply; TimeoutError after a silence of ``timeout_seconds``, OSError if the process died."""
        self._connection.send(request)
        reply = self._receive(timeout_seconds)
        while reply[0] == "alive":
            reply = self._receive(timeout_seconds)
        return reply

    def ending(self) -> str:
        """Return how the process ended, in words."""
        code = self._popen.wait(timeout=10)
        if code >= 0:
            return f"with exit code {code}"
        hint = " (killed: perhaps out of memory)" if -code == signal.SIGKILL else ""
        return f"with signal {-code}{hint}"

    def close(self) -> None:
        self._finalizer()

    def _receive(self, timeout_seconds: float) -> tuple[Any, ...]:
        if not self._connection.poll(timeout_seconds):
            raise TimeoutError
        try:
            reply: tuple[Any, ...] = self._connection.recv()
        except EOFError as error:
            raise BrokenPipeError from error
        return reply


def _live(theirs: Connection, environment: Environment, born: SimpleQueue[subprocess.Popen[bytes] | OSError]) -> None:
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [root])
    try:
        popen = subprocess.Popen(
            # -P: a file named av.py in the working directory must not be imported.
            [sys.executable, "-P", "-m", "operators.decode_child", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env={"DECORD_EOF_RETRY_MAX": "1024", **environment.over(os.environ), "PYTHONPATH": path},
        )
    except OSError as error:
        born.put(error)
        return
    finally:
        theirs.close()
    born.put(popen)
    popen.wait()


def _end(popen: subprocess.Popen[bytes], connection: Connection) -> None:
    popen.kill()
    popen.wait()
    connection.close()


class Stopwatch:
    """Measures wall time and the decoder process's CPU time from when it is made."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._started, self._cpu_started = time.perf_counter(), child.cpu_seconds

    def timing(self, stage: str) -> dict[str, Any]:
        """Return a ``schema.TIMING`` of the time since."""
        return {
            "stage": stage,
            "seconds": time.perf_counter() - self._started,
            "cpu_seconds": self._child.cpu_seconds - self._cpu_started,
        }


def clip_windows(duration_seconds: float, clip_seconds: float) -> list[tuple[float, float]]:
    """Return the [start, stop) of the clips of a video, equally long and nearly ``clip_seconds``."""
    num_clips = max(1, round(duration_seconds / clip_seconds))
    edges = [duration_seconds * index / num_clips for index in range(num_clips + 1)]
    return list(zip(edges, edges[1:], strict=False))


def uniform_times(start_seconds: float, stop_seconds: float, num_times: int) -> list[float]:
    """Return the middles of equal parts of [start, stop)."""
    part = (stop_seconds - start_seconds) / num_times
    return [start_seconds + part * (index + 0.5) for index in range(num_times)]


def regular_times(start_seconds: float, stop_seconds: float, fps: float) -> list[float]:
    """Return start, start + 1/fps, ... before stop; at least one."""
    num_times = max(1, math.ceil((stop_seconds - start_seconds) * fps))
    return [start_seconds + index / fps for index in range(num_times)]


def failure(stage: str, error: ItemError) -> dict[str, Any]:
    """Return a ``schema.FAILURE``."""
    return {"stage": stage, "error": type(error).__name__, "message": str(error), "final": error.final}


def error_named(name: str, message: str) -> ItemError:
    """Return the error of our tree that has a class name."""
    kind: type[ItemError] = getattr(errors, name)
    if not issubclass(kind, ItemError):
        raise TypeError(f"{name} is not an ItemError")
    return kind(message)


def _name(uri: str) -> str:
    return os.path.basename(uri.split("?")[0] if "://" in uri else uri)


def _clip(clip: int, windows: Sequence[tuple[float, float]], **content: Any) -> dict[str, Any]:
    """Return the values of the columns of ``schema.CLIP`` that Decode makes."""
    start_seconds, stop_seconds = windows[clip]
    made = {"clip": clip, "num_clips": len(windows), "start_seconds": start_seconds, "stop_seconds": stop_seconds}
    return {"frames": None, "audio": None, "failures": [], "timings": [], **made, **content}


def _extend(row: pa.Table, clip: dict[str, Any]) -> pa.Table:
    """Return a row with the columns of a clip; failures and timings are added to those that it brought."""
    for name in ("failures", "timings"):
        if name in row.column_names:
            clip = {**clip, name: [*(row[name][0].as_py() or []), *clip[name]]}
    for field in schema.CLIP:
        if field.name in clip:
            row = _with_column(row, field, [clip[field.name]])
    return row


def _with_column(table: pa.Table, field: pa.Field, values: list[Any]) -> pa.Table:
    column = pa.array(values, field.type)
    if field.name in table.column_names:
        return table.set_column(table.column_names.index(field.name), field, column)
    return table.append_column(field, column)
