"""FLMR and PreFLMR: a query's text and its picture as one bag of token embeddings, the picture by a small mapping network.

A query's tokens are those of its text, then 32 of the whole picture, then 32 of each region of interest. PreFLMR puts an
instruction before the text, whose own tokens do not count, and adds one token a patch that has attended to the text.

The papers' documents are passages. Frames are ours: each becomes the 32 tokens that the mapping network gives it, which is
what the released ``doc()`` does with a picture, or words ("text-based vision").

References
----------
FLMR, arXiv:2309.17133, sec. 3; PreFLMR, arXiv:2402.08327, sec. 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from operators import weights
from operators.checkpoints import read_config
from operators.encoder_towers import (
    TowerEncoder,
    frame_tags,
    in_batches,
    kept_of,
    normalised,
    require_fit,
    require_head,
)
from operators.encoders import Floats, Query, check_query, open_picture
from operators.errors import ConfigError
from operators.fingerprint import fingerprint
from operators.flmr_checkpoint import read_flmr
from operators.frame_tags import FrameTags
from operators.heads import build_head, check_towers, open_head
from operators.text_based_vision import (
    PASSAGE,
    QUESTION,
    crop,
    grid_regions,
    render_query,
    without_markers,
)
from operators.text_tower import TextStates, TextTower, TokenRow
from operators.towers import load_module, pad_rows
from operators.vision_tower import VisionTower

MARKER_TOKENS = 2
"""``[CLS]`` and ``[Q]`` of a ColBERT query, which count although an instruction's tokens do not."""


@dataclass(frozen=True)
class Parts:
    """What an encoder of this family is made of; ``separator`` ends an instruction."""

    query: TextTower
    document: TextTower
    vision: VisionTower
    head: Any
    separator: str | None


class FlmrEncoder(TowerEncoder):
    """FLMR, of a released checkpoint or of a text tower, a vision tower and a trained head.

    Parameters
    ----------
    model
        Checkpoint in the layout of ``FLMRModelForRetrieval``; None to give the parts.
    text_model, vision_model, head
        Parts: see `TextTower`, `VisionTower` and `heads`.
    frames
        ``mapped``, ``tags`` or ``none``: see `TowerEncoder`.
    tags_model, top_k, min_probability
        Of the classifier, where frames are tags.
    num_crops
        Most regions of a query's picture.
    crops
        ``given``: those that the query names; ``grid``: where it names none, the cells of a grid, which is ours.
    query_length, document_length
        Tokens of a query's text and of a piece of a document; the text tower's own unless given.
    precision, attention
        Of the towers.
    batch_tokens
        Padded tokens or patches in one forward pass.

    Raises
    ------
    ModelError
        If a checkpoint does not fit, or there is neither a checkpoint nor a head.
    """

    NAME: ClassVar[str] = "flmr"
    VERSION = "1"

    def __init__(
        self,
        model: str | None,
        text_model: str,
        vision_model: str,
        head: str | None,
        frames: str,
        tags_model: str,
        top_k: int,
        min_probability: float,
        num_crops: int,
        crops: str,
        query_length: int | None = None,
        document_length: int | None = None,
        precision: str = "float32",
        attention: str = "sdpa",
        batch_tokens: int = 8192,
        device: str = "cpu",
        num_threads: int = 1,
    ) -> None:
        speed: dict[str, Any] = {
            "precision": precision,
            "device": device,
            "num_threads": num_threads,
            "attention": attention,
        }
        text_options = speed | {
            "query_length": query_length,
            "document_length": document_length,
            "document_markers": PASSAGE,
            "batch_tokens": batch_tokens,
        }
        parts = (
            _open_parts(self.NAME, text_model, vision_model, require_head(self.NAME, head), speed, text_options)
            if model is None
            else _open_checkpoint(self.NAME, model, speed, text_options)
        )
        tags = frame_tags(frames, tags_model, top_k, min_probability, num_threads)
        super().__init__(parts.document, parts.vision, frames, tags, batch_tokens)
        self._queries, self._separator = parts.query, parts.separator
        self._head = parts.head.to(device)
        self._num_crops, self._crops = num_crops, crops
        self._knows_markers = self._queries.knows(QUESTION[0])

    @classmethod
    def fingerprint_of(
        cls,
        model: str | None,
        text_model: str,
        vision_model: str,
        head: str | None,
        frames: str,
        tags_model: str,
        top_k: int,
        min_probability: float,
        batch_tokens: int = 0,
        device: str = "",
        num_threads: int = 0,
        attention: str = "",
        **others: Any,
    ) -> str:
        """Return what the output depends on, without loading the models."""
        models = (
            [weights.fingerprint(each) for each in (text_model, vision_model, require_head(cls.NAME, head))]
            if model is None
            else [weights.fingerprint(model)]
        )
        tags = [FrameTags.VERSION, weights.fingerprint(tags_model), top_k, min_probability] if frames == "tags" else []
        return fingerprint(cls.NAME, cls.VERSION, models, frames, tags, others)

    @classmethod
    def dim_of(cls, model: str | None, head: str | None, **_: Any) -> int:
        """Return the width of a token embedding, without loading the models."""
        if model is not None:
            return int(read_config(Path(weights.resolve(model))).get("dim", 128))
        return int(read_config(Path(weights.resolve(require_head(cls.NAME, head))))["dim"])

    def encode_queries(self, queries: Sequence[Query]) -> list[Floats]:
        """Return (Tq, dim) L2-normalised token embeddings for each query: of its text, then of its picture.

        Raises
        ------
        ConfigError
            If a query is empty, or its image or a box is none.
        """
        for query in queries:
            check_query(query, self.NAME, image=True, both=True)
        places = [i for i, query in enumerate(queries) if self._has_text(query)]
        encoded = self._queries.encode_queries([self._words(queries[i]) for i in places])
        states = {i: self._asked(of_query) for i, of_query in zip(places, encoded, strict=True)}
        tokens: list[list[Floats]] = [[kept_of(states[i])] if i in states else [] for i in range(len(queries))]
        regions = [(i, box) for i, query in enumerate(queries) for box in self._regions(query)]
        pictures = {i: open_picture(query.image) for i, query in enumerate(queries) if query.image}

        def encode(batch: Sequence[Any]) -> list[Floats]:
            cut = [pictures[i] if box is None else crop(pictures[i], box) for i, box in batch]
            return list(normalised(self._query_tokens(cut, [states.get(i) for i, _ in batch])))

        for (i, _), of_region in zip(regions, in_batches(regions, self._batch_pictures, encode), strict=True):
            tokens[i].append(of_region)
        return [np.concatenate(of_query) for of_query in tokens]

    def query_tokens(self, query: Query) -> list[str]:
        """Return what each of a query's token embeddings stands for."""
        check_query(query, self.NAME, image=True, both=True)
        names: list[str] = []
        if self._has_text(query):
            [row] = self._queries.query_rows([self._words(query)])
            kept = row.kept & self._counts(row)
            names += [name for name, is_kept in zip(self._queries.names_of(row), kept, strict=True) if is_kept]
        for number, _ in enumerate(self._regions(query)):
            region = f"crop {number}" if number else "picture"
            names += [f"[{region}: {what}]" for what in self._visual_names()]
        return names

    def _has_text(self, query: Query) -> bool:
        return bool((query.text or "").strip() or query.vision_text)

    def _words(self, query: Query) -> str:
        text = (query.text or "").strip()
        if self._knows_markers:
            return render_query(text, query.vision_text)
        return without_markers(f"{text} {query.vision_text}")

    def _counts(self, row: TokenRow) -> Any:
        """Return (T,) which tokens count as the query's, where an instruction comes before it."""
        return np.ones(len(row.ids), dtype=bool)

    def _asked(self, states: TextStates) -> TextStates:
        """Return a query's states of which only the tokens that count are kept."""
        return replace(states, row=replace(states.row, kept=states.row.kept & self._counts(states.row)))

    def _regions(self, query: Query) -> list[tuple[float, float, float, float] | None]:
        """Return the whole picture, as None, and the boxes that are cut out of it."""
        if not query.image:
            return []
        boxes = query.boxes or (grid_regions(self._num_crops) if self._crops == "grid" else ())
        return [None, *boxes[: self._num_crops]]

    def _visual_names(self) -> list[str]:
        return [str(i) for i in range(self._head.num_tokens)]

    def _query_tokens(self, pictures: Sequence[Any], states: Sequence[TextStates | None]) -> Any:
        """Return (B, n, dim) token embeddings of pictures, each with the states of its query's text."""
        return self._frame_tokens(pictures)

    def _frame_tokens(self, pictures: Sequence[Any]) -> Any:
        import torch

        with torch.inference_mode():
            return self._head(self._vision.features(pictures)[0])


class PreflmrEncoder(FlmrEncoder):
    """PreFLMR: FLMR with an instruction before the text, and patches that attend to both.

    A query without a text is its instruction alone, whose marker and ``[MASK]`` tokens count, as in the paper's tasks of
    pictures alone. A query without a picture has its text's tokens alone, where the released evaluation shows the model
    a black picture. Frames are the mapping network's tokens, without the transformer's, as in the released ``doc()``.

    Parameters
    ----------
    instruction
        What is to be done, put before the text and a colon.
    parameters
        Of `FlmrEncoder`.

    Raises
    ------
    ConfigError
        If the instruction holds the colon that is to end it, or leaves no room for a text.
    """

    NAME = "preflmr"

    def __init__(self, instruction: str, **parameters: Any) -> None:
        super().__init__(**parameters)
        self._instruction = instruction.strip().removesuffix(":").rstrip()
        if self._separator is not None and self._separator in self._instruction:
            raise ConfigError(f"the instruction {instruction!r} holds {self._separator!r}, which ends it; leave it out")
        [alone], [asked] = (self._queries.query_rows([self._words(Query(text))], False) for text in ("", "a"))
        if len(asked.ids) == len(alone.ids):
            raise ConfigError(
                f"the instruction {instruction!r} fills all of {self._queries.query_length} tokens of a query; shorten it "
                "or raise query_length"
            )

    def _has_text(self, query: Query) -> bool:
        return True

    def _words(self, query: Query) -> str:
        return f"{self._instruction}{self._separator or ':'} {super()._words(query)}"

    def _counts(self, row: TokenRow) -> Any:
        if self._separator is None:
            return super()._counts(row)
        places = np.arange(len(row.ids))
        end = np.argmax(row.ids == self._queries.ids_of([self._separator])[0])
        return (places > end) | (places < (MARKER_TOKENS if self._queries.is_colbert else 1))

    def _visual_names(self) -> list[str]:
        mapped = [str(i) for i in range(self._head.mapping.num_tokens)]
        return mapped + [f"patch {i}" for i in range(self._vision.num_patches)]

    def _query_tokens(self, pictures: Sequence[Any], states: Sequence[TextStates | None]) -> Any:
        import torch

        text, mask = pad_rows([of_query.hidden for of_query in states if of_query is not None])
        with torch.inference_mode():
            return self._head(*self._vision.features(pictures), text, mask)

    def _frame_tokens(self, pictures: Sequence[Any]) -> Any:
        import torch

        with torch.inference_mode():
            return self._head.mapping(self._vision.features(pictures)[0])


def _open_parts(
    system: str, text_model: str, vision_model: str, head: str, speed: dict[str, Any], text_options: dict[str, Any]
) -> Parts:
    config, module = open_head(head, system)
    check_towers(config, head, text_model, vision_model)
    text, vision = TextTower(text_model, **text_options), VisionTower(vision_model, **speed)
    require_fit(system, config, text, vision)
    return Parts(text, text, vision, module, ":" if system == "preflmr" else None)


def _open_checkpoint(system: str, model: str, speed: dict[str, Any], text_options: dict[str, Any]) -> Parts:
    checkpoint = read_flmr(model, system)
    head = load_module(build_head(checkpoint.head), checkpoint.head_tensors, model)
    query = TextTower(checkpoint.query, **text_options)
    apart = checkpoint.document is not checkpoint.query
    document = TextTower(checkpoint.document, **text_options) if apart else query
    vision = VisionTower(checkpoint.vision, **speed)
    require_fit(system, checkpoint.head, query, vision)
    return Parts(query, document, vision, head, checkpoint.separator)
