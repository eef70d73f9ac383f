"""The decoder process: ``python -m operators.decode_child FD`` answers requests on a pipe until it closes.

Native decoders crash, hang and print. Here that costs one video and not its worker: the parent (``decode.Child``) gives
each reply a time limit and starts a new process when one dies. One request has one reply, so that a long film is read
clip by clip at the speed of whoever consumes it.

A request is ``(verb, arguments)``. A reply is ``("ok", value, cpu_seconds)`` or ``("error", class name, message,
cpu_seconds)``; while a remote file is copied, ``("alive",)`` says that time is not being wasted.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import heapq
import io
import os
import shutil
import signal
import stat
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from http.client import HTTPException
from multiprocessing.connection import Connection
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import av
import decord
import numpy as np
import numpy.typing as npt
from PIL import Image

from operators import media
from operators.errors import ConfigError, ItemError, MediaError, SourceError, without_credentials
from operators.remote import locate

PR_SET_PDEATHSIG = 1
COPY_BYTES = 16 << 20
HTTP_TIMEOUT_SECONDS = 60.0

MIN_CHANGE = 0.1
"""Part of the pixels whose colour must change for ``shot`` sampling to call it another shot."""


def main() -> None:
    """Answer requests on the connection whose file descriptor is the only argument."""
    _die_with_parent()
    connection = Connection(int(sys.argv[1]))
    decoder = Decoder(alive=lambda: connection.send(("alive",)))
    _silence()
    connection.send(("ready",))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent has gone
        while True:
            verb, arguments = connection.recv()
            connection.send(_reply(getattr(decoder, verb), arguments))


def _reply(handle: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a request gives. Whatever a bad file raises is a reply: the boundary of one item is here."""
    started = time.process_time()
    try:
        value = handle(**arguments)
    except Exception as error:
        return "error", *_described(error, display_name(arguments["uri"])), time.process_time() - started
    return "ok", value, time.process_time() - started


def _described(error: Exception, name: str) -> tuple[str, str]:
    """Return class name and message of an error; one that is not ours means a file that the libraries cannot take."""
    if isinstance(error, ItemError):
        return type(error).__name__, without_credentials(str(error))
    return MediaError.__name__, without_credentials(f"{name}: cannot be decoded; {type(error).__name__}: {error}")


class Decoder:
    """Answers the requests; holds the file that was asked for last.

    Parameters
    ----------
    alive
        Called now and then while a remote file is copied.
    """

    def __init__(self, alive: Callable[[], None]) -> None:
        self._alive = alive
        self._opened: _Opened | None = None

    def probe(self, uri: str) -> dict[str, Any]:
        """Return the fields of ``media.Probe``. A remote file is read in place, not copied."""
        with _readable(uri) as source:
            return dataclasses.asdict(media.probe(source, display_name(uri)))

    def open(self, uri: str, max_side: int) -> dict[str, Any]:
        """Return the fields of ``media.Probe``, with a duration that is measured where none is declared."""
        return dataclasses.asdict(self._open(uri, max_side).probe)

    def clip(
        self,
        uri: str,
        max_side: int,
        start_seconds: float,
        stop_seconds: float,
        frame_times: list[float] | None,
        most_changed: int | None,
        jpeg_quality: int,
        with_audio: bool,
    ) -> dict[str, Any]:
        """Return ``frames``, ``audio`` and ``errors`` of one clip.

        Parameters
        ----------
        frame_times
            When to look at the picture; None to leave the pictures alone.
        most_changed
            Of those frames keep the first and the ones that differ most from the frame before, this many at most.
        """
        opened = self._open(uri, max_side)
        errors: list[tuple[str, str, str]] = []
        frames: list[dict[str, Any]] | None = None
        audio: bytes | None = None
        if frame_times is not None:
            try:
                frames = _jpegs(opened.pictures(frame_times), most_changed, jpeg_quality)
            except Exception as error:
                errors.append(("frame", *_described(error, opened.name)))
        if with_audio:
            try:
                audio = media.read_audio(opened.path, opened.name, start_seconds, stop_seconds)
            except Exception as error:
                errors.append(("speech", *_described(error, opened.name)))
        return {"frames": frames, "audio": audio, "errors": errors}

    def _open(self, uri: str, max_side: int) -> _Opened:
        if self._opened is None or self._opened.key != (uri, max_side):
            self._close()
            self._opened = _Opened(uri, max_side, self._alive)
        return self._opened

    def _close(self) -> None:
        if self._opened is not None:
            self._opened.close()
        self._opened = None


class _Opened:
    """A local file, or a local copy of a remote one, and what is known of it."""

    def __init__(self, uri: str, max_side: int, alive: Callable[[], None]) -> None:
        self.key = uri, max_side
        self.name = display_name(uri)
        self._copy = _copy(uri, alive) if _is_remote(uri) else None
        # The copy has no name, so that nothing is left behind by a process that was killed.
        self.path = _local_path(uri) if self._copy is None else f"/dev/fd/{self._copy.fileno()}"
        self.probe = media.probe(self.path, self.name)
        if self.probe.duration_seconds is None:
            measured = media.measure_duration(self.path, self.name)
            self.probe = dataclasses.replace(self.probe, duration_seconds=measured)
        self._reader = media.FrameReader(self.path, self.name, max_side) if self.probe.has_pictures else None

    def pictures(self, times: Sequence[float]) -> Iterator[tuple[float, media.Picture]]:
        return self._reader.read(times) if self._reader is not None else iter(())

    def close(self) -> None:
        if self._copy is not None:
            self._copy.close()


def display_name(uri: str) -> str:
    """Return the last part of a URI, without the query string, which may hold a credential."""
    return os.path.basename(urlsplit(uri).path if "://" in uri else uri) or uri.split("?")[0]


def _is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def _local_path(uri: str) -> str:
    """Return the path of a local file that exists and is not empty."""
    path = unquote(urlsplit(uri).path) if uri.startswith("file://") else uri
    try:
        status = os.stat(path)
    except OSError as error:
        raise SourceError(f"{display_name(uri)}: cannot be read; {error.strerror}") from error
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise MediaError(f"{display_name(uri)}: file is empty (0 bytes)")
    return path


@contextlib.contextmanager
def _readable(uri: str) -> Iterator[media.Source]:
    """Give what PyAV can open without a copy: a path, a URL, or a file on an object store."""
    if not _is_remote(uri):
        yield _local_path(uri)
    elif _is_http(uri):
        yield uri
    else:
        with _remote_file(uri) as file:
            yield file


def _copy(uri: str, alive: Callable[[], None]) -> IO[bytes]:
    """Return a file without a name that holds the bytes of a remote one."""
    with contextlib.ExitStack() as stack:
        copy = stack.enter_context(tempfile.TemporaryFile())
        try:
            with _remote_file(uri) as remote:
                shutil.copyfileobj(remote, _Telling(copy, alive), COPY_BYTES)
                declared = remote.headers.get("Content-Length") if _is_http(uri) else remote.size()
        except (OSError, HTTPException) as error:
            raise SourceError(f"{display_name(uri)}: cannot be read; {error}") from error
        if declared is not None and copy.tell() != int(declared):
            raise SourceError(f"{display_name(uri)}: got {copy.tell()} of {declared} bytes; the connection was cut")
        if copy.tell() == 0:
            raise MediaError(f"{display_name(uri)}: file is empty (0 bytes)")
        copy.flush()
        stack.pop_all()
    return copy


class _Telling:
    """A file to write to that says so after each write."""

    def __init__(self, file: IO[bytes], alive: Callable[[], None]) -> None:
        self._file, self._alive = file, alive

    def write(self, data: bytes) -> int:
        self._alive()
        return self._file.write(data)


def _is_http(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _remote_file(uri: str) -> Any:
    """Return an open file: over HTTP a stream, on an object store with random access."""
    try:
        if _is_http(uri):
            return urllib.request.urlopen(uri, timeout=HTTP_TIMEOUT_SECONDS)
        filesystem, path = locate(uri, os.environ)
        return filesystem.open_input_file(path)
    except OSError as error:
        raise SourceError(f"{display_name(uri)}: cannot be read; {error}") from error
    except ConfigError as error:
        raise SourceError(f"{display_name(uri)}: {error}") from error
    except ValueError as error:  # its message would repeat the URI and what is secret in it
        raise SourceError(
            f"{display_name(uri)}: not a URI that can be read; allowed are paths, file, http, https and what "
            "pyarrow.fs knows (s3, gs, abfs, hdfs)"
        ) from error


def _jpegs(
    pictures: Iterable[tuple[float, media.Picture]], most_changed: int | None, quality: int
) -> list[dict[str, Any]]:
    """Return the frames as JPEG, one in memory unpacked at a time."""
    if most_changed is not None:
        pictures = _most_changed(pictures, most_changed)
    return [{"pts_seconds": pts_seconds, "jpeg": _jpeg(picture, quality)} for pts_seconds, picture in pictures]


def _jpeg(picture: media.Picture, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _most_changed(
    pictures: Iterable[tuple[float, media.Picture]], num_frames: int
) -> list[tuple[float, media.Picture]]:
    """Return the first frame and those whose colours differ most from the frame before, in order of time."""
    heap: list[tuple[float, float, media.Picture]] = []
    previous = None
    for pts_seconds, picture in pictures:
        colours = _histogram(picture)
        change = np.inf if previous is None else float(np.abs(colours - previous).sum() / 2)
        previous = colours
        if change >= MIN_CHANGE:
            heapq.heappush(heap, (change, -pts_seconds, picture))
        if len(heap) > num_frames:
            heapq.heappop(heap)
    return sorted(((-negative, picture) for _, negative, picture in heap), key=lambda frame: frame[0])


def _histogram(picture: media.Picture) -> npt.NDArray[np.float64]:
    """Return the part of the pixels in each of 8 x 8 x 8 colours."""
    red, green, blue = (picture[::4, ::4, channel].astype(np.int64) >> 5 for channel in range(3))
    counts = np.bincount((red * 64 + green * 8 + blue).ravel(), minlength=512)
    return np.asarray(counts / counts.sum())


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, even while native code hangs."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _silence() -> None:
    """Send what native code prints nowhere. Until here errors of starting up are seen on stderr."""
    av.logging.set_level(av.logging.PANIC)
    decord.logging.set_level(decord.logging.QUIET)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


if __name__ == "__main__":
    main()
