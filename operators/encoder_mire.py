"""MIRe: 16 tokens of a picture's own vector and 12 that pool its patches as the text asks, then the text's tokens.

A picture alone, in a query or as a frame, is pooled as a fixed question asks, which is what the released code does with a
document's picture.

References
----------
MIRe, arXiv:2411.08334, sec. 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from operators.fingerprint import fingerprint
from operators.frame_tags import FrameTags
from operators.heads import build_head, check_towers, open_head
from operators.mire_checkpoint import mire_head_config, read_mire
from operators.text_based_vision import without_markers
from operators.text_tower import TextStates, TextTower
from operators.towers import load_module, pad_rows
from operators.vision_tower import VisionTower

GUIDE = "Can you describe the primary elements in this image?"
"""What a picture without a text is asked."""


class MireEncoder(TowerEncoder):
    """MIRe, of a released checkpoint or of a text tower, a vision tower and a trained head.

    Parameters
    ----------
    model
        Folder of a released checkpoint, whose CLIP has the shape of ``vision_model``; None to give the parts.
    text_model, vision_model, head
        Parts: see `TextTower`, `VisionTower` and `heads`.
    frames, tags_model, top_k, min_probability
        See `TowerEncoder`.
    padding
        What becomes of the ``[MASK]`` tokens that a query is filled up with. ``dropped``: the equation of the paper,
        over the text's tokens. ``attended``: they are tokens like others, as in the released training. ``leaked``: as
        in the released evaluation, where they are no tokens but pool all patches alike.
    query_length, document_length
        Tokens of a query's text and of a piece of a document.
    precision, attention
        Of the towers.
    batch_tokens
        Padded tokens or patches in one forward pass.

    Raises
    ------
    ModelError
        If a checkpoint does not fit, or there is neither a checkpoint nor a head.
    """

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
        padding: str,
        query_length: int | None = 64,
        document_length: int | None = 384,
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
            "attends_to_masks": padding == "attended",
            "batch_tokens": batch_tokens,
        }
        text, vision, self._head = (
            _open_parts(text_model, vision_model, require_head("mire", head), speed, text_options)
            if model is None
            else _open_checkpoint(model, vision_model, speed, text_options)
        )
        tags = frame_tags(frames, tags_model, top_k, min_probability, num_threads)
        super().__init__(text, vision, frames, tags, batch_tokens)
        self._head.to(device)
        self._padding = padding
        self._guide = self._spoken(text.encode_queries([GUIDE], filled=False)[0])

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
        sources = [text_model, require_head("mire", head)] if model is None else [model]
        models = [weights.fingerprint(each) for each in (*sources, vision_model)]
        tags = [FrameTags.VERSION, weights.fingerprint(tags_model), top_k, min_probability] if frames == "tags" else []
        return fingerprint("mire", cls.VERSION, models, frames, tags, others)

    @classmethod
    def dim_of(cls, model: str | None, head: str | None, vision_model: str, **_: Any) -> int:
        """Return the width of a token embedding, without loading the models."""
        if model is not None:
            return int(mire_head_config(Path(weights.resolve(model)), vision_model)["dim"])
        return int(read_config(Path(weights.resolve(require_head("mire", head))))["dim"])

    def encode_queries(self, queries: Sequence[Query]) -> list[Floats]:
        """Return (Tq, dim) L2-normalised token embeddings for each query: of its picture, then of its text.

        Raises
        ------
        ConfigError
            If a query is empty, or its image is none.
        """
        for query in queries:
            check_query(query, "mire", image=True, both=True)
        words = [self._words(query) for query in queries]
        places = [i for i, text in enumerate(words) if text]
        encoded = self._documents.encode_queries([words[i] for i in places])
        states = {i: self._spoken(of_query) for i, of_query in zip(places, encoded, strict=True)}
        tokens: list[list[Floats]] = [[] for _ in queries]
        pictures = [(i, query.image) for i, query in enumerate(queries) if query.image]

        def encode(batch: Sequence[Any]) -> list[Floats]:
            opened = [open_picture(image) for _, image in batch]
            return list(normalised(self._visual(opened, [states.get(i, self._guide) for i, _ in batch])))

        for (i, _), of_picture in zip(pictures, in_batches(pictures, self._batch_pictures, encode), strict=True):
            tokens[i].append(of_picture)
        for i, of_text in states.items():
            tokens[i].append(kept_of(of_text))
        return [np.concatenate(of_query) for of_query in tokens]

    def query_tokens(self, query: Query) -> list[str]:
        """Return what each of a query's token embeddings stands for."""
        check_query(query, "mire", image=True, both=True)
        names = []
        if query.image:
            names += [f"[picture: {i}]" for i in range(self._head.split_mlp.num_tokens)]
            names += [f"[patches: head {i}]" for i in range(self._head.pooling.num_heads)]
        if words := self._words(query):
            [row] = self._documents.query_rows([words])
            kept = row.kept & row.attended
            names += [name for name, is_kept in zip(self._documents.names_of(row), kept, strict=True) if is_kept]
        return names

    def _words(self, query: Query) -> str:
        return without_markers(f"{query.text or ''} {query.vision_text}")

    def _spoken(self, states: TextStates) -> TextStates:
        """Return a query's states of which only the tokens that are attended to are kept."""
        return replace(states, row=replace(states.row, kept=states.row.kept & states.row.attended))

    def _frame_tokens(self, pictures: Sequence[Any]) -> Any:
        return self._visual(pictures, [self._guide] * len(pictures))

    def _visual(self, pictures: Sequence[Any], states: Sequence[TextStates]) -> Any:
        """Return (B, 16 + 12, dim) token embeddings of pictures, each as the text beside it asks."""
        import torch

        kept = [torch.from_numpy(of_query.row.kept).to(of_query.embeddings.device) for of_query in states]
        text, mask = pad_rows([of_query.embeddings[own] for of_query, own in zip(states, kept, strict=True)])
        leaked = None
        if self._padding == "leaked":
            leaked = torch.tensor([int((~of_query.row.attended).sum()) for of_query in states], device=text.device)
        with torch.inference_mode():
            return self._head(*self._vision.features(pictures), text, mask, leaked)


def _open_parts(
    text_model: str, vision_model: str, head: str, speed: dict[str, Any], text_options: dict[str, Any]
) -> tuple[TextTower, VisionTower, Any]:
    config, module = open_head(head, "mire")
    check_towers(config, head, text_model, vision_model)
    text, vision = TextTower(text_model, **text_options), VisionTower(vision_model, **speed)
    require_fit("mire", config, text, vision)
    return text, vision, module


def _open_checkpoint(
    model: str, vision_model: str, speed: dict[str, Any], text_options: dict[str, Any]
) -> tuple[TextTower, VisionTower, Any]:
    checkpoint = read_mire(model, vision_model)
    head = load_module(build_head(checkpoint.head), checkpoint.head_tensors, model)
    text, vision = TextTower(checkpoint.text, **text_options), VisionTower(checkpoint.vision, **speed)
    require_fit("mire", checkpoint.head, text, vision)
    return text, vision, head
