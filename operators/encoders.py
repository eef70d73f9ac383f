"""The contract of an encoder, and what every encoder shares: joined text, token budgets, token-to-span maps."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from operators.errors import ConfigError, ShapeError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Content:
    """What one modality of one clip holds: spans of text, frames, or sound, as in the ``modalities`` table.

    ``audio`` is an encoded file, beside the spans of speech where the corpus keeps its sound (``extract.keep_audio``);
    `operators.sound.decode_sound` gives its samples. It begins at ``start_seconds``, where the clip does, on the clock of
    spans and frames.
    """

    spans: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    frames: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    audio: bytes | None = None
    start_seconds: float = 0.0


@dataclass(frozen=True)
class Query:
    """A query: text, an encoded image, or both.

    Attributes
    ----------
    text
        What is asked.
    image
        A picture, encoded as JPEG, PNG or the like.
    boxes
        Regions of interest in it, each (left, top, right, bottom) as shares of its width and height.
    vision_text
        What others saw in it, in words: objects, captions, text (FLMR's text-based vision).
    """

    text: str | None = None
    image: bytes | None = None
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    vision_text: str = ""


@dataclass(frozen=True)
class TokenEmbeddings:
    """Token embeddings of one modality of one clip.

    Attributes
    ----------
    embeddings : (T, dim), float32
        L2-normalised. T may be 0.
    span_index : (T,), int32
        Which span (or frame) of the content each token came from.
    grid : tuple of int or None
        Patch grid (frames, rows, columns) where the tokens are patches.
    """

    embeddings: Floats
    span_index: Ints
    grid: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or self.span_index.shape != self.embeddings.shape[:1]:
            raise ShapeError(
                f"embeddings of shape {self.embeddings.shape} with a span index of shape {self.span_index.shape}; "
                "wanted (T, dim) and (T,)"
            )


class Encoder(Protocol):
    """Turns clips and queries into token embeddings of one width. Its constructor loads the model."""

    dim: int

    @classmethod
    def fingerprint_of(cls, **parameters: Any) -> str:
        """Return what the output depends on, without loading the model."""
        ...

    @classmethod
    def joint_of(cls, **parameters: Any) -> bool:
        """Return whether all modalities of a clip are seen in one pass: then a change in one makes all of them stale."""
        ...

    @classmethod
    def dim_of(cls, **parameters: Any) -> int:
        """Return the width of a token embedding."""
        ...

    def encode_documents(self, clips: Sequence[Mapping[str, Content]]) -> list[dict[str, TokenEmbeddings]]:
        """Return token embeddings for each modality of each clip."""
        ...

    def encode_queries(self, queries: Sequence[Query]) -> list[Floats]:
        """Return (Tq, dim) L2-normalised token embeddings for each query."""
        ...

    def query_tokens(self, query: Query) -> list[str]:
        """Return what each of a query's Tq token embeddings stands for, to be shown."""
        ...


def check_query(query: Query, encoder: str, image: bool = False, both: bool = False) -> None:
    """Refuse a query that is empty or that an encoder cannot take.

    Parameters
    ----------
    query
        What is asked.
    encoder
        Its name, for the message.
    image, both
        Whether it takes an image alone, and an image with a text.

    Raises
    ------
    ConfigError
        Naming what the query has and what the encoder takes.
    """
    if not query.image and not (query.text or "").strip():
        raise ConfigError("the query is empty; give it a text, an image, or both")
    if query.image and not (both if query.text else image):
        got = "an image and a text" if query.text else "an image"
        takes = "a text or an image, not both" if image else "text only: it has no image tower"
        raise ConfigError(f"the query has {got}, but the encoder {encoder} takes {takes}")


def open_picture(encoded: bytes) -> Any:
    """Return an encoded image as an RGB picture of PIL, turned as its metadata says.

    Raises
    ------
    ConfigError
        If it is none.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"{len(encoded)} bytes are not an image that can be read; give a JPEG, PNG or WebP"
        ) from error


def join_spans(spans: Sequence[Mapping[str, Any]]) -> tuple[str, npt.NDArray[np.int64]]:
    """Return the spans' text joined by spaces, and where in it each span starts."""
    texts = [span["text"] for span in spans]
    lengths = np.array([len(text) + 1 for text in texts], dtype=np.int64)
    return " ".join(texts), np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64) if texts else lengths


def span_of(offsets: npt.NDArray[np.int64], span_starts: npt.NDArray[np.int64]) -> Ints:
    """Return the span that each character offset falls into."""
    return (np.searchsorted(span_starts, offsets, side="right") - 1).astype(np.int32)


def token_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices whose padded size, longest length times count, stays within a token budget.

    Sorted by length, so that little is padding. A single item longer than the budget is a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        longest = lengths[batch[0]] if batch else lengths[index]
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def to_device(tensor: Any, device: str) -> Any:
    """Return a tensor on a device; to a GPU it goes from pinned memory, and nothing waits for it."""
    pinned = device.startswith("cuda") and not tensor.is_cuda
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=pinned)
