"""The contract of an encoder, and what every encoder shares: joined text, token budgets, token-to-span maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from operators.errors import ShapeError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Content:
    """What one modality of one clip holds: spans of text, or frames, as in the ``modalities`` table."""

    spans: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    frames: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


@dataclass(frozen=True)
class Query:
    """A query: text, an encoded image, or both."""

    text: str | None = None
    image: bytes | None = None


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
    """Turns clips and queries into token embeddings of one width.

    An encoder's constructor loads the model. ``fingerprint_of`` names what its output depends on without loading it, and
    ``joint`` says whether it sees all modalities of a clip in one pass (then a change in one makes all of them stale).
    """

    joint: bool
    dim: int

    @classmethod
    def fingerprint_of(cls, **parameters: Any) -> str:
        """Return what the output depends on, without loading the model."""
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
