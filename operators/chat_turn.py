"""Puts one chat turn together from token ids, so that every token knows its modality and its span.

CLaMR's released code renders a turn to text, tokenises that text again and then guesses by counting where each modality
starts. Here each piece is tokenised once and never again, and what the pieces are is written down as they are joined. For
Qwen's tokenizer the ids are those of the whole text: its splitting rule starts a word at the space that each piece begins
with. They differ where a text is cut in the middle of a character, which the released code writes as a replacement
character, and where a text spells a special token, which here stays text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from operators.encoders import Ints, join_spans, span_of
from operators.errors import ModelError
from operators.schema import FRAME, METADATA, MODALITIES, SCREEN_TEXT, SPEECH

NONE = -1
"""Modality of a token that belongs to none: the template's, and an empty modality's label."""

LABELS = {SCREEN_TEXT: " OCR: ", SPEECH: " ASR: ", METADATA: " Description: "}
"""What each text begins with, in the order of the turn (arXiv:2506.06144, released code)."""

AUDIO_TOKEN_SECONDS = 0.04
"""Whisper's frames of 10 ms, halved by a convolution and again by pooling (Qwen2.5-Omni, arXiv:2503.20215, sec. 2.2)."""


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens that belong to one modality, or to none.

    Attributes
    ----------
    ids : (T,)
        Of the tokens.
    modality
        None for the template.
    span_index : (T,) or int
        The span or frame that each came from.
    """

    ids: Sequence[int]
    modality: str | None = None
    span_index: Ints | int = 0


@dataclass(frozen=True)
class Turn:
    """What a model reads in one sequence.

    Attributes
    ----------
    ids : (L,), int64
        Token ids, with as many placeholders of pictures and sound as they have tokens.
    modality : (L,), int8
        Index into ``schema.MODALITIES``, or `NONE`. Of a query: `NONE` where a token is not scored.
    span_index : (L,), int32
        The span or frame that each came from.
    grid
        Patches (frames, rows, columns) of the video, after merging; None where there is none.
    media
        Inputs of the model besides the ids: pictures and sound, by name.
    """

    ids: npt.NDArray[np.int64]
    modality: npt.NDArray[np.int8]
    span_index: Ints
    grid: tuple[int, int, int] | None = None
    media: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def rows_of(self, modality: str) -> npt.NDArray[np.int64]:
        """Return where the tokens of a modality are."""
        return np.flatnonzero(self.modality == MODALITIES.index(modality))


def join_pieces(
    pieces: Sequence[Piece],
    keep_template: bool = False,
    grid: tuple[int, int, int] | None = None,
    media: Mapping[str, Any] | None = None,
) -> Turn:
    """Return the turn that the pieces make in this order.

    With ``keep_template``, tokens that belong to none go to the modality before them, and those at the start to the first.
    """
    lengths = [len(piece.ids) for piece in pieces]
    codes = [NONE if piece.modality is None else MODALITIES.index(piece.modality) for piece in pieces]
    modality = np.repeat(np.array(codes, np.int8), lengths)
    span_index = np.concatenate(
        [np.broadcast_to(piece.span_index, length) for piece, length in zip(pieces, lengths, strict=True)]
    ).astype(np.int32)
    if keep_template and (modality != NONE).any():
        neighbour = _neighbours(modality != NONE)
        modality, span_index = modality[neighbour], span_index[neighbour]
    ids = np.array([token for piece in pieces for token in piece.ids], np.int64)
    return Turn(ids, modality, span_index, grid, media or {})


def _neighbours(known: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return for each place the nearest known one at or before it; before the first, the first."""
    places = np.where(known, np.arange(len(known)), -1)
    before = np.maximum.accumulate(places)
    return np.where(before < 0, np.argmax(known), before)


def split_at(rendered: str, slots: Sequence[str]) -> list[str]:
    """Return what stands before, between and after the slots of a rendered template.

    Raises
    ------
    ModelError
        If the template leaves a slot out or moves it.
    """
    parts, rest = [], rendered
    for slot in slots:
        before, found, rest = rest.partition(slot)
        if not found:
            raise ModelError(
                f"the model's chat template shows no {slot!r} where the turn has one; give a processor of Qwen2.5-VL or "
                "Qwen2.5-Omni"
            )
        parts.append(before)
    return [*parts, rest]


def template_piece(tokenizer: Any, text: str) -> Piece:
    """Return tokens of the template, special ones read as such."""
    return Piece(tokenizer(text, add_special_tokens=False)["input_ids"])


def text_piece(tokenizer: Any, modality: str, spans: Sequence[Mapping[str, Any]], max_tokens: int) -> Piece:
    """Return the tokens of a modality's label and text, at most ``max_tokens`` with the label.

    A token belongs to the span of its last character: a word's token begins with the space before it. The label goes with
    the first span; without text it belongs to none.
    """
    text, starts = join_spans(spans)
    label = LABELS[modality]
    encoded = _plain(tokenizer, label + text)
    ids, offsets = encoded["input_ids"][:max_tokens], encoded["offset_mapping"][:max_tokens]
    if not text.strip():
        return Piece(ids)
    last = np.array([stop - 1 for _, stop in offsets], np.int64) - len(label)
    return Piece(ids, modality, np.maximum(span_of(last, starts), 0))


def query_pieces(tokenizer: Any, text: str, max_tokens: int, augmentation_tokens: int) -> list[Piece]:
    """Return a query's text, cut to ``max_tokens`` less what is appended, and its augmentation tokens.

    The released code cuts the whole from the right, so that a long query loses the tokens that were to augment it.
    """
    ids = _plain(tokenizer, f"Query: {text}")["input_ids"][: max_tokens - augmentation_tokens]
    augmentation = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return [Piece(ids, METADATA), Piece([augmentation] * augmentation_tokens, METADATA)]


def _plain(tokenizer: Any, text: str) -> Any:
    """Return ids and offsets of a text from outside, in which no special token is read."""
    return tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )


def patch_piece(token: int, grid: tuple[int, int, int], frame_of: Sequence[int]) -> Piece:
    """Return the placeholders of a video whose patches (frames, rows, columns) cover pairs of frames.

    Parameters
    ----------
    token
        The placeholder's id.
    grid
        Patches of the video.
    frame_of
        Index of each frame that the video shows; a patch is of the first of its pair.
    """
    pairs, rows, columns = grid
    spans = np.repeat(np.array(frame_of, np.int32)[::2], rows * columns)
    return Piece([token] * (pairs * rows * columns), FRAME, spans)


def audio_piece(token: int, num_tokens: int, spans: Sequence[Mapping[str, Any]], start_seconds: float = 0.0) -> Piece:
    """Return the placeholders of sound; each is of the last span of speech that has started by its middle, or of the first.

    The sound begins at ``start_seconds``, on the clock that spans are on.
    """
    middles = start_seconds + (np.arange(num_tokens) + 0.5) * AUDIO_TOKEN_SECONDS
    starts = np.array([span["start_seconds"] for span in spans], np.float64)
    index = np.searchsorted(starts, middles, side="right") - 1
    return Piece([token] * num_tokens, SPEECH, np.maximum(index, 0).astype(np.int32))


def choose_evenly(num_items: int, most: int) -> list[int]:
    """Return indices of at most ``most`` items, first and last among them.

    The released code takes the first ten frames, whatever the rest shows.
    """
    if num_items <= most:
        return list(range(num_items))
    return [int(index) for index in np.linspace(0, num_items - 1, most).round()]
