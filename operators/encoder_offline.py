"""The default encoder: needs no hub and no GPU, and is honest about what it is.

Text (speech, screen text, metadata, queries) is the token states of all-MiniLM-L6-v2, special tokens dropped. Frames go
through "text-based vision" (FLMR, arXiv:2309.17133, sec. 3.2): an ImageNet classifier names what it sees, and those names
are encoded as text. ImageNet has 1,000 names and knows no actions, so frames are the weak modality of this profile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from operators import weights
from operators.checkpoints import load_whole
from operators.encoders import (
    Content,
    Floats,
    Query,
    TokenEmbeddings,
    check_query,
    join_spans,
    span_of,
    token_batches,
)
from operators.fingerprint import fingerprint
from operators.frame_tags import FrameTags
from operators.text_based_vision import without_markers


class OfflineEncoder:
    """MiniLM token states for text, ImageNet tags as text for frames. Separate: one modality at a time.

    Parameters
    ----------
    text_model
        A BERT-like model whose last hidden states are used.
    tags_model
        Weights of the EfficientNet-Lite0 classifier.
    top_k, min_probability
        Which tags of a frame count.
    max_tokens
        Longer texts are encoded in pieces of this many tokens.
    batch_tokens
        Padded tokens in one forward pass.
    """

    VERSION = "1"

    def __init__(
        self,
        text_model: str,
        tags_model: str,
        top_k: int,
        min_probability: float,
        max_tokens: int = 256,
        batch_tokens: int = 8192,
        device: str = "cpu",
        num_threads: int = 1,
    ) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        torch.set_num_threads(num_threads)
        self._tokenizer = AutoTokenizer.from_pretrained(weights.resolve(text_model))
        self._model = load_whole(AutoModel, text_model, unexpected=[r"pooler\..*"], add_pooling_layer=False).to(device)
        self._tags = FrameTags(tags_model, top_k=top_k, min_probability=min_probability, num_threads=num_threads)
        self._max_tokens, self._batch_tokens = max_tokens, batch_tokens
        self.dim = int(self._model.config.hidden_size)

    @classmethod
    def fingerprint_of(
        cls, text_model: str, tags_model: str, top_k: int, min_probability: float, max_tokens: int = 256, **_: Any
    ) -> str:
        """Return what the output depends on, without loading the models."""
        models = weights.fingerprint(text_model), weights.fingerprint(tags_model)
        return fingerprint("offline", cls.VERSION, FrameTags.VERSION, models, top_k, min_probability, max_tokens)

    @classmethod
    def joint_of(cls, **_: Any) -> bool:
        """Return False: one modality at a time."""
        return False

    @classmethod
    def dim_of(cls, text_model: str, **_: Any) -> int:
        """Return the width of a token embedding, without loading the model."""
        return int(json.loads((Path(weights.resolve(text_model)) / "config.json").read_text())["hidden_size"])

    def encode_documents(self, clips: Sequence[Mapping[str, Content]]) -> list[dict[str, TokenEmbeddings]]:
        """Return token embeddings for each modality of each clip."""
        contents = [content for clip in clips for content in clip.values()]
        spans = [content.spans or self._tag_spans(content.frames) for content in contents]
        joined = [join_spans(of_one) for of_one in spans]
        encoded = self._encode([text for text, _ in joined])
        results = iter(
            TokenEmbeddings(embeddings, span_of(offsets, starts))
            for (embeddings, offsets), (_, starts) in zip(encoded, joined, strict=True)
        )
        return [{modality: next(results) for modality in clip} for clip in clips]

    def encode_queries(self, queries: Sequence[Query]) -> list[Floats]:
        """Return (Tq, dim) token embeddings for each query; of an image, those of its tags, one at least.

        Raises
        ------
        ConfigError
            If a query is empty, or its image cannot be read.
        """
        return [embeddings for embeddings, _ in self._encode([self._words(query) for query in queries])]

    def query_tokens(self, query: Query) -> list[str]:
        """Return what each of a query's token embeddings stands for."""
        ids = self._tokenizer(self._words(query), add_special_tokens=False)["input_ids"]
        tokens: list[str] = self._tokenizer.convert_ids_to_tokens(ids)
        return tokens

    def _words(self, query: Query) -> str:
        check_query(query, "offline", image=True, both=True)
        seen = self._tags.tag([query.image], at_least=1)[0] if query.image else []
        return " ".join(
            filter(None, [query.text, without_markers(query.vision_text), ", ".join(name for name, _ in seen)])
        )

    def _tag_spans(self, frames: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        """Return one span of tag names a frame, so that a span index is a frame index."""
        tags = self._tags.tag([frame["jpeg"] for frame in frames]) if frames else []
        return [{"text": ", ".join(name for name, _ in of_frame)} for of_frame in tags]

    def _encode(self, texts: Sequence[str]) -> list[tuple[Floats, Any]]:
        """Return token states and their character offsets, for each text."""
        import torch

        pieces = self._tokenizer(
            list(texts) or [""],
            truncation=True,
            max_length=self._max_tokens,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        states: dict[int, Floats] = {}
        for batch in token_batches([len(ids) for ids in pieces["input_ids"]], self._batch_tokens):
            inputs = self._tokenizer.pad(
                {name: [pieces[name][i] for i in batch] for name in ("input_ids", "attention_mask")},
                return_tensors="pt",
            ).to(self._model.device)
            with torch.inference_mode():
                hidden = torch.nn.functional.normalize(self._model(**inputs).last_hidden_state.float(), dim=-1)
            for row, piece in enumerate(batch):
                is_text = ~np.array(pieces["special_tokens_mask"][piece], dtype=bool)
                states[piece] = hidden[row, : len(is_text)].cpu().numpy()[is_text]
        return [self._gather(pieces, states, text) for text in range(len(texts))]

    def _gather(self, pieces: Mapping[str, Any], states: Mapping[int, Floats], text: int) -> tuple[Floats, Any]:
        own = [piece for piece, of in enumerate(pieces["overflow_to_sample_mapping"]) if of == text]
        offsets = [
            start
            for piece in own
            for (start, _), special in zip(
                pieces["offset_mapping"][piece], pieces["special_tokens_mask"][piece], strict=True
            )
            if not special
        ]
        return np.concatenate([states[piece] for piece in own]), np.array(offsets, dtype=np.int64)
