"""The screen text operator: what is written in a clip's frames, as spans of text.

Reading is the dearest step of the whole job on a CPU, so as little as possible is read. EasyOCR as it comes takes 2.4 s of
CPU a frame (one Zen 4 core, mean over 35 real videos, 10 frames each, long side 320 to 768), this operator 1.0 s, or 0.5 s
with ``precision="bfloat16"``:

================================================  ================================================================
a frame that did not change is not read again     0.02 s in place of 1 to 4 s: 6 of 10 frames of a lecture,
                                                  9 of 10 of a still picture
a look at half size first; no text, no reading    0.65 s in place of 3.1 s at 768x432; 25 % more where there is text
detector in ``channels_last``                     -10 %, same text
unsure pieces are not read again with contrast    -18 % of the recogniser (0.07 s a line), same text in 33 frames
``precision="bfloat16"``                          -53 % of the detector with AVX512-BF16, not measured without; 34 of 36
                                                  frames gave the same text: off by default
that and the detector at 512 px                   another -33 %, but 20 of 36 frames the same: text of 12 px breaks up
that and a quantised recogniser                   -12 % of the recogniser, but 29 of 36 frames the same: not done
detector on batches of frames                     15 % slower on a CPU: not done
================================================  ================================================================
"""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from operators import schema, weights
from operators.errors import ConfigError, ModelError

Image = np.ndarray[Any, Any]
"""(height, width, 3), uint8, RGB."""

THUMBNAIL_SIDE = 384
CELL = 8
CHANGED = 7.0
"""A picture has changed if the mean grey difference of any cell of its thumbnail is above this, of 255.

Video noise and key frames of a still slide gave up to 7 (12 once a group of pictures). One white digit of 12 px that changes
gives 7.6 and more, faint text of 10 px that appears 8.3 and more; a faint digit that changes (4) is missed.
"""

SCAN_SIDE = 384
SCAN_ABOVE_SIDE = 512
SCAN_SCORE = 0.3
"""Frames above 512 px are first looked at with 384 px, and read if the detector scores any pixel 0.3.

On real frames all readable text scored 0.65 and more there, and 53 of 56 frames without text less than 0.3. In frames of
768 px, text of 10 px scores 0.4; text of 9 px scores 0.05, and is read wrong at full size too.
"""

SAME_TEXT = 0.85
"""Lines of consecutive frames whose `difflib` ratio reaches this are one line, if their digits agree."""


@dataclass(frozen=True)
class Line:
    """Text in a box of a frame, in pixels."""

    text: str
    confidence: float
    left: float
    top: float
    right: float
    bottom: float


class Engine(Protocol):
    """Reads the text of an image."""

    @property
    def language(self) -> str | None:
        """The language of all it reads, if that is known."""
        ...

    def read(self, image: Image) -> list[Line]:
        """Return the pieces of text found, in any order."""
        ...


class ScreenText:
    """Adds ``screen_text`` to clips.

    Parameters
    ----------
    engine
        ``easyocr`` or ``rapidocr``.
    model
        Folder of EasyOCR's weights: see `weights.resolve`. RapidOCR brings its own.
    languages
        Codes as EasyOCR knows them.
    min_confidence
        Less certain pieces are dropped. On real frames 0.4 kept all that was asked for and dropped noise of 0.1 to 0.35.
    device, num_threads
        Where to compute, and with how many threads of the CPU.
    precision
        Of EasyOCR's detector: ``float32`` or ``bfloat16``.

    Raises
    ------
    ModelError
        If the engine or its weights are missing.
    ConfigError
        If the engine is unknown.
    """

    VERSION = "1"

    def __init__(
        self,
        engine: str = "easyocr",
        model: str = "pkg:easyocr_en_models/models",
        languages: Sequence[str] = ("en",),
        min_confidence: float = 0.4,
        device: str = "cpu",
        num_threads: int = 1,
        precision: str = "float32",
    ) -> None:
        self._engine: Engine
        if engine == "easyocr":
            self._engine = EasyOcr(model, languages, device, num_threads, precision)
        elif engine == "rapidocr":
            self._engine = RapidOcr(num_threads)
        else:
            raise ConfigError(f"screen text engine {engine!r}: expected easyocr or rapidocr")
        self._min_confidence = min_confidence

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return ``batch`` with ``screen_text``, in order of time.

        ``screen_text`` is empty where nothing is written, null where it failed, is not wanted or has no frames to read.
        """
        used = ["stop_seconds", "frames", "wanted", "failures", "timings"]
        clips = [self._with_screen_text(clip) for clip in batch.select(used).to_pylist()]
        batch = batch.drop_columns(["failures", "timings"])
        for name, type_ in (
            ("failures", schema.FAILURE),
            ("timings", schema.TIMING),
            (schema.SCREEN_TEXT, schema.SPAN),
        ):
            batch = batch.append_column(name, pa.array([clip[name] for clip in clips], pa.list_(type_)))
        return batch

    def _with_screen_text(self, clip: Mapping[str, Any]) -> dict[str, Any]:
        failures, timings = list(clip["failures"] or ()), list(clip["timings"] or ())
        done = {"failures": failures, "timings": timings, schema.SCREEN_TEXT: None}
        if schema.SCREEN_TEXT not in clip["wanted"] or clip["frames"] is None:
            return done
        started, cpu_started = time.perf_counter(), time.process_time()
        try:
            done[schema.SCREEN_TEXT] = self._spans(clip["frames"], clip["stop_seconds"])
        except Exception as error:  # the per-item boundary
            name = type(error).__name__
            failures.append({"stage": schema.SCREEN_TEXT, "error": name, "message": str(error), "final": False})
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        timings.append({"stage": schema.SCREEN_TEXT, "seconds": seconds, "cpu_seconds": cpu_seconds})
        return done

    def _spans(self, frames: Sequence[Mapping[str, Any]], stop_seconds: float) -> list[dict[str, Any]]:
        times, lines_of_frames = [], []
        lines: list[Line] = []
        last_read: Image | None = None
        for frame in frames:
            image, thumbnail = _decode(frame["jpeg"])
            if last_read is None or is_changed(last_read, thumbnail):
                pieces = [piece for piece in self._engine.read(image) if piece.confidence >= self._min_confidence]
                lines, last_read = join_lines(pieces), thumbnail
            times.append(frame["pts_seconds"])
            lines_of_frames.append(lines)
        return merge_spans(times, lines_of_frames, stop_seconds, self._engine.language)


class EasyOcr:
    """EasyOCR: the CRAFT detector and a recogniser a box.

    Parameters
    ----------
    model, languages, device, num_threads, precision
        As in `ScreenText`.
    """

    def __init__(self, model: str, languages: Sequence[str], device: str, num_threads: int, precision: str) -> None:
        import easyocr
        import torch

        torch.set_num_threads(num_threads)
        folder = weights.resolve(model)
        try:
            self._reader = easyocr.Reader(
                list(languages),
                gpu=False if device == "cpu" else device,
                model_storage_directory=folder,
                user_network_directory=folder,  # else it makes a folder in the home directory
                download_enabled=False,
                verbose=False,
                quantize=False,
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"EasyOCR cannot read {list(languages)} with the weights in {folder}: {error}") from error
        self._detector = _Detector(self._reader.detector, device, precision)
        self._reader.detector = self._detector
        self.language = languages[0] if len(languages) == 1 else None

    def read(self, image: Image) -> list[Line]:
        """Return the pieces of text in an image."""
        import cv2

        if not self._may_have_text(image):
            return []
        boxes, free_boxes = self._reader.detect(image)
        with warnings.catch_warnings():
            # EasyOCR asks for pinned memory, which torch says it cannot give without an accelerator.
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
            # contrast_ths is the confidence below which EasyOCR reads again; what is that unsure is dropped anyway.
            found = self._reader.recognize(grey, boxes[0], free_boxes[0], reformat=False, contrast_ths=0.0)
        return [_line(corners, text, confidence) for corners, text, confidence in found]

    def _may_have_text(self, image: Image) -> bool:
        import cv2
        import torch
        from easyocr.imgproc import normalizeMeanVariance, resize_aspect_ratio

        if max(image.shape[:2]) <= SCAN_ABOVE_SIDE:
            return True
        small, _, _ = resize_aspect_ratio(image, SCAN_SIDE, interpolation=cv2.INTER_AREA)
        pixels = torch.from_numpy(normalizeMeanVariance(small).transpose(2, 0, 1)[None])
        scores, _ = self._detector(pixels)
        return bool(scores[..., 0].max() >= SCAN_SCORE)


class _Detector:
    """EasyOCR's detector network with another memory layout and precision."""

    def __init__(self, network: Any, device: str, precision: str) -> None:
        import torch

        if precision not in ("float32", "bfloat16"):
            raise ConfigError(f"screen text precision {precision!r}: expected float32 or bfloat16")
        self._network = network.to(memory_format=torch.channels_last)
        self._device, self._is_bfloat16 = device, precision == "bfloat16"

    def __call__(self, pixels: Any) -> tuple[Any, None]:
        """Return (batch, height / 2, width / 2, 2) scores of text and of links, for normalised (batch, 3, h, w)."""
        import torch

        pixels = pixels.to(self._device).contiguous(memory_format=torch.channels_last)
        kind = torch.device(self._device).type
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=self._is_bfloat16):
            return self._network(pixels)[0].float(), None


class RapidOcr:
    """RapidOCR: PP-OCR models in ONNX, on the CPU.

    Parameters
    ----------
    num_threads
        As in `ScreenText`.
    """

    language = None

    def __init__(self, num_threads: int) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ModelError("RapidOCR is not installed; run: pip install 'maxreel[rapidocr]'") from error
        params = {"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": num_threads}
        self._reader = RapidOCR(params=params)

    def read(self, image: Image) -> list[Line]:
        """Return the pieces of text in an image."""
        found = self._reader(np.ascontiguousarray(image[..., ::-1]))  # takes BGR
        if found.boxes is None:
            return []
        return [_line(*piece) for piece in zip(found.boxes, found.txts, found.scores, strict=True)]


def is_changed(before: Image, after: Image) -> bool:
    """Return whether two thumbnails differ anywhere, be it in one cell.

    Parameters
    ----------
    before, after
        (height, width), float32 grey values.
    """
    if before.shape != after.shape:
        return True
    height, width = before.shape
    difference = np.pad(np.abs(before - after), ((0, -height % CELL), (0, -width % CELL)))
    cells = difference.reshape(difference.shape[0] // CELL, CELL, difference.shape[1] // CELL, CELL)
    return bool(cells.mean(axis=(1, 3)).max() > CHANGED)


def join_lines(pieces: Sequence[Line]) -> list[Line]:
    """Return lines in reading order: pieces side by side joined, those without a letter or digit dropped.

    A piece is beside another if its middle is within the other's height and the gap is less than that height. A joined
    line is as certain as its least certain piece.
    """
    rows: list[list[Line]] = []
    for piece in sorted(pieces, key=lambda piece: piece.top):
        middle = (piece.top + piece.bottom) / 2
        row = next((row for row in rows if row[0].top <= middle < row[0].bottom), None)
        if row is None:
            rows.append([piece])
        else:
            row.append(piece)
    lines: list[Line] = []
    for row in rows:
        lines += _join_row(sorted(row, key=lambda piece: piece.left))
    return [line for line in lines if any(character.isalnum() for character in line.text)]


def merge_spans(
    times: Sequence[float], lines_of_frames: Sequence[Sequence[Line]], stop_seconds: float, language: str | None
) -> list[dict[str, Any]]:
    """Return spans in order of time, a text that stays over consecutive frames once.

    A span lasts from its first frame to the frame after its last, or to ``stop_seconds``. Of slightly different readings
    the most certain one is kept.

    Parameters
    ----------
    times
        Seconds of the frames, rising.
    lines_of_frames
        Lines of each frame, in reading order.
    """
    spans: list[dict[str, Any]] = []
    before: list[dict[str, Any]] = []
    stops = [*times, stop_seconds][1:]
    for start, stop, lines in zip(times, stops, lines_of_frames, strict=True):
        now: list[dict[str, Any]] = []
        for line in lines:
            span = _span_of(line.text, now, before)
            if span is None:
                span = {"start_seconds": start, "text": line.text, "confidence": line.confidence, "language": language}
                spans.append(span)
            if line.confidence > span["confidence"]:
                span.update(text=line.text, confidence=line.confidence)
            span["stop_seconds"] = max(start, stop)
            if not any(span is other for other in now):
                now.append(span)
        before = now
    return spans


def _span_of(text: str, now: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the span of this frame with the same text, else the most alike one of the frame before not yet taken."""
    for span in now:
        if span["text"].casefold() == text.casefold():
            return span
    free = [span for span in before if not any(span is other for other in now)]
    best = max(free, key=lambda span: _likeness(span["text"], text), default=None)
    return best if best is not None and _likeness(best["text"], text) >= SAME_TEXT else None


def _likeness(one: str, other: str) -> float:
    """Return how alike two texts are, in [0, 1]; 0 if their digits differ, for a clock or a score has changed then."""
    one, other = one.casefold(), other.casefold()
    if [c for c in one if c.isdigit()] != [c for c in other if c.isdigit()]:
        return 0.0
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


def _join_row(row: Sequence[Line]) -> list[Line]:
    joined = [row[0]]
    for piece in row[1:]:
        last = joined[-1]
        if piece.left - last.right >= last.bottom - last.top:
            joined.append(piece)
        else:
            joined[-1] = replace(
                last,
                text=f"{last.text} {piece.text}",
                confidence=min(last.confidence, piece.confidence),
                right=piece.right,
            )
    return joined


def _line(corners: Any, text: str, confidence: float) -> Line:
    """Return a piece from its (4, 2) corners."""
    left, top = np.min(corners, axis=0)
    right, bottom = np.max(corners, axis=0)
    return Line(text.strip(), float(confidence), float(left), float(top), float(right), float(bottom))


def _decode(jpeg: bytes) -> tuple[Image, Image]:
    """Return an image and its (height, width) float32 grey thumbnail."""
    from PIL import Image as Pillow

    with Pillow.open(io.BytesIO(jpeg)) as file:
        picture = file.convert("RGB")
    grey = picture.convert("L")
    scale = THUMBNAIL_SIDE / max(grey.size)
    if scale < 1:
        size = round(grey.width * scale), round(grey.height * scale)
        grey = grey.resize(size, Pillow.Resampling.BOX)
    return np.asarray(picture), np.asarray(grey, dtype=np.float32)
